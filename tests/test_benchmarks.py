"""The benchmark of the eight: one split for ours and scvi-tools', and a page that is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import eight
import eight_page
import numpy as np
import pytest
import scvi_tools
from eight import Dataset
from eight_page import Entry, Notes, Verdict, write_page
from scvi_tools import ScviPlan, as_mudata

from coembed.data.cells import Cells
from coembed.data.pilots import load_pilot
from coembed.data.pipeline import Pipeline
from coembed.data.simulate import simulate
from coembed.errors import DataError, ParameterError, StudyError
from coembed.metrics import score
from coembed.report.results import Score
from coembed.study import Ledger, Plan, Task
from coembed.study.ledger import new_row
from coembed.study.plan import held_out_rows, training_rows
from coembed.study.task import Source

SPLIT = ("fingerprint", "keys", "size", "replicate", "seed", "subsample_seed", "held_out",
         "held_out_seed", "n_permutations", "threads", "device")  # fmt: skip
"""What makes two tasks train on the same cells with the same seed, and be scored alike."""


@pytest.fixture
def scvi_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of scvi-tools' models where it need not be installed."""
    monkeypatch.setattr(scvi_tools, "version", lambda: "1.4.2")


@pytest.fixture
def any_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of models that need not be registered."""
    monkeypatch.setattr("coembed.study.plan.resolve_params", lambda *_: {})


@pytest.fixture(scope="module")
def cells() -> Cells:
    return simulate("cite", 120, n_types=3, n_genes=40, n_proteins=8, seed=1)


def pilot(name: str) -> Cells:
    try:
        return load_pilot(name)
    except DataError as error:
        pytest.skip(f"{name} is not there: {error.remedy}")


# -- the split ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(eight.DATASETS))
@pytest.mark.usefixtures("scvi_version", "any_model")
def test_scvi_tools_trains_on_the_cells_and_seeds_of_ours(name: str) -> None:
    """Whatever other models the ledger's plan has, and on the real pilots."""
    dataset, cells = eight.DATASETS[name], pilot(name)
    twins = [model for model in scvi_tools.TITLES if f"scvi-{model}" in dataset.models]
    ours = dataset.plan(cells, [m for m in dataset.models if not m.startswith("scvi-")])
    by_identity = {task.identity: task for task in ours.tasks(cells)}
    theirs = dataset.plan(cells, twins, ScviPlan).tasks(cells)
    assert len(theirs) == 3 * len(twins) > 0
    for task in theirs:
        twin = by_identity[task.identity]
        assert {f: getattr(task, f) for f in SPLIT} == {f: getattr(twin, f) for f in SPLIT}
        assert task.key != twin.key


def test_a_data_set_holds_out_a_fifth_but_at_most_500() -> None:
    cells = pilot("bmmc_cite_600")
    plan = Dataset("bmmc_cite_600", ("pca",)).plan(cells, ("pca",))
    assert (plan.held_out, plan.sizes, plan.replicates) == (120, (480,), 3)
    cells = pilot("pbmc10k_cite")
    plan = eight.DATASETS["pbmc10k_cite"].plan(cells, ("pca",))
    assert (plan.held_out, plan.sizes) == (500, (2500,))


# -- scvi-tools -----------------------------------------------------------------------------------


def test_mudata_is_padded_with_rows_of_zeros(cells: Cells) -> None:
    present = {"rna": np.ones(120, dtype=bool), "prot": np.arange(120) < 70}
    counts = {"rna": cells.counts["rna"], "prot": cells.counts["prot"].copy()}
    counts["prot"] = counts["prot"].multiply(present["prot"][:, None]).tocsr()
    mosaic = replace(cells, present=present, counts=counts)
    data = as_mudata(Pipeline({"rna": [], "prot": []}).fit(mosaic), mosaic)
    assert list(data.mod) == ["rna", "prot"]
    assert data["prot"].n_obs == data["rna"].n_obs == 120
    np.testing.assert_array_equal(data["prot"].X, counts["prot"].toarray())
    np.testing.assert_array_equal(np.asarray(data["prot"].X).sum(axis=1) > 0, present["prot"])
    assert list(data.obs["batch"]) == list(mosaic.batch)


