"""ToMe on timm's models equals its definition, written out in float64: every variant of blocks and heads."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("timm")

from explicit_tome import run_blocks, timm_blocks, timm_embedded, timm_logits
from model_state import model_state
from timm_models import DEPTH, PATCHES, images, timm_model, variants

import vlmprune
from vlmprune.policies.tome import ToMe

R = (3, 4, 2)


@pytest.mark.parametrize("variant", variants())
@torch.no_grad()
def test_logits_sizes_and_sources(variant: str) -> None:
    model, pictures = timm_model(variant), images(2)
    prefix = model.num_prefix_tokens
    dense, before = model(pictures), model_state(model)
    expected = run_blocks(timm_blocks(model), timm_embedded(model, pictures), (0,) * DEPTH, prefix)
    torch.testing.assert_close(timm_logits(model, expected), dense, rtol=1e-9, atol=1e-9)
    expected = run_blocks(timm_blocks(model), timm_embedded(model, pictures), R, prefix)
    wanted = timm_logits(model, expected)
    assert (wanted - dense).abs().max() > 1e-2
    handle = vlmprune.apply(model, ToMe(r=R))
    torch.testing.assert_close(model(pictures), wanted, rtol=1e-11, atol=1e-11)
    report = handle.last
    assert report.kept_tokens == (PATCHES - sum(R),) * 2
    for sample, image in enumerate(expected):
        groups = [[member - prefix for member in members] for members in image.members[prefix:]]
        assert report.groups(sample) == [sorted(group) for group in groups]
    handle.remove()
    assert torch.equal(model(pictures), dense)
    assert model_state(model) == before


@pytest.mark.parametrize("variant", variants("token", "avg", "eva"))
@torch.no_grad()
def test_without_proportional_attention(variant: str) -> None:
    """Pooling weighs by size all the same."""
    model, pictures = timm_model(variant), images(2)
    expected = run_blocks(
        timm_blocks(model), timm_embedded(model, pictures), R, model.num_prefix_tokens, prop_attn=False
    )
    with vlmprune.applied(model, ToMe(r=R, prop_attn=False)):
        torch.testing.assert_close(model(pictures), timm_logits(model, expected), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("variant", variants("token", "qk_norm", "map", "eva_unfused"))
@torch.no_grad()
def test_unfused_attention(variant: str) -> None:
    """timm's own softmax, as it runs with ``TIMM_FUSED_ATTN=0``."""
    model, pictures = timm_model(variant), images(2)
    with vlmprune.applied(model, ToMe(r=R)):
        fused = model(pictures)
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        torch.testing.assert_close(model(pictures), fused, rtol=1e-9, atol=1e-9)
