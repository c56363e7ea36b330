"""What every part of a recipe is: typed strictly, frozen, with a word for keys that it does not know."""

from __future__ import annotations

import difflib

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


def closest(word: object, choices: list[str]) -> str | None:
    """Return the choice that reads most like `word`, None when nothing does."""
    match = difflib.get_close_matches(str(word), choices, n=1, cutoff=0.5)
    return match[0] if match else None


class Strict(BaseModel):
    """Frozen, no coercion, no unknown key, no NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: object) -> object:
        """Name the unknown key and the nearest known one, which pydantic's own message does not."""
        if isinstance(data, dict):
            known = list(cls.model_fields)
            for key in data:
                if key not in cls.model_fields:
                    near = closest(key, known)
                    hint = f"did you mean `{near}`?" if near else f"known keys: {', '.join(known)}"
                    raise PydanticCustomError(
                        "recipe_unknown_key", "unknown key `{key}`", {"key": key, "hint": hint}
                    )
        return data
