"""From what was typed to values, checked before anything long begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coembed.errors import OutputError, ParameterError

if TYPE_CHECKING:
    from coembed.data.cells import Cells


def listed(text: str) -> tuple[str, ...]:
    """Return the parts of a list by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def reading_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `as_cells` among a verb's, leaving out those at their default."""
    pseudotime = options["pseudotime_keys"]
    keys = {key: options[key] for key in ("batch_key", "site_key", "label_key")}
    reading: dict[str, Any] = {
        **{key: None if value.lower() == "none" else value for key, value in keys.items()},
        "pseudotime_keys": pseudotime if pseudotime in ("auto",) else list(listed(pseudotime)),
        "ignore_labels": list(listed(options["ignore_labels"])),
        "layer": options["layer"],
        "modalities": _pairs(options["modality"], "--modality") or None,
        "drop_empty": options["drop_empty"],
        "unpaired": options["unpaired"],
    }
    if pseudotime.lower() == "none":
        reading["pseudotime_keys"] = None
    return {key: value for key, value in reading.items() if value not in ("auto", [], False)}


def _pairs(texts: list[str] | None, option: str) -> dict[str, str]:
    pairs = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ParameterError(
                f"'{text}' is not name=value", where=option, remedy=f"Write {option} name=value"
            )
        pairs[name.strip()] = value.strip()
    return pairs


def settings_of(texts: list[str] | None) -> dict[str, Any]:
    """Return hyper-parameters from name=value."""
    return {name: _value(text) for name, text in _pairs(texts, "--set").items()}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def model_settings(texts: list[str] | None, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Return model -> hyper-parameters, from model.name=value and name=value."""
    from coembed.models import get_model

    chosen: dict[str, dict[str, Any]] = {}
    for key, value in settings_of(texts).items():
        model, dot, name = key.partition(".")
        if not dot:
            takers = [m for m in names if key in get_model(m).Params.model_fields]
            if not takers:
                raise ParameterError(
                    f"no model of the study has a hyper-parameter '{key}'",
                    where="--set",
                    remedy="`coembed models NAME` lists them",
                )
            for taker in takers:
                chosen.setdefault(taker, {})[key] = value
        else:
            get_model(model)
            chosen.setdefault(model, {})[name] = value
    return chosen


def sizes_of(text: str) -> list[int] | None:
    """Return whole numbers from a list by commas."""
    try:
        return [int(part.replace("_", "")) for part in listed(text)] or None
    except ValueError:
        raise ParameterError(
            f"'{text}' is not a list of whole numbers",
            where="--sizes",
            remedy="Write --sizes 500,1000,2500",
        ) from None


def takers(cells: Cells) -> tuple[str, ...]:
    """Return the models that take these modalities and this pairing."""
    from coembed.models import cards

    return tuple(
        card.name
        for card in cards()
        if cells.roles in card.modalities and (cells.paired.all() or card.pairing != ("paired",))
    )


def refuse_input(data: str, output: Path, overwrite: bool) -> None:
    """Say before hours of training, not after, that the result could not be written."""
    if Path(data).exists() and output.exists() and Path(data).samefile(output):
        raise OutputError(
            "is the input, which is never overwritten",
            where=str(output),
            remedy="Choose another -o",
        )
    if output.exists() and not overwrite:
        raise OutputError(
            "exists already", where=str(output), remedy="Choose another -o, or give --overwrite"
        )
    if not output.parent.is_dir():
        raise OutputError(
            "there is no such folder", where=str(output.parent), remedy="Make it first"
        )
    if output.suffix != ".h5mu":
        raise OutputError("does not end in .h5mu", where=str(output), remedy="Name an .h5mu file")
