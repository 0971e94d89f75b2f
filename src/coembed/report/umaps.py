"""Embeddings in two dimensions, kept in the study's folder."""

from __future__ import annotations

import contextlib
import hashlib
import io
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

from coembed.errors import OutputError
from coembed.files import write_bytes

SEED = 142
"""The review's (study.md section 4)."""

NEIGHBOURS = 15
"""umap-learn's and R umap's default."""


@dataclass(frozen=True, eq=False)
class Cloud:
    """The cells of one embedding in two dimensions.

    Attributes:
        xy: (n, 2).
        labels: (n,), empty for a cell without one.
        replicate: which one.
        key: its ledger key.
    """

    xy: np.ndarray
    labels: np.ndarray
    replicate: int
    key: str


def coordinates(embedding: np.ndarray, cache: Path) -> np.ndarray:
    """Return the UMAP of an embedding whose columns are standardised, as in Figures 4 and 5.

    Args:
        embedding: (n, d), finite, at least four cells.
        cache: a CSV file that keeps the result; one of another embedding is replaced.

    Returns:
        (n, 2) float32; the same for the same embedding on one machine.
    """
    embedding = np.ascontiguousarray(embedding, dtype=np.float32)
    identity = _identity(embedding)
    known = _read(cache, identity, len(embedding))
    if known is not None:
        return known
    points = _umap(embedding)
    # The cache only saves time: a study that cannot be written is still reported.
    with contextlib.suppress(OutputError):
        text = io.StringIO()
        text.write(f"# {identity}\n")
        np.savetxt(text, points, fmt="%.9g", delimiter=",")
        write_bytes(cache, text.getvalue().encode())
    return points


def _umap(embedding: np.ndarray) -> np.ndarray:
    from umap import UMAP

    width = embedding.std(axis=0)
    standardised = (embedding - embedding.mean(axis=0)) / np.where(width > 0, width, 1)
    n_neighbors = min(NEIGHBOURS, len(embedding) - 1)
    # Below 5 cells there are too few eigenvectors for the spectral start.
    init = "spectral" if len(embedding) > 5 else "random"
    model = UMAP(n_neighbors=n_neighbors, random_state=SEED, n_jobs=1, init=init)
    points: np.ndarray = model.fit_transform(standardised).astype(np.float32)
    return points


def _identity(embedding: np.ndarray) -> str:
    version = f"umap-learn {metadata.version('umap-learn')}, seed {SEED}, {embedding.shape}"
    return f"{version}, sha256 {hashlib.sha256(embedding.tobytes()).hexdigest()}"


def _read(cache: Path, identity: str, n: int) -> np.ndarray | None:
    try:
        head, *lines = cache.read_text().splitlines()
        points = np.loadtxt(lines, delimiter=",", dtype=np.float32, ndmin=2)
    except (OSError, ValueError):
        return None
    return points if head == f"# {identity}" and points.shape == (n, 2) else None
