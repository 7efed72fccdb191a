"""Golden cases with weights, run through the stock transformers Llama."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from golden_io import Case
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

import vlmprune
from vlmprune.api import Handle


def llama(case: Case) -> LlamaModel:
    """The case's decoder: stock transformers code with the stored weights."""
    weights = {name: torch.from_numpy(value) for name, value in case.group("weights").items()}
    width, heads = weights["norm.weight"].numel(), case.integer("num_heads")
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers."))
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=width,
        intermediate_size=len(weights["layers.0.mlp.gate_proj.weight"]),
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=len(weights["layers.0.self_attn.k_proj.weight"]) // (width // heads),
        rms_norm_eps=float(case.params["rms_norm_eps"]),
        rope_theta=float(case.params["rope_theta"]),
        attn_implementation="sdpa",
    )
    model = LlamaModel(config).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and missing == ["embed_tokens.weight"]
    return model


def record_lengths(model: nn.Module) -> list[int]:
    """Sequence length that enters each layer, filled by the next forward (behind all hooks so far)."""
    lengths: list[int] = []

    def spy(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        lengths.append(args[0].shape[1])

    for layer in model.layers:
        layer.register_forward_pre_hook(spy)
    return lengths


@dataclass
class Run:
    """A case run through ``vlmprune.apply``: the handle (removed), layer lengths, and the stored tokens per layer."""

    handle: Handle
    lengths: list[int]
    stored: list[int]


@torch.no_grad()
def check_run(case: Case, policy: Any) -> Run:
    """Run a case with an image span, two decoding steps and removal; compare everything that the file holds.

    Hidden states of prompt and steps, tokens stored per layer, bit-exact removal.
    """
    model, inputs = llama(case), torch.from_numpy(case.inputs["inputs_embeds"])
    start, n_visual = case.integer("image_start"), case.integer("image_len")
    dense = model(inputs_embeds=inputs).last_hidden_state
    handle = vlmprune.apply(model, policy, spans=[[(start, n_visual)]], restore_length=False)
    lengths = record_lengths(model)
    output = model(inputs_embeds=inputs, use_cache=True)
    entered, cache = list(lengths), output.past_key_values
    close(output.last_hidden_state, case.outputs["last_hidden_state"])
    stored = [layer.keys.shape[-2] for layer in cache.layers]
    assert stored == case.outputs["kv_len"].tolist()
    for step in range(2):
        new = torch.from_numpy(case.inputs[f"decode{step}_embeds"])
        output = model(inputs_embeds=new, past_key_values=cache, use_cache=True)
        close(output.last_hidden_state, case.outputs[f"decode{step}_hidden"])
        assert [layer.keys.shape[-2] for layer in cache.layers] == [n + step + 1 for n in stored]
    handle.remove()
    assert torch.equal(model(inputs_embeds=inputs).last_hidden_state, dense)
    return Run(handle, entered, stored)


def close(got: Tensor, expected: Any) -> None:
    """Hidden states within 1e-4."""
    torch.testing.assert_close(got, torch.from_numpy(expected), rtol=1e-4, atol=1e-4)
