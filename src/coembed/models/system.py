"""What a system declares, and what it knows of its cells."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from coembed.data.cells import Cells
from coembed.data.minibatches import Batch, Inputs, Sampler, Shuffled
from coembed.data.pipeline import Block, Pipeline
from coembed.errors import DataError, ParameterError, did_you_mean, warn
from coembed.models.card import Card
from coembed.models.params import HyperParams
from coembed.models.requirements import aligned, check_pairing, check_trainable
from coembed.nn.posteriors import Gaussian, Laplace
from coembed.train.loop import Outcome, seeded
from coembed.train.stage import Player, Stage


class Networks(nn.Module):
    """A bag of networks; a system's `build` fills it.

    Attributes:
        frozen: training leaves modes alone: no dropout, no moving of running statistics.
    """

    frozen = False

    def train(self, mode: bool = True) -> Self:
        """Set training mode, unless frozen."""
        return super().train(mode and not self.frozen)

    def __getattr__(self, name: str) -> Any:
        """Return a network by name (untyped: torch's own annotation excludes calling it)."""
        return super().__getattr__(name)


@dataclass(frozen=True)
class Facts:
    """What a preset may depend on."""

    roles: tuple[str, ...]
    n_cells: int


class System:
    """The declarations of a published system; `coembed.models.base.Model` adds the verbs.

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
    takes_sparse: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Callable[[Facts], dict[str, Any]]]] = {}
    views: Pipeline

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
        self.n_features: dict[str, int] = {}
        self.decoded_features: dict[str, list[str]] = {}
        self.depths: dict[str, list[float]] = {}
        self.profiles: dict[str, np.ndarray] = {}
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
    def prior(self) -> Any:
        """The prior of the latent variable, of the posterior's kind, broadcast over K; N(0, 1)."""
        zero = torch.zeros((), device=self.device)
        return Gaussian(zero, zero)

    def sample_prior(self, n: int) -> Tensor:
        """Return n points drawn from the prior, (n, K)."""
        return type(self.prior)(*(part.expand(n, self.n_latent) for part in self.prior)).sample()

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

    @torch.no_grad()
    def latent_in_training_mode(self, inputs: Inputs, parts: Iterable[np.ndarray]) -> np.ndarray:
        """Return `embed` with the dropout and the batch statistics of each of `parts` (rows).

        So do the originals of some systems, by oversight; what it moves is put back.
        """
        kept = {name: value.clone() for name, value in self.net.state_dict().items()}
        z = np.empty((inputs.n_cells, self.n_latent), dtype=np.float32)
        with seeded(0, self.device):
            self.net.train()
            for rows in parts:
                batch = inputs.gather(dict.fromkeys(inputs.blocks, rows))
                z[rows] = self.embed(batch).cpu().numpy()
        self.net.load_state_dict(kept)
        self.net.eval()
        return z

    def finish(self, inputs: Inputs) -> None:
        """Learn what is learnt after training, into `self.learnt` (arrays by name)."""

    # -- what follows -----------------------------------------------------------------------------

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

    @property
    def n_latent(self) -> int:
        """Latent dimensions K."""
        return int(self.params.n_latent)

    @property
    def n_batches(self) -> int:
        """Batches that the networks tell apart."""
        return 1 if getattr(self.params, "no_batch", False) else len(self.batches)

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
        if sampler.batch_size > sampler.largest:
            warn(
                f"minibatches of {sampler.batch_size} cells are more than the {sampler.largest} "
                "training cells",
                where=self.card.title,
                instead=sampler.when_larger,
            )
        return Stage(
            begin=begin,
            name="train",
            players=players,
            sampler=sampler,
            epochs=self.epochs(sampler.steps_per_epoch),
            validation=validation.sweep() if validation else (),
            patience=self.params.patience,
        )

    def paired_stage(self, rows: np.ndarray, validation: np.ndarray, *players: Player) -> Stage:
        """Return the plan in which a step draws cells, each with all its modalities."""
        size = self.params.batch_size
        sampler, held_back = (Shuffled([(self.roles, r)], size) for r in (rows, validation))
        return self.one_stage(sampler, held_back, *players)

    # -- its cells --------------------------------------------------------------------------------

    def _inputs(self, blocks: Mapping[str, Block], cells: Cells) -> Inputs:
        codes = pd.Categorical(cells.batch, categories=self.batches).codes.astype(np.int64)
        return Inputs(blocks, codes, self.device, sparse=self.takes_sparse)

    def cells_of(self, data: Any) -> Cells:
        """Return `data` as checked cells for this model; None is the training cells.

        Raises:
            DataError: the model is not trained, or has no cells, or features are missing.
        """
        if self.outcome is None:
            raise DataError(f"{self.card.title} is not trained", remedy="Call train() first")
        if data is None:
            data = self.cells
        if data is None:
            raise DataError("a loaded model has no cells", remedy="Pass the data to embed")
        return self.prepared(data)

    def inputs_of(self, data: Any, modality: str | None) -> Inputs:
        """Return the networks' inputs for `data`, or for one modality of it.

        Raises:
            DataError: as `cells_of`, or cells lack what the system needs.
            ParameterError: the model does not know the modality.
        """
        data = self.cells_of(data)
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

    def check_decodes(self, role: str) -> None:
        """Refuse a modality that is not among the decoded ones.

        Raises:
            ParameterError: the model does not know it.
        """
        if role not in self.decoded_features:
            raise ParameterError(
                f"no modality '{role}' in this model",
                remedy=did_you_mean(role, self.decoded_features),
            )

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


def _as_cells(data: Any, batch_key: str | None, *, query: bool = False) -> Cells:
    if isinstance(data, Cells) and batch_key == "auto":
        return data
    from coembed.data.read import as_cells

    return as_cells(data, batch_key=batch_key, query=query)
