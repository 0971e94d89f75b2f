"""A study: data x model x size x replicate, run once, kept for good."""

from coembed.study.ledger import Ledger
from coembed.study.plan import Plan, Task
from coembed.study.run import Progress, run

__all__ = ["Ledger", "Plan", "Progress", "Task", "run"]
