from __future__ import annotations

import dataclasses
import json

import fakes
import numpy as np
import pytest

import coembed.study.plan
from coembed.data.cells import Cells
from coembed.errors import ParameterError, StudyError
from coembed.study import Plan, Task
from coembed.study.plan import default_sizes, held_out_rows, training_rows

pytestmark = pytest.mark.usefixtures("fake_models")


def test_same_plan_gives_the_same_tasks(cells: Cells) -> None:
    plan = fakes.study_plan(cells, ("a", "b"))
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict(), allow_nan=False)))
    assert again == plan
    keys = [task.key for task in plan.tasks(cells)]
    assert keys == [task.key for task in again.tasks(cells)]
    assert len(set(keys)) == 2 * 2 * 2


def test_replicates_come_first_so_that_a_short_study_is_whole(cells: Cells) -> None:
    tasks = fakes.study_plan(cells, ("a", "b")).tasks(cells)
    assert [task.replicate for task in tasks] == [0] * 4 + [1] * 4


def test_a_task_survives_json(cells: Cells) -> None:
    task = fakes.study_plan(cells).tasks(cells)[0]
    again = Task.from_dict(json.loads(json.dumps(task.to_dict(), allow_nan=False)))
    assert again == task
    assert again.key == task.key


def test_seeds(cells: Cells) -> None:
    tasks = fakes.study_plan(cells, ("a", "b")).tasks(cells)
    by = {(task.model, task.size, task.replicate): task for task in tasks}
    assert by["a", 20, 0].subsample_seed == by["b", 20, 0].subsample_seed
    assert by["a", 20, 0].subsample_seed != by["a", 20, 1].subsample_seed
    assert by["a", 20, 0].subsample_seed != by["a", 40, 0].subsample_seed
    assert by["a", 20, 0].seed != by["b", 20, 0].seed
    assert len({task.seed for task in tasks}) == len(tasks)
    assert len({task.held_out_seed for task in tasks}) == 1
    other = fakes.study_plan(cells, ("a", "b"), seed=1).tasks(cells)
    assert {task.seed for task in other}.isdisjoint(task.seed for task in tasks)


def test_seeds_do_not_depend_on_what_else_is_planned(cells: Cells) -> None:
    small = {task.key for task in fakes.study_plan(cells, ("a",), sizes=(40,)).tasks(cells)}
    large = {task.key for task in fakes.study_plan(cells, ("b", "a"), replicates=3).tasks(cells)}
    assert small < large


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"preset": "review"},
        {"params": {"rate": 0.2}},
        {"size": 30},
        {"replicate": 7},
        {"seed": 7},
        {"subsample_seed": 7},
        {"held_out": 21},
        {"held_out_seed": 7},
        {"n_permutations": 7},
        {"threads": 7},
        {"device": "cuda"},
        {"fingerprint": "0" * 64},
        {"keys": {"batch": None}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_key_follows_what_determines_the_result(cells: Cells, change: dict) -> None:
    task = fakes.study_plan(cells).tasks(cells)[0]
    assert dataclasses.replace(task, **change).key != task.key


def test_the_key_follows_the_version(cells: Cells, monkeypatch: pytest.MonkeyPatch) -> None:
    task = fakes.study_plan(cells).tasks(cells)[0]
    before = task.key
    monkeypatch.setattr(coembed.study.plan, "__version__", "99")
    assert task.key != before


def test_the_key_does_not_follow_names_paths_and_limits(cells: Cells) -> None:
    plan = fakes.study_plan(cells)
    moved = dataclasses.replace(plan, source="elsewhere", dataset="renamed", timeout=5.0)
    assert [t.key for t in moved.tasks(cells)] == [t.key for t in plan.tasks(cells)]


def test_params_are_resolved_for_the_size_and_hold_the_overrides(cells: Cells) -> None:
    plan = fakes.study_plan(cells, ("a", "b"), params={"a": {"rate": 0.5}})
    params = {(t.model, t.size): t.params for t in plan.tasks(cells)}
    assert params["a", 20] == {"rate": 0.5, "batch_size": 2, "preset": "default"}
    assert params["b", 40] == {"rate": 0.1, "batch_size": 4, "preset": "default"}


def test_held_out_cells_are_never_trained_on_and_shared_by_batch(cells: Cells) -> None:
    rows = held_out_rows(cells.batch, 24, seed=3)
    assert len(set(rows)) == 24
    # 60, 40 and 20 cells of 120 in the three batches.
    names, counts = np.unique(cells.batch[rows].astype(str), return_counts=True)
    assert dict(zip(names, counts, strict=True)) == {"s1d1": 12, "s1d2": 8, "s2d1": 4}
    for seed in range(20):
        chosen = training_rows(cells.n_cells, rows, 90, seed)
        assert len(set(chosen)) == 90
        assert not set(chosen) & set(rows)


def test_rounding_never_loses_a_held_out_cell() -> None:
    batch = np.array(["a"] * 1 + ["b"] * 7 + ["c"] * 92)
    for n in range(0, 100):
        rows = held_out_rows(batch, n, seed=0)
        assert len(set(rows)) == n
        assert abs((batch[rows] == "c").sum() - 0.92 * n) < 1


def test_subsamples_are_uniform() -> None:
    times = np.zeros(40)
    for seed in range(4000):
        times[training_rows(40, np.arange(20), 10, seed)] += 1
    assert times[:20].sum() == 0
    # Binomial(4000, 1/2): five standard deviations.
    assert abs(times[20:] - 2000).max() < 5 * np.sqrt(1000)


def test_defaults(cells: Cells) -> None:
    plan = Plan.make(cells, "fake", ["a"])
    assert plan.held_out == 24
    assert plan.sizes == (24, 48, 96)
    assert default_sizes(8000) == (500, 1000, 2000, 4000, 8000)
    assert default_sizes(400) == (50, 100, 200, 400)
    assert default_sizes(20) == (20,)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"sizes": (97,)}, ("size 97", "96 cells", "up to 96")),
        ({"sizes": (19,)}, ("size 19", "between 20 and 96")),
        ({"sizes": ()}, ("no sizes",)),
        ({"held_out": 101}, ("101", "120", "between 20 and 100")),
        ({"held_out": 5}, ("5 cells cannot be held out",)),
        ({"replicates": 0}, ("replicates is 0", "at least 1")),
        ({"threads": 0}, ("threads is 0",)),
        ({"n_permutations": 1}, ("n_permutations is 1",)),
        ({"device": "auto"}, ("'auto'", "'cuda'")),
        ({"timeout": 0}, ("timeout is 0",)),
        ({"presets": ()}, ("no presets",)),
        ({"params": {"stedy": {}}}, ("stedy", "Did you mean 'steady'")),
    ],
)
def test_what_cannot_be_planned(cells: Cells, options: dict, names: tuple[str, ...]) -> None:
    with pytest.raises(StudyError) as caught:
        fakes.study_plan(cells, **options)
    for name in names:
        assert name in str(caught.value)