def test_where_scvi_tools_is_missing_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scvi_tools, "find_spec", lambda _: None)
    with pytest.raises(StudyError, match=r"pip install scvi-tools==1\.4\.2"):
        scvi_tools.version()


def test_a_loss_that_falls_to_the_end_is_improving() -> None:
    steep, flat = np.linspace(10, 1, 100), np.exp(-np.arange(100.0))
    assert scvi_tools.improving(steep.tolist())
    assert not scvi_tools.improving(flat.tolist())  # the lowest is the last, by next to nothing
    assert not scvi_tools.improving([*steep, 2.0, 2.0, 2.0])  # the lowest is three epochs ago


@pytest.mark.slow
@pytest.mark.parametrize("model", ["totalvi", "multivi"])
@pytest.mark.filterwarnings("ignore")
def test_scvi_tools_are_scored_as_our_tasks_are(model: str, tmp_path: Path) -> None:
    pytest.importorskip("scvi", reason="scvi-tools is not installed")
    data = {"totalvi": "sim-cite", "multivi": "sim-multiome"}[model]
    cells = load_pilot(data)
    plan = ScviPlan.make(cells, data, [model], sizes=(120,), held_out=60, n_permutations=2)
    task = plan.tasks(cells)[0]
    task = replace(task, params={**task.params, "max_epochs": 2})
    source = Source(data, {}, plan.fingerprint, (model,), str(tmp_path))
    row = scvi_tools.execute(task, source)
    assert (row["status"], row["epochs"], row["stopped"]) == ("ok", 2, "cap")
    assert row["steps"] == 2  # 108 cells, one minibatch
    embedding = source.ledger.embedding(task.key)
    held_out = held_out_rows(cells.batch, 60, task.held_out_seed)
    np.testing.assert_array_equal(embedding["held_out_rows"], held_out)
    np.testing.assert_array_equal(
        embedding["train_rows"],
        training_rows(cells.n_cells, held_out, 120, task.subsample_seed),
    )
    table = score(
        embedding["held_out"],
        **cells.take(held_out).annotations,
        n_permutations=2,
        seed=task.subsample_seed,
    )
    told = [line for line in row["scores"] if line["evaluated_on"] == "held_out"]
    assert [(line["metric"], line["value"]) for line in told if not line["undefined"]] == [
        (line.metric, line.value) for line in table.itertuples() if not line.undefined
    ]


# -- the verdict ----------------------------------------------------------------------------------


def a_score(value: float, sd: float, undefined: int = 0) -> Score:
    return Score(value, 0.1, sd, sd, (), (), undefined, 0)


@pytest.mark.parametrize(
    ("ours", "theirs", "holds"),
    [
        ((0.70, 0.01), (0.60, 0.01), True),
        ((0.595, 0.01), (0.60, 0.01), True),
        ((0.595, 0.0), (0.60, 0.0), False),
        ((0.58, 0.01), (0.60, 0.01), False),
        # pooled: the root of the mean of 0 and 0.04^2 is 0.028
        ((0.573, 0.0), (0.60, 0.04), True),
        ((0.571, 0.0), (0.60, 0.04), False),
        ((0.60, float("nan")), (0.60, 0.01), True),
        ((0.59, float("nan")), (0.60, 0.01), False),
    ],
)
def test_ours_may_fall_short_by_one_pooled_sd(
    ours: tuple[float, float], theirs: tuple[float, float], holds: bool
) -> None:
    verdict = Verdict.of(a_score(*ours), a_score(*theirs))
    assert verdict is not None
    assert verdict.holds is holds
    assert verdict.difference == pytest.approx(ours[0] - theirs[0])


def test_what_is_no_measurement_is_not_compared() -> None:
    good = a_score(0.5, 0.1)
    assert Verdict.of(good, None) is None
    assert Verdict.of(good, a_score(float("nan"), 0.1)) is None
    assert Verdict.of(a_score(0.0, 0.1, undefined=1), good) is None


