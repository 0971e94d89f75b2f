"""The picture of the README: one embedding of a ledger that `make eight` made, as a UMAP.

.venv/bin/python benchmarks/picture.py            docs/results/embedding.png
"""

from __future__ import annotations

import io

import numpy as np
from eight import DATASETS, ROOT

from coembed.data.pilots import load_pilot
from coembed.files import write_bytes
from coembed.study import Ledger

DATASET, MODEL = "pbmc_wnn_mosaic_1600", "multivi"
PICTURE = ROOT / "docs" / "results" / "embedding.png"


def main() -> None:
    """Draw the cells of the first seed by type and by what was measured in them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from umap import UMAP

    ledger, cells = Ledger(DATASETS[DATASET].folder(scvi=False)), load_pilot(DATASET)
    row = next(r for r in ledger.rows() if r["task"]["model"] == MODEL and r["status"] == "ok")
    found = ledger.embedding(row["key"])
    rows = np.concatenate([found["train_rows"], found["held_out_rows"]])
    z = np.concatenate([found["train"], found["held_out"]])
    xy = UMAP(random_state=0, n_jobs=1).fit_transform((z - z.mean(0)) / z.std(0))
    seen = cells.take(rows)
    measured = np.where(
        seen.paired, "both", np.where(seen.present["rna"], "RNA alone", "protein alone")
    )
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), dpi=110)
    for axis, title, groups in zip(
        axes, ("cell type", "measured"), (seen.labels.astype(str), measured), strict=True
    ):
        for name in sorted(set(groups)):
            axis.scatter(*xy[groups == name].T, s=4, linewidths=0, label=name)
        axis.set(title=title, xticks=[], yticks=[])
        axis.legend(markerscale=3, fontsize=7, frameon=False, bbox_to_anchor=(1, 1))
        axis.spines[:].set_visible(False)
    image = io.BytesIO()
    figure.savefig(image, format="png", bbox_inches="tight")
    write_bytes(PICTURE, image.getvalue())
    print(PICTURE)


if __name__ == "__main__":
    main()
