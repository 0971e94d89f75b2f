"""Archetypes: corners found, constraints held, the same after a turn; simulated points."""

from __future__ import annotations

import time

import numpy as np
import pytest
from scipy.optimize import linprog, minimize

from coembed.errors import CoembedWarning, DataError, ParameterError
from coembed.explain.archetypes import (
    archetypes,
    furthest_sum,
    mixtures,
    nearest_in_hull,
    onto_simplex,
)


def simplex(
    n_cells: int, n: int, k: int, *, noise: float = 0.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Mixtures of n corners in k dimensions, a cell at each corner among them; the corners."""
    random = np.random.default_rng(seed)
    corners = random.normal(0, 3, (n, k))
    shares = random.dirichlet(np.full(n, 0.5), n_cells)
    shares[:n] = np.eye(n)
    return shares @ corners + noise * random.normal(size=(n_cells, k)), corners


def gaps(found: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Distance from each corner to the nearest archetype."""
    return np.linalg.norm(found[:, None] - corners, axis=2).min(axis=0)


@pytest.mark.parametrize(("n", "k"), [(3, 2), (3, 5), (5, 4), (8, 20)])
def test_corners_of_a_simplex_are_found(n: int, k: int) -> None:
    z, corners = simplex(400, n, k)
    found = archetypes(z, n)
    assert gaps(found.archetypes, corners).max() < 0.05
    assert found.explained_variance > 0.9999


def test_corners_are_found_among_noise() -> None:
    z, corners = simplex(1000, 4, 6, noise=0.1)
    found = archetypes(z, 4)
    assert gaps(found.archetypes, corners).max() < 0.5
    rest = 0.1**2 * z.size / ((z - z.mean(axis=0)) ** 2).sum()
    assert found.explained_variance == pytest.approx(1 - rest, abs=0.01)


def test_result_is_what_it_says() -> None:
    z = np.random.default_rng(1).normal(size=(200, 4))
    found = archetypes(z, 5, n_nearest=3)
    assert found.weights.shape == (200, 5)
    np.testing.assert_allclose(found.weights.sum(axis=1), 1)
    assert (found.weights >= 0).all()
    assert (np.diff(found.weights.sum(axis=0)) <= 0).all(), "the most used first"
    left = ((z - found.weights @ found.archetypes) ** 2).sum()
    total = ((z - z.mean(axis=0)) ** 2).sum()
    assert found.explained_variance == pytest.approx(1 - left / total, abs=1e-9)
    for corner, near in zip(found.archetypes, found.nearest, strict=True):
        equal = np.vstack([z.T, np.ones(200)]), np.append(corner, 1)
        assert linprog(np.zeros(200), A_eq=equal[0], b_eq=equal[1]).success, "inside the hull"
        distance = np.linalg.norm(z - corner, axis=1)
        np.testing.assert_array_equal(near, np.argsort(distance)[:3])


def test_no_weights_are_better_for_these_archetypes() -> None:
    z = np.random.default_rng(2).normal(size=(60, 3))
    found = archetypes(z, 4, tolerance=1e-9)
    for cell, weights in zip(z[:10], found.weights[:10], strict=True):
        best = minimize(
            lambda w, cell=cell: ((cell - w @ found.archetypes) ** 2).sum(),
            np.full(4, 0.25),
            bounds=[(0, 1)] * 4,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        )
        here = ((cell - weights @ found.archetypes) ** 2).sum()
        assert here <= best.fun + 1e-4


def test_turned_shifted_and_scaled_cells_have_the_same_weights() -> None:
    z, _ = simplex(300, 4, 5, noise=0.2)
    turn, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(5, 5)))
    first, second = archetypes(z, 4), archetypes(7 * z @ turn + 100, 4)
    np.testing.assert_allclose(second.weights, first.weights, atol=1e-3)
    np.testing.assert_allclose(second.archetypes, 7 * first.archetypes @ turn + 100, atol=1e-2)
    assert second.explained_variance == pytest.approx(first.explained_variance, abs=1e-6)


def test_order_of_cells_and_seed_do_not_move_clear_corners() -> None:
    z, corners = simplex(300, 4, 5)
    order = np.random.default_rng(4).permutation(300)
    for found in (archetypes(z[order], 4), archetypes(z, 4, seed=9)):
        assert gaps(found.archetypes, corners).max() < 0.05
    again = archetypes(z, 4, seed=9)
    np.testing.assert_array_equal(again.weights, found.weights)


def test_more_archetypes_explain_more() -> None:
    z = np.random.default_rng(5).normal(size=(300, 6))
    explained = [archetypes(z, n).explained_variance for n in (2, 4, 8, 16)]
    assert (np.diff(explained) > 0.03).all()


