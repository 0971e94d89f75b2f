"""Archetypal analysis of an embedding: its extreme cells, and every cell as a mixture of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from coembed.errors import DataError, ParameterError, warn

Face = tuple[np.ndarray, np.ndarray]
"""Cells and their weights: a point of the cells' convex hull."""

STEPS = 10
"""Gradient steps on the weights in each round; they start where the last round ended."""
EXACT = 1e-8
"""Share of the variance that is not worth explaining."""


@dataclass(frozen=True, eq=False)
class Archetypes:
    """The extremes of an embedding, those with the most weight first.

    Attributes:
        archetypes: (n, K) positions, each a convex mixture of cells.
        weights: (n_cells, n) share of each archetype in each cell; a row sums to 1.
        explained_variance: 1 minus the squared distance from the cells to their mixtures, relative
            to that from the cells to their mean.
        nearest: (n, n_nearest) rows of the cells nearest to each archetype, the nearest first.
    """

    archetypes: np.ndarray
    weights: np.ndarray
    explained_variance: float
    nearest: np.ndarray


def archetypes(
    z: np.ndarray,
    n: int,
    *,
    seed: int = 0,
    n_nearest: int = 10,
    max_rounds: int = 500,
    tolerance: float = 1e-5,
) -> Archetypes:
    r"""Return `n` archetypes of any embedding.

    Minimises :math:`\sum_i \| z_i - \sum_j a_{ij} x_j \|^2` over weights :math:`a_i` on the simplex
    and archetypes :math:`x_j` in the convex hull of the cells (Cutler & Breiman, Technometrics
    36:338, 1994), from a furthest-sum start (Morup & Hansen, Neurocomputing 80:54, 2012). Rounds
    of accelerated projected gradient steps on the weights alternate with one pass over the
    archetypes: given all else, the best :math:`x_j` is the point of the hull nearest to a target.
    The minimum is a local one; `seed` chooses where the search begins.

    Distances are Euclidean in `z` as it is: turned, shifted or scaled as a whole, it gives the same
    weights; a dimension that is scaled by itself counts for more.

    Args:
        z: (n_cells, K) embedding.
        n: number of archetypes, 2 or more.
        seed: of the first cell of the start.
        n_nearest: cells named per archetype, fewer where there are fewer cells.
        max_rounds: after which the search ends with a warning.
        tolerance: it ends when a round explains less than this share of what was left.

    Raises:
        ParameterError: fewer than two archetypes, or more than there are different cells.
        DataError: the embedding is not a finite (n_cells, K) array.
    """
    z = np.asarray(z, dtype=np.float64)
    if z.ndim != 2 or not np.isfinite(z).all():
        raise DataError("the embedding is no finite array of cells by dimensions")
    if n < 2:
        raise ParameterError(f"{n} archetypes cannot be", remedy="Ask for two or more")
    if n_nearest < 1:
        raise ParameterError(f"{n_nearest} nearest cells cannot be named", remedy="Ask for one")
    distinct = len(np.unique(z, axis=0))
    if n > distinct:
        raise ParameterError(
            f"{n} archetypes of {distinct} different cells cannot be",
            remedy=f"Ask for {distinct} or fewer" if distinct > 1 else "Give cells that differ",
        )
    centre = z.mean(axis=0)
    centred = z - centre
    total = float(np.sum(centred**2))
    first = furthest_sum(centred, n, np.random.default_rng(seed))
    faces: list[Face] = [(np.array([cell]), np.ones(1)) for cell in first]
    x, weights = centred[first], np.full((len(z), n), 1 / n)
    error = np.inf
    for _ in range(max_rounds):
        weights = mixtures(centred, x, weights)
        _move(centred, weights, x, faces)
        before, error = error, float(np.sum((centred - weights @ x) ** 2))
        if before - error < tolerance * error or error < EXACT * total:
            break
    else:
        warn(
            f"the search for archetypes still gained after {max_rounds} rounds",
            instead="its last state is returned; raise max_rounds",
        )
    order = np.argsort(-weights.sum(axis=0), kind="stable")
    x, weights = x[order], weights[:, order]
    distance = ((centred[:, None, :] - x) ** 2).sum(axis=2)
    return Archetypes(
        archetypes=x + centre,
        weights=weights,
        explained_variance=1 - error / total,
        nearest=np.argsort(distance, axis=0, kind="stable")[:n_nearest].T,
    )


