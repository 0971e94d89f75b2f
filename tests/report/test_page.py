from __future__ import annotations

import base64
import io
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import studies

from coembed.errors import OutputError, ParameterError, StudyError
from coembed.report import build_report, page, umaps

SCRIPT = "<script>alert(1)</script>"
BROKEN = '"><img src=x onerror=alert(2)> $x^$ {{ 7 * 7 }} \x07'
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """The elements of a page, with their attributes, and its text outside drawings."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(self.source)
        assert self.open == [], "unclosed elements"
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script", "svg"} & set(self.open):
            self.text += f" {data}"

    @property
    def drawings(self) -> list[ElementTree.Element]:
        return [
            ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", self.source, re.S)
        ]


def make(folder: Path, **options) -> Page:
    return Page(build_report(folder, **({"formats": ()} | options)))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with every status, an undefined score, a model without a card, and hostile names."""
    folder = tmp_path_factory.mktemp("mixed")
    labels = (f"T {SCRIPT}", BROKEN, "_hidden", None)
    data = studies.cells(name=f"sim {SCRIPT}", labels=labels)
    data.obs["batch"] = [f"{BROKEN}{i % 2}" for i in range(data.n_cells)]
    study = studies.Study(folder, data, models=("pca", "cobolt", "home<b>made", "absent"))
    study.ledger.begin(study.plan, data, [])
    statuses = iter(["diverged", "error", "killed", "timeout", "out_of_memory"])
    for task in study.tasks():
        if task.model == "absent" and (status := next(statuses, None)):
            study.fail(task, status, f"message {SCRIPT} {BROKEN}")
        elif task.model == "cobolt" and task.replicate == 0:
            row = study.add(task, improving=True, stopped="cap", events=[{"lr_factor": 0.1}])
            line = next(line for line in row["scores"] if line["metric"] == "trajectory")
            line.update(value=0.0, undefined=True, reason=f"the root is {SCRIPT}")
            study.ledger.write(row)
        elif task.model != "absent":
            study.add(task)
    build_report(folder, formats=("png", "pdf"))
    return folder


@pytest.fixture(scope="module")
def mixed_page(mixed: Path) -> Page:
    return Page(mixed / "report.html")


def test_hostile_names_stay_text(mixed_page: Page) -> None:
    scripts = [tag for tag, _ in mixed_page.elements if tag == "script"]
    assert len(scripts) == 1
    assert SCRIPT not in mixed_page.source
    assert not any(name.startswith("on") for _, attrs in mixed_page.elements for name in attrs)
    assert not any(tag in ("img", "b", "iframe", "object") for tag, _ in mixed_page.elements)
    # ... and are all there, unevaluated.
    assert f"How many cells? sim {SCRIPT}" in mixed_page.text
    assert f"T {SCRIPT}" in mixed_page.text
    assert f"message {SCRIPT}" in mixed_page.text
    assert f"the root is {SCRIPT}" in mixed_page.text
    assert mixed_page.text.count("{{ 7 * 7 }}") >= 3
    assert "home<b>made" in mixed_page.text
    assert "49" not in mixed_page.text.replace(" ", "")[:2000]


def test_nothing_is_loaded_from_elsewhere(mixed_page: Page) -> None:
    for tag, attrs in mixed_page.elements:
        for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            value = attrs.get(name, "")
            if tag == "a" and name == "href":
                relative = value.startswith(("#", "data:text/csv", "figures/", "scores.json"))
                assert relative or value.startswith("https://"), value
            else:
                assert value == "" or value.startswith(("#", "data:")), (tag, name, value)
        if tag == "meta" and "http-equiv" in attrs:
            assert attrs["content"].startswith("default-src 'none'")
    assert "@import" not in mixed_page.source
    assert set(re.findall(r"url\((.)", mixed_page.source)) <= {"#"}
    assert not any(tag in ("link", "iframe", "object", "embed") for tag, _ in mixed_page.elements)


def test_ids_are_unique_and_point_somewhere(mixed_page: Page) -> None:
    ids = Counter(attrs["id"] for _, attrs in mixed_page.elements if "id" in attrs)
    assert max(ids.values()) == 1
    links = {
        value[1:]
        for _, attrs in mixed_page.elements
        for value in (attrs.get("href", ""), attrs.get("xlink:href", ""))
        if value.startswith("#")
    }
    links |= set(re.findall(r"url\(#([^)]+)\)", mixed_page.source))
    assert links
    assert links <= ids.keys()


def test_drawings_are_whole_and_described(mixed_page: Page) -> None:
    drawings = mixed_page.drawings
    assert len(drawings) == 10  # two parts of four, cost, UMAPs
    assert all(svg.get("role") == "img" and svg.get("aria-label") for svg in drawings)
    assert all("simulated data" in " ".join(svg.itertext()) for svg in drawings)


def test_failures_say_what_to_do(mixed_page: Page) -> None:
    assert "5 of 23 tasks did not end well (1 diverged, 1 error, 1 killed" in mixed_page.text
    assert "1 planned tasks have no result yet" in mixed_page.text
    for status, remedy in page.AGAIN.items():
        assert f"{status.replace('_', ' ')} message" in mixed_page.text
        assert remedy in mixed_page.text


