"""What policies inside image models are given: keys, their mean, and attention per head, also behind a merge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("open_clip")

from clip_models import clip_blocks, clip_model
from explicit_tome import Image, run_block, timm_blocks, timm_embedded
from recording import Recording
from timm_models import images, timm_model, variants
from torch import Tensor, nn

import vlmprune
from vlmprune.adapters.timm_port import _rows
from vlmprune.core.signals import HeadAttention, KeyMean, Keys
from vlmprune.core.sites import Site

SIGNALS = (KeyMean(1), Keys("vision", 1), HeadAttention(1))


def check(model: nn.Module, run: Callable[[Tensor], Any], pictures: Tensor, blocks: Any, entering: Tensor) -> None:
    tokens = [Image(states, [[t] for t in range(len(states))]) for states in entering]
    prefix = getattr(model, "num_prefix_tokens", 1)
    tokens = [run_block(blocks[0], image, 3, prefix) for image in tokens]
    recorder = Recording(wanted=SIGNALS, site=Site.VISION_BLOCK, layer=2)
    tome = vlmprune.ToMe(r=(3,), positions="keep")
    with vlmprune.applied(model, vlmprune.Compose((tome, recorder))):
        run(pictures)
    heard = recorder.tape.last.signals
    start = torch.rand(len(tokens), len(tokens[0].states), dtype=torch.float64)
    ranked = heard[HeadAttention(1)].pagerank(1, start)
    for row, image in enumerate(tokens):
        query, key, _ = blocks[1].heads(blocks[1].norm1(image.states), image.members)
        matrix = (query @ key.mT / query.shape[-1] ** 0.5 + image.sizes.log()).softmax(-1)
        close(heard[KeyMean(1)][row], key.mean(0))
        own = heard[Keys("vision", 1)][row]
        shared = query.shape[0] * query.shape[2] // own.shape[1]  # queries per key
        close(own, key[::shared].transpose(0, 1).flatten(1))
        votes = (start[row] / start[row].sum()) @ matrix
        found = ranked[row] / ranked[row].sum(-1, keepdim=True)
        close(found, votes / votes.sum(-1, keepdim=True))


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "variant", variants("token", "qk_norm", "post_norm", "eva", "eva_mixed", "eva_half", "eva_grouped")
)
@torch.no_grad()
def test_timm(variant: str) -> None:
    model, pictures = timm_model(variant), images(2)
    check(model, model, pictures, timm_blocks(model), timm_embedded(model, pictures))


@pytest.mark.parametrize("variant", ["tok", "qk_norm"])
@torch.no_grad()
def test_open_clip(variant: str) -> None:
    model, pictures = clip_model(variant), images(2, 64)
    check(model, model.encode_image, pictures, clip_blocks(model.visual), model.visual._embeds(pictures))


def test_rows_of_rotary_tables() -> None:
    """One table for all, one per head, one per image."""
    index = torch.tensor([[0, 2], [3, 3]])
    for shape in ((4, 6), (5, 4, 6), (2, 1, 4, 6), (2, 5, 4, 6)):
        table = torch.randn(shape)
        found = _rows(table, index)
        heads = 5 if 5 in shape else 1
        assert found.shape == (2, heads, 2, 6)
        whole = table.expand(2, heads, 4, 6)
        for image in range(2):
            for head in range(heads):
                for place in range(2):
                    assert torch.equal(found[image, head, place], whole[image, head, index[image, place]])
