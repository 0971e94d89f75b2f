"""What a study will do, fixed before it starts: data x model x size x replicate, and every seed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np

from coembed import __version__
from coembed.data.cells import Cells
from coembed.errors import StudyError, did_you_mean
from coembed.study.jsonable import canonical, plain

SCHEMA = 1
"""Version of the plan, the task and the ledger row; part of every task key."""

MIN_CELLS = 20
"""Fewer cells than this are neither trained on nor held out."""


@dataclass(frozen=True)
class Task:
    """One training and its scores: everything that determines them, and nothing else but `dataset`.

    Attributes:
        dataset: the data's name, for tables.
        fingerprint: SHA-256 of the data.
        keys: which columns say what.
        model: a model's name.
        preset: its preset.
        params: all hyper-parameters, as resolved for cells of this size.
        overrides: the ones that the plan sets.
        size: number of training cells.
        replicate: index of the sub-sample, from 0.
        seed: of the model's initialisation and minibatches.
        subsample_seed: of the choice of cells; the same for every model.
        held_out: number of cells that no task trains on.
        held_out_seed: of the choice of these.
        n_permutations: of the null of each score.
        threads: processor threads.
        device: "cpu", "cuda", ...
    """

    dataset: str
    fingerprint: str
    keys: Mapping[str, Any]
    model: str
    preset: str
    params: Mapping[str, Any]
    overrides: Mapping[str, Any]
    size: int
    replicate: int
    seed: int
    subsample_seed: int
    held_out: int
    held_out_seed: int
    n_permutations: int
    threads: int
    device: str

    @property
    def key(self) -> str:
        """SHA-256 of everything that determines the result (64 hexadecimal digits)."""
        content = asdict(self) | {"schema": SCHEMA, "coembed": __version__}
        # The name says nothing about the result; `params` has the overrides in it.
        del content["dataset"], content["overrides"]
        return hashlib.sha256(canonical(content)).hexdigest()

    @property
    def identity(self) -> tuple[str, str, int, int]:
        """What a reader of the ledger tells tasks apart by: model, preset, size, replicate."""
        return (self.model, self.preset, self.size, self.replicate)

    def to_dict(self) -> dict[str, Any]:
        """Return the task as JSON can hold it."""
        return dict(plain(asdict(self)))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Task:
        """Return the task that `to_dict` described."""
        return cls(**content)


@dataclass(frozen=True)
class Plan:
    """A study. Make one with `Plan.make`, which checks it against the data.

    Attributes:
        source: where the data are read from: a file or a pilot's name.
        read: the options they are read with (`coembed.data.read.as_cells`).
        dataset: their name.
        fingerprint: SHA-256 of the data; other data are refused.
        models: names.
        sizes: numbers of training cells, rising.
        held_out: cells kept for scoring, the same for all tasks; 0 for none.
        presets: each model is run with each of these.
        params: model -> hyper-parameters to set.
        replicates: independent sub-samples per size (the review took 10).
        seed: the root of all seeds.
        n_permutations: of the null of each score; 0 for none.
        threads: per task.
        device: "cpu", "cuda" or "mps".
        timeout: seconds a task may take, or None.
        memory_mb: resident memory a task may take, in MB, or None.
    """

    source: str
    dataset: str
    fingerprint: str
    models: tuple[str, ...]
    sizes: tuple[int, ...]
    held_out: int
    read: Mapping[str, Any] = field(default_factory=dict)
    presets: tuple[str, ...] = ("default",)
    params: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    replicates: int = 5
    seed: int = 0
    n_permutations: int = 20
    threads: int = 1
    device: str = "cpu"
    timeout: float | None = None
    memory_mb: float | None = None

    @classmethod
    def make(
        cls,
        cells: Cells,
        source: str,
        models: Sequence[str],
        *,
        sizes: Sequence[int] | None = None,
        held_out: int | None = None,
        **options: Any,
    ) -> Plan:
        """Plan a study of `cells`, which were read from `source`.

        Args:
            cells: the data.
            source: the file or the pilot's name they came from; each worker reads it again.
            models: names of models.
            sizes: numbers of training cells; by default `default_sizes`.
            held_out: by default the smaller of 5,000 and a fifth of the cells.
            options: the other attributes of `Plan`.

        Raises:
            StudyError: the data are too few, or a value is not allowed.
        """
        n = cells.n_cells
        held_out = min(5000, n // 5) if held_out is None else held_out
        if held_out != 0 and not MIN_CELLS <= held_out <= n - MIN_CELLS:
            raise StudyError(
                f"{held_out} cells cannot be held out of {n}",
                where=cells.name,
                remedy=f"Hold out none, or between {MIN_CELLS} and {n - MIN_CELLS}"
                if n >= 2 * MIN_CELLS
                else f"A study needs at least {2 * MIN_CELLS} cells, or held_out=0",
            )
        available = n - held_out
        if available < MIN_CELLS:
            raise StudyError(
                f"{available} cells are too few for a study",
                where=cells.name,
                remedy=f"At least {MIN_CELLS} must be left to train on",
            )
        sizes = default_sizes(available) if sizes is None else tuple(sorted(set(sizes)))
        for size in sizes:
            if size < MIN_CELLS:
                raise StudyError(
                    f"size {size} is below {MIN_CELLS} cells",
                    remedy=f"Choose sizes between {MIN_CELLS} and {available}",
                )
            if size > available:
                raise StudyError(
                    f"size {size} is more than the {available} cells there are to train on",
                    where=cells.name,
                    remedy=f"{held_out} of its {n} cells are held out for scoring: choose sizes "
                    f"up to {available}, hold out fewer, or bring more cells",
                )
        plan = cls(
            source=str(source),
            dataset=cells.name,
            fingerprint=cells.fingerprint(),
            models=tuple(dict.fromkeys(models)),
            sizes=sizes,
            held_out=held_out,
            **options,
        )
        plan._check()
        return plan

    def _check(self) -> None:
        lowest = {"replicates": 1, "seed": 0, "n_permutations": 0, "threads": 1}
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise StudyError(
                    f"{name} is {getattr(self, name)}", remedy=f"It must be at least {least}"
                )
        if self.n_permutations == 1:
            raise StudyError(
                "n_permutations is 1", remedy="A null has a spread from 2 on; 0 is for no null"
            )
        if self.device == "auto":
            raise StudyError(
                "the device is 'auto', which differs between machines",
                remedy="Name it: 'cpu', 'cuda' or 'mps'",
            )
        for name in ("timeout", "memory_mb"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise StudyError(f"{name} is {value}", remedy="It must be more than 0, or None")
        for name in ("models", "presets", "sizes"):
            if not getattr(self, name):
                raise StudyError(f"the study has no {name}", remedy="Name at least one")
        for name in self.params:
            if name not in self.models:
                raise StudyError(
                    f"parameters are given for '{name}', which the study does not run",
                    remedy=did_you_mean(name, self.models),
                )

    def tasks(self, cells: Cells) -> list[Task]:
        """Return the tasks, replicate by replicate, so that a study cut short is of use.

        A model's parameters are resolved on the first sub-sample of each size.

        Raises:
            StudyError: `cells` are not the data of the plan.
            ParameterError: a model, a preset or a parameter does not exist or is not allowed.
        """
        if cells.fingerprint() != self.fingerprint:
            raise StudyError(
                "the data are not those that the study was planned for",
                where=self.source,
                remedy="Plan a new study in a new folder, or bring the old data back",
            )
        held_out_seed = self._seed("held out")
        held_out = held_out_rows(cells.batch, self.held_out, held_out_seed)
        resolved = {}
        for size in self.sizes:
            rows = training_rows(cells.n_cells, held_out, size, self._seed("cells", size, 0))
            sample = cells.take(rows)
            for model in self.models:
                for preset in self.presets:
                    resolved[size, model, preset] = plain(
                        resolve_params(model, sample, preset, self.params.get(model, {}))
                    )
        return [
            Task(
                dataset=self.dataset,
                fingerprint=self.fingerprint,
                keys=plain(asdict(cells.keys)),
                model=model,
                preset=preset,
                params=resolved[size, model, preset],
                overrides=plain(self.params.get(model, {})),
                size=size,
                replicate=replicate,
                seed=self._seed("model", size, replicate, model),
                subsample_seed=self._seed("cells", size, replicate),
                held_out=self.held_out,
                held_out_seed=held_out_seed,
                n_permutations=self.n_permutations,
                threads=self.threads,
                device=self.device,
            )
            for replicate in range(self.replicates)
            for size in self.sizes
            for model in self.models
            for preset in self.presets
        ]

    def _seed(self, purpose: str, *what: object) -> int:
        """Return a 32-bit seed that depends on the plan's seed, the data and `what`."""
        content = canonical([purpose, self.fingerprint, *what])
        words = np.frombuffer(hashlib.sha256(content).digest(), dtype="<u4")
        sequence = np.random.SeedSequence([self.seed, *words.tolist()])
        return int(sequence.generate_state(1)[0])

    def extend(self, earlier: Plan) -> Plan:
        """Return the plan of a folder where `earlier` ran and this one is to run.

        Models, presets, sizes and replicates add up; limits are the new ones.

        Raises:
            StudyError: the two differ in what makes results comparable.
        """
        if earlier.fingerprint != self.fingerprint:
            raise StudyError(
                f"the folder holds a study of other data ({earlier.dataset})",
                remedy="Choose a new folder",
            )
        for name in ("held_out", "seed", "n_permutations", "threads", "device"):
            old, new = getattr(earlier, name), getattr(self, name)
            if old != new:
                raise StudyError(
                    f"the folder holds a study with {name} {old}, not {new}",
                    remedy="Choose a new folder",
                )
        for model in set(self.models) & set(earlier.models):
            before, now = plain(earlier.params.get(model, {})), plain(self.params.get(model, {}))
            if before != now:
                raise StudyError(
                    f"the folder holds a study of {model} with parameters {before}, not {now}",
                    remedy="Choose a new folder",
                )
        return replace(
            self,
            models=tuple(dict.fromkeys(earlier.models + self.models)),
            presets=tuple(dict.fromkeys(earlier.presets + self.presets)),
            sizes=tuple(sorted({*earlier.sizes, *self.sizes})),
            params={**earlier.params, **self.params},
            replicates=max(earlier.replicates, self.replicates),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON can hold it."""
        return dict(plain(asdict(self)))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Plan:
        """Return the plan that `to_dict` described. Raises StudyError for an unknown field."""
        known = {item.name for item in fields(cls)}
        for name in content:
            if name not in known:
                raise StudyError(f"a plan has no field '{name}'", remedy=did_you_mean(name, known))
        lists = {name: tuple(content[name]) for name in ("models", "presets", "sizes")}
        return cls(**{**content, **lists})


def default_sizes(available: int) -> tuple[int, ...]:
    """Return at most five sizes, each half of the next, the largest being all there is.

    None is below 50 cells, or below 20 where fewer than 200 are available. At the largest size
    all replicates train on the same cells; their spread is then the model's alone.
    """
    least = 50 if available >= 200 else MIN_CELLS
    halves = [available // 2**step for step in range(5)]
    return tuple(sorted({available, *(size for size in halves if size >= least)}))


def held_out_rows(batch: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Return the rows of `n` cells, shared among batches in proportion, in rising order.

    Args:
        batch: (n_cells,) the batch of each cell.
        n: how many cells.
        seed: of the choice.
    """
    random = np.random.default_rng(seed)
    names, member = np.unique(batch.astype(str), return_inverse=True)
    share = np.bincount(member, minlength=len(names)) * (n / len(batch))
    quota = np.floor(share).astype(int)
    # The cells that rounding left over go to the largest remainders.
    largest = np.argsort(-(share - quota), kind="stable")
    quota[largest[: n - quota.sum()]] += 1
    chosen = [
        random.choice(np.flatnonzero(member == index), size=count, replace=False)
        for index, count in enumerate(quota)
    ]
    return np.sort(np.concatenate(chosen)) if n else np.empty(0, dtype=np.int64)


def training_rows(n_cells: int, held_out: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Return `size` rows, uniform without replacement from those not held out, rising."""
    free = np.setdiff1d(np.arange(n_cells), held_out, assume_unique=True)
    return np.sort(np.random.default_rng(seed).choice(free, size=size, replace=False))


def resolve_params(
    model: str, cells: Cells, preset: str, params: Mapping[str, Any]
) -> dict[str, Any]:
    """Return all hyper-parameters of a model for these cells. Raises ParameterError."""
    from coembed.models import get_model

    resolved: dict[str, Any] = get_model(model).resolve_params(cells, preset=preset, **params)
    return resolved
