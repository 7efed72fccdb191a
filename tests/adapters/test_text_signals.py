"""Signals of the decoder equal what a stock model with eager attention computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from fixed_policy import FixedKeep
from llava_prompts import LlavaPrompt, N, make_prompt, pick_tokens, prefill, small_llava
from masked_reference import hidden_keys
from recording import Recording
from torch import Tensor, nn

import vlmprune
from vlmprune.core import signals as s
from vlmprune.core.context import Context
from vlmprune.core.errors import InputError, SignalError
from vlmprune.core.sites import Site

CUT = 3  # the recording policy acts before this layer
WANTED = (
    s.GroupMass(2),
    s.GroupMass(0),
    s.AttentionRows("text", 2, "last"),
    s.AttentionRows("text", 2, "text_after"),
    s.AttentionRows("text", 1, "last"),
    s.ColumnMass("text", 2, "mean"),
    s.ColumnMass("text", 1, "sum"),
    s.ProbeAttention(CUT, "last"),
    s.ProbeAttention(CUT, "text_after"),
    s.ModuleTransition(0, "mlp"),
    s.ModuleTransition(2, "attn"),
    s.ModuleTransition(2, "mlp"),
    s.FinalNorm(),
    s.Hidden("text", CUT, "in"),
)
BATCHES = [
    pytest.param((1,), False, id="single"),
    pytest.param((1, 1, 1), False, id="batch"),
    pytest.param((2, 1, 0), True, id="left-padded"),
]


class EagerDecoder:
    """Attention and hidden states of a stock model; ``gone [B, L]`` marks tokens hidden from some layer on."""

    def __init__(self, model: nn.Module, prompt: LlavaPrompt, gone: dict[int, Tensor] | None = None) -> None:
        self.prompt, self.gone = prompt, gone or {}
        layers = model.model.language_model.layers
        with hidden_keys(layers, self.gone, prompt.real), watched(layers) as self.modules:
            self.out = prefill(model, prompt, output_attentions=True, output_hidden_states=True)

    def left(self, layer: int, row: int) -> Tensor:
        """``[L]`` bool: tokens of a row that a layer works on."""
        gone = self.gone.get(layer, torch.zeros_like(self.prompt.real))
        return self.prompt.real[row] & ~gone[row]

    def attention(self, layer: int, row: int) -> Tensor:
        """``[L, L]`` head mean."""
        return self.out.attentions[layer][row].mean(0)

    def visual(self, row: int) -> Tensor:
        """``[L]`` bool: placeholders."""
        mask = torch.zeros_like(self.prompt.real[row])
        mask[sum(self.prompt.places()[row], [])] = True
        return mask

    def group_mass(self, layer: int, row: int) -> Tensor:
        """``[2, 3]`` attention from text and visual rows to system, text and visual columns."""
        visual, left = self.visual(row), self.left(layer, row)
        before = torch.arange(len(left)) < self.prompt.places()[row][0][0]
        groups = [left & before, left & ~visual & ~before, left & visual]
        attention = self.attention(layer, row)
        return torch.stack([torch.stack([attention[r][:, c].sum() for c in groups]) for r in groups[1:]])

    def rows(self, layer: int, row: int, which: str) -> Tensor:
        """``[R, L]`` attention rows of the last token or of all text after the first image."""
        left = self.left(layer, row)
        if which == "last":
            chosen = left.nonzero()[-1]
        else:
            after = torch.arange(len(left)) > self.prompt.places()[row][0][0]
            chosen = (left & after & ~self.visual(row)).nonzero()[:, 0]
        return self.attention(layer, row)[chosen]

    def column_mass(self, layer: int, row: int) -> Tensor:
        """``[L]`` attention received from all real tokens."""
        return self.attention(layer, row)[self.left(layer, row)].sum(0)

    def transition(self, layer: int, module: str, row: int) -> tuple[Tensor, Tensor]:
        """Norm ratio and cosine of a row's tokens, ``[L]`` each, in float64."""
        before, after = (self.modules[layer, name][row].double() for name in MODULES[module])
        lengths = before.square().sum(-1).sqrt(), after.square().sum(-1).sqrt()
        return lengths[1] / lengths[0], (before * after).sum(-1) / (lengths[0] * lengths[1])


