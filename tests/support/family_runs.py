"""What the adapter tests of all families share: models, batches, runs, and what a fixed policy keeps of them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
import transformers
from family_prompts import FamilyPrompt, decode, make_family_prompt, prefill
from fixed_policy import FixedEviction, FixedKeep
from llava_prompts import pick_tokens
from masked_reference import decoder_layers, hidden_keys
from prompt_styles import STYLES
from torch import Tensor, nn

from vlmprune.core.sites import Site
from vlmprune.embedded.random_models import FAMILIES as BUILDERS
from vlmprune.embedded.random_models import random_vlm
from vlmprune.embedded.random_models import tokens as t

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
FAMILIES = tuple(BUILDERS)
MROPE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
PLAIN = tuple(family for family in FAMILIES if family not in MROPE)
"""Families with one position per token."""
VIDEO = tuple(family for family, style in STYLES.items() if style.video is not None)
NEWLINES = ("llava_next", "llava_onevision")
"""Families with newline tokens."""
DEPTH = 4
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


@cache
def family_model(family: str, dtype: torch.dtype = torch.float64, implementation: str = "sdpa") -> nn.Module:
    """A model that tests share: every one of them leaves it as it was."""
    return random_vlm(family, dtype=dtype, attn_implementation=implementation)


def batch(
    family: str,
    images: tuple[int, ...] = (2, 1, 0),
    padded: bool = True,
    dtype: torch.dtype = torch.float64,
    video: bool = False,
    **arguments: Any,
) -> FamilyPrompt:
    """Prompts of a family, by default with two images, one image and none, left-padded."""
    return make_family_prompt(family, images, padded, dtype, video=video, **arguments)


def fixed_policy(
    prompt: FamilyPrompt, where: int | None = None, positions: Any = "keep", ragged: bool = True
) -> FixedKeep:
    """Keeps about half of the tokens of every image (after the encoder), or of every sample before layer ``where``."""
    site = Site.POST_ENCODER if where is None else Site.DECODER_LAYER
    return FixedKeep(kept=pick_tokens(prompt.widths(site), ragged), site=site, layer=where, positions=positions)


def fixed_eviction(prompt: FamilyPrompt, left: list[int] | None = None) -> FixedEviction:
    """Evicts other tokens in every layer; layer 1 loses all of them, layer 3 none.

    Args:
        left: tokens of each sample with images, where earlier sites made them fewer.
    """
    widths = prompt.widths(Site.DECODER_LAYER) if left is None else left
    return FixedEviction(
        kept=(
            pick_tokens(widths, ragged=True, seed=5),
            tuple(() for _ in widths),
            pick_tokens(widths, ragged=True, seed=6),
            tuple(tuple(range(width)) for width in widths),
        )
    )


def masked(model: nn.Module, prompt: FamilyPrompt, policy: FixedKeep | FixedEviction) -> AbstractContextManager[None]:
    """The dense model with the policy's dropped tokens hidden."""
    if isinstance(policy, FixedEviction):
        gone = {layer: prompt.dropped(kept, Site.DECODER_LAYER) for layer, kept in enumerate(policy.kept)}
        return hidden_keys(decoder_layers(model), gone, prompt.real, decode_only=True)
    dropped = prompt.dropped(policy.kept, policy.site)
    gone = dict.fromkeys(range(policy.layer or 0, DEPTH), dropped)
    return hidden_keys(decoder_layers(model), gone, prompt.real)


def forced_tokens(prompt: FamilyPrompt, steps: int = 6) -> Tensor:
    """``[B, S]`` text tokens that the decode steps are given."""
    generator = torch.Generator().manual_seed(9)
    return torch.randint(t.FIRST_TEXT, t.LAST_TEXT + 1, (len(prompt.rows), steps), generator=generator)


def rollout(model: nn.Module, prompt: FamilyPrompt, forced: Tensor, turn: bool = False) -> tuple[Tensor, Tensor]:
    """Logits ``[B, L, V]`` of the prompt and ``[B, S, V]`` of teacher-forced steps, or of one turn."""
    out = prefill(model, prompt, use_cache=True)
    return out.logits, decode(model, prompt, out.past_key_values, forced, turn)


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype = torch.float64) -> None:
    """Equal up to rounding, relative to the largest value."""
    assert got.shape == expected.shape
    scale = max(1.0, float(expected.abs().max()))
    assert (got - expected).abs().max() <= TOLERANCE[dtype] * scale
