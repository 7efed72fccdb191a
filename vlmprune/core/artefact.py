"""Calibration artefacts: small JSON files that a policy loads instead of searching again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlmprune.core.errors import InputError
from vlmprune.core.info import ModelInfo

MODEL_FACTS = ("vision_depth", "feature_block", "grid", "text_depth", "text_hidden", "text_heads")


AnyFound = TypeVar("AnyFound", bound="Found")


class Trial(BaseModel):
    """One set of settings and what the model gave with them."""

    model_config = ConfigDict(extra="forbid")

    settings: dict[str, float]
    measured: dict[str, float]


class Found(BaseModel):
    """What every artefact tells: for what it was made.

    Attributes:
        policy, settings: the policy's name, and its parameters that the result depends on (``keep`` among them).
        model: class name and sizes of the model.
        samples, data: number of samples and a digest of their inputs.
        versions: of the packages that made it.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    policy: str
    settings: dict[str, Any]
    model: dict[str, Any]
    samples: int
    data: str
    versions: dict[str, str] = Field(default_factory=dict)

    @property
    def has_result(self) -> bool:
        """False while the calibration has not got anywhere."""
        raise NotImplementedError

    def check_policy(self, name: str, settings: Mapping[str, Any]) -> None:
        """Refuse to serve another policy, or other settings than those it was made for.

        Raises:
            InputError: it differs, or holds no result yet.
        """
        if self.policy != name:
            raise InputError(f"The artefact is one of {self.policy!r}, not of {name!r}.")
        if not self.has_result:
            raise InputError("The artefact holds no result yet; let `vlmprune calibrate` finish.")
        for key, value in settings.items():
            if self.settings.get(key) != value:
                raise InputError(
                    f"The artefact was calibrated for {key}={self.settings.get(key)}, not {value}; give {key}="
                    f"{self.settings.get(key)}, or calibrate again: vlmprune calibrate {name}."
                )

    def check_model(self, info: ModelInfo) -> None:
        """Refuse another model than the one it was made on.

        Raises:
            InputError: class or sizes differ.
        """
        mine = model_facts(info)
        wrong = [
            f"{key} {self.model.get(key)}, not {value}" for key, value in mine.items() if self.model.get(key) != value
        ]
        if wrong:
            raise InputError(
                f"The artefact was calibrated on another model ({'; '.join(wrong)}); calibrate this one: "
                f"vlmprune calibrate {self.policy}."
            )


class Artefact(Found):
    """What a search found.

    Attributes:
        best, value: the best settings so far and their objective, None before the first call.
        calls, seed: planned calls, and the seed.
        history: every call so far, in order; a run is resumed from it.
    """

    format: Literal["vlmprune calibration"] = "vlmprune calibration"
    version: Literal[1] = 1
    best: dict[str, float] = Field(default_factory=dict)
    value: float | None = None
    calls: int
    seed: int
    history: list[Trial] = Field(default_factory=list)

    @property
    def has_result(self) -> bool:
        """True after the first call."""
        return bool(self.best)


def model_facts(info: ModelInfo) -> dict[str, Any]:
    """What an artefact remembers of a model, as JSON values."""
    facts: dict[str, Any] = {"class": info.model_class}
    for name in MODEL_FACTS:
        value = getattr(info, name)
        facts[name] = list(value) if isinstance(value, tuple) else value
    return facts


def read_artefact(path: str | Path) -> Artefact:
    """Read what a search found.

    Raises:
        InputError: the file is missing or no artefact of a search.
    """
    return read_found(path, Artefact)


def read_found(path: str | Path, kind: type[AnyFound]) -> AnyFound:
    """Read an artefact of a kind.

    Raises:
        InputError: the file is missing or no such artefact.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"Artefact {str(path)!r} does not exist; `vlmprune calibrate` makes one.")
    try:
        return kind.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, ValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{str(path)!r} is no calibration artefact: {reason}") from None


def write_artefact(artefact: Found, path: str | Path) -> None:
    """Write an artefact atomically."""
    path = Path(path)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(artefact.model_dump_json(indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