def test_a_footnote_is_there_once() -> None:
    notes = Notes()
    assert [notes.mark(text) for text in ("a", "b", "a", "")] == ["[^1]", "[^2]", "[^1]", ""]
    assert notes.lines() == ["[^1]: a.", "[^2]: b."]


# -- the page -------------------------------------------------------------------------------------

NMI = {"pca": (0.5, 0.5, 0.5), "totalvi": (0.60, 0.62, 0.64), "scvi-totalvi": (0.70, 0.71, 0.72)}


def write(
    folder: Path, plan: Plan, cells: Cells, nmi: Mapping[str, Any], spoilt: str = ""
) -> Ledger:
    """Write a ledger of made-up scores; the last seed of the model `spoilt` ends with an error."""
    ledger, tasks = Ledger(folder), plan.tasks(cells)
    run = {"stopped": "cap", "cpu_s": 5.0, "peak_memory_mb": 700.0, "parameters": 1234, "steps": 80}
    with ledger.locked():
        ledger.begin(plan, cells, tasks)
        for task in tasks:
            first, last = task.replicate == 0, task.replicate == 2
            if task.model == spoilt and last:
                ledger.write(new_row(task, "error", message="out of luck"))
                continue
            scores, wall_s = scores_of(task, nmi), 10.0 + task.replicate
            row = new_row(task, "ok", scores=scores, wall_s=wall_s, improving=first, **run)
            ledger.write(row)
    return ledger


def scores_of(task: Task, nmi: Mapping[str, Any]) -> list[dict[str, Any]]:
    blank = {"null": 0.1, "null_sd": 0.01, "normalised": 0.5, "undefined": False, "reason": ""}
    nothing = {"value": None, "undefined": True, "reason": "one site only"}
    return [
        {"evaluated_on": part, "metric": metric, **blank, **found}
        for part in ("held_out", "train")
        for metric, found in (
            ("nmi", {"value": nmi[task.model][task.replicate]}),
            ("trajectory", {"value": 0.9}),
            ("asw_site", nothing),
        )
    ]


@pytest.fixture
def page(
    tmp_path: Path, cells: Cells, any_model: None, scvi_version: None
) -> tuple[Path, dict[str, list[Entry]]]:
    """A page of made-up studies: pca, totalvi (a seed lost) and scvi-tools' totalvi."""
    dataset = Dataset("sim-cite", ("pca", "totalvi", "scvi-totalvi", "scalex"))
    ours, theirs = tmp_path / "ours", tmp_path / "ours" / "scvi_tools"
    write(ours, dataset.plan(cells, ["pca", "totalvi"]), cells, NMI, spoilt="totalvi")
    write(theirs, dataset.plan(cells, ["totalvi"], ScviPlan), cells,
          {"totalvi": NMI["scvi-totalvi"]})  # fmt: skip
    entries = [Entry("pca", ours), Entry("totalvi", ours), Entry("totalvi", theirs),
               Entry("scalex", ours)]  # fmt: skip
    path = tmp_path / "eight.md"
    write_page(path, {"sim-cite": entries, "later": [Entry("pca", tmp_path / "later")]})
    return path, {"sim-cite": entries}


def rows_under(text: str, heading: str) -> list[list[str]]:
    """Return the rows of the table under a heading, the header first."""
    after = text.split(f"{heading}\n", 1)[1].split("\n#", 1)[0]
    rows = [line.strip("| ").split(" | ") for line in after.splitlines() if line.startswith("|")]
    return [row for row in rows if set(row[0]) != {"-"}]


def test_the_page_shows_medians_sds_and_nulls(page: tuple[Path, Any]) -> None:
    text = page[0].read_text()
    header, pca, totalvi, scvi = rows_under(text, "### sim-cite: held-out cells")
    assert header == ["model", "NMI", "Trajectory"]  # the site is defined for nobody
    assert "Site ASW is not defined here: one site only." in text
    assert pca[1] == "0.500 ± 0.000 (0.100)"
    assert totalvi[1] == "0.610 ± 0.014 (0.100)"  # of the two seeds that ended well
    assert scvi[:2] == ["totalVI (scvi-tools 1.4.2)", "0.710 ± 0.010 (0.100)"]
    assert "1 of 3 seeds have no result (error: out of luck)" in text
    assert "(simulated)" in text
    cost = rows_under(text, "### sim-cite: cost")
    assert cost[1] == ["PCA", "11.0", "5.0", "700", "1,234", "80", "cap, still falling 1 of 3"]
    assert "Not run: scalex." in text
    assert "Not run yet: later." in text


