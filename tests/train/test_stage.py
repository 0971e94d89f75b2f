"""The plan as data: clocks, schedules, players, stages; and the guard's rule."""

from __future__ import annotations

import math

import numpy as np
import pytest
from torch import nn
from toys import Line, line_stage

from coembed.train.guard import Guard
from coembed.train.stage import Anneal, Clock, Player, WarmUp


@pytest.mark.parametrize(
    ("step", "weight"),
    [(0, 0.0), (10, 0.2), (25, 0.5), (49, 0.98), (50, 1.0), (99, 1.0), (500, 1.0)],
)
def test_a_warm_up_rises_linearly_over_its_share_of_the_plan(step: int, weight: float) -> None:
    assert WarmUp(0.5)(Clock(step, 100)) == pytest.approx(weight)


def test_no_warm_up_is_full_weight_from_the_start() -> None:
    assert WarmUp(0.0)(Clock(0, 100)) == 1.0


def test_every_schedule_is_final_at_the_end_of_the_clock() -> None:
    assert all(WarmUp(f)(Clock.end()) == 1.0 for f in (0.0, 0.1, 1.0))
    assert Clock.end().fraction == 1.0
    assert Clock(0, 0).fraction == 0.0


def test_a_players_weights_and_parameters() -> None:
    net = nn.Linear(2, 1)
    net.bias.requires_grad_(False)
    player = Player("p", [net], lambda batch, clock: {}, {"a": 3.0, "b": WarmUp(0.5)})
    assert [player.weight(term, Clock(25, 100)) for term in "abc"] == [3.0, 0.5, 1.0]
    assert [p is net.weight for p in player.parameters] == [True]


def test_a_stage_counts_its_steps_rounds_and_warm_up() -> None:
    net = Line()
    stage = line_stage(net, epochs=250, weights={"error": WarmUp(0.2), "size": WarmUp(0.4)})
    assert stage.planned_steps == 250 * 5
    assert stage.epochs_per_round == 2
    assert stage.warm_up == 0.4
    assert line_stage(net, epochs=12).epochs_per_round == 1
    assert line_stage(net, weights={"size": 2.0}).warm_up == 0.0


@pytest.mark.parametrize(
    ("value", "least", "wrong"),
    [
        (math.nan, 5.0, "loss is nan"),
        (math.inf, 5.0, "loss is inf"),
        (-math.inf, 5.0, "loss is -inf"),
        (50.0, 5.0, None),
        (50.1, 5.0, "rose from 5 to 50.1"),
        (1.0, 5.0, None),
        (8.9, 0.01, None),  # the scale of a loss near 0 is 1
        (9.1, 0.01, "rose"),
        (-50.0, -100.0, None),  # a negative loss may rise too
        (850.0, -100.0, "rose"),
    ],
)
def test_the_guard_complains_of_what_is_not_finite_and_of_an_explosion(
    value: float, least: float, wrong: str | None
) -> None:
    complaint = Guard().complaint({"loss": value}, {"loss": least})
    assert (complaint is None) if wrong is None else (complaint is not None and wrong in complaint)


def test_the_guard_looks_at_every_term_in_the_first_round_too() -> None:
    assert Guard().complaint({"loss": 1e9}, {}) is None
    assert Guard().complaint({"loss": 1.0, "kl": np.nan}, {}) == "kl is nan"
    assert Guard(explosion=2.0).complaint({"loss": 11.0}, {"loss": 5.0}) is not None


@pytest.mark.parametrize(
    ("step", "factor"), [(0, 1.0), (75, 1.0), (80, 0.8), (99, 0.04), (100, 0.0)]
)
def test_an_annealed_rate_falls_linearly_over_the_last_share_of_the_plan(
    step: int, factor: float
) -> None:
    clock = Clock(step, 100)
    assert Anneal(0.25)(clock) == pytest.approx(factor)
    player = Player("p", [nn.Linear(2, 1)], lambda batch, clock: {}, lr=0.01, anneal=0.25)
    assert player.rate(clock) == pytest.approx(0.01 * factor)
    assert Player("p", [], lambda batch, clock: {}, lr=0.01).rate(clock) == 0.01
