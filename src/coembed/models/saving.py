"""Saved models: a folder with weights.safetensors and model.json, and nothing that runs.

`model.json` carries a format version, a SHA-256 of the weights and one of itself, so that a damaged
or altered folder is refused. `arrays` are the weights of the networks (`net.`), what the views
learnt (`views.`) and what the system learnt after training (`learnt.`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd
import torch

import coembed
from coembed.errors import ModelFileError, OutputError
from coembed.files import read_tensors, write_json, write_tensors
from coembed.train.loop import Outcome

if TYPE_CHECKING:
    from coembed.models.base import Model

FORMAT_VERSION = 1
WEIGHTS, DESCRIPTION = "weights.safetensors", "model.json"
M = TypeVar("M", bound="Model")


def save(model: Model, folder: Path, *, overwrite: bool = False) -> None:
    """Write a trained model to a new folder, which appears whole or not at all.

    Raises:
        OutputError: the folder exists (and `overwrite` is not set) or cannot be written.
        ModelFileError: the model is not trained.
    """
    if model.outcome is None:
        raise ModelFileError("an untrained model cannot be saved", remedy="Call train() first")
    if overwrite and folder.exists() and not (folder / DESCRIPTION).is_file():
        raise OutputError(
            "is no saved model, so it is not replaced",
            where=str(folder),
            remedy="Choose another folder",
        )
    if folder.exists() and not overwrite:
        raise OutputError(
            "exists already", where=str(folder), remedy="Choose another folder, or overwrite=True"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise OutputError(f"cannot be written ({error.strerror})", where=str(folder)) from error
    try:
        _write(model, temporary)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(model: Model, folder: Path) -> None:
    arrays: dict[str, Any] = {f"net.{k}": v for k, v in model.net.state_dict().items()}
    names: dict[str, list[str]] = {}
    views = {f"views.{k}": v for k, v in model.views.state().items()}
    learnt = {f"learnt.{k}": v for k, v in model.learnt.items()}
    learnt |= {f"profiles.{k}": v for k, v in model.profiles.items()}
    for key, value in {**views, **learnt}.items():
        if value.dtype.kind in "US":
            names[key] = [str(name) for name in value]
        else:
            arrays[key] = torch.from_numpy(np.ascontiguousarray(value))
    write_tensors(folder / WEIGHTS, arrays, {})
    facts = {
        "format_version": FORMAT_VERSION,
        "coembed_version": coembed.__version__,
        "model": model.card.name,
        "weights_sha256": hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest(),
        "names": names,
        **model._facts(),
    }
    write_json(folder / DESCRIPTION, {**facts, "sha256": _digest(facts)})


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def read_description(folder: Path) -> dict[str, Any]:
    """Return the checked `model.json` of a saved model.

    Raises:
        ModelFileError: it is missing, damaged, altered or newer than this coembed.
    """
    again = "Save the model again, or restore the folder from a copy"
    path = folder / DESCRIPTION
    if not path.is_file():
        raise ModelFileError("not a saved coembed model", where=str(folder),
                             remedy=f"Name a folder with {DESCRIPTION} and {WEIGHTS}")  # fmt: skip
    try:
        facts: dict[str, Any] = json.loads(path.read_text())
        claimed, version = facts.pop("sha256"), facts["format_version"]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ModelFileError("cannot be read", where=str(path), remedy=again) from error
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ModelFileError(
            f"has format version {version}, this coembed reads up to {FORMAT_VERSION}",
            where=str(path),
            remedy="Update coembed",
        )
    if claimed != _digest(facts):
        raise ModelFileError("was altered after it was saved", where=str(path), remedy=again)
    return facts


def load_model(folder: str | Path, data: Any = None) -> Model:
    """Return a saved model of whatever system; see `Model.load`."""
    from coembed.models import get_model

    return get_model(read_description(Path(folder))["model"]).load(folder, data)


def load(cls: type[M], folder: Path, data: Any = None) -> M:
    """Read a saved model; see `Model.load`."""
    from coembed.models import get_model

    facts = read_description(folder)
    path = folder / WEIGHTS
    if (
        not path.is_file()
        or facts["weights_sha256"] != hashlib.sha256(path.read_bytes()).hexdigest()
    ):
        raise ModelFileError(
            "is missing or was altered after it was saved",
            where=str(path),
            remedy="Restore the folder from a copy, or save the model again",
        )
    kind = get_model(facts["model"])
    if not issubclass(kind, cls):
        raise ModelFileError(
            f"holds a {kind.card.title} model, not a {cls.__name__}",
            where=str(folder),
            remedy=f"Use coembed.{kind.__name__}.load",
        )
    tensors, _ = read_tensors(path)
    arrays: dict[str, Any] = {k: v.numpy() for k, v in tensors.items()}
    arrays |= {k: np.array(v, dtype=str) for k, v in facts["names"].items()}
    model: M = kind.__new__(kind)
    model.preset, model.cells = facts["preset"], None
    model._describe(**{key: facts[key] for key in ("batch_key", "params", "features", "batches")})
    for name in ("n_features", "decoded_features", "depths"):
        setattr(model, name, facts[name])
    model.views = model.pipeline(
        {role: pd.DataFrame(index=names) for role, names in model.features.items()}
    )
    model.views.load_state(_under("views.", arrays))
    model.learnt, model.profiles = _under("learnt.", arrays), _under("profiles.", arrays)
    model._build()
    try:
        model.net.load_state_dict(
            {k: torch.from_numpy(v) for k, v in _under("net.", arrays).items()}
        )
    except RuntimeError as error:
        raise ModelFileError(
            "does not fit the networks it describes", where=str(path), remedy="Save it again"
        ) from error
    model.net.eval()
    model.outcome, model.history = Outcome(**facts["outcome"]), pd.DataFrame(facts["history"])
    if data is not None:
        model.cells = model.prepared(data)
    return model


def _under(prefix: str, arrays: dict[str, Any]) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
