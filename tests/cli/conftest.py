"""Run the command line in this process, and files to run it on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from coembed.data.simulate import simulate
from coembed.data.write import to_mudata, write_h5mu


@dataclass
class Result:
    code: int
    out: str
    err: str


Runner = Callable[..., Result]


@pytest.fixture
def coembed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    """Return a function that runs `coembed ARGS` and gives exit code and output."""
    from coembed.cli import main

    def run(*args: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["coembed", *map(str, args)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def mdata():
    """A small simulated CITE-seq MuData."""
    return to_mudata(simulate("cite", 200, n_types=4, n_genes=80, n_proteins=12, seed=1))


@pytest.fixture(scope="session")
def cite_file(mdata, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_h5mu(mdata, tmp_path_factory.mktemp("data") / "cite.h5mu")
