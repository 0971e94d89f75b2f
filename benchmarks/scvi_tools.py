"""scvi-tools' TOTALVI and MULTIVI as an executor of coembed studies: same cells, split and seeds.

`eight.py` runs it. A study of it is a ledger like any other, so it resumes, and each task has a
process, a wall time and a peak memory of its own, measured as coembed's own systems are. Install
with `pip install scvi-tools==1.4.2`; no module of coembed imports it.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from coembed.data.cells import Cells
from coembed.data.features import HighlyVariable, TopPeaks
from coembed.data.pipeline import Block, Pipeline, Step
from coembed.data.views import dense
from coembed.errors import StudyError
from coembed.study.plan import Plan, Task, held_out_rows, training_rows
from coembed.study.task import Source, load, memory_mb
from coembed.study.task import preload as preload_study

if TYPE_CHECKING:
    from mudata import MuData

EXECUTOR = "scvi_tools:execute"
TITLES = {"totalvi": "totalVI", "multivi": "MultiVI"}
MONITORED = {"totalvi": "elbo_validation", "multivi": "reconstruction_loss_validation"}
"""What scvi-tools' early stopping watches."""

EPOCH_CAP = {"totalvi": 400, "multivi": 500}
"""scvi-tools' own: totalVI's rule gives 400 up to 20,000 cells."""

N_TOP_GENES = 4000
"""Variable genes, seurat_v3 on counts, as scvi-tools' tutorials take."""


def version() -> str:
    """Return the version of scvi-tools. Raises StudyError where it is not installed."""
    if find_spec("scvi") is None:
        raise StudyError(
            "scvi-tools is not installed, and its rows need it",
            remedy="pip install scvi-tools==1.4.2, or leave them out with --models",
        )
    return metadata.version("scvi-tools")


@dataclass(frozen=True)
class ScviPlan(Plan):
    """A plan whose `totalvi` and `multivi` are scvi-tools'.

    Cells, split and seeds are those of coembed's models of these names under a `Plan` with the
    same seed, sizes and data, whether or not the models exist.
    """

    def tasks(self, cells: Cells) -> list[Task]:
        """Return the tasks, replicate by replicate; see `Plan.tasks`."""
        settings = {
            "scvi-tools": version(),
            "n_top_genes": N_TOP_GENES,
            "flavour": "seurat_v3",
        }
        return [
            replace(
                task,
                model=model,
                params={**settings, "max_epochs": EPOCH_CAP[model]},
                overrides={},
                seed=self._seed("model", task.size, task.replicate, model),
            )
            # The split does not depend on the model; `pca` takes all data.
            for task in Plan.tasks(replace(self, models=("pca",), params={}), cells)
            for model in self.models
        ]


def preload(source: Source) -> None:
    """Import and compile once, before the first task."""
    import scvi  # noqa: F401

    preload_study(replace(source, models=()))


