"""What every system must do that trains networks by stages, besides the contract of all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
from contract import Contract, without
from easy import easy_cells

from coembed.data.minibatches import Inputs
from coembed.errors import CoembedWarning, DataError, ParameterError

Terms = Mapping[str, Mapping[str, float]]
"""Player -> its terms and their weights at the end of the warm-up."""


class NetworkContract(Contract):
    """Tests of every system that trains a network by stages."""

    random = True
    presets = ("default", "review")
    validated: ClassVar[bool] = True

    def terms(self, kind: str) -> Terms:
        raise NotImplementedError

    def test_the_loss_falls(self, kind: str) -> None:
        history = self.model(kind).history
        column = "validation_loss" if self.validated else f"train_loss_{list(self.terms(kind))[-1]}"
        assert history[column].iloc[-1] < 0.95 * history[column].iloc[0]

    def test_history_has_every_named_term(self, kind: str) -> None:
        history = self.model(kind).history
        last = history.iloc[-1]
        named = {"stage", "epoch", "step", "learning_rate_factor", "ended"}
        for player, terms in self.terms(kind).items():
            loss = f"train_loss_{player}"
            named |= {loss, *(f"train_{term}" for term in terms)}
            total = sum(weight * last[f"train_{term}"] for term, weight in terms.items())
            assert last[loss] == pytest.approx(total, rel=1e-4), "the loss is the sum of its terms"
        if self.validated:
            terms = next(iter(self.terms(kind).values()))
            named |= {"validation_loss", *(f"validation_{term}" for term in terms)}
            total = sum(weight * last[f"validation_{term}"] for term, weight in terms.items())
            assert last["validation_loss"] == pytest.approx(total, rel=1e-4)
        assert set(history.columns) == named
        assert np.isfinite(history.drop(columns=["stage", "ended"]).to_numpy(dtype=float)).all()
        assert (history["ended"] != "").sum() == history["stage"].nunique()

    def test_cells_without_the_modality_to_embed_from_are_refused(self, kind: str) -> None:
        model, cells = self.model(kind), easy_cells(kind, 60, seed=9)
        role = cells.roles[1]
        if role not in model.n_features:
            pytest.skip("takes all modalities together")
        query = without(cells, role, np.arange(60) % 4 == 0)
        with pytest.raises(DataError, match=f"15 of 60 cells lack.*{role}"):
            model.get_latent_representation(query, modality=role)

    def test_a_file_with_the_source_alone_is_enough_to_translate(self, kind: str) -> None:
        model, cells = self.model(kind), easy_cells(kind, 30, seed=9)
        if "translate" not in self.system.card.abilities:
            pytest.skip("cannot translate, as its card says")
        first, second = cells.roles
        query = replace(
            cells,
            counts={first: cells.counts[first]},
            present={first: cells.present[first]},
            var={first: cells.var[first]},
        )
        np.testing.assert_allclose(
            model.translate(second, source=first, data=query),
            model.translate(second, source=first, data=cells),
            rtol=1e-4,
        )

    def test_a_hundred_cells_and_a_remainder_of_one(self, kind: str) -> None:
        """101 cells in minibatches of 50: the original samplers leave one of a single cell."""
        model = self.fit(easy_cells(kind, 101), batch_size=50, max_epochs=3, validation_fraction=0)
        assert model.outcome is not None
        assert model.outcome.status == "ok"
        assert model.outcome.warnings == []
        z = model.get_latent_representation()
        assert z.shape == (101, self.n_latent)
        assert np.isfinite(z).all()

    def test_a_batch_larger_than_the_data_is_announced(self) -> None:
        cells = easy_cells(self.kinds[0], 60)
        with pytest.warns(CoembedWarning, match=r"of \d+ cells are more than the 60") as caught:
            model = self.fit(cells, batch_size=500, max_epochs=1, validation_fraction=0)
        assert model.outcome is not None
        assert model.outcome.warnings == [str(w.message) for w in caught]

    def test_hyper_parameters_out_of_range_are_refused(self) -> None:
        cells = easy_cells(self.kinds[0], 30)
        wrong = {"max_epochs": 0, "batch_size": 1, "learning_rate": 0.0, "validation_fraction": 1.0,
                 "patience": 0, "n_latent": 0, "min_steps": -1}  # fmt: skip
        if "warm_up" in self.system.Params.model_fields:
            wrong["warm_up"] = 1.5
        for name, value in wrong.items():
            with pytest.raises(ParameterError, match=f"'{name}' cannot be {value}"):
                self.system(cells, **{name: value})

    def test_counts_its_parameters(self, kind: str) -> None:
        model = self.model(kind)
        total = sum(p.numel() for p in model.net.parameters())
        assert model.n_parameters == (total, total)
        assert self.system(easy_cells(kind, 30)).n_parameters == (0, 0)

    def test_max_epochs_by_hand_is_the_plan(self, kind: str) -> None:
        model = self.system(easy_cells(kind, 60), **{**self.params, "max_epochs": 50})
        model.train(3, progress=False, device="cpu")
        assert model.outcome is not None
        assert model.outcome.epochs == 3
        assert (model.params.max_epochs, model.params.min_steps) == (3, 0)

    def test_min_steps_lengthen_the_plan_at_few_cells(self) -> None:
        by_hand = {k: v for k, v in self.params.items() if k != "max_epochs"}
        model = self.system(easy_cells(self.kinds[0], 60), **by_hand, min_steps=500)
        assert model.epochs(steps_per_epoch=2) >= 250
        model = self.system(easy_cells(self.kinds[0], 60), **by_hand, min_steps=500, max_epochs=7)
        assert model.params.min_steps == 500, "asked for by hand, it holds"
        assert self.system(easy_cells(self.kinds[0], 60), max_epochs=7).params.min_steps == 0

    def test_training_resumes_from_a_checkpoint(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cells, file = easy_cells(self.kinds[0], 80), tmp_path / "run.ckpt"
        changes = {**self.params, "max_epochs": 5, "batch_size": 20}
        whole = self.fit(cells, **changes)
        gather, calls = Inputs.gather, iter(range(10**9))

        def interrupted(self: Inputs, draw: Any) -> Any:
            if next(calls) == 13:
                raise KeyboardInterrupt
            return gather(self, draw)

        with monkeypatch.context() as patch:
            patch.setattr(Inputs, "gather", interrupted)
            with pytest.raises(KeyboardInterrupt):
                self.system(cells, **changes).train(progress=False, device="cpu", checkpoint=file)
        assert file.exists()
        resumed = self.system(cells, **changes)
        resumed.train(progress=False, device="cpu", checkpoint=file)
        assert not file.exists()
        np.testing.assert_array_equal(
            resumed.get_latent_representation(), whole.get_latent_representation()
        )
        pd.testing.assert_frame_equal(resumed.history, whole.history)
        assert resumed.outcome == whole.outcome

    def test_a_diverging_run_ends_or_recovers_and_says_so(self, kind: str) -> None:
        model = self.fit(easy_cells(kind, 60), learning_rate=1e6, max_epochs=6)
        outcome = model.outcome
        assert outcome is not None
        factors = [event["lr_factor"] for event in outcome.events]
        assert factors, "a rate of a million goes wrong"
        np.testing.assert_allclose(factors, [0.1 ** (i + 1) for i in range(len(factors))])
        assert all(event["reason"] for event in outcome.events)
        if outcome.status == "diverged":
            assert outcome.stopped == "diverged"
            assert "diverged in stage" in outcome.message
            assert len(factors) == 3
        assert all(p.isfinite().all() for p in model.net.state_dict().values())
        losses = model.history.filter(like="loss").to_numpy(dtype=float)
        assert np.isfinite(losses).all()
        assert math.isfinite(float(model.get_latent_representation().sum()))
