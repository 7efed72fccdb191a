"""Virtual unmerging beside other sites and positions; batches, padding, undo, refusals."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from family_prompts import FamilyPrompt, make_family_prompt, prefill
from family_runs import DEPTH, assert_close, batch, family_model, forced_tokens, rollout
from fixed_policy import FixedGroups, FixedKeep, MeanGroups
from llava_prompts import pick_tokens
from masked_reference import decoder_layers
from model_state import hooked, model_state
from torch import Tensor, nn
from virtual_reference import Groups, group_places, pick_groups, unique, unmerged

import vlmprune
from vlmprune.adapters.cache import PrunedDynamicCache
from vlmprune.core.errors import InputError, UnsupportedError
from vlmprune.core.sites import Site
from vlmprune.embedded.random_models import random_vlm
from vlmprune.embedded.random_models.weights import randomise


def text_model(model: nn.Module) -> nn.Module:
    layers = decoder_layers(model)
    return next(module for module in model.model.modules() if getattr(module, "layers", None) is layers)


def closed_up(gone: Tensor, first: int, text: nn.Module, index: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """A layer's keywords with tables for positions that the places ``gone [B, L]`` take no part in."""
    if index < first:
        return None
    hidden = args[0] if args else kwargs["hidden_states"]
    given, removed = kwargs["position_ids"], gone.long().cumsum(1) - gone.long()
    if hidden.shape[1] < gone.shape[1]:
        removed = gone.sum(1, keepdim=True)
    positions = given - removed
    if hasattr(text, "rotary_emb_local"):
        tables = {
            "position_embeddings_global": text.rotary_emb(hidden, positions),
            "position_embeddings_local": text.rotary_emb_local(hidden, positions),
        }
    elif "gemma3" in type(text).__name__.lower():
        tables = {"position_embeddings": text.rotary_emb(hidden, positions, text.config.layer_types[index])}
    else:
        tables = {"position_embeddings": text.rotary_emb(hidden, positions)}
    return args, {**kwargs, **tables}


def closed_up_rollout(
    model: nn.Module, prompt: FamilyPrompt, groups: Groups, gone: Tensor, first: int, forced: Tensor
) -> tuple[Tensor, Tensor]:
    """The reference with places dropped, and positions closed up, from layer ``first`` on."""
    hooks = [
        layer.register_forward_pre_hook(partial(closed_up, gone, first, text_model(model), i), with_kwargs=True)
        for i, layer in enumerate(decoder_layers(model))
    ]
    with unmerged(model, prompt, groups, dict.fromkeys(range(first, DEPTH), gone)):
        result = rollout(model, prompt, forced)
    for hook in hooks:
        hook.remove()
    return result


@pytest.mark.parametrize("family", ["llava", "paligemma", "gemma3"])
def test_compact_cut_of_whole_groups(family: str) -> None:
    """Later positions close up over all places of the dropped tokens."""
    model, prompt = family_model(family), batch(family)
    groups, forced = pick_groups(prompt.widths()), forced_tokens(prompt)
    number = group_places(prompt, groups)
    merged = unique(prompt, groups) & (prompt.kinds > 0)
    firsts = [merged[row].nonzero()[:, 0] for row, n in enumerate(prompt.images) if n]
    kept = pick_tokens([len(row) for row in firsts], ragged=True)
    gone = torch.zeros_like(prompt.real)
    for row, places, stay in zip([r for r, n in enumerate(prompt.images) if n], firsts, kept, strict=True):
        lost = [place for i, place in enumerate(places.tolist()) if i not in stay]
        gone[row] = torch.isin(number[row], torch.tensor(lost))
    expected, expected_steps = closed_up_rollout(model, prompt, groups, gone, 2, forced)
    cut = FixedKeep(kept=kept, site=Site.DECODER_LAYER, layer=2, positions="compact")
    with vlmprune.applied(model, [FixedGroups(kept=groups), cut]):
        got, steps = rollout(model, prompt, forced)
    stay = unique(prompt, groups) & ~gone
    assert_close(got[stay], expected[stay])
    assert_close(steps, expected_steps)
    with vlmprune.applied(model, [FixedGroups(kept=groups), FixedKeep(kept=kept, site=Site.DECODER_LAYER, layer=2)]):
        _, apart = rollout(model, prompt, forced)
    assert (apart - expected_steps).abs().max() > 1e-4


@pytest.mark.parametrize("positions", ["keep", "compact"])
@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_after_an_earlier_drop(family: str, positions: Any) -> None:
    """Tokens dropped after the encoder, and the rest merged: nothing stands at the dropped places."""
    model, prompt = family_model(family), batch(family)
    kept = pick_tokens(prompt.widths(), ragged=True)
    of_kept = pick_groups([len(tokens) for tokens in kept])
    groups = tuple(
        tuple(dict(zip(tokens, names, strict=True)).get(i, -1) for i in range(width))
        for width, tokens, names in zip(prompt.widths(), kept, of_kept, strict=True)
    )
    gone, forced = group_places(prompt, groups) < 0, forced_tokens(prompt)
    if positions == "compact":
        expected, expected_steps = closed_up_rollout(model, prompt, groups, gone, 0, forced)
    else:
        with unmerged(model, prompt, groups):
            expected, expected_steps = rollout(model, prompt, forced)
    with vlmprune.applied(model, [FixedKeep(kept=kept, positions=positions), FixedGroups(kept=of_kept)]):
        got, steps = rollout(model, prompt, forced)
    stay = unique(prompt, groups)
    assert_close(got[stay], expected[stay])
    assert_close(steps, expected_steps)