def test_the_verdict_is_computed_and_trajectory_not_judged(page: tuple[Path, Any]) -> None:
    text = page[0].read_text()
    _, *rows = rows_under(text, "## totalVI and MultiVI against scvi-tools")
    held_out = [row for row in rows if row[2] == "held-out cells"]
    assert [row[3] for row in held_out] == ["NMI", "Trajectory"]
    # sds 0.0141 and 0.01, pooled 0.0122; 0.10 short
    assert held_out[0][4:] == ["0.610", "0.710", "-0.100", "0.012", "**no**"]
    assert held_out[1][-1] == "not judged"
    assert "It holds in 0 of 2 comparisons that are judged." in text


def test_without_a_row_there_is_no_page(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="nothing to make the page of"):
        write_page(tmp_path / "eight.md", {"later": [Entry("pca", tmp_path)]})
    assert not (tmp_path / "eight.md").exists()


def test_endings_are_counted() -> None:
    ends = [{"stopped": "early", "improving": False}, {"stopped": "cap", "improving": True},
            {"stopped": "early", "improving": False}]  # fmt: skip
    assert eight_page._stopped(ends) == "early 2, cap 1, still falling 1 of 3"


# -- the command ----------------------------------------------------------------------------------


def test_models_that_cannot_run_are_left_out_with_a_note(
    cells: Cells, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scvi_tools, "find_spec", lambda _: None)
    wanted = ["pca", "nobody", "portal", "scvi-totalvi"]
    assert list(eight.runnable(wanted, cells)) == ["pca"]
    notes = capsys.readouterr().err
    assert "nobody is left out: no model 'nobody'" in notes
    assert "portal is left out: Portal takes rna + atac, the data have rna + prot" in notes
    assert "scvi-totalvi is left out: scvi-tools is not installed" in notes


@pytest.mark.usefixtures("any_model")
def test_forgetting_a_model_keeps_the_others(tmp_path: Path, cells: Cells) -> None:
    plan = Dataset("sim-cite", ()).plan(cells, ["pca", "totalvi"])
    ledger = write(tmp_path, plan, cells, NMI)
    eight.forget(ledger, ["totalvi"])
    assert {row["task"]["model"] for row in ledger.rows()} == {"pca"}
    eight.forget(Ledger(tmp_path / "none"), ["pca"])  # nothing there, nothing to do


def test_an_unknown_name_is_refused() -> None:
    assert eight._listed("", ("a", "b")) == ("a", "b")
    assert eight._listed("b, a", ("a", "b")) == ("b", "a")
    with pytest.raises(ParameterError, match="totalvy"):
        eight._listed("totalvy", eight.MODELS)


@pytest.mark.slow
def test_one_command_runs_resumes_and_writes_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(eight, "OUT", tmp_path / "out")
    monkeypatch.setattr(eight, "PAGE", tmp_path / "eight.md")
    monkeypatch.setattr(eight, "DATASETS", {"sim-cite": Dataset("sim-cite", ("pca", "svd"), 100)})
    eight.main(["--models", "pca", "--jobs", "1"])
    tasks = tmp_path / "out" / "sim-cite" / "tasks"
    before = {path.name: path.stat().st_mtime_ns for path in tasks.glob("*.json")}
    assert len(before) == 3
    eight.main(["--models", "pca,svd", "--jobs", "1"])
    after = {path.name: path.stat().st_mtime_ns for path in tasks.glob("*.json")}
    assert len(after) == 6
    assert before.items() <= after.items()
    assert [row[0] for row in rows_under((tmp_path / "eight.md").read_text(),
            "### sim-cite: held-out cells")] == ["model", "PCA", "SVD"]  # fmt: skip
    capsys.readouterr()
