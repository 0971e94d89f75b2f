"""Hyper-parameters: checked, frozen, with a source for every default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coembed.errors import ParameterError, did_you_mean


def param(default: Any, what: str, source: str, **bounds: Any) -> Any:
    """Return a hyper-parameter: its default, what it is with its unit, where the default is from.

    Args:
        default: the value of the preset 'default'.
        what: meaning and unit.
        source: paper, original code, sheet section, or our reason to depart.
        **bounds: pydantic's constraints (gt, ge, le, ...).
    """
    return Field(default, description=what, json_schema_extra={"source": source}, **bounds)


class HyperParams(BaseModel):
    """Hyper-parameters of a system without a network."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @classmethod
    def checked(cls, values: Mapping[str, Any], *, model: str) -> Self:
        """Return the parameters, or say which value is wrong.

        Raises:
            ParameterError: an unknown name or a value that is not allowed.
        """
        for name in values:
            if name not in cls.model_fields:
                raise ParameterError(
                    f"no hyper-parameter '{name}'",
                    where=f"model '{model}'",
                    remedy=did_you_mean(name, cls.model_fields),
                )
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0]) if first["loc"] else "?"
            what = cls.model_fields[name].description if name in cls.model_fields else ""
            raise ParameterError(
                f"hyper-parameter '{name}' cannot be {first['input']!r}: {first['msg'].lower()}",
                where=f"model '{model}'",
                remedy=f"'{name}' is: {what}" if what else None,
            ) from error


MIN_STEPS = (
    "optimiser steps the plan has at least, however few the cells; dropped where max_epochs is set"
)

WARM_UP = "share of the plan over which the KL's weight rises from 0 to 1"
ANNEAL = "share of the plan, at its end, over which the learning rate falls to 0"
VALIDATION = "share of the training cells held back to find the best weights (0: keep the last)"


class TrainingParams(HyperParams):
    """What every trained system has."""

    max_epochs: int = param(100, "upper bound on passes over the cells", "original code", ge=1)
    min_steps: int = param(0, MIN_STEPS, "ours: steps, not epochs, make few cells converge", ge=0)
    batch_size: int = param(128, "cells in a minibatch", "original code", ge=2)
    learning_rate: float = param(1e-3, "Adam's learning rate", "original code", gt=0)
    validation_fraction: float = param(0.1, VALIDATION, "ours: best weights kept", ge=0, lt=1)
    patience: int = param(
        20,
        "rounds without improvement before training ends; a round is an epoch, or a hundredth of "
        "the plan where that is longer",
        "ours",
        ge=1,
    )