def test_too_few_cells() -> None:
    with pytest.raises(StudyError, match="at least 40 cells"):
        Plan.make(fakes.small_cells(39), "fake", ["a"], held_out=20)
    assert Plan.make(fakes.small_cells(30), "fake", ["a"], held_out=0).sizes == (30,)


def test_no_model(cells: Cells) -> None:
    with pytest.raises(StudyError, match="no models"):
        fakes.study_plan(cells, ())


def test_an_unknown_parameter_is_refused_before_anything_runs(cells: Cells) -> None:
    plan = fakes.study_plan(cells, params={"steady": {"speed": 1}})
    with pytest.raises(ParameterError, match="speed"):
        plan.tasks(cells)


def test_other_data_are_refused(cells: Cells) -> None:
    with pytest.raises(StudyError, match="not those that the study was planned for"):
        fakes.study_plan(cells).tasks(fakes.small_cells(seed=1))


def test_extending_adds_up(cells: Cells) -> None:
    first = fakes.study_plan(cells, ("a",), params={"a": {"rate": 1}})
    second = fakes.study_plan(cells, ("b",), sizes=(60,), replicates=1, timeout=9.0)
    both = second.extend(first)
    assert both.models == ("a", "b")
    assert both.sizes == (20, 40, 60)
    assert both.replicates == 2
    assert both.params == {"a": {"rate": 1}}
    assert both.timeout == 9.0


@pytest.mark.parametrize(
    "change", [{"seed": 5}, {"held_out": 30}, {"threads": 2}, {"params": {"steady": {"rate": 2}}}]
)
def test_extending_refuses_what_cannot_be_compared(cells: Cells, change: dict) -> None:
    with pytest.raises(StudyError, match="new folder"):
        fakes.study_plan(cells, **change).extend(fakes.study_plan(cells))


def test_extending_refuses_other_data(cells: Cells) -> None:
    with pytest.raises(StudyError, match="other data"):
        fakes.study_plan(fakes.small_cells(seed=1)).extend(fakes.study_plan(cells))


def test_an_unknown_field_of_a_plan(cells: Cells) -> None:
    content = fakes.study_plan(cells).to_dict() | {"replicate": 3}
    with pytest.raises(StudyError, match="Did you mean 'replicates'"):
        Plan.from_dict(content)