def test_two_merges_in_a_row() -> None:
    """Members of members stand at all their places; the second merge weighs the first's means equally."""
    model, prompt = family_model("llava"), batch("llava", (1, 1), False)
    pairs = tuple(tuple(i // 2 for i in range(width)) for width in prompt.widths())
    fours = tuple(tuple(i // 4 for i in range(width)) for width in prompt.widths())
    forced, there = forced_tokens(prompt), unique(prompt, fours)
    twice = [MeanGroups(size=2, positions="virtual"), MeanGroups(size=2, positions="virtual")]
    with vlmprune.applied(model, twice) as handle:
        got, steps = rollout(model, prompt, forced)
        assert handle.last.groups()[0] == [0, 1, 2, 3]
    embeds = averaged_twice(model, prompt, pairs, fours)
    with unmerged(model, prompt, fours):
        hook = text_model(model).register_forward_pre_hook(partial(start_from, embeds), with_kwargs=True)
        expected, expected_steps = rollout(model, prompt, forced)
        hook.remove()
    assert_close(got[there], expected[there])
    assert_close(steps, expected_steps)


def start_from(embeds: Tensor, module: nn.Module, args: Any, kwargs: Any) -> Any:
    return (args, {**kwargs, "inputs_embeds": embeds}) if kwargs["inputs_embeds"].shape == embeds.shape else None


def averaged_twice(model: nn.Module, prompt: FamilyPrompt, pairs: Groups, fours: Groups) -> Tensor:
    """Prompt embeddings with every token of a four at the mean of its pairs' means."""
    given: list[Tensor] = []
    hook = text_model(model).register_forward_pre_hook(
        lambda m, a, k: given.append(k["inputs_embeds"]), with_kwargs=True
    )
    prefill(model, prompt)
    hook.remove()
    embeds = given[0].clone()
    item = 0
    for row, images in enumerate(prompt.places()):
        for places in images:
            place = torch.tensor(places)
            pair, four = torch.tensor(pairs[item]), torch.tensor(fours[item])
            means = torch.stack([embeds[row, place[pair == p]].mean(0) for p in range(int(pair.max()) + 1)])
            for group in range(int(four.max()) + 1):
                inside = pair[four == group].unique()
                embeds[row, place[four == group]] = means[inside].mean(0)
            item += 1
    return embeds


def test_rows_of_a_batch_are_as_alone() -> None:
    """Rows with different numbers of merged tokens, and padding on either side."""
    model, prompt = family_model("llava"), batch("llava", (1, 2, 0))
    groups = pick_groups(prompt.widths())
    of_rows = [groups[:1], groups[1:], ()]
    with vlmprune.applied(model, FixedGroups(kept=groups)):
        left = prefill(model, prompt).logits
        inputs, lengths = prompt.inputs, prompt.real.sum(1).tolist()
        turned = {
            name: torch.stack([row.roll(n, 0) for row, n in zip(inputs[name], lengths, strict=True)])
            for name in ("input_ids", "attention_mask")
        }
        with torch.no_grad():
            right = model(**{**inputs, **turned}).logits
    for row, length in enumerate(lengths):
        alone = prompt.row(row)
        kept = unique(alone, of_rows[row])[0]
        if of_rows[row]:
            with vlmprune.applied(model, FixedGroups(kept=of_rows[row])):
                expected = prefill(model, alone).logits[0]
        else:
            expected = prefill(model, alone).logits[0]
        assert_close(left[row, -length:][kept], expected[kept])
        assert_close(right[row, :length][kept], expected[kept])


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_later_tokens_change_nothing_before_them(family: str) -> None:
    model, prompt = family_model(family), batch(family, (1,), False)
    [row] = prompt.rows
    other = FamilyPrompt(family, (type(row)([*row.ids[:-1], row.ids[-1] ^ 1], row.kinds, row.parts, row.starts),))
    with vlmprune.applied(model, FixedGroups(kept=pick_groups(prompt.widths()))):
        first, second = prefill(model, prompt).logits, prefill(model, other).logits
    assert torch.equal(first[:, :-1], second[:, :-1]) and not torch.equal(first[:, -1], second[:, -1])


def test_undo_copies_and_pauses() -> None:
    model, prompt = random_vlm("qwen2_5_vl"), make_family_prompt("qwen2_5_vl", (1, 1), True)
    dense, before = prefill(model, prompt).logits, model_state(model)
    handle = vlmprune.apply(model, [FixedGroups(kept=pick_groups(prompt.widths())), vlmprune.FastV(keep=0.5, layer=2)])
    merged = prefill(model, prompt).logits
    with handle.disabled():
        assert torch.equal(prefill(model, prompt).logits, dense)
    twin = copy.deepcopy(model)
    assert torch.equal(prefill(twin, prompt).logits, merged)
    handle.remove()
    assert torch.equal(prefill(model, prompt).logits, dense)
    assert model_state(model) == before
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(prefill(twin, prompt).logits, merged)
    ids = twin._vlmprune._engine.hook_ids
    twin._vlmprune.remove()
    assert torch.equal(prefill(twin, prompt).logits, dense)
    assert not any(hooked(module, ids) for module in twin.modules())


def test_text_alone_runs_as_before() -> None:
    """Also between an image's prompt and its next turn, and after a forward that failed inside a layer."""
    model, prompt = random_vlm("llava"), make_family_prompt("llava", (1,))
    groups, text = pick_groups(prompt.widths()), prompt.ids[:, -4:]
    with torch.no_grad():
        dense = model(input_ids=text).logits
        with vlmprune.applied(model, FixedGroups(kept=groups)):
            merged = prefill(model, prompt).logits
            assert torch.equal(model(input_ids=text).logits, dense)
            hook = decoder_layers(model)[1].mlp.register_forward_pre_hook(fail)
            with pytest.raises(RuntimeError, match="on purpose"):
                prefill(model, prompt)
            hook.remove()
            assert torch.equal(model(input_ids=text).logits, dense)
            assert torch.equal(prefill(model, prompt).logits, merged)


def fail(module: nn.Module, args: Any) -> None:
    raise RuntimeError("on purpose")


def test_a_pruning_selection_keeps_positions() -> None:
    model, prompt = family_model("llava"), batch("llava")
    kept = pick_tokens(prompt.widths(), ragged=True)
    results = []
    for positions in ("keep", "virtual"):
        with vlmprune.applied(model, FixedKeep(kept=kept, positions=positions)):
            results.append(rollout(model, prompt, forced_tokens(prompt)))
    assert all(torch.equal(got, expected) for got, expected in zip(*results, strict=True))


def test_refusals() -> None:
    model, prompt = random_vlm("llava"), make_family_prompt("llava", (1,))
    prefill(model, prompt)  # transformers leaves hooks of its own
    before = model_state(model)
    with pytest.raises(InputError, match="virtual positions at decoder_layer.*merged before the decoder"):
        vlmprune.apply(model, FixedKeep(kept=((0,),), site=Site.DECODER_LAYER, layer=2, positions="virtual"))
    with (
        vlmprune.applied(model, "grid_pool", keep=0.5, positions="virtual"),
        pytest.raises(InputError, match="made new tokens, of which it is not known at which places they stand"),
    ):
        prefill(model, prompt)
    with vlmprune.applied(model, FixedGroups(kept=pick_groups(prompt.widths()))):
        cache = prefill(model, prompt, use_cache=True).past_key_values
        assert isinstance(cache, PrunedDynamicCache)
        with model._vlmprune.disabled(), pytest.raises(UnsupportedError, match="cache was pruned; a dense run"):
            model(input_ids=prompt.ids[:, -1:], past_key_values=cache)
    with pytest.raises(UnsupportedError, match="cache was pruned; a dense run"):
        model(input_ids=prompt.ids[:, -1:], past_key_values=cache)
    assert model_state(model) == before


@pytest.mark.parametrize("name", ["Mistral", "Qwen3", "Gemma2"])
def test_decoders_that_no_family_brings(name: str) -> None:
    """Norms of queries and keys, soft caps, other windows: LLaVA takes any decoder."""
    config = copy.deepcopy(family_model("llava").config)
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    given = {field: getattr(config.text_config, field) for field in (*sizes, "num_key_value_heads", "pad_token_id")}
    config.text_config = getattr(transformers, f"{name}Config")(**given, head_dim=8, sliding_window=256)
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    randomise(model, 0.2)
    model.set_attn_implementation("eager")
    prompt = batch("llava", dtype=torch.float32)
    groups, forced = pick_groups(prompt.widths()), forced_tokens(prompt)
    with unmerged(model, prompt, groups):
        expected, expected_steps = rollout(model, prompt, forced)
    with vlmprune.applied(model, FixedGroups(kept=groups)):
        got, steps = rollout(model, prompt, forced)
    there = unique(prompt, groups)
    assert_close(got[there], expected[there], torch.float32)
    assert_close(steps, expected_steps, torch.float32)
    with vlmprune.applied(model, FixedGroups(kept=groups, positions="keep")):
        _, apart = rollout(model, prompt, forced)
    assert (apart - expected_steps).abs().max() > 1e-3


def test_unknown_attention_is_refused() -> None:
    text = transformers.CohereConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, eos_token_id=1
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(vision_config=vision, text_config=text))
    with pytest.raises(UnsupportedError, match="not known to be had from CohereAttention; merge without.*Qwen2Att"):
        vlmprune.apply(model, MeanGroups(positions="virtual"))
    vlmprune.apply(model, MeanGroups()).remove()