# Whose outputs are what enters a module, and what is added to the residual stream.
MODULES = {"attn": ("input_layernorm", "self_attn"), "mlp": ("post_attention_layernorm", "mlp")}


@contextmanager
def watched(layers: Any) -> Iterator[dict[tuple[int, str], Tensor]]:
    """Outputs ``[B, L, D]`` of the layers' norms and modules in the next forward."""
    seen: dict[tuple[int, str], Tensor] = {}

    def see(key: tuple[int, str], module: nn.Module, args: Any, output: Any) -> None:
        seen[key] = output[0] if isinstance(output, tuple) else output

    handles = [
        getattr(layer, name).register_forward_hook(partial(see, (index, name)))
        for index, layer in enumerate(layers)
        for name in sum(MODULES.values(), ())
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def record(model: nn.Module, prompt: LlavaPrompt, signals: tuple[s.Signal, ...], *before: FixedKeep) -> Context:
    policy = Recording(wanted=signals, site=Site.DECODER_LAYER, layer=CUT)
    with vlmprune.applied(model, [*before, policy]):
        prefill(model, prompt)
    return policy.tape.last


def close(got: Tensor, expected: Tensor) -> bool:
    scale = max(1.0, float(expected.abs().max()))
    return got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-5, atol=2e-6 * scale)