def furthest_sum(z: np.ndarray, n: int, random: np.random.Generator) -> np.ndarray:
    """Return (n,) rows of `z`, each the furthest from the others by the sum of distances."""

    def distance(cell: int) -> np.ndarray:
        return np.linalg.norm(z - z[cell], axis=1)

    chosen = [int(random.integers(len(z)))]
    sums = distance(chosen[0])
    for _ in range(n + 10):  # the first cells, chosen beside few others, are chosen again
        if len(chosen) == n:
            sums -= distance(chosen.pop(0))
        far = sums.copy()
        far[(z[:, None, :] == z[chosen]).all(axis=2).any(axis=1)] = -np.inf
        chosen.append(int(far.argmax()))
        sums += distance(chosen[-1])
    return np.array(chosen)


def mixtures(z: np.ndarray, x: np.ndarray, start: np.ndarray, steps: int = STEPS) -> np.ndarray:
    """Move weights (n_cells, n) from `start` towards those by which `x` (n, K) best mixes to `z`.

    Accelerated projected gradient, the momentum of a cell put to nothing where it points uphill.
    """
    gram, target = x @ x.T, z @ x.T
    rate = 1 / max(float(np.linalg.eigvalsh(gram)[-1]), np.finfo(float).tiny)
    weights, ahead, t = start, start, 1.0
    for _ in range(steps):
        stepped = onto_simplex(ahead - rate * (ahead @ gram - target))
        t_next = (1 + np.sqrt(1 + 4 * t * t)) / 2
        move = stepped - weights
        uphill = ((ahead - stepped) * move).sum(axis=1, keepdims=True) > 0
        ahead = stepped + np.where(uphill, 0, (t - 1) / t_next) * move
        weights, t = stepped, t_next
    return weights


def onto_simplex(v: np.ndarray) -> np.ndarray:
    """Return the point of the simplex nearest to each row of `v` (Held et al. 1974)."""
    falling = np.sort(v, axis=1)[:, ::-1]
    excess = (falling.cumsum(axis=1) - 1) / np.arange(1, v.shape[1] + 1)
    return np.maximum(v - excess.max(axis=1, keepdims=True), 0)


def _move(z: np.ndarray, weights: np.ndarray, x: np.ndarray, faces: list[Face]) -> None:
    """Put each archetype in turn where it is best, given the weights and the other archetypes."""
    gram, sums = weights.T @ weights, weights.T @ z
    for j in range(len(x)):
        if gram[j, j] < 1e-12 * len(z):
            continue  # no cell has a part of it
        target = x[j] + (sums[j] - gram[j] @ x) / gram[j, j]
        faces[j] = nearest_in_hull(z, target, faces[j])
        x[j] = faces[j][1] @ z[faces[j][0]]


def nearest_in_hull(points: np.ndarray, target: np.ndarray, start: Face) -> Face:
    """Return the face and weights of the point of the hull of `points` nearest to `target`.

    Wolfe's active set method (Mathematical Programming 11:128, 1976): the point of the smallest
    norm in the hull of points minus target, by adding the vertex that lies furthest downhill and
    dropping those that would get a negative weight.
    """
    active, weights = start
    shifted = points - target
    close = 1e-10 * float((shifted**2).sum(axis=1).max())
    for _ in range(10 * points.shape[1] + 100):
        active, weights = _nearest_on_face(shifted, active, weights)
        here = weights @ shifted[active]
        slopes = shifted @ here
        vertex = int(slopes.argmin())
        if here @ here - slopes[vertex] <= close or vertex in active:
            break
        active, weights = np.append(active, vertex), np.append(weights, 0.0)
    return active, weights


def _nearest_on_face(shifted: np.ndarray, active: np.ndarray, weights: np.ndarray) -> Face:
    """Go from `weights` towards the smallest norm on the face, leaving what gets in the way."""
    while True:
        best = _affine_minimum(shifted[active])
        if (best > 0).all():
            return active, best
        falling = best <= 0
        part = weights[falling] / np.maximum(weights[falling] - best[falling], 1e-300)
        weights = weights + part.min() * (best - weights)
        weights[np.flatnonzero(falling)[part.argmin()]] = 0
        keep = weights > 1e-12
        active, weights = active[keep], weights[keep] / weights[keep].sum()


def _affine_minimum(points: np.ndarray) -> np.ndarray:
    """Return weights that sum to 1, of whatever sign, of the smallest norm of their mixture."""
    n = len(points)
    system = np.ones((n + 1, n + 1))
    system[:n, :n], system[n, n] = points @ points.T, 0
    system[:n, :n] /= max(float(np.trace(system[:n, :n])), np.finfo(float).tiny)
    answer: np.ndarray = np.linalg.lstsq(system, np.eye(n + 1)[n], rcond=None)[0][:n]
    return answer