def test_cautions_and_cost(mixed_page: Page) -> None:
    assert "These data are simulated." in mixed_page.text
    assert "2 trainings reached their limit of epochs while still improving" in mixed_page.text
    assert "1 reached the limit, 2 stopped improving 1 still improving" in mixed_page.text
    assert "fewer than 4 models with trained parameters" in mixed_page.text
    assert "home<b>made. No reference is known here." in mixed_page.text
    assert "10.1186/s13059-021-02556-z" in mixed_page.text
    assert "10.3389/fmolb.2022.962644" in mixed_page.text


def test_every_mark_names_its_ledger_row(mixed: Path, mixed_page: Page) -> None:
    keys = {path.stem[:12] for path in (mixed / "tasks").glob("*.json")}
    titles = re.findall(r"<title>([^<]*\[[^<]*)</title>", mixed_page.source)
    named = {key for title in titles for key in re.findall(r"\[([0-9a-f]{12})\]", title)}
    assert named <= keys
    ok = {row["key"][:12] for row in page.load(mixed).rows if row["status"] == "ok"}
    assert named == ok
    tile = next(t for t in titles if t.startswith("pca, 20 cells, NMI on held-out cells: median"))
    assert "median 0.600 (null 0.100) of 0.500 [" in tile


def test_tiles_show_medians_and_mark_the_undefined(mixed_page: Page) -> None:
    biology = next(
        svg for svg in mixed_page.drawings if "NMI, Trajectory: models" in svg.get("aria-label")
    )
    texts = ["".join(text.itertext()) for text in biology.iter("{http://www.w3.org/2000/svg}text")]
    assert "0.60" in texts  # pca at 20 cells
    assert "0.85" in texts  # cobolt at 40 cells
    assert "–" in texts  # absent
    train = next(
        s for s in mixed_page.drawings if "0.70*" in " ".join(s.itertext())
    )  # of 0, 0.8 and 0.7
    assert train is not None


def test_files_are_made_whole(mixed: Path) -> None:
    names = {path.name for path in (mixed / "figures").iterdir()}
    kinds = ("biology", "technical", "curves", "boxes")
    expected = {f"{kind}_{part}" for kind in kinds for part in ("train", "held_out")}
    stems = expected | {"cost", "umaps"}
    assert names == {f"{stem}.{kind}" for stem in stems for kind in ("png", "pdf")}
    for path in (mixed / "figures").iterdir():
        magic = b"\x89PNG" if path.suffix == ".png" else b"%PDF"
        assert path.read_bytes().startswith(magic)
    assert not list(mixed.rglob("*.tmp"))
    assert (mixed / "report.html").stat().st_size < 2e6


def test_scores_can_be_taken_away(mixed: Path, mixed_page: Page) -> None:
    table = pd.read_csv(mixed / "scores.csv")
    assert len(table) == 18 * 2 * len(studies.METRICS)
    lines = table.query("model == 'pca' and size == 20 and metric == 'nmi'")
    assert list(lines.query("evaluated_on == 'held_out'")["value"]) == [0.5, 0.7, 0.6]
    link = next(
        attrs["href"] for tag, attrs in mixed_page.elements if attrs.get("download") == "scores.csv"
    )
    embedded = base64.b64decode(link.split(",", 1)[1])
    assert embedded == (mixed / "scores.csv").read_bytes()
    pd.testing.assert_frame_equal(pd.read_csv(io.BytesIO(embedded)), table)
    assert len(json.loads((mixed / "scores.json").read_text())) == len(table)


def test_the_same_study_gives_the_same_page(tmp_path: Path) -> None:
    studies.Study(tmp_path, models=("pca",), sizes=(20,), replicates=1).fill()
    first, again = (make(tmp_path).source for _ in range(2))
    without_time = re.compile(r"Made in [0-9.]+ s")
    assert without_time.sub("", again) == without_time.sub("", first)


def test_one_size_one_replicate(tmp_path: Path) -> None:
    studies.Study(tmp_path, sizes=(20,), replicates=1).fill()
    found = make(tmp_path)
    assert "There is one replicate" in found.text
    assert "at one size only" in found.text
    assert len(found.drawings) == 10


def test_no_labels(tmp_path: Path) -> None:
    studies.Study(tmp_path, studies.cells(labels=())).fill(lambda *_: np.nan)
    found = make(tmp_path)
    assert "No score could be computed: made-up reason." in found.text
    assert "NMI is not shown: made-up reason." in found.text
    assert "Cell types None are named." in found.text
    assert len(found.drawings) == 2  # cost and UMAPs, all grey


def test_a_metric_without_values_is_left_out_with_its_reason(tmp_path: Path) -> None:
    def value(task, metric: str, part: str) -> float:
        return np.nan if metric == "asw_site" else studies.made_up(task, metric, part)

    studies.Study(tmp_path).fill(value)
    found = make(tmp_path)
    assert "Site ASW is not shown: made-up reason." in found.text
    assert all("Site ASW" not in svg.get("aria-label") for svg in found.drawings)


