"""Batch silhouette and graph connectivity: metrics.md section 9, B1-B4, G1, G2."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from coembed import metrics

P = ([0, 1, 2, 3], "xyxy", "PPPP")
Q = ([0, 1, 2, 10, 11, 12], "xxxyyy", "QQQQQQ")
R = ([5, 6], "xy", "RR")


def gather(*types: tuple[list[int], str, str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n, 1) embedding, (n,) labels, (n,) batches."""
    x, batches, labels = (np.concatenate([list(one[part]) for one in types]) for part in range(3))
    return x.astype(float)[:, None], labels, batches


def graph_of(n: int, edges: list[tuple[int, int]]) -> sparse.csr_matrix:
    i, j = np.array(edges).T
    return sparse.csr_matrix((np.ones(2 * len(i)), (np.r_[i, j], np.r_[j, i])), shape=(n, n))


def test_b1_one_type():
    x, labels, batches = gather(P)
    np.testing.assert_allclose(metrics.silhouette_samples(x, batches), [0, -0.5, -0.5, 0])
    assert metrics.batch_asw(x, labels, batches) == pytest.approx(0.75, abs=1e-12)


def test_b2_mean_over_types_without_those_that_cannot_be_scored():
    assert metrics.batch_asw(*gather(Q)) == pytest.approx(0.134343434, abs=5e-10)
    x, labels, batches = gather(P, Q, R)
    np.testing.assert_array_equal(metrics.scorable_types(labels, batches), [True, True, False])
    assert metrics.batch_asw(x, labels, batches) == pytest.approx(0.442171717, abs=5e-10)


def test_b3_one_batch_cannot_be_scored():
    x, labels, _ = gather(P, Q)
    assert np.isnan(metrics.batch_asw(x, labels, np.full(len(x), "x")))
    assert np.isnan(metrics.batch_asw(*gather(R)))


def test_b4_identical_points():
    _, labels, batches = gather(P, Q)
    assert metrics.batch_asw(np.ones((10, 3)), labels, batches) == 1


@pytest.mark.parametrize(("n", "expected"), [(500, 0.82), (2500, 0.86), (5000, 0.89)])
def test_without_batch_effect_the_width_is_not_1_and_rises_with_n(n, expected):
    """metrics.md section 4: 22 Gaussian types in 10 dimensions, here of Dirichlet(0.8) shares."""
    rng = np.random.default_rng(0)
    widths = []
    for _ in range(3):
        labels = rng.choice(22, n, p=rng.dirichlet(np.full(22, 0.8)))
        x = 2 * rng.normal(size=(22, 10))[labels] + rng.normal(size=(n, 10))
        widths.append(metrics.batch_asw(x, labels, rng.integers(13, size=n)))
    assert np.mean(widths) == pytest.approx(expected, abs=0.02)


def test_several_labelings_are_scored_one_by_one():
    x, labels, batches = gather(P, Q, R)
    several = np.array([batches, batches[::-1], np.full(len(x), "x")])
    got = metrics.batch_asw(x, labels, several, chunk=3)
    np.testing.assert_allclose(got, [metrics.batch_asw(x, labels, one) for one in several])
    assert np.isnan(got[2])


def test_g1_share_of_the_largest_component():
    graph = graph_of(9, [(0, 1), (1, 2), (2, 3), (4, 5), (5, 6), (7, 8)])
    labels = np.array(list("AAAABBBBC"))
    assert metrics.graph_connectivity(graph, labels) == pytest.approx(0.916666667, abs=5e-10)
    several = np.array([labels, np.full(9, "A")])
    np.testing.assert_allclose(metrics.graph_connectivity(graph, several), [11 / 12, 4 / 9])


def test_g2_a_chain_is_connected():
    assert metrics.graph_connectivity(graph_of(3, [(0, 1), (1, 2)]), np.zeros(3)) == 1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(4, 40))
def test_names_and_order_do_not_matter_and_values_are_in_range(seed, n):
    rng = np.random.default_rng(seed)
    x, labels, batches = rng.normal(size=(n, 2)), rng.integers(3, size=n), rng.integers(3, size=n)
    order, names = rng.permutation(n), np.array(["c", "a", "b"])
    value = metrics.batch_asw(x, labels, batches)
    assert np.isnan(value) or 0 <= value <= 1
    for other in (
        metrics.batch_asw(x, names[labels], names[batches]),
        metrics.batch_asw(x[order], labels[order], batches[order]),
    ):
        assert other == pytest.approx(value, abs=1e-9, nan_ok=True)
    graph = sparse.random(n, n, density=1.5 / n, random_state=seed, format="csr")
    graph = sparse.csr_matrix(graph + graph.T)
    value = metrics.graph_connectivity(graph, labels)
    assert 0 < value <= 1
    assert metrics.graph_connectivity(graph, names[labels]) == pytest.approx(value)
    assert metrics.graph_connectivity(graph[order][:, order], labels[order]) == pytest.approx(value)
