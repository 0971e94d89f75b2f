"""The report: one page that opens anywhere, and its figures as files."""

from coembed.report.page import build_report

__all__ = ["build_report"]
