"""Contexts for tests of policies without a model: ragged items padded with values that must not matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlmprune.core.attention import DenseAttention, DenseHeads
from vlmprune.core.budget import Budget
from vlmprune.core.context import Context
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import Policy
from vlmprune.core.selection import Selection
from vlmprune.core.signals import (
    Attention,
    ClsRow,
    ColumnMass,
    GroupMass,
    HeadAttention,
    KeyMean,
    Keys,
    Projected,
    Signal,
)
from vlmprune.core.sites import Site
from vlmprune.core.views import View

# Padding of features and scores: larger than any real value, so that a policy that looks at it goes wrong.
PADDING = 1e4
WIDTH = 16
HEADS = 2

ALL_SITES = frozenset({Site.IMAGE, Site.VISION_BLOCK, Site.POST_ENCODER, Site.DECODER_LAYER})

# LLaVA-1.5-7B: CLIP ViT-L/14-336, the last block but one feeds the projector.
LLAVA = ModelInfo(
    family="llava",
    model_class="LlavaForConditionalGeneration",
    sites=ALL_SITES,
    signals=frozenset({Attention, ColumnMass, ClsRow, Projected, GroupMass, KeyMean, HeadAttention, Keys}),
    vision_depth=24,
    text_depth=32,
    feature_block=22,
    has_cls=True,
    prefix_tokens=1,
    text_hidden=WIDTH,
    vision_hidden=WIDTH,
    vision_heads=HEADS,
    vision_ffn=4 * WIDTH,
)
# Qwen2.5-VL: no CLS, 2 x 2 merger, multi-axis positions.
QWEN = replace(
    LLAVA,
    family="qwen",
    model_class="Qwen2_5_VLForConditionalGeneration",
    vision_depth=32,
    text_depth=28,
    feature_block=31,
    has_cls=False,
    prefix_tokens=0,
    merge_unit=4,
    vision_gated=True,
    mrope=True,
    full_attention_blocks=(7, 15, 23, 31),
)


def image(height: int, width: int) -> tuple[View, ...]:
    """The views of an image seen as a whole."""
    return (View(height, width),)


def any_resolution(height: int, width: int, n_tiles: int) -> tuple[View, ...]:
    """A thumbnail and tiles of equal grids."""
    n = height * width
    tiles = [View(height, width, n * (i + 1), "tile") for i in range(n_tiles)]
    return (View(height, width, 0, "thumbnail"), *tiles)


def frames(height: int, width: int, count: int) -> tuple[View, ...]:
    """The frames of a video."""
    return tuple(View(height, width, height * width * i, "frame") for i in range(count))


def n_tokens(views: Sequence[View]) -> int:
    """Tokens of an item."""
    return sum(view.length for view in views)


def pad(rows: Sequence[Tensor], value: float = PADDING) -> Tensor:
    """One tensor out of ragged rows."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def post_encoder(
    views: Sequence[tuple[View, ...]],
    keep: Any = 1.0,
    signals: Mapping[Signal, Sequence[Any]] | None = None,
    info: ModelInfo = LLAVA,
    **fields: Any,
) -> Context:
    """A context after the encoder.

    Args:
        views: per item its views; a plain list of ``image(...)``, ``any_resolution(...)``, ``frames(...)``.
        keep: the budget.
        signals: per signal one tensor ``[n, ...]`` per item; for attention one ``[P, P]`` per view of each item.
        fields: other fields of the context.
    """
    lengths = tuple(n_tokens(item) for item in views)
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    padded: dict[Signal, Any] = {s: pad(rows) for s, rows in (signals or {}).items() if not isinstance(s, Attention)}
    for signal, per_view in (signals or {}).items():
        if isinstance(signal, Attention):
            padded[signal], patch_valid = dense_attention(per_view)
            fields = {"patch_valid": patch_valid, **encoder_fields(views, valid), **fields}
    return Context(
        site=Site.POST_ENCODER,
        info=info,
        budget=Budget.parse(keep),
        lengths=lengths,
        valid=valid,
        features=padded.get(Projected()),
        signals=padded,
        views=tuple(views),
        **{"sample": tuple(range(len(views))), **fields},
    )


def dense_attention(per_item: Sequence[Sequence[Tensor]]) -> tuple[DenseAttention, Tensor | None]:
    """The attention matrices ``[P, P]`` of all views as one padded map, and which patches are real ``[V, P]``."""
    matrices = [matrix for item in per_item for matrix in item]
    sizes = torch.tensor([len(matrix) for matrix in matrices])
    most = int(sizes.max())
    padded = torch.full((len(matrices), most, most), PADDING)
    for target, matrix in zip(padded, matrices, strict=True):
        target[: len(matrix), : len(matrix)] = matrix
    valid = torch.arange(most) < sizes[:, None]
    return DenseAttention(padded), None if bool(valid.all()) else valid


