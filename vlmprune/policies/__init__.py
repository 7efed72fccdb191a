"""Policies, one file each. Files whose name starts with an underscore are not registered."""

from __future__ import annotations

from vlmprune.core.policy import Policy
from vlmprune.core.registry import registry


def find_class(name: str) -> type[Policy] | None:
    """The registered policy class with the Python name ``name``, or None."""
    return registry.by_class_name(name)
