"""``remove`` gives the model back bit for bit; ``disabled`` and saving see the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fixed_policy import FixedKeep
from llava_prompts import N, StubProcessor, make_prompt, pick_tokens, prefill, small_llava
from model_state import decoder_signals, generated, logits, model_state, tower_signals
from policy_matrix import CASES
from transformers import LlavaForConditionalGeneration

import vlmprune
from vlmprune.core.sites import Site


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_remove_restores_the_model(name: str, parameters: dict[str, Any]) -> None:
    model, prompt = small_llava(), make_prompt((1, 1), True)
    prefill(model, prompt, output_hidden_states=True)  # transformers' own hooks are there from now on
    dense, dense_ids, before = logits(model, prompt), generated(model, prompt), model_state(model)
    handle = vlmprune.apply(model, name, processor=StubProcessor(), **parameters)
    pruned = logits(model, prompt)
    generated(model, prompt)
    if name != "downsample":
        assert not torch.equal(pruned, dense)
        assert handle.last.kept_tokens < handle.last.visual_tokens or name == "todre"
    handle.remove()
    assert not handle.active
    assert torch.equal(logits(model, prompt), dense)
    assert torch.equal(generated(model, prompt), dense_ids)
    assert model_state(model) == before
    handle.remove()
    assert model_state(model) == before


def test_remove_takes_every_kind_of_hook_and_tap() -> None:
    model, prompt = small_llava(), make_prompt()
    logits(model, prompt)
    before = model_state(model)
    handle = vlmprune.apply(model, [tower_signals(), decoder_signals(), FixedKeep(kept=((1, 2),))])
    during = model_state(model)
    changed = [name for name in before if before[name] != during[name]]
    assert len(changed) > 10
    ours = {
        key for name in changed for table in during[name][1].values() for key in table if key in handle._engine.hook_ids
    }
    assert ours == set(handle._engine.hook_ids)
    handle.remove()
    assert model_state(model) == before
    assert "_vlmprune" not in model.__dict__


def test_a_failing_apply_leaves_nothing() -> None:
    model = small_llava()
    before = model_state(model)
    with pytest.raises(ValueError):
        vlmprune.apply(model, "hiprune", keep=17)
    with pytest.raises(ValueError):
        vlmprune.apply(model, "downsample", keep=0.25)
    assert model_state(model) == before


def test_hooks_of_others_stay() -> None:
    model, prompt = small_llava(), make_prompt()
    calls: list[str] = []
    first = model.model.register_forward_pre_hook(lambda *_: calls.append("before apply"))
    handle = vlmprune.apply(model, "hiprune", keep=0.5)
    second = model.model.language_model.register_forward_hook(lambda *_: calls.append("after apply"))
    handle.remove()
    logits(model, prompt)
    assert calls == ["before apply", "after apply"]
    first.remove()
    second.remove()


def test_disabled_runs_the_dense_model() -> None:
    model, prompt = small_llava(), make_prompt((1, 1), True)
    dense, dense_ids = logits(model, prompt), generated(model, prompt)
    handle = vlmprune.apply(model, [tower_signals(), FixedKeep(kept=pick_tokens([N, N]))])
    pruned = logits(model, prompt)
    report = handle.last
    with handle.disabled():
        assert torch.equal(logits(model, prompt), dense)
        assert torch.equal(generated(model, prompt), dense_ids)
        with handle.disabled():
            assert torch.equal(logits(model, prompt), dense)
        assert torch.equal(logits(model, prompt), dense)
        assert handle.last is report
    assert torch.equal(logits(model, prompt), pruned)
    with pytest.raises(KeyError), handle.disabled():
        raise KeyError
    assert torch.equal(logits(model, prompt), pruned)


def test_context_managers_remove() -> None:
    model, prompt = small_llava(), make_prompt()
    logits(model, prompt)
    before = model_state(model)
    with vlmprune.applied(model, "hiprune", keep=0.5) as handle:
        assert handle.active and "active" in repr(handle)
    assert not handle.active and "removed" in repr(handle)
    with vlmprune.apply(model, "hiprune", keep=0.5):
        logits(model, prompt)
    with pytest.raises(KeyError), vlmprune.applied(model, "hiprune", keep=0.5):
        raise KeyError
    assert model_state(model) == before


def test_saving_while_applied(tmp_path: Path) -> None:
    model, prompt = small_llava(), make_prompt()
    dense = logits(model, prompt)
    model.save_pretrained(tmp_path / "before")
    handle = vlmprune.apply(model, [tower_signals(), "uniform"], keep=[None, 0.25])
    pruned = logits(model, prompt)
    model.save_pretrained(tmp_path / "applied")
    files = {folder: sorted(path.name for path in (tmp_path / folder).iterdir()) for folder in ("before", "applied")}
    assert files["before"] == files["applied"]
    for name in files["before"]:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "applied" / name).read_bytes()
    assert torch.equal(logits(model, prompt), pruned)
    keys = list(model.state_dict())
    handle.remove()
    assert keys == list(model.state_dict())
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "applied").eval()
    assert torch.equal(logits(again, prompt), dense)


@pytest.mark.parametrize("order", [("sdpa", "eager"), ("eager", "sdpa")])
def test_another_attention_implementation_after_apply(order: tuple[str, str]) -> None:
    """Masks, taps and layer hooks follow ``set_attn_implementation``, also for a left-padded ragged batch."""
    before, after = order
    prompt = make_prompt((2, 1), True)
    kept = pick_tokens([32, 16], ragged=True)
    policy = vlmprune.Compose(
        (tower_signals(), decoder_signals(), FixedKeep(kept=kept, site=Site.DECODER_LAYER, layer=3))
    )
    model, fresh = small_llava(attn_implementation=before), small_llava(attn_implementation=after)
    dense = logits(model, prompt)
    handle = vlmprune.apply(model, policy)
    logits(model, prompt)
    model.set_attn_implementation(after)
    with vlmprune.applied(fresh, policy):
        expected = logits(fresh, prompt)
    assert torch.equal(logits(model, prompt), expected)
    handle.remove()
    configs = {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")}
    assert configs == {after}
    model.set_attn_implementation(before)
    assert torch.equal(logits(model, prompt), dense)
