"""Signals: what a policy may ask an adapter to deliver, nothing more and without eager attention.

Layers are 0-based. ``stack`` is ``"vision"`` or ``"text"``. Shapes use ``I`` items and ``N`` visual tokens per item;
see :class:`vlmprune.core.context.Context` for what an item is at each site. Attention is after the softmax, the mean
over heads, float32.

Values of patches follow unpadding, interpolation and pooling to the LLM's tokens: a token made of several patches has
their mean, a newline token 0. Only ``QK``, ``Attention`` and ``Pixels`` come per patch, over the ``V`` encoder views
of all items with ``P`` patches each (``context.encoder_items``); ``context.to_tokens`` takes such values to tokens.
"""

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
