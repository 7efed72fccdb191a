"""Policies that draw: the draw depends on the image (or the harness's id) and its place, on nothing else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from llava_prompts import LlavaPrompt, N, make_prompt, prefill, small_llava
from torch import nn

import vlmprune
from vlmprune.core.context import Context
from vlmprune.core.errors import SignalError
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import Policy, PolicyMeta
from vlmprune.core.selection import Selection
from vlmprune.core.sites import Site, SiteRequest


@dataclass(frozen=True)
class RandomCut(Policy):
    """Keeps half of each sample's tokens inside the decoder, or in its cache, drawn by the item's seed."""

    meta = PolicyMeta(title="random cut, for tests")
    name = "random_cut"

    site: Site = Site.DECODER_LAYER
    seed: int = 0
    keep: Any = 0.5

    def is_random(self, info: ModelInfo) -> bool:
        return True

    def requests(self, info: ModelInfo) -> tuple[SiteRequest, ...]:
        return (SiteRequest(self.site, 2, (), "keep"),)

    def select(self, context: Context) -> Selection:
        keep = torch.zeros_like(context.valid)
        for item, n in enumerate(context.lengths):
            keep[item, torch.randperm(n, generator=context.item_generator(item))[: n // 2]] = True
        return Selection.from_mask(keep)


POLICIES = {
    "after the encoder": vlmprune.RandomTokens(keep=0.5),
    "in the decoder": RandomCut(),
    "in the cache": RandomCut(site=Site.KV_CACHE),
}


@pytest.fixture(params=POLICIES)
def policy(request: pytest.FixtureRequest) -> Policy:
    return POLICIES[request.param]


def kept(model: nn.Module, policy: Policy, prompt: LlavaPrompt, ids: list[str] | None = None) -> list[list[int]]:
    """Kept tokens of every image of every row."""
    with vlmprune.applied(model, policy) as handle:
        handle.sample_ids = ids
        prefill(model, prompt, use_cache=True)
        report = handle.last
        return [report.kept(row, i, layer=2) for row, count in enumerate(prompt.images) for i in range(count)]


def reordered(prompt: LlavaPrompt, order: list[int]) -> LlavaPrompt:
    """The same rows in another order; one image per row."""
    return LlavaPrompt(prompt.ids[order], prompt.real[order], prompt.pixels[order], prompt.images)


def test_the_draw_follows_the_image_not_the_batch(policy: Policy) -> None:
    model, prompt = small_llava(), make_prompt((1, 1, 1), True)
    first = kept(model, policy, prompt)
    assert len({tuple(tokens) for tokens in first}) == 3
    assert kept(model, policy, prompt) == first
    torch.manual_seed(77)
    assert kept(model, policy, reordered(prompt, [2, 0, 1])) == [first[2], first[0], first[1]]
    for row in range(3):
        assert kept(model, policy, prompt.row(row)) == [first[row]]


def test_the_text_does_not_matter(policy: Policy) -> None:
    model, prompt = small_llava(), make_prompt((1, 1, 1), True)
    other = make_prompt((1, 1, 1), True, seed=9)
    assert not torch.equal(other.ids, prompt.ids)
    assert kept(model, policy, replace(other, pixels=prompt.pixels)) == kept(model, policy, prompt)


def test_equal_images_draw_alike_in_two_rows_but_not_in_one(policy: Policy) -> None:
    model = small_llava()
    prompt = make_prompt((1, 1))
    same = replace(prompt, pixels=prompt.pixels[[0, 0]])
    one, two = kept(model, policy, same)
    assert one == two
    prompt = make_prompt((2,))
    one, two = kept(model, policy, replace(prompt, pixels=prompt.pixels[[0, 0]]))
    assert one != two


def test_one_pixel_changes_the_draw(policy: Policy) -> None:
    model, prompt = small_llava(), make_prompt((1,))
    changed = prompt.pixels.clone()
    changed[0, 0, 0, 0] += 1e-3
    assert kept(model, policy, prompt) != kept(model, policy, replace(prompt, pixels=changed))


def test_the_policys_seed_changes_the_draw(policy: Policy) -> None:
    model, prompt = small_llava(), make_prompt((1, 1))
    assert kept(model, policy, prompt) != kept(model, replace(policy, seed=1), prompt)


def test_the_global_generator_is_neither_used_nor_moved(policy: Policy) -> None:
    model, prompt = small_llava(), make_prompt((1,))
    torch.manual_seed(1)
    first = kept(model, policy, prompt)
    moved = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), moved)
    torch.manual_seed(2)
    assert kept(model, policy, prompt) == first


def test_ids_of_a_harness_replace_the_content(policy: Policy) -> None:
    model, prompt = small_llava(), make_prompt((1, 1, 1), True)
    first = kept(model, policy, prompt, ["a", "b", "c"])
    assert kept(model, policy, prompt) != first
    assert kept(model, policy, replace(prompt, pixels=prompt.pixels * 2), ["a", "b", "c"]) == first
    assert kept(model, policy, prompt, ["c", "b", "x"])[0] == first[2]
    assert kept(model, policy, prompt.row(1), ["b"]) == [first[1]]


def test_ids_follow_the_rows_that_generate_repeats(policy: Policy) -> None:
    model, prompt = small_llava(), make_prompt((1, 1), True)
    alone = kept(model, policy, prompt, ["a", "b"])
    with vlmprune.applied(model, policy) as handle:
        handle.sample_ids = ["a", "b"]
        model.generate(**prompt.inputs, max_new_tokens=2, num_beams=3)
        rows = [handle.last.kept(row, layer=2) for row in range(6)]
    assert rows == [alone[0]] * 3 + [alone[1]] * 3


def test_several_images_draw_independently() -> None:
    """Each image of a row has its own seed, whatever stands beside it."""
    model, policy = small_llava(), POLICIES["after the encoder"]
    prompt = make_prompt((2, 1), True)
    first, second, third = kept(model, policy, prompt)
    assert len({tuple(first), tuple(second), tuple(third)}) == 3
    swapped = replace(prompt, pixels=prompt.pixels[[0, 2, 1]])
    assert kept(model, policy, swapped)[0] == first
    ids = kept(model, policy, prompt, ["a", "b"])
    assert ids[0] != ids[1]


def test_a_wrong_number_of_ids_is_an_error() -> None:
    model, prompt = small_llava(), make_prompt((1, 1, 1))
    with vlmprune.applied(model, "random", keep=0.5) as handle:
        handle.sample_ids = ["a", "b"]
        with pytest.raises(SignalError, match="2 ids, but the batch has 3 rows"):
            prefill(model, prompt)
        handle.sample_ids = None
        prefill(model, prompt)


def test_a_bare_decoder_draws_by_its_visual_embeddings(policy: Policy) -> None:
    decoder = small_llava().model.language_model
    embeds = torch.randn(2, 24, 32)
    embeds[1, 3 : 3 + N] = embeds[0, 3 : 3 + N]
    spans = [[(3, N)]]
    with vlmprune.applied(decoder, policy, spans=spans) as handle, torch.no_grad():
        decoder(inputs_embeds=embeds, use_cache=True)
        one, two = handle.last.kept(0, layer=2), handle.last.kept(1, layer=2)
        assert one == two
        decoder(inputs_embeds=embeds[1:], use_cache=True)
        assert handle.last.kept(0, layer=2) == one
        embeds[0, 4] += 1
        decoder(inputs_embeds=embeds, use_cache=True)
        assert handle.last.kept(0, layer=2) != one
        assert handle.last.kept(1, layer=2) == one


def test_policies_that_do_not_draw_need_no_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A digest copies pixels to the host; it is made only where a policy draws."""
    from vlmprune.adapters import encoding

    def refuse(values: torch.Tensor) -> str:
        raise AssertionError("a digest was made")

    monkeypatch.setattr(encoding, "tensor_digest", refuse)
    model, prompt = small_llava(), make_prompt()
    with vlmprune.applied(model, "hiprune", keep=0.5):
        prefill(model, prompt)
    with vlmprune.applied(model, "random", keep=1.0):
        prefill(model, prompt)
