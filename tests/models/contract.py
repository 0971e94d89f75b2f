"""What every system must do. A system's test inherits it: a name, small hyper-parameters, terms."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from easy import easy_cells, mosaic, neighbour_accuracy
from scipy import sparse

from coembed.data.cells import Cells, Keys
from coembed.data.read import as_cells
from coembed.errors import CoembedError, DataError, ModelFileError, OutputError, ParameterError
from coembed.models import get_model, model_names
from coembed.models.base import Model
from coembed.models.saving import load_model


@cache
def trained(name: str, kind: str, params: tuple[tuple[str, Any], ...]) -> Model:
    """A model trained on easy cells, shared by the tests that only read it."""
    return get_model(name)(easy_cells(kind), **dict(params)).train(progress=False, device="cpu")


def subset(cells: Cells, role: str, columns: np.ndarray) -> Cells:
    """The cells with the features of one modality at `columns`."""
    return replace(
        cells,
        counts={**cells.counts, role: cells.counts[role][:, columns].tocsr()},
        var={**cells.var, role: cells.var[role].iloc[columns]},
    )


def without(cells: Cells, role: str, rows: np.ndarray) -> Cells:
    """The cells, of which those at `rows` (bool) lack a modality."""
    counts = sparse.csr_matrix(cells.counts[role].multiply(~rows[:, None]), dtype=np.float32)
    return replace(
        cells,
        counts={**cells.counts, role: counts},
        present={**cells.present, role: cells.present[role] & ~rows},
    )


class Contract:
    """Tests of every system."""

    name: ClassVar[str]
    params: ClassVar[Mapping[str, Any]] = {}
    kinds: ClassVar[tuple[str, ...]] = ("cite", "multiome")
    random: ClassVar[bool] = False
    presets: ClassVar[tuple[str, ...]] = ("default",)
    n_latent: ClassVar[int] = 10
    faults: ClassVar[Mapping[tuple[str, str], str]] = {}
    """(test, kind) -> what is known to be wrong; the test must fail until it is put right."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "kind" not in metafunc.fixturenames:
            return
        test = metafunc.function.__name__
        known = {
            kind: self.faults[test, kind] for kind in self.kinds if (test, kind) in self.faults
        }
        metafunc.parametrize("kind", [
            pytest.param(kind, marks=pytest.mark.xfail(strict=True, reason=known[kind]))
            if kind in known else kind
            for kind in self.kinds
        ])  # fmt: skip

    @property
    def system(self) -> type[Model]:
        return get_model(self.name)

    @property
    def cheap(self) -> dict[str, Any]:
        """Hyper-parameters for a training that need not learn."""
        return dict(self.params) | ({"max_epochs": 2} if self.random else {})

    def model(self, kind: str) -> Model:
        return trained(self.name, kind, tuple(self.params.items()))

    def fit(self, cells: Cells, seed: int = 0, **changes: Any) -> Model:
        made = self.system(cells, **{**self.cheap, **changes})
        return made.train(progress=False, device="cpu", seed=seed)

    # -- what it declares -------------------------------------------------------------------------

    def test_card(self) -> None:
        card = self.system.card
        assert card.name == self.name
        assert self.name in model_names()
        assert card.reference
        assert card.url.startswith("https://")
        assert set(card.pairing) <= {"paired", "unpaired", "mosaic"}
        assert set(self.presets) == {"default", *self.system.presets}
        for name, field in self.system.Params.model_fields.items():
            assert field.description, f"{name} has no description"
            assert field.json_schema_extra["source"], f"{name} has no source"

    # -- what it learns ---------------------------------------------------------------------------

    def test_embeds_types_apart(self, kind: str) -> None:
        z, labels = self.model(kind).get_latent_representation(), easy_cells(kind).labels
        shuffled = np.random.default_rng(0).permutation(labels)
        assert neighbour_accuracy(z, labels) > 0.95
        assert neighbour_accuracy(z, shuffled) < 0.5

    def test_embedding_is_a_finite_table(self, kind: str) -> None:
        model = self.model(kind)
        z = model.get_latent_representation()
        assert z.dtype == np.float32
        assert z.shape == (150, self.n_latent)
        assert np.isfinite(z).all()
        assert (z.std(axis=0) > 0).all(), "no dimension is constant"
        assert model.outcome is not None
        assert model.outcome.status == "ok"
        np.testing.assert_array_equal(z, model.get_latent_representation(easy_cells(kind)))
        np.testing.assert_array_equal(z, model.get_latent_representation())

    def test_same_seed_same_bits(self, kind: str) -> None:
        cells = easy_cells(kind)
        first, again, other = (self.fit(cells, seed) for seed in (0, 0, 1))
        z = first.get_latent_representation()
        np.testing.assert_array_equal(z, again.get_latent_representation())
        assert (z != other.get_latent_representation()).any() == self.random
        pd.testing.assert_frame_equal(first.history, again.history)

    def test_global_random_states_are_untouched(self) -> None:
        torch.manual_seed(11)
        np.random.seed(11)
        before, of_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
        self.fit(easy_cells(self.kinds[0])).get_latent_representation()
        assert torch.equal(torch.get_rng_state(), before)
        np.testing.assert_array_equal(np.random.get_state()[1], of_numpy)

    # -- cells it was not trained on --------------------------------------------------------------

    def test_held_out_cells_do_not_depend_on_their_neighbours(self, kind: str) -> None:
        model, held_out = self.model(kind), easy_cells(kind, 30, seed=9)
        z = model.get_latent_representation(held_out)
        assert neighbour_accuracy(z, held_out.labels) > 0.9
        rows = np.array([7, 3, 20])
        for some in (rows, rows[:1]):
            alone = model.get_latent_representation(held_out.take(some))
            np.testing.assert_allclose(alone, z[some], rtol=1e-3, atol=1e-4)

    def test_features_in_another_order_give_the_same_embedding(self, kind: str) -> None:
        model, cells = self.model(kind), easy_cells(kind, 30, seed=9)
        other = cells
        for role in cells.roles:
            order = np.random.default_rng(1).permutation(len(cells.var[role]))
            other = subset(other, role, order)
        np.testing.assert_allclose(
            model.get_latent_representation(other),
            model.get_latent_representation(cells),
            rtol=1e-3,
            atol=1e-4,
        )

    def test_missing_features_are_named(self, kind: str) -> None:
        model, cells = self.model(kind), easy_cells(kind, 30)
        for role in cells.roles:
            short = subset(cells, role, np.arange(1, len(cells.var[role])))
            with pytest.raises(DataError, match=f"{role}.*1 of the .* missing.*'{role}0'"):
                model.get_latent_representation(short)

    def test_a_new_batch_can_be_embedded(self, kind: str) -> None:
        cells = easy_cells(kind, 30, seed=9)
        new = replace(cells, obs=cells.obs.assign(batch="never seen"))
        z = self.model(kind).get_latent_representation(new)
        assert np.isfinite(z).all()
        assert neighbour_accuracy(z, cells.labels) > 0.9

    def test_one_modality_embeds_or_is_refused_by_name(self, kind: str) -> None:
        model, cells = self.model(kind), easy_cells(kind)
        with pytest.raises(ParameterError, match=r"no modality 'rnaa'.*"):
            model.get_latent_representation(modality="rnaa")
        for role in cells.roles:
            if role not in model.n_features:
                with pytest.raises(ParameterError, match=f"all modalities together, not '{role}'"):
                    model.get_latent_representation(modality=role)
                continue
            z = model.get_latent_representation(modality=role)
            assert len(z) == 150
            assert z.shape[1] == self.n_latent or not self.random, "svd gives the role's part"
            assert neighbour_accuracy(z, cells.labels) > 0.9, role

    # -- saving -----------------------------------------------------------------------------------

    def test_saved_and_loaded_it_embeds_bit_for_bit(self, kind: str, tmp_path: Path) -> None:
        model, cells = self.model(kind), easy_cells(kind, 30, seed=9)
        folder = tmp_path / "a" / "model"
        model.save(folder)
        assert sorted(path.name for path in folder.iterdir()) == [
            "model.json",
            "weights.safetensors",
        ]
        assert [path.name for path in folder.parent.iterdir()] == ["model"], "no temporary is left"
        for loaded in (self.system.load(folder), load_model(folder), Model.load(folder)):
            assert type(loaded) is type(model)
            np.testing.assert_array_equal(
                loaded.get_latent_representation(cells), model.get_latent_representation(cells)
            )
        loaded = self.system.load(folder, easy_cells(kind))
        np.testing.assert_array_equal(
            loaded.get_latent_representation(), model.get_latent_representation()
        )
        assert loaded.params == model.params
        assert loaded.outcome == model.outcome
        assert loaded.n_parameters == model.n_parameters
        assert (loaded.features, loaded.batches) == (model.features, model.batches)
        pd.testing.assert_frame_equal(loaded.history, model.history, check_dtype=False)
        again = tmp_path / "again"
        loaded.save(again)
        assert (again / "weights.safetensors").read_bytes() == (
            folder / "weights.safetensors"
        ).read_bytes()

    def test_saving_refuses_what_it_must(self, tmp_path: Path) -> None:
        model = self.model(self.kinds[0])
        with pytest.raises(ModelFileError, match="untrained model cannot be saved"):
            self.system(easy_cells(self.kinds[0])).save(tmp_path / "new")
        model.save(tmp_path / "model")
        with pytest.raises(OutputError, match="exists already"):
            model.save(tmp_path / "model")
        model.save(tmp_path / "model", overwrite=True)
        self.system.load(tmp_path / "model")
        with pytest.raises(DataError, match="has no cells"):
            self.system.load(tmp_path / "model").get_latent_representation()
        with pytest.raises(DataError, match="no cells to train on"):
            self.system.load(tmp_path / "model").train()

    def test_a_tampered_model_is_refused(self, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        self.model(self.kinds[0]).save(folder)
        weights, description = folder / "weights.safetensors", folder / "model.json"
        good_weights, good_facts = weights.read_bytes(), description.read_text()
        facts = json.loads(good_facts)

        def refused(match: str) -> None:
            with pytest.raises(ModelFileError, match=match):
                self.system.load(folder)
            weights.write_bytes(good_weights)
            description.write_text(good_facts)

        weights.write_bytes(good_weights[:-1] + bytes([good_weights[-1] ^ 1]))
        refused("weights.safetensors.*altered")
        weights.write_bytes(good_weights[:-9])
        refused("altered")
        weights.unlink()
        refused("missing")
        description.unlink()
        refused("not a saved coembed model")
        description.write_text(json.dumps({**facts, "preset": "other"}))
        refused("model.json.*altered")
        description.write_text(good_facts[:-40])
        refused("cannot be read")
        description.write_text("[]")
        refused("cannot be read")
        description.write_text(json.dumps({**facts, "format_version": facts["format_version"] + 1}))
        refused(f"format version {facts['format_version'] + 1}.*Update coembed")
        wrong = next(name for name in model_names() if name != self.name)
        with pytest.raises(ModelFileError, match=f"holds a {self.system.card.title} model, not a"):
            get_model(wrong).load(folder)
        with pytest.raises(ModelFileError, match="not a saved coembed model"):
            self.system.load(tmp_path / "nowhere")
        self.system.load(folder)

    # -- refusals ---------------------------------------------------------------------------------

    def test_parameters_are_refused_by_name(self) -> None:
        cells = easy_cells(self.kinds[0], 30)
        with pytest.raises(
            ParameterError, match=f"'{self.name}'.*'n_top_gene'.*Did you mean 'n_top_genes'"
        ):
            self.system(cells, n_top_gene=3)
        for value in (-1, 2.5, "many"):
            with pytest.raises(ParameterError, match=f"'n_top_genes' cannot be {value!r}"):
                self.system(cells, n_top_genes=value)
        with pytest.raises(ParameterError, match=r"no preset 'defalt'.*Did you mean 'default'"):
            self.system(cells, preset="defalt")
        with pytest.raises(ParameterError, match="device 'gpux' is not there"):
            self.system(cells).train(device="gpux", progress=False)

    def test_wrong_modalities_are_refused(self) -> None:
        for kind in ("cite", "multiome", "all"):
            cells = easy_cells(kind, 30)
            for roles in (cells.roles, *((role,) for role in cells.roles)):
                some = replace(
                    cells,
                    counts={r: cells.counts[r] for r in roles},
                    present={r: cells.present[r] for r in roles},
                    var={r: cells.var[r] for r in roles},
                )
                if roles in self.system.card.modalities:
                    self.system(some)
                    continue
                with pytest.raises(DataError, match=f"takes .*the data have {' . '.join(roles)}"):
                    self.system(some)

    def test_an_untrained_model_says_so(self) -> None:
        with pytest.raises(DataError, match=r"not trained.*train\(\)"):
            self.system(easy_cells(self.kinds[0], 30)).get_latent_representation()
        assert "not trained" in repr(self.system(easy_cells(self.kinds[0], 30)))
        assert "ok" in repr(self.model(self.kinds[0]))

    # -- mosaic and unpaired ----------------------------------------------------------------------

    def test_incomplete_cells_are_trained_on_or_refused(self, kind: str) -> None:
        cells = mosaic(easy_cells(kind))
        if "mosaic" not in self.system.card.pairing:
            lacking = int((~cells.paired).sum())
            with pytest.raises(DataError, match=f"{lacking} of 150 cells lack a modality"):
                self.system(cells, **self.params)
            return
        z = self.fit(cells, **self.params).get_latent_representation()
        assert z.shape == (150, self.n_latent)
        assert np.isfinite(z).all()
        assert neighbour_accuracy(z, cells.labels) > 0.9
        near = neighbour_accuracy(z[~cells.paired], cells.labels[~cells.paired])
        assert near > 0.7, "cells that lack a modality lie with their type"

    def test_a_query_that_lacks_a_modality_is_embedded_or_refused(self, kind: str) -> None:
        model, cells = self.model(kind), easy_cells(kind, 60, seed=9)
        rows = np.arange(60) % 4 == 0
        for role in cells.roles:
            query = without(cells, role, rows)
            if "mosaic" not in self.system.card.pairing:
                with pytest.raises(DataError, match="15 of 60 cells lack"):
                    model.get_latent_representation(query)
                continue
            z = model.get_latent_representation(query)
            assert np.isfinite(z).all()
            whole = model.get_latent_representation(cells)
            np.testing.assert_allclose(z[~rows], whole[~rows], rtol=1e-3, atol=1e-4)

    # -- sizes ------------------------------------------------------------------------------------

    def test_every_preset_trains(self, kind: str) -> None:
        for preset in self.presets:
            changes = {"max_epochs": 2} if self.random else {}
            model = self.system(easy_cells(kind), preset=preset, **changes)
            model.train(progress=False, device="cpu")
            assert model.preset == preset
            assert model.outcome is not None
            assert model.outcome.status == "ok"
            assert np.isfinite(model.get_latent_representation()).all()

    def test_thirty_cells_and_a_batch_larger_than_the_data(self, kind: str) -> None:
        changes = {"batch_size": 500} if self.random else {}
        z = self.fit(easy_cells(kind, 30), **changes).get_latent_representation()
        assert len(z) == 30
        assert np.isfinite(z).all()

    def test_data_of_one_batch(self, kind: str) -> None:
        one = easy_cells(kind, 60, n_batches=1)
        none = replace(one, keys=Keys(label="type"))
        z = [self.fit(cells).get_latent_representation() for cells in (one, none)]
        assert np.isfinite(z[0]).all()
        np.testing.assert_array_equal(z[0], z[1])

    # -- translation ------------------------------------------------------------------------------

    def test_translates_or_says_that_it_cannot(self, kind: str) -> None:
        model, cells = self.model(kind), easy_cells(kind)
        first, second = cells.roles
        if "translate" not in self.system.card.abilities:
            with pytest.raises(CoembedError, match=f"{self.system.card.title} cannot translate"):
                model.translate(second, source=first)
            return
        for source, target in ((first, second), (second, first)):
            table = model.translate(target, source=source)
            assert list(table.index) == list(cells.obs.index)
            assert list(table.columns) == model.decoded_features[target]
            out = table.to_numpy()
            assert out.dtype == np.float32
            assert out.shape == (150, model.n_features[target])
            assert np.isfinite(out).all()
            assert (out >= 0).all()
            # The features of a cell's own type are predicted above those of the others.
            owner = np.arange(out.shape[1]) % 60 % 3
            own = np.array(["A", "B", "C"])[owner] == cells.labels[:, None]
            up, down = np.where(own, out, np.nan), np.where(own, np.nan, out)
            right = np.nanmean(up, axis=1) > 1.5 * np.nanmean(down, axis=1)
            assert right.mean() > 0.9, f"{source} to {target}"
        with pytest.raises(ParameterError, match="no modality 'rnaa'"):
            model.translate("rnaa", source=first)
        with pytest.raises(ParameterError, match="no modality 'rnaa'"):
            model.translate(first, source="rnaa")

    # -- levels and new cells ---------------------------------------------------------------------

    def test_card_says_what_is_implemented(self) -> None:
        can, system = set(self.system.card.abilities), self.system
        assert ("denoise" in can) == (system.decode is not Model.decode)
        assert ("sample" in can) == (system.draw is not Model.draw)
        assert "denoise" in can or "translate" not in can

    def test_denoises_or_says_that_it_cannot(self, kind: str) -> None:
        model, cells = self.model(kind), easy_cells(kind)
        role = cells.roles[0]
        if "denoise" not in self.system.card.abilities:
            with pytest.raises(CoembedError, match=r"cannot decode features.*These can: .*cobolt"):
                model.get_normalized_expression(role)
            return
        for role in cells.roles:
            table = model.get_normalized_expression(role)
            assert table.shape == (150, len(model.decoded_features[role]))
            assert np.isfinite(table.to_numpy()).all()
            some = model.get_normalized_expression(role, cells.take(np.arange(7)))
            np.testing.assert_allclose(some, table[:7], rtol=1e-3, atol=1e-5)
            batches = [
                model.get_normalized_expression(role, transform_batch=b) for b in ("b0", "b1")
            ]
            both = model.get_normalized_expression(role, transform_batch=["b0", "b1"])
            np.testing.assert_allclose(both, (batches[0] + batches[1]) / 2, rtol=1e-4, atol=1e-6)
            in_b0 = (cells.obs["batch"] == "b0").to_numpy()
            np.testing.assert_allclose(table[in_b0], batches[0][in_b0], rtol=1e-4, atol=1e-6)
        with pytest.raises(ParameterError, match="no batch 'b7'"):
            model.get_normalized_expression(role, transform_batch="b7")
        with pytest.raises(ParameterError, match="no modality 'rnaa'"):
            model.get_normalized_expression("rnaa")

    def test_imputes_what_mosaic_cells_lack(self, kind: str) -> None:
        able = {"denoise"} <= set(
            self.system.card.abilities
        ) and "mosaic" in self.system.card.pairing
        model, cells = self.model(kind), easy_cells(kind, 60, seed=9)
        role = cells.roles[1]
        if not able:
            pytest.skip("takes no mosaic cells or does not decode, as its card says")
        with pytest.raises(DataError, match=f"every cell has '{role}', so there is nothing"):
            model.impute(role, cells)
        lacks = np.arange(60) % 4 == 0
        table = model.impute(role, without(cells, role, lacks))
        assert list(table.index) == list(cells.obs.index[lacks])
        owner = np.arange(table.shape[1]) % 60 % 3
        own = np.array(["A", "B", "C"])[owner] == cells.labels[lacks][:, None]
        up = np.nanmean(np.where(own, table, np.nan), axis=1)
        down = np.nanmean(np.where(own, np.nan, table), axis=1)
        assert (up > 1.5 * down).mean() > 0.9, "a cell's own features are above the others"

    def test_draws_new_cells_or_says_that_it_cannot(self, kind: str) -> None:
        model, cells = self.model(kind), easy_cells(kind)
        if "sample" not in self.system.card.abilities:
            with pytest.raises(CoembedError, match="cannot draw new cells"):
                model.sample(5)
            return
        drawn = model.sample(40, seed=3)
        for role in cells.roles:
            x = np.asarray(drawn[role].X.todense())
            assert x.shape == (40, len(model.decoded_features[role]))
            assert (x >= 0).all()
            np.testing.assert_array_equal(x, np.round(x))
            again = model.sample(40, seed=3)[role].X.todense()
            np.testing.assert_array_equal(x, again)
            assert (x != model.sample(40, seed=4)[role].X.todense()).any()
        assert drawn.uns["simulated"]
        assert set(model.sample(20, batch="b1").obs["batch"]) == {"b1"}
        near = cells.take(cells.labels == "A")
        drawn = as_cells(model.sample(60, near=near, seed=1), drop_empty=True)
        z = model.get_latent_representation(drawn)
        centres = np.stack([
            model.get_latent_representation()[cells.labels == name].mean(0) for name in "ABC"
        ])  # fmt: skip
        nearest = ((z[:, None] - centres) ** 2).sum(-1).argmin(1)
        assert (nearest == 0).mean() > 0.8, "drawn near type A, they are of type A"
        with pytest.raises(ParameterError, match="0 cells cannot be drawn"):
            model.sample(0)
        with pytest.raises(ParameterError, match="no batch 'b7'"):
            model.sample(5, batch="b7")

    # -- mapping ----------------------------------------------------------------------------------

    def test_new_batches_are_mapped_and_the_reference_stays(self, kind: str) -> None:
        model, cells = self.model(kind), easy_cells(kind, 60, seed=9)
        new = replace(cells, obs=cells.obs.assign(batch="new"))
        before = model.get_latent_representation()
        mapped = model.map_query(new, steps=20, progress=False)
        assert mapped.batches == [*model.batches, "new"]
        assert model.batches == ["b0", "b1"]
        np.testing.assert_array_equal(model.get_latent_representation(), before)
        after = mapped.get_latent_representation(easy_cells(kind))
        np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)
        z = mapped.get_latent_representation(new)
        assert np.isfinite(z).all()
        assert neighbour_accuracy(z, cells.labels) > 0.9
        known = model.map_query(cells, progress=False)
        assert known.batches == model.batches
        np.testing.assert_array_equal(
            known.get_latent_representation(cells), model.get_latent_representation(cells)
        )