def test_closed_forms() -> None:
    line = np.random.default_rng(6).normal(size=(50, 1))
    found = archetypes(line, 2)
    assert set(found.archetypes.ravel().round(6)) == {line.min().round(6), line.max().round(6)}
    assert found.explained_variance == pytest.approx(1)
    few = np.random.default_rng(7).normal(size=(5, 8))
    found = archetypes(few, 5)
    assert found.explained_variance == pytest.approx(1, abs=1e-5), "every cell is its own"
    assert found.nearest.shape == (5, 5)


def test_equal_cells_are_one_cell() -> None:
    corners = np.random.default_rng(8).normal(size=(3, 4))
    found = archetypes(np.repeat(corners, 20, axis=0), 3)
    assert gaps(found.archetypes, corners).max() < 1e-3
    chosen = furthest_sum(np.repeat(corners, 20, axis=0), 3, np.random.default_rng(0))
    assert len(np.unique(chosen // 20)) == 3


@pytest.mark.parametrize(
    ("z", "n", "says"),
    [
        (np.eye(4), 5, "5 archetypes of 4 different cells"),
        (np.repeat(np.eye(3), 9, axis=0), 4, "4 archetypes of 3 different cells.*Ask for 3"),
        (np.ones((9, 2)), 2, "2 archetypes of 1 different cells.*Give cells that differ"),
        (np.eye(4), 1, "Ask for two or more"),
    ],
)
def test_numbers_that_cannot_be(z: np.ndarray, n: int, says: str) -> None:
    with pytest.raises(ParameterError, match=says):
        archetypes(z, n)


def test_embeddings_that_are_none() -> None:
    with pytest.raises(DataError, match="no finite array"):
        archetypes(np.array([[0, 1], [np.nan, 2], [3, 4]]), 2)
    with pytest.raises(DataError, match="no finite array"):
        archetypes(np.arange(5.0), 2)
    with pytest.raises(ParameterError, match="nearest"):
        archetypes(np.eye(3), 2, n_nearest=0)


def test_a_search_that_is_cut_short_says_so() -> None:
    z = np.random.default_rng(9).normal(size=(200, 5))
    with pytest.warns(CoembedWarning, match="still gained after 2 rounds"):
        archetypes(z, 6, max_rounds=2)


def test_projection_onto_the_simplex_is_the_nearest_point() -> None:
    v = np.random.default_rng(10).normal(size=(20, 5))
    projected = onto_simplex(v)
    np.testing.assert_allclose(projected.sum(axis=1), 1)
    shares = np.random.default_rng(11).dirichlet(np.full(5, 0.5), 3000)
    for row, point in zip(v, projected, strict=True):
        # The gap v - p makes no acute angle with a step from p to any point of the simplex.
        assert ((shares - point) @ (row - point)).max() <= 1e-12
    np.testing.assert_allclose(onto_simplex(shares), shares, atol=1e-12)


def test_nearest_point_of_a_hull() -> None:
    random = np.random.default_rng(12)
    points = random.normal(size=(80, 4))
    start = (np.array([0]), np.ones(1))
    for scale in (0.2, 1.0, 5.0):
        target = scale * random.normal(size=4)
        active, weights = nearest_in_hull(points, target, start)
        assert weights.min() >= 0
        assert weights.sum() == pytest.approx(1)
        gap = target - weights @ points[active]
        assert ((points - weights @ points[active]) @ gap).max() <= 1e-6 * (1 + gap @ gap)
        warm = nearest_in_hull(points, target, nearest_in_hull(points, -target, start))
        np.testing.assert_allclose(warm[1] @ points[warm[0]], weights @ points[active], atol=1e-5)
    active, weights = nearest_in_hull(points, points.mean(axis=0), start)
    np.testing.assert_allclose(weights @ points[active], points.mean(axis=0), atol=1e-4)


def test_gradient_steps_never_leave_the_simplex_and_gain() -> None:
    random = np.random.default_rng(13)
    z, x = random.normal(size=(100, 6)), random.normal(size=(4, 6))
    weights = np.full((100, 4), 0.25)
    errors = []
    for _ in range(6):
        errors.append(((z - weights @ x) ** 2).sum())
        weights = mixtures(z, x, weights)
        np.testing.assert_allclose(weights.sum(axis=1), 1)
        assert weights.min() >= 0
    assert (np.diff(errors) <= 1e-9).all()


@pytest.mark.slow
def test_ten_thousand_cells_in_seconds() -> None:
    z, corners = simplex(10_000, 10, 20, noise=0.05)
    start = time.process_time()
    found = archetypes(z, 10)
    assert time.process_time() - start < 30
    assert found.explained_variance > 0.99
    assert (gaps(found.archetypes, corners) < 0.1 * np.linalg.norm(corners, axis=1)).all()
