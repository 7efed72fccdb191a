"""Budgets: one spelling for every way of saying how many visual tokens stay."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

from vlmprune.core.errors import BudgetError

Basis = Literal["site", "final", "mean_layers"]
Rounding = Literal["floor", "round", "ceil"]
BASES: tuple[Basis, ...] = ("site", "final", "mean_layers")

_ROUND: Mapping[str, Callable[[float], int]] = {"floor": math.floor, "round": round, "ceil": math.ceil}


@dataclass(frozen=True)
class Budget:
    """How many visual tokens may stay.

    Build one with :meth:`parse`; exactly one of the fields is set.

    Attributes:
        share: share of the tokens, in (0, 1].
        tokens: tokens per image (an image's views together), at least 1.
        flops: share of the dense model's FLOPs, in (0, 1].
        parts: one budget per stage, layer, composed policy or image.
    """

    share: float | None = None
    tokens: int | None = None
    flops: float | None = None
    parts: tuple[Budget, ...] | None = None

    @classmethod
    def parse(cls, value: Any) -> Budget:
        """Read a budget.

        Args:
            value: a float share in (0, 1] (``1.0`` keeps everything), an int number of tokens (``1`` is one
                token), ``"flops:0.4"``, a list of these, or a :class:`Budget`. Text is read as the command
                line writes it: ``"0.33"``, ``"192"``, ``"flops:0.4"``, ``"0.5,0.3"``.

        Raises:
            BudgetError: the value is not one of these, or out of range.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, str):
            return cls._parse_text(value)
        if isinstance(value, bool):
            raise BudgetError(f"keep={value!r} is not a budget; give a share such as 0.33 or a number of tokens.")
        if isinstance(value, Integral):  # Integral and Real take NumPy's scalars too
            if value < 1:
                raise BudgetError(f"keep={value} tokens is out of range; give at least 1 token, or a share in (0, 1].")
            return cls(tokens=int(value))
        if isinstance(value, Real):
            return cls(share=_checked_share(float(value), "keep"))
        if isinstance(value, Sequence):
            if not value:
                raise BudgetError("keep=[] is empty; give one budget per stage, layer or policy.")
            return cls(parts=tuple(cls.parse(part) for part in value))
        raise BudgetError(
            f"keep={value!r} is not a budget; give a share such as 0.33, a number of tokens such as 192, "
            '"flops:0.4", or a list of these.'
        )

    @classmethod
    def _parse_text(cls, text: str) -> Budget:
        text = text.strip()
        if "," in text or text.startswith("["):
            return cls(parts=tuple(cls._parse_text(part) for part in text.strip("[]").split(",")))
        kind, _, number = text.rpartition(":")
        if kind not in ("", "flops"):
            raise BudgetError(f"keep={text!r} has the unknown prefix {kind!r}; the only one is 'flops:'.")
        try:
            if kind == "flops":
                return cls(flops=_checked_share(float(number), "keep='flops:...'"))
            return cls.parse(int(number) if number.lstrip("+-").isdigit() else float(number))
        except ValueError as error:
            if isinstance(error, BudgetError):
                raise
            raise BudgetError(f"keep={text!r} is not a number; try 0.33 (a share) or 192 (tokens).") from None

    @property
    def is_all(self) -> bool:
        """True if this budget keeps every token whatever the model is."""
        if self.parts is not None:
            return all(part.is_all for part in self.parts)
        return self.share == 1.0 or self.flops == 1.0

    @property
    def has_flops(self) -> bool:
        """True if this budget, or any of its parts, is a FLOP share."""
        return self.flops is not None or any(part.has_flops for part in self.parts or ())

    def part(self, index: int) -> Budget:
        """The budget of stage, layer, policy or image ``index``; a single budget serves all of them.

        Raises:
            BudgetError: the list is too short.
        """
        if self.parts is None:
            return self
        if index >= len(self.parts):
            raise BudgetError(f"keep has {len(self.parts)} entries, but entry {index + 1} is needed.")
        return self.parts[index]

    def count(self, n: int, rounding: Rounding = "floor", minimum: int = 1) -> int:
        """Number of tokens kept out of ``n``.

        A share is multiplied by ``n`` and rounded (``floor`` unless the policy's source says otherwise;
        ``round`` takes halves to the even side) and is at least ``minimum``; a number of tokens is capped at
        ``n``.

        Raises:
            BudgetError: the budget is a list or a FLOP share, which name no count by themselves.
        """
        if self.tokens is not None:
            return min(self.tokens, n)
        if self.share is None:
            raise BudgetError(f"{self} does not name a number of tokens; this policy takes a share or a token count.")
        return min(n, max(minimum, _ROUND[rounding](self.share * n)))

    def describe(self) -> str | float | int | list[Any]:
        """The value that :meth:`parse` reads back to this budget."""
        if self.parts is not None:
            return [part.describe() for part in self.parts]
        if self.flops is not None:
            return f"flops:{self.flops}"
        return self.share if self.share is not None else int(self.tokens or 0)

    def __str__(self) -> str:
        return f"keep={self.describe()}"


def _checked_share(value: float, name: str) -> float:
    share = round(value, 6)  # float32 ratios of stored settings would floor to one token less
    if not math.isfinite(value) or share <= 0 or share > 1:
        raise BudgetError(
            f"{name}={value} is out of range; a share lies in (0, 1]. For a number of tokens give an integer."
        )
    return share
