"""Errors and warnings that a user can act on: the thing, the place and the remedy."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class CoembedError(Exception):
    """Something the user can put right. The command line prints it and exits with code 2.

    Args:
        what: the thing that is wrong, as a sentence without a full stop.
        where: the place (a file, a modality, a cell), if there is one.
        remedy: what to do about it.
    """

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.what, self.where, self.remedy = what, where, remedy
        text = f"{where}: {what}" if where else what
        super().__init__(f"{text}. {remedy}" if remedy else f"{text}.")

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.what, self.where, self.remedy))


def _rebuild(
    kind: type[CoembedError], what: str, where: str | None, remedy: str | None
) -> CoembedError:
    return kind(what, where=where, remedy=remedy)


class DataError(CoembedError):
    """The data cannot be used as they are."""


class ParameterError(CoembedError):
    """A name or a value that was asked for does not exist or is not allowed."""


class ModelFileError(CoembedError):
    """A saved model is missing, damaged, altered or from another version."""


class StudyError(CoembedError):
    """A study cannot be planned, run or read."""


class OutputError(CoembedError):
    """A result cannot be written."""


class CoembedWarning(UserWarning):
    """A setting cannot work as asked; the message says what was done instead."""


def warn(what: str, *, where: str | None = None, instead: str) -> None:
    """Warn that a setting cannot work, and say what was done instead.

    Args:
        what: the setting and why it cannot work, as a sentence without a full stop.
        where: the place (a model, a modality), if there is one.
        instead: what was done.
    """
    text = f"{where}: {what}; {instead}." if where else f"{what}; {instead}."
    notes = _notes.get()
    if notes is not None:
        notes.append(text)
    warnings.warn(text, CoembedWarning, stacklevel=3)


_notes: ContextVar[list[str] | None] = ContextVar("notes", default=None)


@contextmanager
def noted() -> Iterator[list[str]]:
    """Give the list to which every warning inside the block is added, as it is raised."""
    notes: list[str] = []
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a remedy that lists the known names, the nearest one first."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    lead = f"Did you mean '{near[0]}'? " if near else ""
    return f"{lead}Known: {', '.join(names) if names else 'none'}"
