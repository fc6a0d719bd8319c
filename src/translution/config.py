"""Configuration: typed and validated; an error names the key, the file and what is allowed."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["Options"]


class Options(BaseModel):
    """A part of a configuration: typed, without unknown keys, unchanging once made."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
