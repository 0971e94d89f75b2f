"""Speed and memory, measured beside scvi-tools and against the arithmetic.

    make bench                                            everything, then docs/results/speed.md
    make bench ARGS='--sections step,floor'               some of it
    .venv/bin/python benchmarks/speed.py --quick          a smoke run, in out/speed/quick
    .venv/bin/python benchmarks/speed.py --page           the page alone, from what is kept

A run that is stopped goes on when the same command is given again. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

from speed_floor import floor
from speed_page import write_page
from speed_parts import ROOT, Part, Settings, kept, measure
from speed_quality import quality
from speed_scaling import cells, peaks, study
from speed_step import gpu, step

from coembed.errors import CoembedError, ParameterError, did_you_mean
from coembed.files import write_json

Section = Callable[[Settings], Mapping[str, Part]]
SECTIONS: dict[str, Section] = {
    "step": step, "quality": quality, "floor": floor, "cells": cells, "peaks": peaks,
    "study": study, "gpu": gpu,
}  # fmt: skip
PAGE = ROOT / "docs" / "results" / "speed.md"


def run(settings: Settings, sections: Sequence[str], *, redo: bool) -> bool:
    """Measure what is missing, each part in a process of its own; say whether nothing failed."""
    well = True
    for section in sections:
        if redo:
            settings.file(section).unlink(missing_ok=True)
        for part in SECTIONS[section](settings):
            if part in kept(settings, section):
                continue
            _note(f"{section}: {part}")
            command = [sys.executable, __file__, *_arguments(settings), "--part", section, part]
            code = subprocess.run(command, env=_environment(settings), check=False).returncode
            if code:
                _note(f"{section}: {part} ended with exit code {code}; it is left out")
                well = False
    return well


def _arguments(settings: Settings) -> list[str]:
    values = {
        "threads": settings.threads,
        "repeats": settings.repeats,
        "peer-repeats": settings.peer_repeats,
    }
    text = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return text + (["--quick"] if settings.quick else [])


def _environment(settings: Settings) -> dict[str, str]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    return {**os.environ, **dict.fromkeys(names, str(settings.threads))}


def publish(settings: Settings) -> None:
    """Write the page and its numbers from all that is kept."""
    page = settings.folder / "speed.md" if settings.quick else PAGE
    found = {section: kept(settings, section) for section in SECTIONS}
    write_json(page.with_suffix(".json"), found)
    write_page(page, found, quick=settings.quick)
    print(page)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is wanted, then write the page."""
    options = _parser().parse_args(arguments)
    settings = Settings(options.threads, options.repeats, options.peer_repeats, options.quick)
    try:
        if options.part:
            section, part = options.part
            measure(settings, section, part, SECTIONS[section](settings)[part])
            return
        well = options.page or run(settings, _listed(options.sections), redo=options.redo)
        publish(settings)
    except KeyboardInterrupt:
        _note("Stopped. Run the same command to go on.")
        sys.exit(130)
    except CoembedError as error:
        _note(f"Error: {error}")
        sys.exit(2)
    sys.exit(0 if well else 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    say, start = parser.add_argument, Settings()
    say("--sections", default="", help=f"by commas, of {', '.join(SECTIONS)}")
    say("--threads", type=int, default=start.threads, help="of every training (default 2)")
    say("--repeats", type=int, default=start.repeats, help="of what takes seconds (default 5)")
    say("--peer-repeats", type=int, default=start.peer_repeats,
        help="of scvi-tools' default training (default 1)")  # fmt: skip
    say("--redo", action="store_true", help="measure the chosen sections anew")
    say("--quick", action="store_true", help="tiny sizes: whether it runs, not how fast")
    say("--page", action="store_true", help="write the page, measure nothing")
    say("--part", nargs=2, metavar=("SECTION", "PART"), help="measure one part in this process")
    return parser


def _listed(text: str) -> list[str]:
    """Return the sections in a list by commas; all of them for an empty one."""
    names = [name.strip() for name in text.split(",") if name.strip()] or list(SECTIONS)
    for name in names:
        if name not in SECTIONS:
            raise ParameterError(
                f"there is no section '{name}'", remedy=did_you_mean(name, SECTIONS)
            )
    return names


def _note(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    main()
