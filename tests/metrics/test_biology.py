"""NMI, ARI, AMI and the cell-type silhouette: metrics.md section 9, N1, N2, S1-S3, B4."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import normalized_mutual_info_score, silhouette_samples

from coembed import metrics

AAABBB = np.array(list("aaabbb"))


def column(*x: float) -> np.ndarray:
    return np.array(x, dtype=float)[:, None]


def test_n1_agreement_of_two_labelings():
    clusters = np.array([0, 0, 1, 1, 2, 2])
    assert metrics.nmi(AAABBB, clusters) == pytest.approx(
        4 * np.log(2) / (3 * np.log(6)), abs=1e-12
    )
    assert metrics.nmi(AAABBB, clusters) == pytest.approx(0.515803743, abs=5e-10)
    assert metrics.ari(AAABBB, clusters) == pytest.approx(0.8 / 3.3, abs=1e-12)


def test_n2_a_single_cluster():
    one = np.zeros(6)
    assert metrics.nmi(AAABBB, one) == 0
    assert metrics.ari(AAABBB, one) == 0
    assert metrics.nmi(one, one) == 1


def test_nmi_is_that_of_sklearn():
    rng = np.random.default_rng(0)
    for n_labels, n_clusters in ((2, 9), (22, 17), (5, 1)):
        labels, clusters = rng.integers(n_labels, size=300), rng.integers(n_clusters, size=300)
        expected = normalized_mutual_info_score(labels, clusters)
        assert metrics.nmi(labels, clusters) == pytest.approx(expected, abs=1e-12)


def test_best_partition_is_the_first_maximum_above_zero():
    good, same_again = np.array([0, 0, 0, 1, 1, 1]), np.array([1, 1, 1, 0, 0, 0])
    partitions = np.array([np.zeros(6, dtype=int), [0, 0, 1, 1, 2, 2], good, same_again])
    value, index = metrics.best_partition(AAABBB, partitions)
    assert (value, index) == (1, 2)
    value, index = metrics.best_partition(AAABBB, partitions[:1])
    assert (value, index) == (0, -1)
    values, indices = metrics.best_partition(np.array([AAABBB, list("aabbcc")]), partitions)
    np.testing.assert_allclose(values, 1)
    np.testing.assert_array_equal(indices, [2, 1])


def test_s1_two_labels():
    x, labels = column(0, 1, 3, 4), np.array(list("aabb"))
    np.testing.assert_allclose(metrics.silhouette_samples(x, labels), [5 / 7, 3 / 5, 3 / 5, 5 / 7])
    assert metrics.label_asw(x, labels) == pytest.approx(29 / 35, abs=1e-12)


def test_s2_mean_over_cells_not_over_types():
    x, labels = column(0, 1, 3, 4, 20, 21, 22, 23), np.array(list("aabbcccc"))
    s = metrics.silhouette_samples(x, labels)
    assert s.mean() == pytest.approx(0.782066582, abs=5e-10)
    assert np.mean([s[labels == one].mean() for one in "abc"]) == pytest.approx(
        0.740425340, abs=5e-10
    )
    assert metrics.label_asw(x, labels) == pytest.approx(0.891033291, abs=5e-10)


def test_s3_a_single_cell_of_a_label():
    s = metrics.silhouette_samples(column(0, 1, 5), np.array(list("aab")))
    np.testing.assert_allclose(s, [0.8, 0.75, 0], atol=1e-12)


def test_b4_identical_points():
    assert metrics.label_asw(np.ones((8, 3)), np.array(list("aabbccdd"))) == 0.5


def test_label_asw_needs_two_to_n_minus_1_labels():
    assert np.isnan(metrics.label_asw(column(0, 1, 3), np.array(list("aaa"))))
    assert np.isnan(metrics.label_asw(column(0, 1, 3), np.array(list("abc"))))


def test_silhouettes_are_those_of_sklearn_for_every_chunk_and_many_labelings():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(131, 6)).astype(np.float32)
    labelings = rng.integers(7, size=(4, 131))
    expected = [silhouette_samples(x.astype(float), labels) for labels in labelings]
    for chunk in (1, 50, 131, 1000):
        got = metrics.silhouette_samples(x, labelings, chunk=chunk)
        np.testing.assert_allclose(got, expected, atol=1e-9)
        np.testing.assert_array_equal(got[2], metrics.silhouette_samples(x, labelings[2], chunk))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(5, 40), st.integers(2, 4), st.booleans())
def test_names_and_order_do_not_matter_and_values_are_in_range(seed, n, n_labels, ties):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3))
    x = x.round() if ties else x
    labels, clusters = rng.integers(n_labels, size=n), rng.integers(5, size=n)
    renamed = np.array(["d", "a", "c", "b"])[labels]
    order = rng.permutation(n)
    for metric, first in (
        (metrics.nmi, clusters),
        (metrics.ari, clusters),
        (metrics.ami, clusters),
    ):
        value = metric(labels, first)
        assert metric(renamed, first) == pytest.approx(value, abs=1e-9)
        assert metric(labels[order], first[order]) == pytest.approx(value, abs=1e-9)
        assert -1 <= value <= 1 + 1e-12
    assert 0 <= metrics.nmi(labels, clusters) <= 1
    value = metrics.label_asw(x, labels)
    assert metrics.label_asw(x, renamed) == pytest.approx(value, abs=1e-9, nan_ok=True)
    assert metrics.label_asw(x[order], labels[order]) == pytest.approx(value, abs=1e-9, nan_ok=True)
    assert np.isnan(value) or 0 <= value <= 1
