"""The systems. They are found by entry points, so that another package can add its own."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from coembed.errors import ParameterError, did_you_mean

if TYPE_CHECKING:
    from coembed.models.base import Model
    from coembed.models.card import Card


@cache
def _entries() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group="coembed.models")}


def model_names() -> list[str]:
    """Return the names of all systems, without importing them."""
    return list(_entries())


def get_model(name: str) -> type[Model]:
    """Return a system's class.

    Raises:
        ParameterError: there is no such system.
    """
    if name not in _entries():
        raise ParameterError(f"no model '{name}'", remedy=did_you_mean(name, _entries()))
    model: type[Model] = _entries()[name].load()
    return model


def cards() -> list[Card]:
    """Return the card of every system."""
    return [get_model(name).card for name in model_names()]
