"""Signals of the decoder; see :mod:`vlmprune.core.signals`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from vlmprune.core.signal import Signal, Stack


@dataclass(frozen=True)
class AttentionRows(Signal):
    """Rows of the attention over the visual tokens, ``[I, R, N]``.

    ``rows``: ``"last"`` (last real token of the prompt), ``"text_after"`` (all text after the first image; R
    is padded with zeros), or explicit positions in the current sequence.
    """

    per_token: ClassVar[bool] = False
    stack: Stack
    layer: int
    rows: Literal["last", "text_after"] | tuple[int, ...] = "last"


@dataclass(frozen=True)
class ProbeAttention(Signal):
    """Rows of the attention over the visual tokens, ``[I, R, N]``, in the *coming* layer: the one before which the
    tokens are cut, by its own norm, projections, rotary tables and mask, on the tokens as they are before the cut;
    ``rows`` as in :class:`AttentionRows`."""

    per_token: ClassVar[bool] = False
    layer: int
    rows: Literal["last", "text_after"] = "last"


@dataclass(frozen=True)
class GroupMass(Signal):
    """Attention mass between groups, ``[I, 2, 3]``: rows text, visual; columns system, text, visual.

    System: before the first visual token. Text: every other token that is not visual. Padding: in no group.
    """

    per_token: ClassVar[bool] = False
    layer: int


@dataclass(frozen=True)
class ModuleTransition(Signal):
    """Norm ratio and cosine between a module's input and output, a :class:`~vlmprune.core.transition.Transition`.

    The input is what the module is given, behind its norm; the output is what is added to the residual stream
    (behind a second norm, where the layer has one).
    """

    per_token: ClassVar[bool] = False
    layer: int
    module: Literal["attn", "mlp"]


@dataclass(frozen=True)
class FinalNorm(Signal):
    """The LLM's final norm, a callable."""

    per_token: ClassVar[bool] = False


@dataclass(frozen=True)
class DecodeRows(Signal):
    """Attention of the newest decoded token over the stored prompt tokens, ``[I, N]``."""

    layer: int
