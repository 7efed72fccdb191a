"""Signals of every family's tower equal what a stock model with eager attention computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from eager_reference import CLS, PACKED, EagerReference, encoder_views, padded
from family_prompts import FamilyPrompt, prefill
from family_runs import FAMILIES, VIDEO, batch, family_model
from recording import Recording
from torch import Tensor

import vlmprune
from vlmprune.core import signals as s
from vlmprune.core.context import Context
from vlmprune.core.errors import InputError
from vlmprune.embedded.random_models import qwen

BLOCKS = (0, 1, 2, 3)  # of Qwen2.5-VL, 0 and 2 attend within windows
PATCHES = (s.QK, s.Attention)
BATCHES = [
    pytest.param(family, video, id=family + "-video" * video)
    for family in FAMILIES
    for video in (False, True)
    if family in VIDEO or not video
]


def wanted(family: str, video: bool) -> tuple[s.Signal, ...]:
    found: list[s.Signal] = [s.PreProjector(), s.Projected()]
    for block in BLOCKS:
        found += [
            s.ColumnMass("vision", block),
            s.ColumnMass("vision", block, "sum"),
            s.Keys("vision", block),
            s.QK("vision", block),
            s.Hidden("vision", block, "in"),
            s.Hidden("vision", block, "out"),
        ]
        found += [s.ClsRow(block), s.ClsLogits(block)] if family in CLS else []
        found += [] if video else [s.Attention(block)]
    return tuple(found)


def record(family: str, prompt: FamilyPrompt, signals: tuple[s.Signal, ...]) -> Context:
    policy = Recording(wanted=signals)
    with vlmprune.applied(family_model(family), policy):
        prefill(family_model(family), prompt)
    return policy.tape.last


def eager(family: str, prompt: FamilyPrompt) -> EagerReference:
    return EagerReference(family_model(family, torch.float64, "eager"), prompt)


def per_patch(reference: EagerReference, signal: s.Signal) -> Tensor:
    """``[V, P, ...]`` of a signal that comes per token, by its definition."""
    first = reference.first
    if isinstance(signal, s.Hidden):
        states = "entering" if signal.when == "in" else "leaving"
        return padded(reference.patches(lambda run: getattr(run, states)[signal.layer]))
    block = signal.layer
    if isinstance(signal, s.Keys):
        return padded([key.transpose(0, 1).flatten(1) for key in reference.heads(block, "key")])
    matrices = reference.matrices(block)
    if isinstance(signal, s.ColumnMass):
        return padded([(m.sum(0) if signal.reduce == "sum" else m.mean(0))[first:] for m in matrices])
    if isinstance(signal, s.ClsRow):
        return padded([m[0, 1:] for m in matrices])
    assert isinstance(signal, s.ClsLogits)
    scores = []
    for run, number in reference.views:
        [call] = run.attention[block]
        query, key = call.query[number], call.key[number]
        scores.append((query[:, 0][:, None] @ key.transpose(1, 2)).mean(0)[0, 1:] * call.scale)
    return padded(scores)


def expected(reference: EagerReference, context: Context, signal: s.Signal) -> Any:
    """A signal as it has to be delivered."""
    if isinstance(signal, s.QK):
        return tuple(padded(reference.heads(signal.layer, name), 1) for name in ("query", "key"))
    if isinstance(signal, s.PreProjector):
        return context.to_tokens(pre_projector(reference))
    return context.to_tokens(per_patch(reference, signal))


def pre_projector(reference: EagerReference) -> Tensor:
    """What the projector was given, per patch; per token on InternVL, where patches were joined before."""
    if reference.prompt.family == "internvl":
        return torch.stack([run.projector[number] for run, number in reference.views])
    if reference.first:
        return padded([run.projector[number] for run, number in reference.views])
    return padded(reference.patches(lambda run: run.projector))


def close(got: Any, wish: Any, tolerance: float = 1e-5) -> bool:
    if isinstance(got, tuple):
        return all(close(a, b, tolerance) for a, b in zip(got, wish, strict=True))
    scale = max(1.0, float(wish.abs().max()))
    return got.shape == wish.shape and torch.allclose(got.double(), wish, rtol=tolerance, atol=tolerance * scale * 0.1)


@pytest.mark.parametrize(("family", "video"), BATCHES)
def test_tower_signals_equal_eager_attention(family: str, video: bool) -> None:
    images = (2, 0, 1) if video else (2, 1, 0)
    prompt = batch(family, images, video=video)
    signals = wanted(family, video)
    context, reference = record(family, prompt, signals), eager(family, prompt)
    assert len(reference.runs) == 1 + video
    wrong = [
        signal
        for signal in signals
        if not isinstance(signal, (s.Projected, s.Attention))
        and not close(context.signal(signal), expected(reference, context, signal))
    ]
    assert not wrong
    items = [
        i for i, part in enumerate(p for row in prompt.rows for p in row.parts) for _ in range(encoder_views(part))
    ]
    assert context.encoder_items == tuple(items)
    for kind in (s.ColumnMass, s.Keys):  # the reference tells blocks apart
        assert not close(context.signal(kind("vision", 0)), expected(reference, context, kind("vision", 2)))


@pytest.mark.parametrize("family", FAMILIES)
def test_reductions_of_the_attention_matrix(family: str) -> None:
    """With and without weights of the rows; zero between windows."""
    prompt = batch(family)
    context, reference = record(family, prompt, tuple(s.Attention(block) for block in BLOCKS)), eager(family, prompt)
    generator = torch.Generator().manual_seed(4)
    for block in BLOCKS:
        given = context.signal(s.Attention(block))
        matrices = [m[reference.first :, reference.first :] for m in reference.matrices(block)]
        weights = [torch.rand(len(m), generator=generator, dtype=torch.float64) for m in matrices]
        some = [torch.where(w > 0.5, w, 0) for w in weights]
        cases: list[tuple[Tensor | None, list[Tensor]]] = [
            (None, [torch.ones_like(w) for w in weights]),
            (padded(weights), weights),
            (padded(some), some),
        ]
        for given_weights, rows in cases:
            total = padded([w @ m for w, m in zip(rows, matrices, strict=True)])
            mean = padded([w @ m / w.sum() for w, m in zip(rows, matrices, strict=True)])
            assert close(given.column_mass(given_weights, "sum"), total)
            assert close(given.column_mass(given_weights), mean)
        assert not close(given.column_mass(padded(weights)), given.column_mass().double())
        if family == "qwen2_5_vl":
            windowed = block % 2 == 0
            assert any((m == 0).any() for m in matrices) == windowed
    lengths = torch.tensor([len(m) for m in matrices])
    valid = torch.arange(int(lengths.max())) < lengths[:, None]
    assert valid.all() if context.patch_valid is None else torch.equal(context.patch_valid, valid)
    assert (family in PACKED) == (context.patch_valid is not None)


@pytest.mark.parametrize(("family", "video"), BATCHES)
def test_pixels_are_those_that_the_processor_was_given(family: str, video: bool) -> None:
    prompt, raw = painted(batch(family, (2, 0, 1), video=video))
    policy = Recording(wanted=(s.Pixels(),))
    with vlmprune.applied(family_model(family), policy, processor=PaintProcessor()):
        prefill(family_model(family), prompt)
    got = policy.tape.last.signal(s.Pixels())
    for view, colours in zip(got, raw, strict=True):
        assert torch.equal(view[: len(colours)].double(), colours.double())
        assert not view[len(colours) :].any()


class PaintProcessor:
    """Says how pixels were normalised."""

    def __init__(self) -> None:
        self.image_processor = self
        self.image_mean, self.image_std, self.rescale_factor = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3], 1 / 255


def painted(prompt: FamilyPrompt) -> tuple[FamilyPrompt, list[Tensor]]:
    """The prompt with images of whole-numbered colours, and these per view ``[P, C, h, w]`` as the tower cuts them."""
    generator = torch.Generator().manual_seed(6)
    rows, raw = [], []
    for row in prompt.rows:
        parts = []
        for part in row.parts:
            name = next(n for n in part.tensors if n.startswith("pixel_values"))
            colours = torch.randint(0, 256, part.tensors[name].shape, generator=generator)
            raw += cut(prompt.family, part, colours)
            parts.append(replace(part, tensors={**part.tensors, name: normalised(colours)}))
        rows.append(replace(row, parts=parts))
    return replace(prompt, rows=tuple(rows)), raw


def normalised(colours: Tensor) -> Tensor:
    """What a processor makes of colours: ``[..., C, H, W]``, or packed patches ``[N, C * t * h * w]``."""
    mean, std = (
        torch.tensor(x, dtype=torch.float64) for x in (PaintProcessor().image_mean, PaintProcessor().image_std)
    )
    if colours.ndim == 2:
        return ((colours.unflatten(1, (3, -1)) / 255 - mean[:, None]) / std[:, None]).flatten(1)
    return (colours / 255 - mean[:, None, None]) / std[:, None, None]


def cut(family: str, part: Any, colours: Tensor) -> list[Tensor]:
    """Patches of each view, row by row; of packed ones in the given order, frames of a patch on top of each other."""
    if family in PACKED:
        views = colours.chunk(encoder_views(part))
        return [view.unflatten(1, (3, qwen.TEMPORAL * qwen.PATCH, qwen.PATCH)) for view in views]
    side = family_model(family).config.vision_config.patch_size
    side = side if isinstance(side, int) else side[0]
    found = []
    for image in colours.reshape(-1, *colours.shape[-3:]):
        rows = image.split(side, 1)
        found.append(torch.stack([cell for row in rows for cell in row.split(side, 2)]))
    return found


def test_pixels_without_a_processor_are_refused() -> None:
    for family in FAMILIES:
        with pytest.raises(InputError, match="looks at pixels; give processor="):
            vlmprune.apply(family_model(family), Recording(wanted=(s.Pixels(),)))
