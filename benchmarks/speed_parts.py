"""What the sections of the speed benchmark share: settings, the machine, results that are kept."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from coembed.files import write_json

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "out" / "speed"

Part = Callable[[], dict[str, Any]]
"""A measurement that has a process of its own; it returns JSON-able numbers."""


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        threads: of every training; of a study, its workers, with a thread each.
        repeats: of what takes seconds.
        peer_repeats: of the peer's default training, which takes many minutes.
        quick: tiny sizes: whether it runs, not how fast.
    """

    threads: int = 2
    repeats: int = 5
    peer_repeats: int = 1
    quick: bool = False

    @property
    def folder(self) -> Path:
        """Where results are kept."""
        return OUT / "quick" if self.quick else OUT

    def file(self, section: str) -> Path:
        """Return where a section's results are kept."""
        return self.folder / f"{section}.json"


def kept(settings: Settings, section: str) -> dict[str, Any]:
    """Return part -> record of what a section has measured so far."""
    path = settings.file(section)
    return json.loads(path.read_text()) if path.exists() else {}


def measure(settings: Settings, section: str, name: str, part: Part) -> None:
    """Measure one part in this process and keep its record."""
    pin(settings.threads)
    load, started = os.getloadavg()[0], time.perf_counter()
    result = part()
    record = {
        "result": result,
        "threads": settings.threads,
        "seconds": time.perf_counter() - started,
        "load_before": load,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": machine(),
    }
    write_json(settings.file(section), {**kept(settings, section), name: record})


def pin(threads: int) -> None:
    """Set the number of threads of torch and of the BLAS libraries."""
    import torch
    from threadpoolctl import threadpool_limits

    threadpool_limits(threads)
    torch.set_num_threads(threads)


def machine() -> dict[str, Any]:
    """Return what the numbers depend on besides the code."""
    import psutil
    import torch

    cuda = torch.cuda.is_available()
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("coembed", "torch", "numpy", "scipy", "scvi-tools")},
    }


def peer_is_here() -> bool:
    """Say whether scvi-tools is installed."""
    return _version("scvi-tools") is not None


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return median, least and largest."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Return the summary of theirs over ours, repeat by repeat: a pair ran side by side."""
    return summary([b / a for a, b in zip(ours, theirs, strict=True)])


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor()


def _commit() -> str | None:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    return said.stdout.strip() or None
