"""Features of timm's models behind merged and dropped patches: their length, what stands where, and pooling."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("timm")

from explicit_tome import Image, run_block, timm_blocks, timm_embedded, unmerged
from timm_models import DEPTH, PATCHES, images, timm_model, variants
from torch import Tensor, nn
from tower_policies import KeepPatches, MergeEach

import vlmprune
from vlmprune.core.errors import InputError
from vlmprune.policies.tome import ToMe

R = (3, 4, 2)
KEPT = ((0, 3, 5, 10, 15), (1, 2, 6, 8, 9, 14))
VARIANTS = ("token", "avg", "registers", "map", "eva", "distilled")


def block_outputs(model: nn.Module, pictures: Tensor) -> list[Tensor]:
    """Every block's output in full length ``[V, T, D]``, by the definition."""
    found = []
    images = [Image(states, [[t] for t in range(len(states))]) for states in timm_embedded(model, pictures)]
    for block, r in zip(timm_blocks(model), R, strict=True):
        images = [run_block(block, image, r, model.num_prefix_tokens) for image in images]
        found.append(torch.stack([unmerged(image) for image in images]))
    return found


@pytest.mark.parametrize("variant", variants(*VARIANTS))
@torch.no_grad()
def test_features_have_their_length(variant: str) -> None:
    model, pictures = timm_model(variant), images(2)
    wanted = model.norm(block_outputs(model, pictures)[-1])
    with vlmprune.applied(model, ToMe(r=R)) as handle:
        logits = model(pictures)
        features = model.forward_features(pictures)
        torch.testing.assert_close(features, wanted, rtol=1e-6, atol=1e-6)
        close(model.forward_head(features), logits)
        assert handle.last.kept_tokens == (PATCHES - sum(R),) * 2
    with vlmprune.applied(model, ToMe(r=R), restore_length=False):
        assert torch.equal(model(pictures), logits)
        short = model.forward_features(pictures)
        assert short.shape[1] == features.shape[1] - sum(R)
        assert torch.equal(model.forward_head(short), logits)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("variant", variants(*VARIANTS))
@torch.no_grad()
def test_intermediates(variant: str, norm: bool) -> None:
    model, pictures = timm_model(variant), images(2)
    prefix = model.num_prefix_tokens
    outputs = block_outputs(model, pictures)
    last = model.norm(outputs[-1])
    wanted = [model.norm(states) for states in outputs] if norm else outputs
    with vlmprune.applied(model, ToMe(r=R)):
        final, maps = model.forward_intermediates(pictures, norm=norm)
        close(final, last)
        for states, found in zip(wanted, maps, strict=True):
            assert found.shape == (2, 32, 4, 4)
            close(found.flatten(2).mT, states[:, prefix:])
        rows = model.forward_intermediates(
            pictures, indices=[0, -1], norm=norm, output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True
        )
        for found, states in zip(rows, (wanted[0], wanted[-1]), strict=True):  # pairs where there is a prefix
            close(torch.cat(found[::-1], 1) if prefix else found, states)
        early = model.forward_intermediates(pictures, indices=[1], norm=norm, stop_early=True, intermediates_only=True)
        close(early[0].flatten(2).mT, wanted[1][:, prefix:])


@torch.no_grad()
def test_intermediates_as_a_dictionary_and_the_older_name() -> None:
    model, pictures = timm_model("registers"), images(2)
    outputs = block_outputs(model, pictures)
    with vlmprune.applied(model, ToMe(r=R)):
        found = model.forward_intermediates(pictures, 2, output_dict=True, output_fmt="NLC", return_prefix_tokens=True)
        close(found["image_features"], model.norm(outputs[-1]))
        close(found["image_intermediates"][0], outputs[1][:, 5:])
        close(found["image_intermediates_prefix"][1], outputs[2][:, :5])
        older = model.get_intermediate_layers(pictures, n=(0, 2), reshape=True, norm=True)
        close(older[0].flatten(2).mT, model.norm(outputs[0])[:, 5:])


@torch.no_grad()
def test_short_intermediates() -> None:
    model, pictures = timm_model("token"), images(2)
    outputs = block_outputs(model, pictures)
    with vlmprune.applied(model, ToMe(r=R), restore_length=False) as handle:
        final, parts = model.forward_intermediates(pictures, output_fmt="NLC", norm=True)
        assert [part.shape[1] for part in parts] == [13, 9, 7] and final.shape[1] == 8
        groups = handle.last.groups(1)
        first = torch.tensor([group[0] for group in groups])
        close(parts[-1][1], model.norm(outputs[-1])[1, 1:][first])
        with pytest.raises(InputError, match="NCHW.*restore_length=True"):
            model.forward_intermediates(pictures)
        with pytest.raises(InputError, match="NCHW.*output_fmt='NLC'"):
            model.get_intermediate_layers(pictures, reshape=True)
        assert isinstance(handle.last_error, InputError)
        assert model.get_intermediate_layers(pictures)[0].shape[1] == 7


