"""Checkpoints: an interrupted or killed run ends with the bits of an undisturbed one."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import toys
from torch import nn
from toys import train, two_stages

from coembed.files import read_tensors, write_tensors
from coembed.train.loop import Outcome

Result = tuple[nn.Module, Outcome, list[dict[str, object]]]
STEPS = 5 * 12


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def undisturbed() -> Result:
    return train(two_stages())


def same(a: Result, b: Result) -> None:
    for (name, x), y in zip(a[0].state_dict().items(), b[0].state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    assert a[1:] == b[1:]


def interrupted_at(step: int) -> Callable[[int], float]:
    def hook(call: int) -> float:
        if call == step:
            raise KeyboardInterrupt
        return 1.0

    return hook


@pytest.mark.parametrize("step", [0, 3, 12, 19, 20, 21, 33, 59])
def test_an_interrupted_run_resumes_to_the_same_bits(
    step: int, tmp_path: Path, undisturbed: Result
) -> None:
    file = tmp_path / "run.ckpt"
    with pytest.raises(KeyboardInterrupt):
        train(two_stages(interrupted_at(step)), checkpoint=file, identity="toy")
    assert file.exists()
    calls: list[int] = []
    resumed = train(
        two_stages(lambda call: float(calls.append(call) or 1)), checkpoint=file, identity="toy"
    )
    same(resumed, undisturbed)
    assert len(calls) == STEPS - 5 * (step // 5), "the rounds that were done are not done again"
    assert not file.exists(), "a run that ended leaves no checkpoint"


def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, undisturbed: Result) -> None:
    """SIGKILL in the middle of a step, twice, in processes of their own."""
    file = tmp_path / "run.ckpt"
    for step in (13, 20):  # in the first stage; then, counted from the resumed round, the second
        killed = subprocess.run([sys.executable, toys.__file__, str(file), str(step)], check=False)
        assert killed.returncode == -signal.SIGKILL
        assert file.exists()
    _, about = read_tensors(file)
    assert (about["state"]["stage"], about["state"]["epoch"]) == (1, 2)
    same(train(two_stages(), checkpoint=file, identity="toy"), undisturbed)


def test_the_guards_events_survive_an_interruption(tmp_path: Path) -> None:
    def hook(bad: int, stop: int) -> Callable[[int], float]:
        def call_hook(call: int) -> float:
            return float("nan") if call == bad else interrupted_at(stop)(call)

        return call_hook

    whole = train(two_stages(hook(7, -1)))
    file = tmp_path / "run.ckpt"
    with pytest.raises(KeyboardInterrupt):
        train(two_stages(hook(7, 31)), checkpoint=file, identity="toy")
    resumed = train(two_stages(), checkpoint=file, identity="toy")
    assert len(resumed[1].events) == 1
    same(resumed, whole)


def test_a_checkpoint_of_another_run_is_ignored(tmp_path: Path, undisturbed: Result) -> None:
    file = tmp_path / "run.ckpt"
    with pytest.raises(KeyboardInterrupt):
        train(two_stages(interrupted_at(33)), seed=5, checkpoint=file, identity="another")
    same(train(two_stages(), checkpoint=file, identity="toy"), undisturbed)


def test_a_checkpoint_of_networks_of_other_shapes_is_ignored(
    tmp_path: Path, undisturbed: Result
) -> None:
    """That of other code: the identity of a run does not see it."""
    file = tmp_path / "run.ckpt"
    with pytest.raises(KeyboardInterrupt):
        train(two_stages(interrupted_at(33)), checkpoint=file, identity="toy")
    tensors, about = read_tensors(file)
    name = next(k for k, v in tensors.items() if k.startswith("module.") and v.dim() == 2)
    write_tensors(file, tensors | {name: tensors[name].t()}, about)
    same(train(two_stages(), checkpoint=file, identity="toy"), undisturbed)


def damaged(file: Path, how: str) -> None:
    whole = file.read_bytes()
    file.write_bytes({"truncated": whole[:-100], "garbage": b"\0" * 500, "empty": b"",
                      "header": whole[:8] + b"x" * (len(whole) - 8)}[how])  # fmt: skip


@pytest.mark.parametrize("how", ["truncated", "garbage", "empty", "header"])
def test_a_damaged_checkpoint_is_ignored(how: str, tmp_path: Path, undisturbed: Result) -> None:
    file = tmp_path / "run.ckpt"
    with pytest.raises(KeyboardInterrupt):
        train(two_stages(interrupted_at(33)), checkpoint=file, identity="toy")
    damaged(file, how)
    same(train(two_stages(), checkpoint=file, identity="toy"), undisturbed)


def test_checkpoints_are_written_no_more_often_than_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    monkeypatch.setattr(
        "coembed.train.loop.write_tensors", lambda path, *rest: written.append(path)
    )
    train(two_stages(), checkpoint=tmp_path / "a", identity="toy")
    assert written == []
    train(two_stages(), checkpoint=tmp_path / "b", identity="toy", interval=0.0)
    assert len(written) == 12


def test_a_checkpoint_holds_no_code(tmp_path: Path) -> None:
    file = tmp_path / "run.ckpt"
    with pytest.raises(KeyboardInterrupt):
        train(two_stages(interrupted_at(33)), checkpoint=file, identity="toy")
    tensors, about = read_tensors(file)  # safetensors and JSON
    assert about["identity"] == "toy"
    assert {name.split(".")[0] for name in tensors} == {"module", "best", "optimiser", "rng"}