def encoder_fields(views: Sequence[tuple[View, ...]], valid: Tensor) -> dict[str, Any]:
    """Fields of a context whose patches are its tokens: which views there are, and the way to the tokens."""

    def to_tokens(values: Tensor, newline: float = 0.0) -> Tensor:
        tokens = values.new_full((*valid.shape, *values.shape[2:]), newline)
        for view, (item, place) in zip(values, places, strict=True):
            tokens[item, place] = view[: len(place)]
        return tokens

    places = [(item, view.tokens()) for item, row in enumerate(views) for view in row]
    return {"encoder_items": tuple(item for item, _ in places), "to_tokens": to_tokens}


def decoder(
    lengths: Sequence[int],
    layer: int,
    signals: Mapping[Signal, Any],
    info: ModelInfo = LLAVA,
    keep: Any = 1.0,
) -> Context:
    """A context before a decoder layer, one image per sample."""
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    index = torch.arange(valid.shape[1]).expand_as(valid)
    return Context(
        site=Site.DECODER_LAYER,
        info=info,
        budget=Budget.parse(keep),
        lengths=tuple(lengths),
        valid=valid,
        layer=layer,
        signals=signals,
        image_id=torch.where(valid, 0, -1),
        position=torch.where(valid, index + 1, -1),
        sample=tuple(range(len(lengths))),
    )


def vision_block(
    lengths: Sequence[int],
    layer: int,
    signals: Mapping[Signal, Any] | None = None,
    info: ModelInfo = LLAVA,
    keep: Any = 1.0,
    **fields: Any,
) -> Context:
    """A context inside the tower, one view per sample.

    Args:
        lengths: tokens per item, prefix included, as it enters the tower and, unless ``entered`` says otherwise, now.
        layer: block.
        signals: padded values.
        fields: other fields of the context.
    """
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    given = {"prefix": info.prefix_tokens, "entered": tuple(lengths), "sample": tuple(range(len(lengths)))}
    return Context(
        site=Site.VISION_BLOCK,
        info=info,
        budget=Budget.parse(keep),
        lengths=tuple(lengths),
        valid=valid,
        layer=layer,
        signals=signals or {},
        **{**given, **fields},
    )


def tower_signals(signals: Sequence[Signal], lengths: Sequence[int], seeds: Sequence[int]) -> dict[Signal, Any]:
    """Random values of what a policy asks for inside the tower; item i's depend on its seed only."""
    found: dict[Signal, Any] = {}
    for number, signal in enumerate(signals):
        draws = [torch.Generator().manual_seed(97 * seed + number) for seed in seeds]
        if isinstance(signal, HeadAttention):
            heads = [_heads(n, draw) for n, draw in zip(lengths, draws, strict=True)]
            most = max(lengths)
            padded = torch.full((len(heads), HEADS, most, most), PADDING)
            for target, matrix in zip(padded, heads, strict=True):
                target[:, : matrix.shape[1], : matrix.shape[1]] = matrix
            found[signal] = DenseHeads(padded)
        else:
            channels = WIDTH // HEADS if isinstance(signal, KeyMean) else WIDTH
            found[signal] = pad([torch.randn(n, channels, generator=d) for n, d in zip(lengths, draws, strict=True)])
    return found


def _heads(n: int, generator: torch.Generator) -> Tensor:
    """Attention ``[H, n, n]`` of several heads, all of them uneven."""
    favour = torch.randn(HEADS, 1, n, generator=generator)
    return (favour + torch.randn(HEADS, n, n, generator=generator)).softmax(2)


def random_signals(
    policy: Policy, views: Sequence[tuple[View, ...]], info: ModelInfo = LLAVA, seed: int = 0
) -> dict[Signal, list[Any]]:
    """Random values of all that a policy asks for after the encoder; item i's depend on ``seed + i`` only."""
    signals: dict[Signal, list[Any]] = {}
    for request in policy.requests(info):
        if request.site != Site.POST_ENCODER:
            continue
        for number, signal in enumerate(request.signals):
            draws = [torch.Generator().manual_seed(97 * (seed + i) + number) for i, _ in enumerate(views)]
            if isinstance(signal, Attention):
                signals[signal] = [_attention(item, draw) for item, draw in zip(views, draws, strict=True)]
            else:
                signals[signal] = [_random(signal, n_tokens(v), d) for v, d in zip(views, draws, strict=True)]
    return signals


def _attention(views: Sequence[View], generator: torch.Generator) -> list[Tensor]:
    """Rows of a softmax over the patches of each view; some patches get much."""
    sizes = [view.length for view in views]
    return [
        (2 * torch.randn(1, n, generator=generator) + torch.randn(n, n, generator=generator)).softmax(1) for n in sizes
    ]


def _random(signal: Signal, n: int, generator: torch.Generator) -> Tensor:
    if isinstance(signal, Projected):
        return torch.randn(n, WIDTH, generator=generator)
    return torch.rand(n, generator=generator)


def kept_tokens(selection: Selection) -> list[list[int]]:
    """Kept tokens per item, without padding."""
    assert selection.kept is not None
    return [[token for token in row if token >= 0] for row in selection.kept.tolist()]
