"""The base of all signals."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

Stack = Literal["vision", "text"]


@dataclass(frozen=True)
class Signal:
    """Base of all signals. One that is missing is an error at ``apply`` unless it is ``optional``."""

    per_token: ClassVar[bool] = True
    """True if the delivered tensor is ``[I, N, ...]``, so that selections re-index it."""

    optional: bool = field(default=False, kw_only=True)

    @property
    def stack_name(self) -> Stack:
        """The stack that the signal is read from."""
        return getattr(self, "stack", "text")
