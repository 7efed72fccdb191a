"""FastV and TransPrune on models: what they cost, which tokens and positions later layers see, batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from llava_prompts import LlavaPrompt, N, decode, make_prompt, prefill, small_llava
from masked_reference import hidden_keys
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaModel

import vlmprune
from vlmprune.core.sites import Site
from vlmprune.policies.fastv import FastV
from vlmprune.policies.transprune import TransPrune

# 32 layers as in the papers; the prompt has 5 + 64 + 3 tokens.
DEPTH, WIDTH, FFN, HEADS, KV_HEADS, HEAD_DIM = 32, 16, 24, 4, 2, 4
BEFORE, VISUAL, AFTER = 5, 64, 3
TEXT = BEFORE + AFTER
POLICIES = [
    pytest.param(FastV(keep=0.25), [2 * [64] + 30 * [16]], id="fastv"),
    pytest.param(FastV(keep=0.25, score="mean_all"), [2 * [64] + 30 * [16]], id="fastv-mean"),
    pytest.param(TransPrune(keep=0.125), [7 * [64] + 2 * [56] + 3 * [40] + 20 * [8]], id="transprune"),
    pytest.param(TransPrune(keep=0.125, use_iga=False), [7 * [64] + 2 * [56] + 3 * [40] + 20 * [8]], id="ttv-only"),
    pytest.param(TransPrune(keep=(0.5, 0.06), layers=(3, 20)), [3 * [64] + 17 * [32] + 12 * [3]], id="lists"),
]


def deep_llama() -> tuple[LlamaModel, Tensor]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        attn_implementation="eager",  # the counter knows its products on every device
    )
    return LlamaModel(config).eval(), torch.randn(1, BEFORE + VISUAL + AFTER, WIDTH)


def layer_flops(n: int) -> int:
    """Projections, attention and MLP of one layer over ``n`` tokens."""
    kv = KV_HEADS * HEAD_DIM
    return 2 * n * (2 * WIDTH**2 + 2 * WIDTH * kv) + 4 * n**2 * WIDTH + 6 * n * WIDTH * FFN


def own_flops(policy: Any, visual: list[int]) -> int:
    """What the policy's scores cost: attention rows, and the coming layer's queries, keys and values."""
    length = TEXT + VISUAL
    if isinstance(policy, FastV):
        return 2 * WIDTH * length * (length if policy.score == "mean_all" else 1)
    lengths = [TEXT + before for before, after in zip(visual, visual[1:], strict=False) if before != after]
    probe = [2 * n * WIDTH * (WIDTH + 2 * KV_HEADS * HEAD_DIM) + 2 * AFTER * n * WIDTH for n in lengths]
    return sum(probe) if policy.use_iga else 0


def rotary_flops(model: LlamaModel, lengths: set[int]) -> int:
    """What the counter sees in the rotary tables of ``lengths`` tokens: a product in some versions."""
    with FlopCounterMode(display=False) as counter:
        for n in lengths:
            model.rotary_emb(torch.zeros(1, n, WIDTH), torch.arange(n)[None])
    return counter.get_total_flops()


@pytest.mark.parametrize(("policy", "expected"), POLICIES)
@torch.no_grad()
def test_flops_bytes_and_means_follow_the_budget(policy: Any, expected: list[list[int]]) -> None:
    model, embeds = deep_llama()
    [visual] = expected
    with vlmprune.applied(model, policy, spans=[[(BEFORE, VISUAL)]], restore_length=False) as handle:
        with FlopCounterMode(display=False) as counter:
            cache = model(inputs_embeds=embeds, use_cache=True).past_key_values
        report = handle.last
    assert [row[0] for row in report.kept_tokens_per_layer] == visual
    assert report.mean_kept_layers == pytest.approx(sum(visual) / DEPTH)
    per_token = 2 * KV_HEADS * HEAD_DIM * 4
    assert report.kv_bytes_per_layer == tuple(per_token * (TEXT + n) for n in visual)
    assert [layer.keys.shape[2] for layer in cache.layers] == [TEXT + n for n in visual]
    renumbered = {TEXT + n for n in visual} if isinstance(policy, TransPrune) else {TEXT + VISUAL}
    flops = sum(layer_flops(TEXT + n) for n in visual) + own_flops(policy, visual) + rotary_flops(model, renumbered)
    assert counter.get_total_flops() == flops
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embeds)
    dense = DEPTH * layer_flops(TEXT + VISUAL) + rotary_flops(model, {TEXT + VISUAL})
    assert counter.get_total_flops() == dense > flops


def test_the_papers_budget() -> None:
    """TransPrune-High: 41 % of the image tokens on average over the layers."""
    model, embeds = deep_llama()
    with vlmprune.applied(model, "transprune", keep=0.125, spans=[[(BEFORE, VISUAL)]]) as handle, torch.no_grad():
        model(inputs_embeds=embeds)
    assert handle.last.mean_kept_layers == (7 * 64 + 2 * 56 + 3 * 40 + 20 * 8) / 32 == pytest.approx(0.41 * 64, abs=0.1)


SETTINGS = [
    pytest.param(FastV(keep=0.3, layer=2), id="fastv"),
    pytest.param(FastV(keep=0.3, layer=2, score="mean_all", per_image=True), id="fastv-per-image"),
    pytest.param(TransPrune(keep=0.3), id="transprune"),
    pytest.param(TransPrune(keep=5, layers=(1,), accumulate=(0,), direction="abs"), id="one-stage"),
    pytest.param(TransPrune(keep=0.3, positions="keep"), id="transprune-keep"),
]


def watch_positions(model: nn.Module) -> list[Tensor]:
    """Position ids that enter each layer, filled by the next forward (behind all hooks so far)."""
    seen: list[Tensor] = []

    def spy(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_ids"])

    for layer in model.model.language_model.layers:
        layer.register_forward_pre_hook(spy, with_kwargs=True)
    return seen


@pytest.mark.parametrize("text", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("policy", SETTINGS)
def test_a_padded_batch_gives_what_single_rows_give(policy: Any, text: str) -> None:
    model, prompt = small_llava(text=text, dtype=torch.float64), make_prompt((2, 0, 1), True, torch.float64)
    forced = torch.randint(8, 60, (3, 3), generator=torch.Generator().manual_seed(4))
    with vlmprune.applied(model, policy) as handle:
        out = prefill(model, prompt, use_cache=True)
        together, steps = handle.last, decode(model, prompt, out.past_key_values, forced)
        for row in range(3):
            single = prompt.row(row)
            alone = prefill(model, single, use_cache=True)
            start = prompt.length - single.length
            left = stays(single, handle.last.kept(0, 0) if single.images[0] == 1 else None)
            assert torch.allclose(out.logits[row, start:][left], alone.logits[0][left], atol=1e-6)
            got = decode(model, single, alone.past_key_values, forced[row : row + 1])
            assert torch.allclose(steps[row], got[0], atol=1e-6)
            if not single.images[0]:
                continue
            for layer in range(4):
                for image in range(single.images[0]):
                    assert together.kept(row, image, layer) == handle.last.kept(0, image, layer)


def stays(prompt: LlavaPrompt, kept: list[int] | None) -> Tensor:
    """``[L]`` bool: text, and the kept tokens of the only image."""
    mask = torch.ones(prompt.length, dtype=torch.bool)
    for tokens in prompt.places()[0]:
        mask[tokens] = False
    if kept is not None:
        mask[[prompt.places()[0][0][token] for token in kept]] = True
    return mask


@pytest.mark.parametrize("policy", SETTINGS)
def test_text_stays_and_positions_follow(policy: Any) -> None:
    """Text is stored by every layer; a decoded token's position is that of the unpruned prompt, or (compact) the
    number of tokens that the layer stores of its row."""
    model, prompt = small_llava(), make_prompt((2, 0, 1), padded=True)
    forced = torch.full((3, 1), 9)
    with vlmprune.applied(model, policy) as handle:
        out = prefill(model, prompt, use_cache=True)
        seen = watch_positions(model)
        decode(model, prompt, out.past_key_values, forced)
        report, state = handle.last, out.past_key_values.prompt
    assert report.kept_tokens[0] < 2 * N and report.kept_tokens[2] < N
    assert len(seen) == len(state.layers) == 4
    text = prompt.real.clone()
    for row, images in enumerate(prompt.places()):
        text[row, sum(images, [])] = False
    for layer, (positions, tokens) in enumerate(zip(seen, state.layers, strict=True)):
        for row in range(3):
            stored = tokens.index[row][tokens.valid[row]].tolist()
            assert stored == sorted(set(stored))
            assert set(text[row].nonzero()[:, 0].tolist()) <= set(stored)
            assert len(stored) == int(text[row].sum()) + report.kept_tokens_per_layer[layer][row]
            compact = handle.policy.resolve_positions(handle.info) == "compact"
            assert positions[row].item() == (len(stored) if compact else int(prompt.real[row].sum()))


@pytest.mark.parametrize("score", ["last", "mean_all"])
@pytest.mark.parametrize("images", [(1, 1), (2, 0, 1)])
def test_fastv_equals_masking_the_keys_that_attention_leaves_out(images: tuple[int, ...], score: str) -> None:
    """The cut is found again from a stock model's eager attention, and the logits from that model with hidden keys."""
    model = small_llava(dtype=torch.float32)
    stock, prompt = small_llava(attn_implementation="eager"), make_prompt(images, True)
    attention = prefill(stock, prompt, output_attentions=True).attentions[1].mean(1)  # [B, L, L]
    kept = []
    for row, places in enumerate(prompt.places()):
        visual = sum(places, [])
        if visual:
            given = attention[row, -1] if score == "last" else attention[row][prompt.real[row]].mean(0)
            order = given[visual].argsort(descending=True)[: round(0.3 * len(visual))]
            kept.append(sorted(order.tolist()))
    dropped = prompt.dropped(kept, Site.DECODER_LAYER)
    with hidden_keys(stock.model.language_model.layers, dict.fromkeys((2, 3), dropped), prompt.real):
        expected = prefill(stock, prompt).logits
    with vlmprune.applied(model, FastV(keep=0.3, layer=2, score=score)) as handle:
        logits = prefill(model, prompt).logits
    rows = [row for row, count in enumerate(images) if count]
    found = [[N * i + t for i in range(images[row]) for t in handle.last.kept(row, i)] for row in rows]
    assert found == kept
    stay = prompt.real & ~dropped
    assert torch.allclose(logits[stay], expected[stay], rtol=1e-5, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*nothing was reduced")
@pytest.mark.parametrize("span", [(0, 12), (4, 16), (0, 20), (19, 1)])
@pytest.mark.parametrize("policy", [FastV(keep=0.25), TransPrune(keep=0.25)], ids=["fastv", "transprune"])
def test_spans_at_the_edges(policy: Any, span: tuple[int, int]) -> None:
    """No text before or after the image, or no text at all; a single token stays."""
    model, _ = deep_llama()
    with vlmprune.applied(model, policy, spans=[[span]], restore_length=False) as handle, torch.no_grad():
        hidden = model(inputs_embeds=torch.randn(1, 20, WIDTH)).last_hidden_state
    count = max(1, span[1] // 4)
    assert hidden.shape[1] == 20 - span[1] + count and hidden.isfinite().all()
    assert handle.last.kept_tokens == (count,)


def test_composed_with_a_selection_before_the_decoder() -> None:
    """Shares are then of the tokens that entered the decoder."""
    model, prompt = small_llava(), make_prompt((2, 1))
    with vlmprune.applied(model, ["uniform", "transprune"], keep=[0.5, 0.25]) as handle:
        prefill(model, prompt)
    assert handle.last.kept_tokens_per_layer == ((16, 8), (14, 7), (10, 5), (4, 2))
    with vlmprune.applied(model, ["uniform", "fastv"], keep=[0.5, 3]) as handle:
        prefill(model, prompt)
    assert handle.last.kept_tokens_per_layer == ((16, 8), (6, 3), (6, 3), (6, 3))
    late = FastV(keep=0.5, layer=3)
    with vlmprune.applied(model, [TransPrune(keep=0.5, layers=(1,)), late]) as handle:
        prefill(model, prompt)
    assert handle.last.kept_tokens_per_layer == ((32, 16), (16, 8), (16, 8), (8, 4))


def test_two_policies_at_one_layer() -> None:
    """The second one probes what the first one left."""
    model, prompt = small_llava(), make_prompt((1, 1), True)
    policies = [FastV(keep=0.5, layer=2, positions="keep"), TransPrune(keep=0.5, layers=(2,), positions="keep")]
    with vlmprune.applied(model, policies) as handle:
        prefill(model, prompt)
        first, second = handle.last.sites
    assert first.layer == second.layer == 2
    assert second.lengths == first.tokens_out == (8, 8) and second.tokens_out == (8, 8)


def test_gradients_flow_past_the_probe() -> None:
    model, prompt = small_llava(), make_prompt((1, 1), True)
    model.train()
    with vlmprune.applied(model, "transprune", keep=0.25):
        model(**prompt.inputs, labels=torch.where(prompt.real, prompt.ids, -100)).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.model.language_model.parameters())