@pytest.mark.parametrize("run", [True, False])
def test_no_task_ended_well(tmp_path: Path, run: bool) -> None:
    study = studies.Study(tmp_path)
    for task in study.tasks() if run else []:
        study.fail(task, "error", "ValueError: no")
    found = make(tmp_path)
    assert "No task ended well, so there is nothing to compare." in found.text
    assert found.drawings == []
    expected = "12 of 12 tasks did not end well" if run else "12 planned tasks have no result yet"
    assert expected in found.text


def test_no_held_out_cells(tmp_path: Path) -> None:
    studies.Study(tmp_path, held_out=0).fill()
    found = make(tmp_path)
    assert not [a for t, a in found.elements if t == "button"]
    assert "No cells were held out." in found.text
    assert ("body", {"data-part": "train"}) in found.elements


def test_many_models_are_correlated_with_their_size(tmp_path: Path) -> None:
    study = studies.Study(tmp_path, models=tuple("abcdefghij"), sizes=(20,), replicates=1)
    for index, task in enumerate(study.tasks()):
        study.add(task, parameters_trained=100 + index)
    found = make(tmp_path)
    assert "(n = 10)" in found.text
    assert len(found.drawings) == 10


def test_real_data_are_not_called_simulated(tmp_path: Path) -> None:
    data = studies.cells(name="real")
    data.about.update(simulated=False, publication="A paper", url="javascript:alert(1)")
    studies.Study(tmp_path, data).fill()
    found = make(tmp_path)
    assert "simulated" not in found.text
    assert all("simulated" not in " ".join(svg.itertext()) for svg in found.drawings)
    assert "The data: A paper." in found.text
    assert all(not a.get("href", "").startswith("javascript") for _, a in found.elements)


def test_another_place_and_no_files(tmp_path: Path) -> None:
    studies.Study(tmp_path / "study", models=("pca",), sizes=(20,), replicates=1).fill()
    path = build_report(tmp_path / "study", tmp_path / "new" / "place", formats=())
    assert path == tmp_path / "new" / "place" / "report.html"
    assert {p.name for p in path.parent.iterdir()} == {"report.html", "scores.csv", "scores.json"}
    assert not (tmp_path / "study" / "report.html").exists()


def test_errors_name_the_thing(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"no study\.json"):
        build_report(tmp_path)
    studies.Study(tmp_path / "study", models=("pca",), sizes=(20,), replicates=1).fill()
    with pytest.raises(ParameterError, match="'jpg'"):
        build_report(tmp_path / "study", formats=("jpg",))
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file"):
        build_report(tmp_path / "study", tmp_path / "file", formats=())


def test_a_failure_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studies.Study(tmp_path, models=("pca",), sizes=(20,), replicates=1).fill()
    path = build_report(tmp_path, formats=())
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(OutputError, match="disk full"):
        build_report(tmp_path, formats=())
    assert path.read_bytes() == before
    assert not list(tmp_path.rglob("*.tmp"))


def test_an_embedding_beyond_the_cell_table_is_refused(tmp_path: Path) -> None:
    studies.Study(tmp_path).fill()
    lines = (tmp_path / "cells.csv").read_text().splitlines(keepends=True)
    (tmp_path / "cells.csv").write_text("".join(lines[:20]))
    with pytest.raises(StudyError, match=r"cells\.csv.*has 19 cells"):
        build_report(tmp_path, formats=())


def test_umaps_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fake(embedding: np.ndarray) -> np.ndarray:
        calls.append(len(embedding))
        return embedding[:, :2] / 3

    monkeypatch.setattr(umaps, "_umap", fake)
    random = np.random.default_rng(0)
    first, other = random.normal(size=(2, 30, 4)).astype(np.float32)
    cache = tmp_path / "umap" / "key.csv"
    points = umaps.coordinates(first, cache)
    np.testing.assert_array_equal(umaps.coordinates(first, cache), points)
    assert calls == [30]
    umaps.coordinates(other, cache)  # another embedding under the same key
    cache.write_text("# damaged\n1,2\n")
    umaps.coordinates(other, cache)
    assert calls == [30] * 3
    cache.write_bytes(b"\xff\xfe")
    umaps.coordinates(other, cache)
    assert calls == [30] * 4


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "umap").touch()
    points = umaps.coordinates(np.eye(6, dtype=np.float32), tmp_path / "umap" / "key.csv")
    assert points.shape == (6, 2)


@pytest.mark.slow
def test_real_umaps_are_deterministic_and_keep_groups_apart() -> None:
    import subprocess
    import sys

    code = """
import numpy as np
from coembed.report.umaps import _umap
cells = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
cells[30:] += 12
cells[:, 3] = 1  # a column without spread
first, again = _umap(cells), _umap(cells)
assert first.shape == (60, 2) and (first == again).all()
apart = np.linalg.norm(first[:, None] - first, axis=2) + np.diag(np.full(60, np.inf))
nearest = apart.argmin(axis=1)
assert ((nearest < 30) == (np.arange(60) < 30)).all()
assert _umap(cells[:4]).shape == (4, 2)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
