"""The MLP of a padded batch works on the real tokens alone where a good part is padding."""

from __future__ import annotations

import pytest
import torch
from fixed_tower import FixedGroups, Groups
from timm_models import timm_model

import vlmprune
from vlmprune.adapters import tower_reduction

TOKENS, PREFIX, LAYER = 17, 1, 1


def merged(tokens: int) -> Groups:
    """Groups of neighbours, so many tokens in all."""
    own = tuple((token,) for token in range(tokens - 1))
    return (*own, tuple(range(tokens - 1, TOKENS)))


def seen_by_mlp(model: torch.nn.Module, pixels: torch.Tensor, lengths: tuple[int, ...]) -> tuple[list, torch.Tensor]:
    """Shapes of the MLP's inputs in the block that merges and the next, and the logits."""
    shapes: list[tuple[int, ...]] = []
    hooks = [
        model.blocks[layer].mlp.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape[:2])))
        for layer in (LAYER, LAYER + 1)
    ]
    policy = FixedGroups(groups=(tuple(map(merged, lengths)),), layer=LAYER)
    with vlmprune.applied(model, policy), torch.no_grad():
        logits = model(pixels)
    for hook in hooks:
        hook.remove()
    return shapes, logits


@pytest.fixture
def model() -> torch.nn.Module:
    return timm_model("token")


def test_only_real_tokens(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lengths = (9, 16, 4)
    shapes, logits = seen_by_mlp(model, pixels, lengths)
    assert shapes == [(1, sum(lengths)), (3, 16)]  # the next block merges nothing
    monkeypatch.setattr(tower_reduction, "WORTH_PACKING", 1.1)
    padded_shapes, padded = seen_by_mlp(model, pixels, lengths)
    assert padded_shapes == [(3, 16), (3, 16)]
    torch.testing.assert_close(logits, padded, atol=1e-12, rtol=1e-12)
    for row, length in enumerate(lengths):
        _, alone = seen_by_mlp(model, pixels[row : row + 1], (length,))
        torch.testing.assert_close(logits[row : row + 1], alone, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("lengths", "training"), [((16, 16, 15), False), ((16, 16, 16), False), ((9, 16, 4), True)])
def test_little_padding_and_training(model: torch.nn.Module, lengths: tuple[int, ...], training: bool) -> None:
    """In training, blocks drop whole rows of the batch at random."""
    shapes, _ = seen_by_mlp(model.train(training), torch.zeros(3, 3, 32, 32, dtype=torch.float64), lengths)
    assert shapes == [(3, 16), (3, 16)]


def test_the_report_counts_what_was_computed(model: torch.nn.Module) -> None:
    flops = []
    for lengths in ((9, 16, 4), (16, 16, 16)):
        policy = FixedGroups(groups=(tuple(map(merged, lengths)),), layer=LAYER)
        with vlmprune.applied(model, policy) as handle, torch.no_grad():
            model(torch.zeros(3, 3, 32, 32, dtype=torch.float64))
        flops.append(handle.last.tower_flops)
    block = model.blocks[LAYER]
    per_token = 4 * block.mlp.fc1.in_features * block.mlp.fc1.out_features
    assert flops[1] - flops[0] == per_token * (3 * 16 - 29)
