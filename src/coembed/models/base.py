"""The contract of every system, and all that follows from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from coembed import __version__
from coembed.data.cells import Cells
from coembed.data.minibatches import Batch, Inputs, Sampler, Shuffled
from coembed.data.pipeline import Block, Pipeline
from coembed.errors import CoembedError, DataError, ParameterError, did_you_mean
from coembed.models.card import Card
from coembed.models.params import HyperParams
from coembed.models.requirements import aligned, check_pairing, check_trainable
from coembed.nn.posteriors import Gaussian, Laplace
from coembed.train.guard import Guard
from coembed.train.loop import Loop, Outcome, choose_device, seeded
from coembed.train.stage import Player, Stage

__all__ = ["Card", "Facts", "Model", "Networks"]


class Networks(nn.Module):
    """A bag of networks; a system's `build` fills it."""

    def __getattr__(self, name: str) -> Any:
        """Return a network by name (untyped: torch's own annotation excludes calling it)."""
        return super().__getattr__(name)


@dataclass(frozen=True)
class Facts:
    """What a preset may depend on."""

    roles: tuple[str, ...]
    n_cells: int


class Model:
    """A system: what it declares, and the verbs that follow.

    A system declares its card, its hyper-parameters, the views of the modalities (`pipeline`), its
    networks (`build`), and a training plan (`stages`). Of `posterior`, `decode` and `embed` it
    defines those it has. A system without a network leaves `build` and `stages` as they are.

    Args:
        data: a MuData, an AnnData with feature types, a path to one, or checked `Cells`.
        preset: 'default' follows the paper and works; 'review' does what the review's study ran.
        batch_key: column of obs with the technical batch; None for none, 'auto' to look for one.
        **params: hyper-parameters that differ from the preset's.

    Raises:
        DataError: the data are not what the system takes.
        ParameterError: no such preset or hyper-parameter, or a value that is not allowed.
    """

    card: ClassVar[Card]
    Params: ClassVar[type[HyperParams]] = HyperParams
    presets: ClassVar[Mapping[str, Callable[[Facts], dict[str, Any]]]] = {}

    def __init__(
        self,
        data: Any,
        *,
        preset: str = "default",
        batch_key: str | None = "auto",
        **params: Any,
    ) -> None:
        data = _as_cells(data, batch_key)
        check_trainable(self.card, data)
        self.cells: Cells | None = data
        self.preset = preset
        resolved = self.resolve_params(data, preset, **params)
        self._describe(
            batch_key=data.keys.batch,
            params=resolved,
            features={role: list(data.var[role].index) for role in data.roles},
            batches=sorted(set(data.batch)),
        )

    def _describe(
        self,
        batch_key: str | None,
        params: dict[str, Any],
        features: dict[str, list[str]],
        batches: list[str],
    ) -> None:
        """Set what a fresh and a loaded model have in common."""
        self.params: Any = self.Params.checked(params, model=self.card.name)
        self.batch_key, self.features, self.batches = batch_key, features, batches
        self.roles = tuple(features)
        self.net = Networks()
        self.learnt: dict[str, np.ndarray] = {}
        self.outcome: Outcome | None = None
        self.history = pd.DataFrame()
        self.input_features: dict[str, list[str]] = {}
        self.n_features: dict[str, int] = {}
        self.device = torch.device("cpu")

    # -- what a system declares -------------------------------------------------------------------

    def pipeline(self, var: Mapping[str, pd.DataFrame]) -> Pipeline:
        """Return the views of the modalities; `var` holds their features."""
        raise NotImplementedError

    def build(self, net: Networks) -> None:
        """Put the networks into `net`; `self.n_features` has the width of every input."""

    def stages(self, inputs: Inputs, rows: np.ndarray, validation: np.ndarray) -> Sequence[Stage]:
        """Return the training plan for the training rows and the held-back ones."""
        return ()

    def posterior(self, batch: Batch) -> Gaussian | Laplace:
        """Return the (b, K) posterior given the inputs that are in the minibatch."""
        raise NotImplementedError

    @property
    def prior(self) -> Gaussian | Laplace:
        """The prior of the latent variable, broadcast over K; N(0, 1) unless a system says so."""
        zero = torch.zeros((), device=self.device)
        return Gaussian(zero, zero)

    def decode(self, z: Tensor, codes: Tensor, role: str) -> Tensor:
        """Return the denoised share or level of every feature of `role`, (b, n_features).

        Args:
            z: (b, K) points of the latent space.
            codes: (b,) int64 batch of each cell; -1 for one the model never saw.
            role: the modality.
        """
        raise NotImplementedError

    def draw(self, z: Tensor, codes: Tensor, role: str, depth: Tensor) -> Tensor:
        """Return counts of `role` drawn from the likelihood, (b, n_features).

        Args:
            z: (b, K) points of the latent space.
            codes: (b,) int64 batch of each cell.
            role: the modality.
            depth: (b,) total counts of each cell, where the likelihood has a depth.
        """
        raise NotImplementedError

    def embed(self, batch: Batch) -> Tensor:
        """Return the (b, K) embedding; the posterior's mean unless a system says otherwise."""
        return self.posterior(batch).mean

    @torch.no_grad()
    def latent(self, inputs: Inputs, chunk: int = 1024) -> np.ndarray:
        """Return `embed` of every cell, (n_cells, K); a system may add to it."""
        rows = np.arange(inputs.n_cells)
        parts = [self.embed(batch).cpu().numpy() for batch in inputs.chunks(rows, chunk)]
        return np.concatenate(parts).astype(np.float32)

    def finish(self, inputs: Inputs) -> None:
        """Learn what is learnt after training, into `self.learnt` (arrays by name)."""

    # -- the verbs --------------------------------------------------------------------------------

    def train(
        self,
        max_epochs: int | None = None,
        *,
        seed: int = 0,
        device: str = "auto",
        progress: bool = True,
        checkpoint: Path | None = None,
        guard: Guard | None = None,
    ) -> Self:
        """Fit the views and the networks on the cells the model was made with.

        Args:
            max_epochs: in place of the hyper-parameter of that name.
            seed: of everything random; the same seed gives the same embedding on one machine
                and one number of threads.
            device: 'auto', 'cpu', 'cuda' or 'mps'.
            progress: draw a bar with the time left.
            checkpoint: a file to resume from after a kill; it is removed at the end.
            guard: when a training counts as diverged.

        Returns:
            The model. `outcome` says how the training ended, `history` has every named term.

        Raises:
            DataError: the training cells cannot be used.
            ParameterError: there is no such device.
        """
        if self.cells is None:
            raise DataError("a loaded model has no cells to train on", remedy="Pass them to load")
        if max_epochs is not None:
            self.params = self._with({"max_epochs": max_epochs})
        self.device = choose_device(device)
        self.views = self.pipeline(self.cells.var)
        inputs = self._inputs(self.views.fit(self.cells), self.cells)
        self._name_inputs({name: list(b.var.index) for name, b in inputs.blocks.items()})
        rows, validation = self._split(inputs.n_cells, seed)
        with seeded(seed, self.device):
            self._build()
            loop = Loop(
                self.net,
                self.stages(inputs, rows, validation),
                inputs,
                seed=seed,
                guard=guard,
                checkpoint=checkpoint,
                identity=self._identity(seed) if checkpoint else "",
                progress=progress,
            )
            self.outcome, history = loop.run()
        self.history = pd.DataFrame(history)
        self.net.eval()
        self.finish(inputs)
        return self

    def get_latent_representation(
        self, data: Any = None, *, modality: str | None = None
    ) -> np.ndarray:
        """Return the embedding, (n_cells, K) float32, of the training cells or of other ones.

        Args:
            data: cells with the features of the training data; None for the training cells.
            modality: embed from this modality alone.

        Raises:
            DataError: features of the training data are missing, or the model is not trained.
            ParameterError: the model does not know the modality.
        """
        return self.latent(self._inputs_of(data, modality))

    @torch.no_grad()
    def translate(self, target: str, *, source: str, data: Any = None) -> np.ndarray:
        """Return modality `target` predicted from `source`, (n_cells, n_features) float32.

        The embedding from `source` alone is decoded; the unit is the system's (see its `decode`).

        Raises:
            CoembedError: the system cannot translate, as its card says.
        """
        if "translate" not in self.card.abilities:
            raise CoembedError(
                f"{self.card.title} cannot translate between modalities",
                remedy="`coembed models` lists the systems that can",
            )
        inputs = self._inputs_of(data, source)
        self._known(target)
        z = torch.from_numpy(self.latent(inputs)).to(self.device)
        parts = [
            self.decode(z[rows], inputs.gather({source: rows}).codes, target).cpu().numpy()
            for rows in np.array_split(np.arange(len(z)), -(-len(z) // 1024))
        ]
        return np.concatenate(parts)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write the trained model as safetensors and JSON; see `coembed.models.saving`."""
        from coembed.models.saving import save

        save(self, Path(folder), overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | Path, data: Any = None) -> Self:
        """Read a saved model; nothing in its files is executed.

        Args:
            folder: what `save` wrote.
            data: cells for `get_latent_representation()` without an argument.

        Raises:
            ModelFileError: the files are missing, damaged, altered, newer, or of another system.
        """
        from coembed.models.saving import load

        return load(cls, Path(folder), data)

    @property
    def n_parameters(self) -> tuple[int, int]:
        """Number of parameters: all, and those that a player trains; 0 before training."""
        if self.outcome is None:
            return 0, 0
        return self.outcome.parameters, self.outcome.parameters_trained

    @classmethod
    def resolve_params(
        cls, data: Cells, preset: str = "default", **overrides: Any
    ) -> dict[str, Any]:
        """Return every hyper-parameter under `preset` with `overrides`, JSON-able.

        Raises:
            ParameterError: no such preset or hyper-parameter, or a value that is not allowed.
        """
        known = {"default": lambda facts: {}, **cls.presets}
        if preset not in known:
            raise ParameterError(
                f"no preset '{preset}'",
                where=f"model '{cls.card.name}'",
                remedy=did_you_mean(preset, known),
            )
        values = known[preset](Facts(data.roles, data.n_cells))
        if "max_epochs" in overrides and "min_steps" in cls.Params.model_fields:
            values["min_steps"] = 0
        return cls.Params.checked(values | overrides, model=cls.card.name).model_dump()

    def __repr__(self) -> str:
        state = self.outcome.status if self.outcome else "not trained"
        shape = ", ".join(f"{role}: {len(names)}" for role, names in self.features.items())
        return f"{type(self).__name__}({shape}; {state})"

    # -- shared with the systems ------------------------------------------------------------------

    def epochs(self, steps_per_epoch: int) -> int:
        """Return the planned epochs: `max_epochs`, or more where `min_steps` asks for them."""
        return max(self.params.max_epochs, -(-self.params.min_steps // steps_per_epoch))

    def one_stage(
        self,
        sampler: Sampler,
        validation: Shuffled | None,
        *players: Player,
        begin: Callable[[], None] | None = None,
    ) -> Stage:
        """Return the plan of a system that trains in one stage."""
        return Stage(
            begin=begin,
            name="train",
            players=players,
            sampler=sampler,
            epochs=self.epochs(sampler.steps_per_epoch),
            validation=validation.sweep() if validation else (),
            patience=self.params.patience,
        )

    # -- inside -----------------------------------------------------------------------------------

    def _with(self, changes: Mapping[str, Any]) -> Any:
        values = self.params.model_dump() | changes
        if "max_epochs" in changes and "min_steps" in values:
            values["min_steps"] = 0
        return self.Params.checked(values, model=self.card.name)

    def _identity(self, seed: int) -> str:
        """Return what a checkpoint must agree in to be resumed from."""
        assert self.cells is not None
        facts = (__version__, torch.__version__, self.card.name, self.params, seed)
        return f"{facts} {self.cells.fingerprint()}"

    def _name_inputs(self, features: dict[str, list[str]]) -> None:
        """Set the features that reach the networks, by input."""
        self.input_features = features
        self.n_features = {name: len(names) for name, names in features.items()}

    def _build(self) -> None:
        self.net = Networks()
        self.build(self.net)
        self.net.to(self.device)

    def _split(self, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        fraction = getattr(self.params, "validation_fraction", 0.0)
        held = max(1, round(n * fraction)) if fraction and n >= 10 else 0
        order = np.random.default_rng(seed).permutation(n)
        return np.sort(order[held:]), np.sort(order[:held])

    def _inputs(self, blocks: Mapping[str, Block], cells: Cells) -> Inputs:
        codes = pd.Categorical(cells.batch, categories=self.batches).codes.astype(np.int64)
        return Inputs(blocks, codes, self.device)

    def _inputs_of(self, data: Any, modality: str | None) -> Inputs:
        if self.outcome is None:
            raise DataError(f"{self.card.title} is not trained", remedy="Call train() first")
        if data is None:
            data = self.cells
        if data is None:
            raise DataError("a loaded model has no cells", remedy="Pass the data to embed")
        data = self.prepared(data)
        if modality is None:
            check_pairing(self.card, data, self.roles)
            return self._inputs(self.views.apply(data), data)
        self._known(modality)
        lacking = int((~data.present[modality]).sum())
        if lacking:
            raise DataError(
                f"{lacking} of {data.n_cells} cells lack '{modality}', from which to embed",
                where=data.name,
                remedy="Leave these cells out, or embed from all modalities",
            )
        return self._inputs({modality: self.views.apply(data)[modality]}, data)

    def _known(self, modality: str) -> None:
        if modality in self.n_features:
            return
        if modality in self.roles:
            raise ParameterError(
                f"{self.card.title} takes all modalities together, not '{modality}' alone",
                remedy="Leave out modality=",
            )
        raise ParameterError(
            f"no modality '{modality}' in this model", remedy=did_you_mean(modality, self.roles)
        )

    def prepared(self, data: Any) -> Cells:
        """Return `data` as checked cells with the features of the training data in their order.

        Raises:
            DataError: the data cannot be read, or features are missing.
        """
        cells = data if isinstance(data, Cells) else _as_cells(data, self.batch_key, query=True)
        return aligned(cells, self.features)

    def _facts(self) -> dict[str, Any]:
        """Return what a saved model's JSON holds about this one."""
        return {
            "params": self.params.model_dump(),
            "preset": self.preset,
            "batch_key": self.batch_key,
            "features": self.features,
            "batches": self.batches,
            "input_features": self.input_features,
            "outcome": asdict(self.outcome) if self.outcome else None,
            "history": self.history.astype(object)
            .where(self.history.notna(), None)
            .to_dict("list"),
        }


def _as_cells(data: Any, batch_key: str | None, *, query: bool = False) -> Cells:
    if isinstance(data, Cells) and batch_key == "auto":
        return data
    from coembed.data.read import as_cells

    return as_cells(data, batch_key=batch_key, query=query)