def execute(task: Task, source: Source) -> dict[str, Any]:
    """Train with scvi-tools' defaults, embed training and held-out cells, score them.

    The wall time is that of `coembed`'s rows: from counts to trained model, selection included.

    Returns:
        The content of a ledger row (`coembed.study.ledger.new_row`), `status` included.
    """
    import scvi
    import torch
    from threadpoolctl import threadpool_limits

    warnings.simplefilter("ignore")  # lightning, on loaders without workers and its own future
    torch.set_num_threads(task.threads)
    threadpool_limits(task.threads)
    scvi.settings.seed = task.seed
    cells = load(source)
    held_out = held_out_rows(cells.batch, task.held_out, task.held_out_seed)
    rows = {
        "train": training_rows(cells.n_cells, held_out, task.size, task.subsample_seed),
        "held_out": held_out,
    }

    before = memory_mb()
    wall, cpu = time.perf_counter(), time.process_time()
    train = cells.take(rows["train"])
    selection: dict[str, list[Step]] = {
        "rna": [HighlyVariable(task.params["n_top_genes"], task.params["flavour"])],
        "atac": [TopPeaks()],
        "prot": [],
    }
    views = Pipeline({role: selection[role] for role in cells.roles})
    model = registered(task.model, as_mudata(views.fit(train), train))
    model.train(
        max_epochs=task.params["max_epochs"],
        accelerator=task.device,
        devices=1,
        enable_progress_bar=False,
    )
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall

    embedding = {}
    scores: list[dict[str, Any]] = []
    started = time.perf_counter()
    for part in rows if len(held_out) else ("train",):
        chosen = cells.take(rows[part])
        # The held-out cells are encoded by the trained model under their own batch labels.
        other = as_mudata(views.apply(chosen), chosen) if part == "held_out" else None
        embedding[part] = np.asarray(model.get_latent_representation(other), dtype=np.float32)
        embedding[f"{part}_rows"] = rows[part].astype(np.int64)
        scores += _scores(embedding[part], chosen, part, task)
    scoring = time.perf_counter() - started
    return {
        "status": "ok",
        "scores": scores,
        "cpu_s": cpu,
        "wall_s": wall,
        "scoring_s": scoring,
        "start_memory_mb": before,
        "parameters": sum(p.numel() for p in model.module.parameters()),
        **_ending(model, task),
        "embedding": source.ledger.write_embedding(task.key, embedding),
    }


def as_mudata(blocks: dict[str, Block], cells: Cells) -> MuData:
    """Return the counts as scvi-tools wants them: every modality has a row for every cell.

    A row is zero where the modality did not measure the cell; scvi-tools knows it by that.
    """
    import anndata
    import mudata

    obs = cells.obs[[]]
    parts = {
        # The mask of missing proteins is computed with numpy.
        role: anndata.AnnData(dense(b.x) if role == "prot" else b.x, obs=obs, var=b.var[[]])
        for role, b in blocks.items()
    }
    data = mudata.MuData(parts)
    data.obs["batch"] = cells.batch
    # MULTIVI's set-up adds this to the training data and then misses it in any other.
    data.obs["_indices"] = np.arange(cells.n_cells)
    return data


def registered(name: str, data: MuData) -> Any:
    """Return scvi-tools' model, registered with the batch and with all other defaults."""
    from scvi.model import MULTIVI, TOTALVI

    layers = {"rna": "rna_layer", "atac": "atac_layer", "prot": "protein_layer"}
    system = {"totalvi": TOTALVI, "multivi": MULTIVI}[name]
    modalities = {layers[role]: role for role in data.mod}
    system.setup_mudata(data, batch_key="batch", modalities=modalities)
    return system(data)


def _scores(z: np.ndarray, cells: Cells, part: str, task: Task) -> list[dict[str, Any]]:
    """Score an embedding as `coembed.study.task` does, with the same permutations."""
    from coembed.metrics.score import score

    table = score(
        z, **cells.annotations, n_permutations=task.n_permutations, seed=task.subsample_seed
    )
    return [{"evaluated_on": part, **line} for line in table.to_dict("records")]


def _ending(model: Any, task: Task) -> dict[str, Any]:
    """Return epochs, steps, how the training stopped, and its history."""
    history = model.history[MONITORED[task.model]].iloc[:, 0]
    watched = [float(value) for value in history]
    capped = len(watched) >= task.params["max_epochs"]
    return {
        "epochs": len(watched),
        # Lightning's own counter adds the steps of the adversary's optimiser.
        "steps": len(watched) * model.trainer.num_training_batches,
        "stopped": "cap" if capped else "early",
        "improving": capped and improving(watched),
        "history": {"epoch": list(range(len(watched))), str(history.name): watched},
    }


def improving(losses: Sequence[float]) -> bool:
    """Say whether a validation loss was still falling at its end, as coembed's loop judges it."""
    from coembed.train.loop import HELD_BACK_FALL, still_falling

    recent = len(losses) - 1 - int(np.argmin(losses)) <= 2
    return recent and still_falling(losses, HELD_BACK_FALL)