@pytest.mark.parametrize("place", ["before", "middle"])
@pytest.mark.parametrize("variant", variants(*VARIANTS, "max", "avgmax", "no_class", "eva_map"))
@torch.no_grad()
def test_dropped_patches(variant: str, place: Any) -> None:
    """As if they had not been there from that block on; their features are zero and no pooling counts them."""
    model, pictures = timm_model(variant), images(2)
    prefix = model.num_prefix_tokens
    entering = [states.clone() for states in timm_embedded(model, pictures)]
    blocks = timm_blocks(model)
    results = []
    for states, kept in zip(entering, KEPT, strict=True):
        image = run_block(blocks[0], Image(states, [[t] for t in range(len(states))]), 0, prefix)
        stay = [*range(prefix), *(prefix + patch for patch in kept)]
        for number, block in enumerate(blocks[1:]):
            if number == 0 and place == "middle":
                image = drop_in_the_middle(block, image, stay)
                continue
            if number == 0:
                image = Image(image.states[stay], [[t] for t in stay])
            image = run_block(block, image, 0, prefix)
        results.append(image)
    wanted = torch.zeros(2, prefix + PATCHES, 32, dtype=torch.float64)
    for row, image in enumerate(results):
        wanted[row, [m[0] for m in image.members]] = model.norm(image.states)
    policy = KeepPatches(kept=KEPT, block=1, place=place)
    with vlmprune.applied(model, policy) as handle:
        logits = model(pictures)
        features = model.forward_features(pictures)
        close(features, wanted)
        assert (features == 0).all(2).sum(1).tolist() == [PATCHES - len(kept) for kept in KEPT]
        close(model.forward_head(features), logits)
        final, maps = model.forward_intermediates(pictures, norm=True)
        close(final, wanted)
        assert (maps[0] == 0).all(1).sum() == 0 and (maps[1] == 0).all(1).sum() == 2 * PATCHES - 11
        close(model.forward_head(final), logits)
        assert [handle.last.kept(sample) for sample in (0, 1)] == [list(kept) for kept in KEPT]
    for row, image in enumerate(results):
        close(logits[row], alone(model, model.norm(image.states)))


def drop_in_the_middle(block: Any, image: Image, stay: list[int]) -> Image:
    query, key, value = block.heads(block.norm1(image.states), image.members)
    mixed = ((query @ key.mT / query.shape[-1] ** 0.5).softmax(-1) @ value).transpose(0, 1).flatten(1)
    states = (image.states + block.project(mixed))[stay]
    return Image(states + block.mlp(states), [[t] for t in stay])


def alone(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits of a model whose image has just these tokens ``[n, D]``."""
    return model.forward_head(tokens[None])[0]


@pytest.mark.parametrize("variant", variants("token", "avg", "max", "map", "eva", "qk_norm"))
@torch.no_grad()
def test_different_numbers_per_image(variant: str) -> None:
    """Padding of shorter images influences nothing."""
    model, pictures = timm_model(variant), images(3)
    numbers = (1, 4, 2)
    singles = []
    for picture, r in zip(pictures, numbers, strict=True):
        with vlmprune.applied(model, MergeEach(r=(r,))):
            singles.append((model(picture[None]), model.forward_features(picture[None])))
    with vlmprune.applied(model, MergeEach(r=numbers)) as handle:
        close(model(pictures), torch.cat([logits for logits, _ in singles]))
        assert handle.last.kept_tokens == tuple(PATCHES - DEPTH * r for r in numbers)
        close(model.forward_features(pictures), torch.cat([features for _, features in singles]))


@torch.no_grad()
def test_outputs_without_pooling() -> None:
    model, pictures = timm_model("token"), images(2)
    model.reset_classifier(5, global_pool="")
    model.double()
    wanted = model.head(model.norm(block_outputs(model, pictures)[-1]))
    with vlmprune.applied(model, ToMe(r=R)):
        close(model(pictures), wanted)
    with vlmprune.applied(model, ToMe(r=R), restore_length=False):
        assert model(pictures).shape == (2, 17 - sum(R), 5)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
