"""The benchmark of speed: it does not disturb what it measures, counts rightly and resumes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import speed
import speed_floor
import speed_goals
import speed_parts
import speed_quality
import speed_scaling
import speed_sides
import speed_step
import torch
from speed_floor import Products
from speed_page import write_page
from speed_parts import Settings, measure
from speed_quality import Watch
from speed_sides import Epochs, described, simulated, train_ours
from threadpoolctl import threadpool_limits
from torch.utils.flop_counter import FlopCounterMode

from coembed.data.cells import Cells
from coembed.errors import ParameterError
from coembed.models import get_model
from coembed.nn.likelihoods import scaled_bernoulli
from coembed.nn.sparse import Linear

QUICK = Settings(threads=1, repeats=1, quick=True)
SMALL: dict[str, Any] = {"n_genes": 40, "n_proteins": 6, "n_peaks": 60}


@pytest.fixture(scope="module")
def cite() -> Cells:
    return simulated("cite", 120, **SMALL)


@pytest.fixture(autouse=True)
def _kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Results go to a folder of the test; numbers of threads are put back."""
    monkeypatch.setattr(speed_parts, "OUT", tmp_path / "out")
    monkeypatch.setattr(speed, "PAGE", tmp_path / "speed.md")
    threads = torch.get_num_threads()
    with threadpool_limits():
        yield
    torch.set_num_threads(threads)


# -- what is timed --------------------------------------------------------------------------------


def test_a_stages_first_and_last_epochs_are_not_timed() -> None:
    epochs = Epochs()
    epochs.starts = [("a", 0.0), ("a", 9.0), ("a", 10.0), ("b", 20.0), ("b", 30.0), ("b", 33.0)]
    epochs.starts += [("b", 35.0)]
    assert epochs.seconds == [1.0, 3.0, 2.0]


def test_watching_a_training_does_not_change_it(cite: Cells) -> None:
    """Neither the ticks nor evaluations in the middle of it."""
    plain = get_model("totalvi")(cite).train(4, seed=1, device="cpu", progress=False)
    watch, ticks = Watch(cite.take(np.arange(30)), every=1), []

    def tick(stage: str, model: Any) -> None:
        ticks.append(stage)
        if watch.due():
            watch.note(model)

    watched = train_ours("totalvi", cite, tick, epochs=4, seed=1)
    assert ticks == ["train"] * 4
    assert [point["epoch"] for point in watch.points] == [1, 2, 3]
    np.testing.assert_array_equal(
        watched.get_latent_representation(), plain.get_latent_representation()
    )


def test_the_objective_holds_reconstruction_and_kl_alone(cite: Cells) -> None:
    watch = Watch(cite, every=1)
    watch.note(train_ours("totalvi", cite, speed_quality.idle, epochs=1))
    (point,) = watch.points
    held = {"reconstruction_rna", "reconstruction_prot", "kl", "kl_background"}
    assert held < set(point["terms"])
    assert point["objective"] == pytest.approx(sum(point["terms"][name] for name in held))


def test_all_features_are_trained_on() -> None:
    cells = simulated("multiome", 60, n_genes=30, n_peaks=21_000)
    model = train_ours("multivi", cells, Epochs(), epochs=1, all_features=True)
    assert model.n_features == {"rna": 30, "atac": 21_000}


