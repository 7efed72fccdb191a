"""``torch.compile``: a policy acts on a model that is compiled already, and is gone after ``remove``."""

from __future__ import annotations

import pytest
import torch
from fixed_policy import MeanGroups
from llava_prompts import make_prompt, prefill, small_llava
from transformers import LlamaConfig, LlamaModel

import vlmprune
from vlmprune.policies.transprune import TransPrune


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_compiled_model_is_pruned() -> None:
    model, prompt = small_llava(vision_depth=2, text_layers=1), make_prompt()
    dense = prefill(model, prompt).logits
    with vlmprune.applied(model, "hiprune", keep=0.5):
        expected = prefill(model, prompt).logits
    compiled = torch.compile(model, backend="eager")
    try:
        assert torch.allclose(prefill(compiled, prompt).logits, dense, atol=1e-5)
        handle = vlmprune.apply(compiled, "hiprune", keep=0.5)
        assert torch.allclose(prefill(compiled, prompt).logits, expected, atol=1e-5)
        assert handle.last.kept_tokens == (8,)
        with pytest.raises(RuntimeError, match="pruned already"):
            vlmprune.apply(model, "uniform", keep=0.5)
        handle.remove()
        assert torch.allclose(prefill(compiled, prompt).logits, dense, atol=1e-5)
        assert torch.equal(prefill(model, prompt).logits, dense)
    finally:
        torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@torch.no_grad()
def test_a_compiled_decoder_is_probed() -> None:
    """The probe ends the run of a layer half-way."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaModel(LlamaConfig(vocab_size=8, num_hidden_layers=2, **sizes)).eval()
    given = {"inputs_embeds": torch.randn(1, 20, 16), "use_cache": False}
    policy, spans = TransPrune(keep=0.25, layers=(1,)), [[(2, 16)]]
    with vlmprune.applied(model, policy, spans=spans):
        expected = model(**given).last_hidden_state
    compiled = torch.compile(model, backend="eager")
    try:
        with vlmprune.applied(compiled, policy, spans=spans) as handle:
            assert torch.allclose(compiled(**given).last_hidden_state, expected, atol=1e-5)
            assert handle.last.kept_tokens == (4,)
    finally:
        torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@torch.no_grad()
def test_a_compiled_decoder_unmerges() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaModel(LlamaConfig(vocab_size=8, num_hidden_layers=1, **sizes)).eval()
    prompt = {"inputs_embeds": torch.randn(1, 20, 16)}
    step = {"inputs_embeds": torch.randn(1, 1, 16)}
    policy, spans = MeanGroups(positions="virtual"), [[(2, 16)]]

    def run(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        out = model(**prompt, use_cache=True)
        hidden = out.last_hidden_state.clone()
        return hidden, model(**step, past_key_values=out.past_key_values, use_cache=True).last_hidden_state

    with vlmprune.applied(model, policy, spans=spans):
        expected = run(model)
    compiled = torch.compile(model, backend="eager")
    try:
        with vlmprune.applied(compiled, policy, spans=spans) as handle:
            for got, reference in zip(run(compiled), expected, strict=True):
                assert torch.allclose(got, reference, atol=1e-5)
            assert handle.last.lengths_per_layer == (12,)
    finally:
        torch._dynamo.reset()
