"""The one training loop: every system's stages run through it."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from coembed.data.minibatches import Inputs
from coembed.files import read_tensors, write_tensors
from coembed.train.guard import Guard
from coembed.train.stage import Clock, Player, Stage

Stopped = Literal["early", "cap", "diverged", "none"]

TOLERANCE = 1e-4
"""Relative fall of the validation loss that counts as an improvement when patience is counted."""

ADVERSARIAL = "adversarial"
"""The term by which a player works against another; the only one that need not fall."""

HELD_BACK_FALL, TRAINING_FALL = 0.01, 0.05
"""Share of the whole fall of the loss, in the last tenth of a plan, that means it still falls: of
the held-back cells' loss, and of the training cells', which falls on while a model overfits."""


@dataclass
class Outcome:
    """How a training ended.

    Attributes:
        status: 'ok' or 'diverged'.
        message: why, in a sentence, where it is not 'ok'.
        stopped: 'early' (no improvement), 'cap' (the plan ended), 'diverged', or 'none' (nothing
            to train).
        improving: the plan ended while the loss still fell: that of the held-back cells, or, where
            none are held back, that of the training cells.
        epochs: epochs done, over all stages.
        steps: optimiser steps of each player, over all stages.
        parameters: how many numbers the networks have.
        parameters_trained: how many of them a loss reaches.
        events: restarts of the guard, each with the epoch, the reason and the new learning rate.
        warnings: settings that could not work, and what was done instead.
    """

    status: Literal["ok", "diverged"] = "ok"
    message: str = ""
    stopped: Stopped = "none"
    improving: bool = False
    epochs: int = 0
    steps: int = 0
    parameters: int = 0
    parameters_trained: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass
class _State:
    """What a checkpoint holds besides tensors; JSON-able."""

    stage: int = 0
    epoch: int = 0
    step: int = 0
    best: float | None = None
    reference: float | None = None
    stale: int = 0
    minima: dict[str, float] = field(default_factory=dict)
    final_minima: dict[str, float] = field(default_factory=dict)
    slowdown: float = 1.0
    trained: list[str] = field(default_factory=list)
    terms: dict[str, list[str]] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    outcome: dict[str, Any] = field(default_factory=lambda: asdict(Outcome()))
    sampler: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Snapshot:
    state: _State
    tensors: dict[str, Tensor]


class Loop:
    """Trains `module` by `stages`.

    The global random state of torch is expected to be seeded by the caller (`seeded`).

    Args:
        module: everything the players own; its state is what is kept, restored and saved.
        stages: the plan.
        inputs: the training cells.
        seed: of the sampler and of the noise of validation.
        guard: what counts as divergence.
        checkpoint: file for resuming; written at most every `interval` seconds and when the run is
            interrupted, removed at the end.
        identity: what the run is; a checkpoint of another run is ignored.
        progress: whether to draw a bar with the time left.
    """

    def __init__(
        self,
        module: nn.Module,
        stages: Sequence[Stage],
        inputs: Inputs,
        *,
        seed: int,
        guard: Guard | None = None,
        checkpoint: Path | None = None,
        identity: str = "",
        interval: float = 30.0,
        progress: bool = False,
    ) -> None:
        self.module, self.stages, self.inputs = module, stages, inputs
        self.seed, self.guard = seed, guard or Guard()
        self.checkpoint, self.identity, self.interval = checkpoint, identity, interval
        self.progress = progress
        self.rng = np.random.default_rng(seed)
        self.state = _State()
        self.best: dict[str, Tensor] = {}
        self.optimisers: dict[str, torch.optim.Adam] = {}

    def run(self) -> tuple[Outcome, list[dict[str, Any]]]:
        """Run every stage; return how it ended and one row of named terms per round.

        The last row of a stage says how it `ended`: as `Outcome.stopped`, and whether the loss was
        still falling.
        """
        resumed = self._resume()
        with self._bar() as advance:
            for index in range(self.state.stage, len(self.stages)):
                stage = self.stages[index]
                self._enter(index, stage, resumed)
                resumed = None
                self._run_stage(stage, advance)
                if self.state.outcome["status"] == "diverged":
                    break
        if self.checkpoint is not None:
            self.checkpoint.unlink(missing_ok=True)
        outcome = Outcome(**self.state.outcome)
        sizes = {name: p.numel() for name, p in self.module.named_parameters()}
        outcome.parameters = sum(sizes.values())
        outcome.parameters_trained = sum(sizes[name] for name in self.state.trained)
        return outcome, self.state.history

    def _enter(self, index: int, stage: Stage, resumed: Mapping[str, Tensor] | None) -> None:
        self.optimisers = {player.name: _adam(player) for player in stage.players}
        if resumed is not None:
            self._restore_tensors(resumed)
        else:
            self.best = {}
            kept = self.state
            self.state = _State(
                stage=index, history=kept.history, outcome=kept.outcome, trained=kept.trained
            )
            if stage.begin is not None:
                stage.begin()

    def _run_stage(self, stage: Stage, advance: Any) -> None:
        good = self._snapshot()
        saved = time.monotonic()
        while self.state.epoch < stage.epochs and self.state.stale < stage.patience:
            try:
                complaint = self._round(stage)
            except KeyboardInterrupt:
                self._save(good)
                raise
            if complaint:
                if not self._slow_down(stage, good, complaint):
                    return
                continue
            good = self._snapshot(good.tensors)
            if self.checkpoint is not None and time.monotonic() - saved > self.interval:
                self._save(good)
                saved = time.monotonic()
            advance(self.state)
        self._leave(stage)

    def _round(self, stage: Stage) -> str | None:
        """Do the epochs of one round and a validation; return the guard's complaint."""
        state = self.state
        means, before = self._train(stage, min(stage.epochs_per_round, stage.epochs - state.epoch))
        # A loss that rises because a weight warms up does not at final weights, nor the other way.
        final = {f"train_loss_{p.name}": self._final_loss(p, means) for p in stage.players}
        minima, final_minima = state.minima or before, state.final_minima or before
        complaint = self.guard.complaint(means, minima)
        if complaint and self.guard.complaint(means | final, final_minima):
            return complaint
        state.minima = {name: min(means[name], least) for name, least in minima.items()}
        state.final_minima = {name: min(final[name], v) for name, v in final_minima.items()}
        if stage.validation:
            means |= self._validate(stage)
            if not np.isfinite(means["validation_loss"]):
                return f"validation_loss is {means['validation_loss']}"
            self._judge(stage, means["validation_loss"])
        row = {"stage": stage.name, "epoch": state.epoch, "step": state.step, **means}
        state.history.append(row | {"learning_rate_factor": state.slowdown, "ended": ""})
        return None

    def _train(self, stage: Stage, epochs: int) -> tuple[dict[str, float], dict[str, float]]:
        """Take the steps of some epochs; every player has its turn on every minibatch.

        Returns:
            Mean of every term and loss, and, in the stage's first round, what each loss was before
            training: that of the first draw of each kind (draws differ in their inputs), with
            every weight at its final value.
        """
        state, sums = self.state, dict[str, Tensor]()
        first, before = dict[tuple[str, ...], float](), dict[str, float]()
        self.module.train()
        for draw in (draw for _ in range(epochs) for draw in stage.sampler.epoch(self.rng)):
            clock = Clock(state.step, stage.planned_steps)
            batch = self.inputs.gather(draw)
            for player in stage.players:
                name, optimiser = f"train_loss_{player.name}", self.optimisers[player.name]
                optimiser.zero_grad()
                terms = player.loss(batch, clock)
                known = state.terms.setdefault(player.name, [])
                known += [term for term in terms if term not in known]
                loss = player.total(terms, clock)
                loss.backward(inputs=player.parameters)  # not through those of other players
                for group in optimiser.param_groups:
                    group["lr"] = player.rate(clock) * state.slowdown
                optimiser.step()
                for term, value in terms.items():
                    sums[f"train_{term}"] = sums.get(f"train_{term}", 0) + value.detach()
                sums[name] = sums.get(name, 0) + loss.detach()
                if not state.minima:
                    kind = (player.name, *draw)
                    if kind not in first:
                        first[kind] = float(player.total(terms, Clock.end()).detach())
                    before[name] = before.get(name, 0.0) + first[kind]
            state.step += 1
        state.epoch += epochs
        if not state.minima:
            reached = [n for n, p in self.module.named_parameters() if p.grad is not None]
            state.trained = sorted({*state.trained, *reached})
        steps = epochs * stage.sampler.steps_per_epoch
        return (
            {name: float(value) / steps for name, value in sums.items()},
            {name: value / steps for name, value in before.items()},
        )

    @torch.no_grad()
    def _validate(self, stage: Stage) -> dict[str, float]:
        """Measure the first player's loss on held-back cells, with the same noise every time."""
        player, clock = stage.players[0], Clock.end()
        self.module.eval()
        sums, cells = dict[str, float](), 0
        with seeded(self.seed, self.inputs.device):
            for draw in stage.validation:
                batch = self.inputs.gather(draw)
                terms = player.loss(batch, clock)
                cells += len(batch)
                for name, value in {**terms, "loss": player.total(terms, clock)}.items():
                    key = f"validation_{name}"
                    sums[key] = sums.get(key, 0.0) + float(value) * len(batch)
        return {name: value / cells for name, value in sums.items()}

    def _judge(self, stage: Stage, loss: float) -> None:
        state = self.state
        if state.best is None or loss < state.best:
            state.best = loss
            self.best = _clone(self.module.state_dict())
        if state.reference is None or loss < state.reference - TOLERANCE * abs(state.reference):
            state.reference, state.stale = loss, 0
        elif Clock(state.step, stage.planned_steps).fraction >= stage.warm_up:
            state.stale += 1
            if stage.plateau is not None and state.stale % stage.plateau.patience == 0:
                state.slowdown *= stage.plateau.factor

    def _slow_down(self, stage: Stage, good: _Snapshot, complaint: str) -> bool:
        """Go back to the last good state with a lower learning rate; False if that is used up."""
        events, epoch = self.state.outcome["events"], self.state.epoch
        give_up = len(events) >= self.guard.restarts
        slowdown = self.state.slowdown * self.guard.slowdown
        self.state = copy.deepcopy(good.state)
        self._restore_tensors(good.tensors)
        outcome = self.state.outcome
        outcome["events"] = list(events)
        if give_up:
            if self.best:
                self.module.load_state_dict(self.best)
            outcome["status"], outcome["stopped"] = "diverged", "diverged"
            if self.state.history:
                self.state.history[-1]["ended"] = "diverged"
            outcome["message"] = (
                f"training diverged in stage '{stage.name}' at epoch {epoch}: {complaint}, "
                f"after {len(events)} restarts at lower learning rates"
            )
            self._count()
            return False
        self.state.slowdown = slowdown
        outcome["events"].append(
            {"stage": stage.name, "epoch": epoch, "reason": complaint, "lr_factor": slowdown}
        )
        return True

    def _leave(self, stage: Stage) -> None:
        state, outcome = self.state, self.state.outcome
        if self.best:
            self.module.load_state_dict(self.best)
        capped = state.stale < stage.patience
        outcome["stopped"] = "cap" if capped else "early"
        recent = state.stale <= 2  # rounds since the held-back loss was lowest; 0 without one
        share = HELD_BACK_FALL if stage.validation else TRAINING_FALL
        outcome["improving"] = capped and recent and still_falling(self._objective(stage), share)
        falling = ", still falling" if outcome["improving"] else ""
        state.history[-1]["ended"] = outcome["stopped"] + falling
        self._count()

    def _objective(self, stage: Stage) -> list[float]:
        """Return the loss by round, final weights: of held-back cells, else of the training cells.

        Of competing players it is that of the one with an 'adversarial' term, without that term:
        only the rest must fall.
        """
        rows = [row for row in self.state.history if row["stage"] == stage.name]
        if stage.validation:
            return [row["validation_loss"] for row in rows]
        terms = self.state.terms
        judged = next((p for p in stage.players if ADVERSARIAL in terms[p.name]), stage.players[0])
        return [self._final_loss(judged, row, but=ADVERSARIAL) for row in rows]

    def _final_loss(self, player: Player, means: Mapping[str, float], but: str = "") -> float:
        """Return a player's loss with final weights, from the means of its terms but one."""
        own = [term for term in self.state.terms[player.name] if term != but]
        return sum(player.weight(term, Clock.end()) * means[f"train_{term}"] for term in own)

    def _count(self) -> None:
        self.state.outcome["epochs"] += self.state.epoch
        self.state.outcome["steps"] += self.state.step

    # -- snapshots and checkpoints ----------------------------------------------------------------

    def _snapshot(self, old: Mapping[str, Tensor] | None = None) -> _Snapshot:
        """Return a copy of everything, written over the tensors of an `old` one."""
        now = {f"module.{k}": v.detach() for k, v in self.module.state_dict().items()}
        for name, optimiser in self.optimisers.items():
            for i, slots in optimiser.state_dict()["state"].items():
                now |= {f"optimiser.{name}.{i}.{k}": v for k, v in slots.items()}
        known = {k: old[k] for k in now if old and k in old}
        tensors = {k: known[k].copy_(v) if k in known else v.clone() for k, v in now.items()}
        tensors |= {f"best.{k}": v for k, v in self.best.items()}  # never changed in place
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.inputs.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.inputs.device)
        self.state.sampler = dict(self.rng.bit_generator.state)
        return _Snapshot(copy.deepcopy(self.state), tensors)

    def _restore_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back module, best weights and optimisers; random states go on."""
        self.module.load_state_dict(_under("module.", tensors))
        self.best = _clone(_under("best.", tensors))
        for name, optimiser in self.optimisers.items():
            slots: dict[int, dict[str, Tensor]] = {}
            for key, value in _under(f"optimiser.{name}.", tensors).items():
                index, slot = key.split(".", 1)
                slots.setdefault(int(index), {})[slot] = value
            groups = optimiser.state_dict()["param_groups"]
            optimiser.load_state_dict({"state": copy.deepcopy(slots), "param_groups": groups})

    def _save(self, snapshot: _Snapshot) -> None:
        if self.checkpoint is not None:
            about = {"identity": self.identity, "state": asdict(snapshot.state)}
            write_tensors(self.checkpoint, snapshot.tensors, about)

    def _resume(self) -> dict[str, Tensor] | None:
        if self.checkpoint is None or not self.checkpoint.exists():
            return None
        try:
            tensors, about = read_tensors(self.checkpoint)
        except (OSError, ValueError):
            return None  # a checkpoint is a convenience: an unreadable one costs time, not results
        if about.get("identity") != self.identity or not self._fits(tensors):
            return None
        self.state = _State(**about["state"])
        self.rng.bit_generator.state = self.state.sampler
        torch.set_rng_state(tensors["rng.cpu"])
        if self.inputs.device.type == "cuda" and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.inputs.device)
        return tensors

    def _fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Say whether the networks have these shapes; those of other code may not."""
        now = {name: value.shape for name, value in self.module.state_dict().items()}
        return now == {k: v.shape for k, v in _under("module.", tensors).items()}

    @contextlib.contextmanager
    def _bar(self) -> Iterator[Any]:
        if not self.progress:
            yield lambda state: None
            return
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("epoch {task.completed:.0f}/{task.total:.0f}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
        )
        with Progress(*columns, transient=True) as bar:
            tasks = [bar.add_task(s.name, total=s.epochs, loss="") for s in self.stages]

            def advance(state: _State) -> None:
                last = state.history[-1]
                name = "validation_loss"
                if name not in last:
                    name = f"train_loss_{self.stages[state.stage].players[0].name}"
                text = f"{name.replace('_', ' ')} {last[name]:.5g}"
                bar.update(tasks[state.stage], completed=state.epoch, loss=text)

            yield advance


