"""A row of the review's Table 1 as data: what a system is, and where that is written."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

Pairing = Literal["paired", "unpaired", "mosaic"]
Ability = Literal["translate", "denoise", "sample", "batch correction"]


@dataclass(frozen=True)
class Card:
    """What a user must know before choosing a system.

    Attributes:
        name: what the command line calls it.
        title: what its authors call it.
        summary: one sentence.
        reference: authors, title, journal, year.
        doi: of the reference; empty where there is none.
        code: the original repository; empty where there is none.
        architecture: in the review's words.
        pairing: which cells it trains on.
        modalities: the sets of roles it takes.
        abilities: what a trained model can do besides embedding.
        departures: where our default leaves the original, and why.
    """

    name: str
    title: str
    summary: str
    reference: str
    architecture: str
    pairing: tuple[Pairing, ...]
    modalities: tuple[tuple[str, ...], ...]
    doi: str = ""
    code: str = ""
    abilities: tuple[Ability, ...] = ()
    departures: tuple[str, ...] = ()

    @classmethod
    def read(cls, name: str) -> Card:
        """Return the card of a system that comes with coembed, `cards/<name>.toml`."""
        file = resources.files("coembed.models").joinpath("cards", f"{name}.toml")
        fields = tomllib.loads(file.read_text(encoding="utf-8"))
        return cls(name=name, **{field: _frozen(value) for field, value in fields.items()})

    @property
    def url(self) -> str:
        """Where the reference is found."""
        return f"https://doi.org/{self.doi}" if self.doi else self.code


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
