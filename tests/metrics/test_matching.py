"""FOSCTTM and the match score: translation_metrics.md section 6, the definition, errors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from coembed.errors import DataError
from coembed.metrics import foscttm, match_score

LINE = np.arange(5.0)[:, None]


def brute_force(a: np.ndarray, b: np.ndarray) -> float:
    """The definition of section 3, a loop over cells."""
    n, scores = len(a), []
    for one, other in ((a, b), (b, a)):
        for i in range(n):
            distances = ((one[i] - other) ** 2).sum(axis=1)
            rivals = np.delete(distances, i)
            ahead = (rivals < distances[i]).sum() + (rivals == distances[i]).sum() / 2
            scores.append(ahead / (n - 1))
    return float(np.mean(scores))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (LINE, LINE, 0.0),
        (LINE, LINE[::-1], 0.7),
        (LINE, 0 * LINE, 0.5),
        (0 * LINE, 0 * LINE, 0.5),
    ],
    ids=["itself", "reverse", "one collapsed", "both collapsed"],
)
def test_vectors_of_the_note(a, b, expected):
    assert foscttm(a, b) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n", [2, 7, 60])
@pytest.mark.parametrize("chunk", [1, 3, 7, 512])
def test_it_is_the_definition_ties_included_for_any_chunk(n, chunk):
    rng = np.random.default_rng(n)
    for a in (rng.normal(size=(n, 3)), rng.integers(3, size=(n, 2)).astype(float)):
        b = np.round(a + rng.normal(size=a.shape))
        assert foscttm(a, b, chunk) == pytest.approx(brute_force(a, b), abs=1e-12)


def test_a_collapse_in_any_number_of_dimensions_is_chance():
    """Not 0, which the strict count of other packages gives: no rounding may break the ties."""
    points = np.random.default_rng(0).normal(size=(1, 33)).astype(np.float32)
    assert foscttm(np.tile(points, (1111, 1)), np.tile(points + 1, (1111, 1))) == 0.5


def test_it_falls_from_chance_to_0_as_noise_goes():
    rng = np.random.default_rng(0)
    a, noise = rng.normal(size=(500, 8)), rng.normal(size=(500, 8))
    scores = [foscttm(a, a + spread * noise) for spread in (0.1, 0.5, 1, 3)]
    assert scores == sorted(scores)
    assert scores[0] < 0.001
    assert foscttm(a, noise) == pytest.approx(0.5, abs=0.02)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(1, 4), st.integers(0, 10_000))
def test_symmetry_order_and_scale(n, d, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(-5, 6, size=(2, n, d)).astype(float)
    value, order = foscttm(a, b), rng.permutation(n)
    assert 0 <= value <= 1
    assert foscttm(b, a) == pytest.approx(value, abs=1e-12)
    assert foscttm(a[order], b[order]) == pytest.approx(value, abs=1e-12)
    assert foscttm(4 * a + 1, 4 * b + 1) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, sparse.coo_array])
def test_match_score(form):
    n = 5
    assert match_score(form(np.ones((n, n)))) == pytest.approx(1 / n, abs=1e-15)
    assert match_score(form(3 * np.eye(n))) == 1
    # Without zeroing first, row 0 would be 2 / (2 - 1 + 1) = 1.
    weights = np.array([[2.0, -1, 1], [0, 0, 0], [-3, 1, 3]])
    assert match_score(form(weights)) == pytest.approx((2 / 3 + 0 + 3 / 4) / 3, abs=1e-15)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (LINE, LINE[:4], "shapes"),
        (LINE, np.c_[LINE, LINE], "shapes"),
        (LINE[:1], LINE[:1], "embedding a: has shape"),
        (LINE[:, 0], LINE, "embedding a: has shape"),
        (LINE, np.where(LINE == 3, np.nan, LINE), "embedding b: 1 of 5 .* first is cell 3"),
    ],
)
def test_embeddings_that_cannot_be_compared(a, b, message):
    with pytest.raises(DataError, match=message):
        foscttm(a, b)


@pytest.mark.parametrize(
    ("weights", "message"),
    [(np.ones((2, 3)), "shape"), (np.ones((0, 0)), "shape"), (np.full((2, 2), np.inf), "finite")],
)
def test_weights_that_cannot_be_scored(weights, message):
    with pytest.raises(DataError, match=message):
        match_score(weights)
