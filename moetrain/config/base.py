"""The base of all sections, the types of their numbers, and the error.

A section is strict and frozen: unknown keys, wrong types and values out of range are errors."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0, lt=2**63)]
"""Bounded, as all whole numbers are: what does not fit into 64 bits overflows somewhere in a library, without a word about the option."""
NonNegative = Annotated[int, Field(ge=0, lt=2**63)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Name = Annotated[str, Field(min_length=1)]


class ConfigError(ValueError):
    """A configuration that can't be used; the message lists every reason, one per line."""



class Section(BaseModel):
    """Named options of one part of the file."""

    # strict: a string is never taken for a number nor 1 for true; numbers such as 3e-4 are made numbers by the YAML reader below.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=())

    def idle(self) -> set[str]:
        """Options that have no effect beside the others; `rules.check` refuses one that is given."""
        return set()


def short(value: Any) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
