"""What a calibration's file remembers of how it was made, and the checks before it goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor

from vlmprune._version import __version__
from vlmprune.core.artefact import Found
from vlmprune.core.errors import InputError
from vlmprune.core.policy import Policy
from vlmprune.core.randomness import tensor_digest

NOT_SETTINGS = ("artefact", "positions")


def settings_of(policy: Policy) -> dict[str, Any]:
    """The parameters that a calibration depends on, as JSON values."""
    settings = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    settings = {name: value for name, value in settings.items() if name not in NOT_SETTINGS}
    settings["keep"] = policy.budget.describe()
    return json.loads(json.dumps(settings, default=str))


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of this package and of those of ``names`` that are installed."""
    found = {"vlmprune": __version__}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def add_to_digest(digest: hashlib.blake2b, sample: Mapping[str, Any]) -> None:
    """Take a sample's inputs into a digest."""
    for name in sorted(sample):
        value = sample[name]
        digest.update(f"{name}={tensor_digest(value) if isinstance(value, Tensor) else value}\n".encode())


def check_folder(output: str | Path) -> None:
    """Refuse a file whose folder does not exist.

    Raises:
        InputError: it does not.
    """
    if not Path(output).resolve().parent.is_dir():
        raise InputError(f"Folder {str(Path(output).parent)!r} for the artefact does not exist.")


def check_same(earlier: Found, fresh: Found, names: Iterable[str], output: str | Path) -> None:
    """Refuse to go on with another calibration than this one.

    Raises:
        InputError: one of the fields ``names`` differs.
    """
    for name in names:
        before, now = getattr(earlier, name), getattr(fresh, name)
        if before != now:
            raise InputError(
                f"{str(output)!r} holds a calibration of another {name} ({before}, now {now}); choose another file, or "
                "start anew (resume=False, on the command line --fresh)."
            )
