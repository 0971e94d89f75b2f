"""What the base class and the registry do for every system."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from easy import easy_cells

import coembed
from coembed.data.write import to_mudata
from coembed.errors import DataError, ParameterError
from coembed.models import cards, get_model, model_names
from coembed.models.base import Facts, Model
from coembed.models.params import HyperParams, TrainingParams
from coembed.models.pca import PCA
from coembed.models.portal import Portal


def test_registry() -> None:
    assert {"pca", "svd", "cobolt", "scmm", "portal"} <= set(model_names())
    assert [card.name for card in cards()] == model_names()
    assert all(issubclass(get_model(name), Model) for name in model_names())
    with pytest.raises(ParameterError, match=r"no model 'cobold'.*Did you mean 'cobolt'"):
        get_model("cobold")


def test_takes_mudata_and_files(tmp_path: Path) -> None:
    cells = easy_cells("cite", 40)
    expected = PCA(cells).train(progress=False).get_latent_representation()
    mdata = to_mudata(cells)
    model = PCA(mdata, batch_key="batch").train(progress=False)
    np.testing.assert_allclose(model.get_latent_representation(), expected, atol=1e-4)
    assert model.batches == ["b0", "b1"]
    mdata.write(tmp_path / "cells.h5mu")
    from_file = PCA(str(tmp_path / "cells.h5mu"), batch_key=None).train(progress=False)
    np.testing.assert_allclose(from_file.get_latent_representation(), expected, atol=1e-4)
    assert from_file.batches == ["all"]
    folder = tmp_path / "model"
    model.save(folder)
    loaded = PCA.load(folder, mdata)
    np.testing.assert_allclose(loaded.get_latent_representation(), expected, atol=1e-4)


def test_the_example_of_the_package_runs() -> None:
    model = coembed.Cobolt(easy_cells("cite", 40))
    assert model.train(1, progress=False, device="cpu") is model
    assert model.get_latent_representation().shape == (40, 10)


def test_cells_in_another_order_keep_their_rows() -> None:
    cells = easy_cells("cite", 40)
    model = PCA(cells).train(progress=False)
    order = np.random.default_rng(0).permutation(40)
    z = model.get_latent_representation()
    np.testing.assert_allclose(
        model.get_latent_representation(cells.take(order)), z[order], atol=1e-5
    )


@pytest.mark.parametrize(("n", "held"), [(9, 0), (10, 1), (104, 10), (1000, 100)])
def test_split(n: int, held: int) -> None:
    model = get_model("scmm")(easy_cells("cite", 30), validation_fraction=0.1)
    rows, validation = model._split(n, seed=3)
    assert len(validation) == held
    np.testing.assert_array_equal(np.sort(np.concatenate([rows, validation])), np.arange(n))
    np.testing.assert_array_equal(model._split(n, seed=3)[1], validation)
    if held > 5:
        assert (model._split(n, seed=4)[1] != validation).any()


def test_extra_modalities_of_a_query_are_ignored() -> None:
    whole = easy_cells("all", 40)
    roles = ("rna", "prot")
    two = replace(
        whole,
        counts={role: whole.counts[role] for role in roles},
        present={role: whole.present[role] for role in roles},
        var={role: whole.var[role] for role in roles},
    )
    model = PCA(two).train(progress=False)
    np.testing.assert_array_equal(
        model.get_latent_representation(whole), model.get_latent_representation()
    )


def test_parameters_are_frozen_and_name_their_sources() -> None:
    params = TrainingParams.checked({}, model="m")
    with pytest.raises(ValueError, match="frozen"):
        params.max_epochs = 3
    with pytest.raises(ParameterError, match=r"model 'm'.*no hyper-parameter 'x'.*Known: none"):
        HyperParams.checked({"x": 1}, model="m")
    with pytest.raises(ParameterError, match=r"'batch_size' cannot be 1: .*cells in a minibatch"):
        TrainingParams.checked({"batch_size": 1}, model="m")


def test_presets_see_the_number_of_cells() -> None:
    review = Portal.presets["review"]
    sizes = [review(Facts(("rna", "atac"), n))["batch_size"] for n in (5, 500, 2500, 10_000)]
    assert sizes == [2, 50, 250, 500]


def test_unknown_batches_of_the_training_data_are_refused() -> None:
    with pytest.raises(DataError, match="nowhere"):
        PCA(to_mudata(easy_cells("cite", 30)), batch_key="nowhere")


def test_embedding_of_a_reader_that_writes_into_it() -> None:
    """The caller owns the table: writing into it changes nothing in the model."""
    model = PCA(easy_cells("cite", 30)).train(progress=False)
    z = model.get_latent_representation()
    kept = z.copy()
    z[:] = 0
    np.testing.assert_array_equal(model.get_latent_representation(), kept)
    assert isinstance(model.history, pd.DataFrame)