def still_falling(losses: Sequence[float], share: float) -> bool:
    """Say whether the last tenth of the rounds brought over `share` of the whole fall."""
    tenth = max(1, len(losses) // 10)
    if len(losses) < 3 * tenth:
        return False
    parts = losses[:tenth], losses[-2 * tenth : -tenth], losses[-tenth:]
    first, before, last = (float(np.mean(part)) for part in parts)
    return first > last and before - last > share * (first - last)


def _adam(player: Player) -> torch.optim.Adam:
    parameters = player.parameters
    kind = torch.optim.AdamW if player.decoupled else torch.optim.Adam
    return kind(
        parameters,
        lr=player.lr,
        eps=player.eps,
        weight_decay=player.weight_decay,
        amsgrad=player.amsgrad,
        fused=parameters[0].device.type in ("cpu", "cuda"),  # one kernel for all parameters
    )


def _clone(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch inside the block and put its random state back afterwards."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        yield


def choose_device(name: str) -> torch.device:
    """Return the device for 'auto', 'cpu', 'cuda' or 'mps'.

    Raises:
        ParameterError: there is no such device on this machine.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.utilities.exceptions import MisconfigurationException

    from coembed.errors import ParameterError

    try:
        return torch.device(Fabric(accelerator=name, devices=1).device)
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise ParameterError(
            f"the device '{name}' is not there", remedy="Use --device auto, cpu, cuda or mps"
        ) from error
