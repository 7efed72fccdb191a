"""The engine that serves a family."""

from __future__ import annotations

from typing import Any

from vlmprune.adapters.engine import Engine
from vlmprune.adapters.family import Family
from vlmprune.adapters.vision_engine import VisionEngine
from vlmprune.adapters.vit_family import VitFamily
from vlmprune.core.policy import Policy

AnyEngine = Engine | VisionEngine


def make_engine(family: Family | VitFamily, policy: Policy, restore_length: bool, processor: Any = None) -> AnyEngine:
    """The engine of a policy on a model: see :class:`Engine` and :class:`VisionEngine`."""
    if isinstance(family, VitFamily):
        return VisionEngine(family, policy, restore_length)
    return Engine(family, policy, restore_length, processor)
