"""A row of the review's Table 1 as data: what a system is, and where that is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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

    @property
    def url(self) -> str:
        """Where the reference is found."""
        return f"https://doi.org/{self.doi}" if self.doi else self.code
