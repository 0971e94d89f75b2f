"""The contract of every system: the verbs that follow from what it declares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
import torch

from coembed import __version__
from coembed.data.minibatches import Inputs
from coembed.errors import DataError, noted
from coembed.models.card import Card
from coembed.models.generate import depths, impute, levels, profiles, require, sample
from coembed.models.query import map_query
from coembed.models.system import Facts, Networks, System
from coembed.train.guard import Guard
from coembed.train.loop import Loop, choose_device, seeded

if TYPE_CHECKING:
    from mudata import MuData

__all__ = ["Card", "Facts", "Model", "Networks"]


class Model(System):
    """A system with its verbs: train, embed, translate, sample, save and the others."""

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
        with noted() as notes, seeded(seed, self.device):
            self.views = self.pipeline(self.cells.var)
            inputs = self._inputs(self.views.fit(self.cells), self.cells)
            self._note(inputs)
            rows, validation = self._split(inputs.n_cells, seed)
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
        self.outcome.warnings = notes
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
        return self.latent(self.inputs_of(data, modality))

    def get_normalized_expression(
        self,
        role: str,
        data: Any = None,
        *,
        transform_batch: str | Sequence[str] | None = None,
    ) -> pd.DataFrame:
        """Return the denoised levels of a modality, (n_cells, n_features) float32.

        The embedding is decoded; the unit is the system's (see its `decode`), the features are
        those that its views keep.

        Args:
            role: 'rna', 'prot' or 'atac'.
            data: cells with the features of the training data; None for the training cells.
            transform_batch: decode as if every cell were of this batch; of several, the mean.

        Raises:
            CoembedError: the system does not decode features, as its card says.
            ParameterError: no such modality or batch.
        """
        return levels(self, role, data, source=None, transform_batch=transform_batch)

    def translate(
        self,
        target: str,
        *,
        source: str,
        data: Any = None,
        transform_batch: str | Sequence[str] | None = None,
    ) -> pd.DataFrame:
        """Return modality `target` predicted from `source` alone, (n_cells, n_features) float32.

        As `get_normalized_expression`, from the embedding that `source` alone gives.

        Raises:
            CoembedError: the system cannot translate, as its card says.
        """
        require(self, "translate", "translate between modalities")
        return levels(self, target, data, source=source, transform_batch=transform_batch)

    def impute(
        self,
        role: str,
        data: Any = None,
        *,
        transform_batch: str | Sequence[str] | None = None,
    ) -> pd.DataFrame:
        """Return the levels of a modality for the cells that lack it, from what they have.

        As `get_normalized_expression`, for mosaic data: one row per cell without `role`.

        Raises:
            DataError: no cell lacks it.
        """
        return impute(self, role, data, transform_batch=transform_batch)

    def sample(
        self, n: int, *, batch: str | None = None, near: Any = None, seed: int = 0
    ) -> MuData:
        """Return `n` new cells drawn from the model: counts of every modality.

        Depths are drawn from those of the training cells. The result says that it is simulated.

        Args:
            n: number of cells.
            batch: the batch all cells are of; by default a random one, or that of the cell near by.
            near: cells in whose posterior the new ones are drawn; by default from the prior.
            seed: of the draws.

        Raises:
            CoembedError: the system does not draw counts, as its card says.
        """
        return sample(self, n, batch=batch, near=near, seed=seed)

    def map_query(
        self, data: Any, *, steps: int = 200, seed: int = 0, progress: bool = True
    ) -> Self:
        """Return a model that knows the batches of `data` too; cells it knew keep their place.

        What depends on the batch gets a part for each new one, which alone is trained, on `data`
        (architectural surgery, Lotfollahi et al. 2022). Without new batches nothing is trained.
        Embed the cells with the result.

        Args:
            data: the new cells, with the features of the training data.
            steps: optimiser steps.
            seed: of the training.
            progress: draw a bar.

        Raises:
            DataError: features are missing.
        """
        return map_query(self, data, steps=steps, seed=seed, progress=progress)

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

    def _note(self, inputs: Inputs) -> None:
        """Keep what a trained model must know of its inputs: widths, feature names, depths."""
        self.n_features, self.decoded_features = {}, {}
        for name, block in inputs.blocks.items():
            roles = block.var.get("_role", pd.Series(name, index=block.var.index)).to_numpy()
            self.n_features[name] = len(block.var)
            for role in pd.unique(roles):
                self.decoded_features[role] = list(block.var.index[roles == role])
        self.depths = depths(inputs)
        assert self.cells is not None
        self.profiles = profiles(self.cells, self.decoded_features)

    def _build(self) -> None:
        self.net = Networks()
        self.build(self.net)
        self.net.to(self.device)

    def _split(self, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        fraction = getattr(self.params, "validation_fraction", 0.0)
        held = max(1, round(n * fraction)) if fraction and n >= 10 else 0
        order = np.random.default_rng(seed).permutation(n)
        return np.sort(order[held:]), np.sort(order[:held])

    def _facts(self) -> dict[str, Any]:
        """Return what a saved model's JSON holds about this one."""
        return {
            "params": self.params.model_dump(),
            "preset": self.preset,
            "batch_key": self.batch_key,
            "features": self.features,
            "batches": self.batches,
            "n_features": self.n_features,
            "decoded_features": self.decoded_features,
            "depths": self.depths,
            "outcome": asdict(self.outcome) if self.outcome else None,
            "history": self.history.astype(object)
            .where(self.history.notna(), None)
            .to_dict("list"),
        }
