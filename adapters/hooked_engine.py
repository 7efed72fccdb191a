"""What the engines share: one policy on one model, by hooks that come and go together."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn

from vlmprune.adapters.hooks import HookStack
from vlmprune.adapters.model_family import ModelFamily
from vlmprune.adapters.sites import Step, plan
from vlmprune.core.policy import Policy


class HookedEngine(ABC):
    """One policy on one model: installs hooks, keeps the report, and can be switched off and removed.

    Args:
        family: adapter of the model.
        policy: what to do.

    Attributes:
        info: the model's facts.
        steps: what the policy asks for on this model.
        enabled: False while it is switched off.
        last_error: what the last forward raised, None if nothing.
    """

    def __init__(self, family: ModelFamily, policy: Policy) -> None:
        self.policy = policy
        self.info = family.info()
        self.steps = self._plan()
        self.enabled = True
        self.last_error: BaseException | None = None
        self._draws = any(step.policy.is_random(self.info) for step in self.steps)
        self._hooks = HookStack()
        self._warned = False
        self._busy: dict[str, int] = {}

    def _plan(self) -> tuple[Step, ...]:
        """The policy's steps on the model, checked."""
        return plan(self.policy, self.info)

    @property
    @abstractmethod
    def main(self) -> nn.Module:
        """The module that bears the handle beside the model itself."""

    @property
    def hook_ids(self) -> frozenset[int]:
        """Ids of our hooks in the modules' tables."""
        return self._hooks.ids

    def install(self) -> None:
        """Register the hooks; on failure none stays."""
        try:
            self._install()
        except BaseException:
            self._hooks.remove()
            raise

    @abstractmethod
    def _install(self) -> None:
        """Register the hooks."""

    def remove(self) -> None:
        """Take every hook away."""
        self._hooks.remove()

    def switch(self, on: bool) -> None:
        """Turn the policy on or off without touching the hooks."""
        self.enabled = on
