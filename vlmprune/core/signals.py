"""Signals: what a policy may ask an adapter to deliver, nothing more and without eager attention.

Layers are 0-based. ``stack`` is ``"vision"`` or ``"text"``. Shapes use ``I`` items and ``N`` visual tokens per item;
see :class:`vlmprune.core.context.Context` for what an item is at each site. Attention is after the softmax, the mean
over heads, float32.

Values of patches follow unpadding, interpolation and pooling to the LLM's tokens: a token made of several patches has
their mean, a newline token 0. Only ``QK``, ``Attention`` and ``Pixels`` come per patch, over the ``V`` encoder views
of all items with ``P`` patches each (``context.encoder_items``); ``context.to_tokens`` takes such values to tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from vlmprune.core.signal import Signal, Stack
from vlmprune.core.text_signals import (
    AttentionRows,
    DecodeRows,
    FinalNorm,
    GroupMass,
    ModuleTransition,
    ProbeAttention,
)

__all__ = [
    "Attention",
    "AttentionRows",
    "ClsLogits",
    "ClsRow",
    "ColumnMass",
    "DecodeRows",
    "FinalNorm",
    "GroupMass",
    "HeadAttention",
    "Hidden",
    "JointEmbeddings",
    "KeyMean",
    "Keys",
    "ModuleTransition",
    "Pixels",
    "PreProjector",
    "ProbeAttention",
    "Projected",
    "Projector",
    "QK",
    "Signal",
    "Stack",
    "TextEmbeddings",
]


@dataclass(frozen=True)
class ColumnMass(Signal):
    """Attention received by each visual token, ``[I, N]``: over all query rows, in the tower (a CLS row
    included) or in a decoder layer (text rows included, padding not)."""

    stack: Stack
    layer: int
    reduce: Literal["mean", "sum"] = "mean"


@dataclass(frozen=True)
class ClsRow(Signal):
    """The CLS query's row of the softmax attention without the CLS column, ``[I, N]``."""

    stack: ClassVar[Stack] = "vision"
    layer: int


@dataclass(frozen=True)
class ClsLogits(Signal):
    """The CLS query's scaled scores before the softmax, without the CLS column, head mean, ``[I, N]``."""

    stack: ClassVar[Stack] = "vision"
    layer: int


@dataclass(frozen=True)
class Keys(Signal):
    """Keys of an attention layer, heads concatenated, ``[I, N, H * d]``."""

    stack: Stack
    layer: int


@dataclass(frozen=True)
class KeyMean(Signal):
    """Keys of a tower block, mean over heads, ``[I, N, d]``, at ``vision_block`` only (the metric of ToMe). The keys
    of the patches of a unit stand side by side; a prefix token's key is repeated as often."""

    stack: ClassVar[Stack] = "vision"
    layer: int


@dataclass(frozen=True)
class HeadAttention(Signal):
    """A tower block's attention per head over the tokens of ``vision_block``, prefix tokens included, as
    :class:`vlmprune.core.attention.AttentionHeads`: votes along it, without the matrix."""

    per_token: ClassVar[bool] = False
    stack: ClassVar[Stack] = "vision"
    layer: int


@dataclass(frozen=True)
class QK(Signal):
    """Queries and keys of an attention layer as they enter the product: a pair of ``[V, H, P, d]`` over the patches
    of every encoder view. Which pairs a windowed layer allows they do not say: see :class:`Attention`."""

    per_token: ClassVar[bool] = False
    stack: Stack
    layer: int


@dataclass(frozen=True)
class Attention(Signal):
    """A vision layer's attention as a :class:`vlmprune.core.attention.AttentionMap` over the patches of every encoder
    view: reductions of the matrix, which itself never exists."""

    per_token: ClassVar[bool] = False
    stack: ClassVar[Stack] = "vision"
    layer: int


@dataclass(frozen=True)
class Hidden(Signal):
    """Residual stream entering (``when="in"``) or leaving (``"out"``) a layer, ``[I, N, D]``."""

    stack: Stack
    layer: int
    when: Literal["in", "out"] = "out"


@dataclass(frozen=True)
class PreProjector(Signal):
    """What the projector is given, ``[I, N, D_vision]``."""

    stack: ClassVar[Stack] = "vision"


@dataclass(frozen=True)
class Projected(Signal):
    """What the LLM is given, ``[I, N, D_text]``."""


@dataclass(frozen=True)
class Projector(Signal):
    """The projector itself, a callable from ``[..., D_vision]`` to ``[..., D_text]``."""

    per_token: ClassVar[bool] = False


@dataclass(frozen=True)
class TextEmbeddings(Signal):
    """Embeddings of the prompt's text tokens: a pair ``[I, T, D]`` and valid ``[I, T]``."""

    per_token: ClassVar[bool] = False


@dataclass(frozen=True)
class JointEmbeddings(Signal):
    """Image and text features in the encoder's joint space: a pair ``[I, N, E]`` and ``[I, E]``."""

    per_token: ClassVar[bool] = False


@dataclass(frozen=True)
class Pixels(Signal):
    """Un-normalised pixels in 0..255 of every patch, ``[V, P, C, h, w]`` (the frames of a temporal patch on top of each
    other). Needs ``processor=`` at ``apply``, which knows the normalisation."""

    per_token: ClassVar[bool] = False
    stack: ClassVar[Stack] = "vision"
