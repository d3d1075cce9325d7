"""The base of every configuration section."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Part of a recipe: strict (an unknown key is an error) and frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
