"""``torch.compile``: a policy acts on a model that is compiled already, and is gone after ``remove``."""

from __future__ import annotations

import pytest
import torch
from llava_prompts import make_prompt, prefill, small_llava

import vlmprune


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
