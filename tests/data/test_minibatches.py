"""Minibatches: every cell once an epoch, no batch of one, and rows that equal dense indexing."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from coembed.data.minibatches import Independent, Inputs, Shuffled
from coembed.data.pipeline import Block
from coembed.data.rows import ResidentRows, rows_of

CPU = torch.device("cpu")
sizes = st.integers(2, 90)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def inputs() -> Inputs:
    """Eleven cells: sparse counts 'a', dense values 'b' that the last three cells lack."""
    random = rng()
    a = random.poisson(1, (11, 5)).astype(np.float32)
    b = random.normal(size=(11, 3)).astype(np.float32)
    has = np.arange(11) < 8
    b[~has] = 0
    var = [pd.DataFrame(index=[f"{n}{i}" for i in range(w)]) for n, w in (("a", 5), ("b", 3))]
    blocks = {
        "a": Block(sparse.csr_matrix(a), var[0], a.sum(axis=1) + 7, np.ones(11, bool)),
        "b": Block(b, var[1], np.arange(11.0), has),
    }
    return Inputs(blocks, np.arange(11) % 4 - 1, CPU)


@given(n=sizes, batch_size=sizes)
def test_shuffled_visits_every_cell_once_in_even_batches(n: int, batch_size: int) -> None:
    rows = np.arange(n) * 3 + 1
    sampler = Shuffled([(("a", "b"), rows)], batch_size)
    draws = list(sampler.epoch(rng()))
    assert len(draws) == sampler.steps_per_epoch
    assert all(draw["a"] is draw["b"] or (draw["a"] == draw["b"]).all() for draw in draws)
    np.testing.assert_array_equal(np.sort(np.concatenate([d["a"] for d in draws])), rows)
    lengths = [len(draw["a"]) for draw in draws]
    assert min(lengths) >= 2, "batch normalisation fails on a single cell"
    assert max(lengths) - min(lengths) <= 1
    assert max(lengths) <= max(batch_size, 3), "three cells cannot be cut in two batches"


@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4), batch_size=st.integers(3, 50))
def test_groups_follow_in_turn_and_empty_ones_are_left_out(
    lengths: list[int], batch_size: int
) -> None:
    names = "abcd"
    sampler = Shuffled([((names[i],), np.arange(n)) for i, n in enumerate(lengths)], batch_size)
    draws = list(sampler.epoch(rng()))
    assert len(draws) == sampler.steps_per_epoch
    order = [next(iter(draw)) for draw in draws]
    assert order == sorted(order)
    for name, n in zip(names, lengths, strict=False):
        seen = [draw[name] for draw in draws if name in draw]
        assert sorted(np.concatenate(seen) if seen else []) == list(range(n))


def test_shuffled_differs_between_epochs_and_repeats_with_the_seed() -> None:
    sampler = Shuffled([(("a",), np.arange(50))], 10)
    order = lambda random: np.concatenate([d["a"] for d in sampler.epoch(random)])  # noqa: E731
    random = rng()
    first, second = order(random), order(random)
    assert (first != second).any()
    np.testing.assert_array_equal(order(rng()), first)


def test_a_sweep_goes_in_the_given_order() -> None:
    sampler = Shuffled([(("a",), np.array([5, 3, 9])), (("a", "b"), np.array([5, 3]))], 2)
    seen = [(tuple(draw), draw["a"].tolist()) for draw in sampler.sweep()]
    assert [name for name, _ in seen][-1] == ("a", "b")
    assert [row for name, rows in seen if name == ("a",) for row in rows] == [5, 3, 9]
    assert [row for name, rows in seen if name == ("a", "b") for row in rows] == [5, 3]


def test_independent_draws_with_replacement_even_where_the_batch_exceeds_the_data() -> None:
    sampler = Independent({"a": np.array([4, 6, 8]), "b": np.arange(100, 107)}, batch_size=50)
    assert sampler.steps_per_epoch == 1
    (draw,) = sampler.epoch(rng())
    assert len(draw["a"]) == len(draw["b"]) == 50
    assert set(draw["a"]) == {4, 6, 8}
    assert set(draw["b"]) == set(range(100, 107))


@given(a=sizes, b=sizes, batch_size=sizes)
def test_independent_draws_enough_for_the_larger_domain(a: int, b: int, batch_size: int) -> None:
    sampler = Independent({"a": np.arange(a), "b": np.arange(b)}, batch_size)
    draws = list(sampler.epoch(rng()))
    assert len(draws) == sampler.steps_per_epoch
    assert max(a, b) <= len(draws) * batch_size < max(a, b) + batch_size
    assert all(draw["a"].max() < a and draw["b"].max() < b for draw in draws)


def test_independent_domains_are_not_paired() -> None:
    sampler = Independent({"a": np.arange(1000), "b": np.arange(1000)}, 500)
    draw = next(iter(sampler.epoch(rng())))
    assert (draw["a"] == draw["b"]).mean() < 0.02
    assert abs(np.corrcoef(draw["a"], draw["b"])[0, 1]) < 0.15


def test_gather_equals_dense_indexing(inputs: Inputs) -> None:
    rows = {"a": np.array([3, 3, 10, 0]), "b": np.array([9, 1, 2, 2])}
    batch = inputs.gather(rows)
    for name, drawn in rows.items():
        block = inputs.blocks[name]
        dense = block.x.toarray() if sparse.issparse(block.x) else block.x
        np.testing.assert_array_equal(batch.x[name], dense[drawn])
        np.testing.assert_array_equal(batch.present[name], block.present[drawn])
        np.testing.assert_array_equal(batch.batch[name], inputs.batch[drawn])
        assert batch.x[name].dtype == torch.float32
        assert batch.present[name].dtype == torch.bool
        assert batch.batch[name].dtype == torch.int64
    assert len(batch) == 4


DEVICES = [CPU, *([torch.device("cuda")] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64])
@given(seed=st.integers(0, 2**31), n=st.integers(0, 9))
def test_rows_gathered_on_the_device_are_those_of_scipy(
    device: torch.device, kind: type, seed: int, n: int
) -> None:
    random = np.random.default_rng(seed)
    x = sparse.random_array((12, 7), density=0.3, rng=random, format="csr")
    x = sparse.csr_matrix((100 * x).astype(kind))
    rows = random.integers(0, 12, n)
    for give in (ResidentRows(x, device), rows_of(x, device, sparse=True)):
        found = give(rows)
        assert found.layout == torch.sparse_csr
        assert found.dtype == torch.float32
        assert found.device.type == device.type
        np.testing.assert_array_equal(found.to_dense().cpu(), x[rows].toarray().astype(np.float32))


def test_a_minibatch_does_not_share_memory_with_the_data(inputs: Inputs) -> None:
    before = inputs.blocks["b"].x.copy()
    inputs.gather({"b": np.arange(11)}).x["b"].zero_()
    np.testing.assert_array_equal(inputs.blocks["b"].x, before)


def test_having_and_take(inputs: Inputs) -> None:
    rows = np.array([10, 2, 8, 7])
    np.testing.assert_array_equal(inputs.having(["a"], rows), rows)
    np.testing.assert_array_equal(inputs.having(["a", "b"], rows), [2, 7])
    part = inputs.take(["b"], rows)
    assert part.n_cells == 4
    assert list(part.blocks) == ["b"]
    everything = dict(b=np.arange(4))
    np.testing.assert_array_equal(part.gather(everything).x["b"], inputs.gather({"b": rows}).x["b"])
    np.testing.assert_array_equal(part.present["b"], [False, True, False, True])
    np.testing.assert_array_equal(part.batch, inputs.batch[rows])


@given(n=st.integers(1, 11), size=st.integers(1, 15))
def test_chunks_keep_the_order(n: int, size: int) -> None:
    x = np.arange(11, dtype=np.float32)[:, None]
    one = Inputs({"a": Block(x, pd.DataFrame(index=["f"]), x[:, 0], x[:, 0] >= 0)}, x[:, 0], CPU)
    parts = list(one.chunks(np.arange(n)[::-1], size))
    assert max(map(len, parts)) <= size
    np.testing.assert_array_equal(torch.cat([p.x["a"][:, 0] for p in parts]), np.arange(n)[::-1])