def check(context: Context, eager: EagerDecoder, model: nn.Module) -> None:
    """Compare a context at layer ``CUT`` with the eager model, row by row."""
    assert context.sample == tuple(row for row, count in enumerate(eager.prompt.images) if count)
    for item, row in enumerate(context.sample):
        stay = eager.left(CUT - 1, row) & eager.visual(row)
        n = int(stay.sum())
        assert context.lengths[item] == n == int(context.valid[item].sum())
        hidden = context.signal(s.Hidden("text", CUT, "in"))[item][:n]
        assert close(hidden, eager.out.hidden_states[CUT][row][stay])
        order = eager.left(CUT - 1, row).long().cumsum(0) - 1
        assert context.position[item][:n].tolist() == order[stay].tolist()
        for layer in (0, 2):
            assert close(context.signal(s.GroupMass(layer))[item], eager.group_mass(layer, row)), layer
        for layer, which in ((2, "last"), (2, "text_after"), (1, "last")):
            got = context.signal(s.AttentionRows("text", layer, which))[item]
            expected = eager.rows(layer, row, which)[:, stay]
            assert close(got[len(got) - len(expected) :, :n], expected), (layer, which)
            assert not got[: len(got) - len(expected)].any()
            assert not got[:, n:].any()
        mass = eager.column_mass(2, row)[stay] / eager.left(2, row).sum()
        assert close(context.signal(s.ColumnMass("text", 2, "mean"))[item, :n], mass)
        assert close(context.signal(s.ColumnMass("text", 1, "sum"))[item, :n], eager.column_mass(1, row)[stay])
        for which in ("last", "text_after"):
            got = context.signal(s.ProbeAttention(CUT, which))[item]
            expected = eager.rows(CUT, row, which)[:, stay]
            assert close(got[len(got) - len(expected) :, :n], expected), which
            assert not got[: len(got) - len(expected)].any() and not got[:, n:].any()
        for layer, module in ((0, "mlp"), (2, "attn"), (2, "mlp")):
            got = context.signal(s.ModuleTransition(layer, module))
            left = eager.left(layer, row)
            assert int(got.valid[item].sum()) == int(left.sum())
            for value, expected in zip(got[:2], eager.transition(layer, module, row), strict=True):
                assert value.dtype == torch.float32
                assert close(value[item][got.valid[item]].double(), expected[left]), (layer, module)
                assert close(value[item][got.place[item][:n]].double(), expected[stay]), (layer, module)
    norm = context.signal(s.FinalNorm())
    assert norm is model.model.language_model.norm


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("text", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize(("images", "padded"), BATCHES)
def test_decoder_signals_equal_eager_attention(
    images: tuple[int, ...], padded: bool, text: str, implementation: str
) -> None:
    model = small_llava("clip", text, attn_implementation=implementation)
    stock = small_llava("clip", text, attn_implementation="eager")
    prompt = make_prompt(images, padded)
    check(record(model, prompt, WANTED), EagerDecoder(stock, prompt), model)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("where", [0, 2])
@pytest.mark.parametrize(("images", "padded"), BATCHES)
def test_decoder_signals_after_an_earlier_cut(
    images: tuple[int, ...], padded: bool, where: int, implementation: str
) -> None:
    """Signals of layers before the cut are given over the survivors, too."""
    model = small_llava(attn_implementation=implementation)
    stock = small_llava(attn_implementation="eager")
    prompt = make_prompt(images, padded)
    site = Site.DECODER_LAYER if where else Site.POST_ENCODER
    kept = pick_tokens([N * n for n in images if n] if where else [N] * sum(images), ragged=True)
    first = FixedKeep(kept=kept, site=site, layer=where or None, positions="keep")
    gone = {layer: prompt.dropped(kept, site) for layer in range(where, 4)}
    check(record(model, prompt, WANTED, first), EagerDecoder(stock, prompt, gone), model)


def test_rows_by_number_do_not_count_padding() -> None:
    model = small_llava()
    prompt = make_prompt((1, 1, 1), padded=True)
    signal = s.AttentionRows("text", 2, (19, 21))
    context = record(model, prompt, (signal,))
    eager = EagerDecoder(small_llava(attn_implementation="eager"), prompt)
    for item, row in enumerate(context.sample):
        start = int((~prompt.real[row]).sum())
        expected = eager.attention(2, row)[[start + 19, start + 21]][:, eager.visual(row)]
        assert close(context.signal(signal)[item], expected)


def test_the_reference_tells_layers_and_heads_apart() -> None:
    model = small_llava(attn_implementation="eager")
    prompt = make_prompt((1, 1, 1), padded=True)
    eager = EagerDecoder(model, prompt)
    context = record(model, prompt, WANTED)
    assert not close(context.signal(s.GroupMass(2))[0], eager.group_mass(0, 0))
    last = context.signal(s.AttentionRows("text", 2, "last"))[0]
    visual = eager.visual(0)
    assert not close(last, eager.rows(1, 0, "last")[:, visual])
    assert not close(last, eager.out.attentions[2][0][0][-1:, visual])


def test_shares_of_a_causal_decoder() -> None:
    """Text after the image: visual rows see no text (todre's second share is zero), rows of mass sum to rows."""
    model, prompt = small_llava(), make_prompt((1,))
    mass = record(model, prompt, (s.GroupMass(1),)).signal(s.GroupMass(1))[0]
    assert torch.allclose(mass.sum(1), torch.tensor([3.0, 16.0]), atol=1e-4)
    assert mass[1, 1] == 0


@pytest.mark.parametrize(
    "signal",
    [
        s.GroupMass(CUT),
        s.AttentionRows("text", CUT, "last"),
        s.AttentionRows("text", 9, "last"),
        s.ColumnMass("text", CUT),
        s.Hidden("text", 1, "in"),
        s.Hidden("text", CUT, "out"),
        s.ColumnMass("vision", 1),
        s.ProbeAttention(CUT - 1),
        s.ProbeAttention(CUT + 1),
        s.ModuleTransition(CUT, "attn"),
        s.DecodeRows(1),
    ],
    ids=str,
)
def test_signals_that_come_too_late_fail_at_apply(signal: s.Signal) -> None:
    policy = Recording(wanted=(signal,), site=Site.DECODER_LAYER, layer=CUT)
    with pytest.raises(SignalError, match=type(signal).__name__):
        vlmprune.apply(small_llava(), policy)


def test_a_decoder_layer_that_does_not_exist_fails_at_apply() -> None:
    policy: Any = Recording(site=Site.DECODER_LAYER, layer=4)
    with pytest.raises(InputError, match="4 decoder layers; give a layer from 0 to 3"):
        vlmprune.apply(small_llava(), policy)