def test_peaks_are_about_as_dense_as_asked() -> None:
    for density in speed_sides.DEPTHS:
        cells = simulated("multiome", 300, density=density, n_genes=100, n_peaks=3000)
        assert described(cells)["density"]["atac"] == pytest.approx(density, rel=0.2)
        assert described(cells)["simulated"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux forgets a peak")
def test_memory_rises_by_what_is_allocated() -> None:
    found, _ = speed_sides.peak_while(lambda: np.ones(4_000_000), lambda x: np.ones(8_000_000))
    assert found["data_mb"] - found["imports_mb"] == pytest.approx(32, abs=8)
    assert found["peak_mb"] - found["data_mb"] == pytest.approx(64, abs=8)


# -- the floor ------------------------------------------------------------------------------------


def test_products_of_a_step_are_counted() -> None:
    products = Products()
    net = torch.nn.Sequential(torch.nn.Linear(20, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    x = torch.rand(5, 20)
    with FlopCounterMode(display=False, custom_mapping=products.formulas()) as counter:
        net(x).sum().backward()
    first, second = 2 * 5 * 20 * 8, 2 * 5 * 8 * 3
    want = 2 * first + 3 * second  # the input of the first layer needs no gradient
    assert sum(n * speed_floor.flops(shape) for shape, n in products.shapes.items()) == want
    assert counter.get_total_flops() == want


def test_a_sparse_factor_counts_by_its_entries() -> None:
    """Of our own layer: our own kernel forward, bags of embeddings for the gradient."""
    products, layer = Products(), Linear(20, 8)
    x = torch.zeros(5, 20)
    x[[0, 0, 1, 3, 4], [2, 7, 7, 11, 19]] = 1.0
    with FlopCounterMode(display=False, custom_mapping=products.formulas()), products.kernels():
        layer(x.to_sparse_csr()).sum().backward()
    assert products.own == 2 * 5 * 8
    assert products.sparse == 2 * products.own
    assert not products.shapes


def test_products_inside_a_kernel_are_counted() -> None:
    products, head = Products(), torch.nn.Linear(8, 20)
    rows, columns = torch.zeros(5), torch.zeros(20)
    with products.kernels():
        scaled_bernoulli(torch.ones(5, 20), torch.rand(5, 8), head, rows, columns, rows + 1)
    assert sum(products.shapes.values()) == 3  # logits, and the gradients by both factors
    assert products.own == 3 * 2 * 5 * 8 * 20


def test_products_in_place_and_into_an_output_are_counted() -> None:
    products = Products()
    a, b, c = torch.rand(3, 4), torch.rand(4, 5), torch.rand(3, 5)
    with FlopCounterMode(display=False, custom_mapping=products.formulas()):
        c.addmm_(a, b)
        torch.mm(a, b, out=c)
    assert products.shapes == {(1, 3, 4, 5, False, False): 2}


def test_sparse_layers_of_an_epoch_are_counted() -> None:
    cells = simulated("multiome", 130, density=0.02, n_genes=100, n_peaks=400)
    products = speed_floor.counted("multivi", cells)
    nnz = sum(x.nnz for x in cells.counts.values())  # both far below the density of a dense product
    # The encoder's and the depth's first layers, forward and the gradient of their weights.
    assert products.sparse == 2 * 2 * 2 * nnz * 128
    assert products.other == 0


@pytest.mark.parametrize("name", ["totalvi", "scalex"])
def test_a_step_has_a_floor_and_parts(name: str, cite: Cells, monkeypatch: Any) -> None:
    monkeypatch.setattr(speed_floor, "cells_of", lambda *_: cite)
    result = speed_floor.share(name, "cite", QUICK)
    step = np.median(result["seconds_per_step"])
    assert 0 < result["floor_seconds"] < step
    parts = result["parts"]
    assert set(parts) == {"gather", "forward and loss", "backward", "optimiser", "rest", "step"}
    assert all(seconds > 0 for seconds in parts.values())
    json.dumps(result, allow_nan=False)


def test_all_eight_are_measured() -> None:
    parts = speed_floor.floor(QUICK)
    assert {part.split()[0] for part in parts} == set(speed_step.EIGHT)
    assert len(parts) == 10


# -- goals and the page ---------------------------------------------------------------------------


def curve(*objectives: float) -> dict[str, Any]:
    points = [{"epoch": 10 * i, "objective": v} for i, v in enumerate(objectives, start=1)]
    cells = {"name": "toy", "simulated": True, "cells": 9, "features": {"rna": 3}, "density": {}}
    last = points[-1]
    return {"cells": cells, "epochs": last["epoch"], "final": last["objective"], "curve": points}


def test_a_race_is_won_when_the_peers_last_value_is_reached() -> None:
    results = {
        "totalvi scvi 0": curve(90, 80, 70, 60, 60, 60, 60, 60),
        "totalvi ours 0": curve(61, 59),
        "totalvi ours 1": curve(60),
        "totalvi ours 2": curve(65, 66),
        "totalvi pace": {"seconds_per_epoch": {"ours": [0.5, 1.0], "scvi": [2.0, 3.0]}},
    }
    race = speed_goals.race("totalvi", results)
    assert race is not None
    assert (race["their_epochs"], race["their_first"], race["our_epochs"]) == (80, 40, [20, 10])
    assert (race["theirs"], race["ours"]) == ([160, 240], [7.5, 15])
    assert race["ratio"]["median"] == pytest.approx((160 / 7.5 + 240 / 15) / 2)
    assert speed_goals.race("multivi", results) is None
    del results["totalvi ours 1"]
    half = speed_goals.race("totalvi", results)
    assert half is not None
    assert half["ratio"] is None, "half of them is not enough"


def test_memory_is_what_the_training_adds_over_what_it_needs() -> None:
    memory = {"imports_mb": 300, "peak_mb": 900, "csr_mb": 350, "parameters_and_optimiser_mb": 50}
    assert speed_goals.memory_ratio(memory) == 1.5


def test_growth_is_the_power_at_the_three_largest_sizes() -> None:
    results = {
        f"multivi {n}": {"seconds_per_epoch": [n**1.5]} for n in (10, 1000, 10_000, 100_000)
    } | {"totalvi 10": {"seconds_per_epoch": [1.0]}}
    assert speed_goals.growth("multivi", results) == pytest.approx(1.5)
    assert speed_goals.growth("totalvi", results) is None


def record(result: dict[str, Any]) -> dict[str, Any]:
    base = {"threads": 2, "load_before": 0.1, "date": "2026-01-01T00:00:00", "commit": "abc"}
    return {"result": result, "machine": speed_parts.machine(), **base}


def test_the_page_judges_what_was_measured_and_nothing_else(tmp_path: Path) -> None:
    step = {
        "cells": curve(1)["cells"], "device": "cpu", "batch_size": 128, "their_sizes": {},
        "default_sizes": {}, "steps_per_epoch": {"ours": 2, "scvi": 2},
        "seconds_per_epoch": {"ours": [1.0, 2.0, 1.0], "scvi": [4.0, 4.0, 5.0]},
    }  # fmt: skip
    study = {"training_s": 50.0, "scoring_s": 20.0, "wall_s": 50.0, "workers": 2, "tasks": 9,
             "not_ok": 0, "in_tasks_s": 80.0, "cells": curve(1)["cells"]}  # fmt: skip
    found = {"step": {"multivi": record(step)}, "study": {"run 0": record(study)}}
    write_page(tmp_path / "page.md", found)
    text = (tmp_path / "page.md").read_text()
    assert "| a step of MultiVI against scvi-tools' | at least 3x | 4.00x | yes |" in text
    assert "| a step of totalVI against scvi-tools' | at least 1.7x | – | – |" in text
    assert "| a study's time in training and scoring | at least 0.8 | 0.70 | **no** |" in text
    assert "| coembed, default sizes | 2 | 500 (500-1e+03) |" in text
    assert "toy (simulated)" in text
    assert "No GPU was there." in text
    assert text.count("Not measured.") == 4


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sections of made-up parts, run in this process; the list of those that ran."""
    ran: list[str] = []

    def part(name: str) -> Callable[[], dict[str, Any]]:
        def run() -> dict[str, Any]:
            ran.append(name)
            if name == "bad":
                raise RuntimeError("no luck")
            return {"value": len(ran)}

        return run

    def child(command: list[str], **_: Any) -> Any:
        section, name = command[-2:]
        try:
            measure(QUICK, section, name, part(name))
        except RuntimeError:
            return subprocess.CompletedProcess(command, 1)
        return subprocess.CompletedProcess(command, 0)

    parts = {"one": ("a", "b"), "two": ("bad", "c")}
    sections = {
        s: (lambda _, n=names: {name: part(name) for name in n}) for s, names in parts.items()
    }
    monkeypatch.setattr(speed, "SECTIONS", sections)
    monkeypatch.setattr(speed.subprocess, "run", child)
    monkeypatch.setattr(speed_parts, "_commit", lambda: "abc")
    return ran


def test_a_run_goes_on_where_it_was_stopped(runs: list[str]) -> None:
    assert speed.run(QUICK, ["one"], redo=False)
    assert not speed.run(QUICK, ["one", "two"], redo=False), "a part failed"
    assert runs == ["a", "b", "bad", "c"]
    assert set(speed_parts.kept(QUICK, "two")) == {"c"}
    assert speed.run(QUICK, ["one"], redo=True)
    assert runs[4:] == ["a", "b"]
    kept = json.loads((speed_parts.OUT / "quick" / "one.json").read_text())["a"]
    assert kept["result"] == {"value": 5}
    assert (kept["threads"], kept["commit"]) == (1, "abc")


def test_an_unknown_section_is_refused() -> None:
    assert speed._listed("floor, step") == ["floor", "step"]
    assert speed._listed("") == list(speed.SECTIONS)
    with pytest.raises(ParameterError, match="stepp"):
        speed._listed("stepp")


def test_a_smoke_run_leaves_the_real_page_alone(tmp_path: Path) -> None:
    speed.publish(QUICK)
    assert "say nothing of speed" in (tmp_path / "out" / "quick" / "speed.md").read_text()
    assert not (tmp_path / "speed.md").exists()
    speed.publish(Settings())
    assert json.loads((tmp_path / "speed.json").read_text())["step"] == {}


def test_a_point_of_the_scaling_is_measured() -> None:
    result = speed_scaling.point("totalvi", n_cells=100, n_genes=30, n_proteins=5)
    assert len(result["seconds_per_epoch"]) == 5
    assert result["memory"]["csr_mb"] > 0
    json.dumps(result, allow_nan=False)


# -- scvi-tools -----------------------------------------------------------------------------------


@pytest.mark.slow  # scvi-tools takes half a minute to import
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["totalvi", "multivi"])
def test_copied_weights_have_scvi_tools_own_objective(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained weights, all cells as one minibatch, latent variables at their means."""
    pytest.importorskip("scvi", reason="scvi-tools is not installed")
    import scvi_weights

    from coembed.nn.posteriors import Gaussian

    kind = {"totalvi": "cite", "multivi": "multiome"}[name]
    cells = simulated(kind, 100, **SMALL)
    theirs = speed_sides.train_scvi(
        name, speed_sides.counts_for_scvi(cells), speed_quality.idle, max_epochs=2,
        **speed_sides.bare(name),
    )  # fmt: skip
    sizes = scvi_weights.sizes(name, theirs.module)
    ours = train_ours(name, cells, speed_quality.idle, epochs=1, all_features=True, **sizes)
    scvi_weights.load(name, ours, theirs.module)
    monkeypatch.setattr(Gaussian, "sample", lambda q: q.mean)
    monkeypatch.setattr(torch.distributions.Normal, "rsample", lambda q: q.loc)
    watch = Watch(cells, every=1)
    watch.note(ours)
    theirs.module.eval()
    loader = theirs._make_data_loader(theirs.adata, batch_size=100)
    with torch.no_grad():
        loss = theirs.module(next(iter(loader)))[2]
    terms = watch.points[0]["terms"]
    reconstruction = sum(v for k, v in terms.items() if k.startswith("reconstruction"))
    want = sum(v.mean() for v in loss.reconstruction_loss.values())
    assert reconstruction == pytest.approx(float(want), rel=1e-4)
    kl = {"totalvi": "kl_div_z", "multivi": "kl_divergence_z"}[name]
    assert terms["kl"] == pytest.approx(float(loss.kl_local[kl].mean()), rel=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_both_sides_take_as_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scvi", reason="scvi-tools is not installed")
    result = speed_step.compare("multivi", QUICK)
    assert set(result["seconds_per_epoch"]) == {"ours", "ours_at_their_sizes", "scvi"}
    assert len(set(result["steps_per_epoch"].values())) == 1
    assert result["their_sizes"] == {"n_hidden": 17, "n_latent": 4}
    json.dumps(result, allow_nan=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_peers_curve_is_that_of_its_own_weights() -> None:
    pytest.importorskip("scvi", reason="scvi-tools is not installed")
    result = speed_quality.peer("multivi", "sim-multiome", 0, QUICK)
    assert [point["epoch"] for point in result["curve"]] == [5, 6]
    assert result["curve"][1]["objective"] < result["curve"][0]["objective"]
    assert result["final"] == result["curve"][-1]["objective"]
    json.dumps(result, allow_nan=False)
