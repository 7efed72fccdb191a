"""A policy that keeps everything changes nothing, and ``remove`` gives the model back bit for bit."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from fixed_policy import FixedKeep
from llava_prompts import LlavaPrompt, N, decode, make_prompt, pick_tokens, prefill, small_llava
from policy_matrix import CASES
from recording import Recording
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

import vlmprune
from vlmprune.adapters.cache import PrunedDynamicCache
from vlmprune.core import signals as s
from vlmprune.core.context import Context
from vlmprune.core.errors import ActiveError
from vlmprune.core.registry import registry
from vlmprune.core.selection import Selection
from vlmprune.core.sites import Site

HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


class FakeProcessor:
    """Enough of a processor for policies that act on images; these tests give pixels."""

    def __init__(self) -> None:
        self.image_processor = object()


def state(model: nn.Module) -> dict[str, Any]:
    """Per module: its class, hook tables, config object and instance attributes."""
    return {
        name: (
            type(module),
            {table: dict(getattr(module, table)) for table in HOOK_TABLES},
            id(getattr(module, "config", None)),
            sorted(module.__dict__),
            id(module.__dict__.get("forward")),
        )
        for name, module in model.named_modules()
    }


def generated(model: nn.Module, prompt: LlavaPrompt, **mode: Any) -> Tensor:
    with torch.no_grad():
        return model.generate(**prompt.inputs, max_new_tokens=5, do_sample=False, **mode)


def logits(model: nn.Module, prompt: LlavaPrompt) -> Tensor:
    return prefill(model, prompt).logits


def keep_everything(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """A case's parameters with a budget that keeps everything and stage 2 of todre off."""
    neutral = {"keep": 1.0}
    if name == "todre":
        neutral["tau"] = None
    if "factor" in parameters:
        neutral |= {"factor": 1.0, "jpeg": False}
    return parameters | neutral


@pytest.mark.parametrize("form", [((1, 1, 1), False), ((2, 0, 1), True)], ids=["batch", "mixed"])
@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_keeping_everything_changes_no_bit(name: str, parameters: dict[str, Any], form: Any) -> None:
    model, prompt = small_llava(), make_prompt(*form)
    dense, dense_ids = logits(model, prompt), generated(model, prompt)
    with vlmprune.applied(model, name, processor=FakeProcessor(), **keep_everything(name, parameters)) as handle:
        assert torch.equal(logits(model, prompt), dense)
        assert torch.equal(generated(model, prompt), dense_ids)
        assert handle.last.kept_tokens == handle.last.visual_tokens == tuple(N * n for n in prompt.images)


@pytest.mark.filterwarnings("error:.*nothing was reduced")
@pytest.mark.parametrize("name", [n for n in vlmprune.available() if n != "downsample"])
def test_a_count_of_all_tokens_changes_no_bit(name: str) -> None:
    model, prompt = small_llava(), make_prompt((2, 1), True)
    dense = logits(model, prompt)
    settings = {"tau": 0.0} if name == "todre" else {}
    with vlmprune.applied(model, name, keep=N, **settings):
        assert torch.equal(logits(model, prompt)[prompt.real], dense[prompt.real])


def test_the_matrix_names_every_policy() -> None:
    assert {case.values[0] for case in CASES} == set(vlmprune.available())


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_remove_restores_the_model(name: str, parameters: dict[str, Any]) -> None:
    model, prompt = small_llava(), make_prompt((1, 1), True)
    prefill(model, prompt, output_hidden_states=True)  # transformers' own hooks are there from now on
    dense, dense_ids, before = logits(model, prompt), generated(model, prompt), state(model)
    handle = vlmprune.apply(model, name, processor=FakeProcessor(), **parameters)
    pruned = logits(model, prompt)
    generated(model, prompt)
    if name != "downsample":
        assert not torch.equal(pruned, dense)
        assert handle.last.kept_tokens < handle.last.visual_tokens or name == "todre"
    handle.remove()
    assert not handle.active
    assert torch.equal(logits(model, prompt), dense)
    assert torch.equal(generated(model, prompt), dense_ids)
    assert state(model) == before
    handle.remove()
    assert state(model) == before


def everything() -> Recording:
    """Asks for every signal of the tower, so that all kinds of hooks and taps are in place."""
    wanted = (
        s.ColumnMass("vision", 0),
        s.QK("vision", 1),
        s.ClsRow(2),
        s.Hidden("vision", 1, "in"),
        s.Hidden("vision", 1, "out"),
        s.PreProjector(),
    )
    return Recording(wanted=wanted)


def inside() -> Recording:
    return Recording(wanted=(s.GroupMass(1), s.AttentionRows("text", 0)), site=Site.DECODER_LAYER, layer=2)


def test_remove_takes_every_kind_of_hook_and_tap() -> None:
    model, prompt = small_llava(), make_prompt()
    logits(model, prompt)
    before = state(model)
    handle = vlmprune.apply(model, [everything(), inside(), FixedKeep(kept=((1, 2),))])
    during = state(model)
    changed = [name for name in before if before[name] != during[name]]
    assert len(changed) > 10
    ours = {
        key for name in changed for table in during[name][1].values() for key in table if key in handle._engine.hook_ids
    }
    assert ours == set(handle._engine.hook_ids)
    handle.remove()
    assert state(model) == before
    assert "_vlmprune" not in model.__dict__


def test_a_failing_apply_leaves_nothing() -> None:
    model = small_llava()
    before = state(model)
    with pytest.raises(ValueError):
        vlmprune.apply(model, "hiprune", keep=17)
    with pytest.raises(ValueError):
        vlmprune.apply(model, "downsample", keep=0.25)
    assert state(model) == before


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


def test_two_models_do_not_influence_each_other() -> None:
    one, two = small_llava(), small_llava(seed=4)
    prompt = make_prompt((1, 1), True)
    dense_one, dense_two = logits(one, prompt), logits(two, prompt)
    first = vlmprune.apply(one, "hiprune", keep=0.25)
    assert torch.equal(logits(two, prompt), dense_two)
    pruned_one = logits(one, prompt)
    second = vlmprune.apply(two, "uniform", keep=0.5)
    pruned_two = logits(two, prompt)
    assert torch.equal(logits(one, prompt), pruned_one)
    assert first.last.kept_tokens == (4, 4) and second.last.kept_tokens == (8, 8)
    first.remove()
    assert torch.equal(logits(two, prompt), pruned_two)
    assert torch.equal(logits(one, prompt), dense_one)
    second.remove()
    assert torch.equal(logits(two, prompt), dense_two)


@pytest.mark.parametrize("kind", ["hiprune", "decoder"])
def test_a_copy_prunes_independently(kind: str) -> None:
    model, prompt = small_llava(), make_prompt((1, 1), True)
    dense = logits(model, prompt)
    kept = pick_tokens([N, N])
    policy = {
        "hiprune": vlmprune.HiPrune(keep=0.25),
        "decoder": vlmprune.Compose((inside(), FixedKeep(kept=kept, site=Site.DECODER_LAYER, layer=3))),
    }[kind]
    handle = vlmprune.apply(model, policy)
    pruned = logits(model, prompt)
    twin = copy.deepcopy(model)
    other = twin._vlmprune
    assert other is not handle and other.model is twin and other.active
    report = handle.last
    assert torch.equal(logits(twin, prompt), pruned)
    assert handle.last is report and other.last is not report
    handle.remove()
    assert torch.equal(logits(model, prompt), dense)
    assert torch.equal(logits(twin, prompt), pruned)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(twin, prompt), pruned)
    before = [name for name, module in twin.named_modules() if _hooked(module, other._engine.hook_ids)]
    assert before
    other.remove()
    assert torch.equal(logits(twin, prompt), dense)
    assert not any(_hooked(module, other._engine.hook_ids) for module in twin.modules())


def _hooked(module: nn.Module, ids: Any) -> bool:
    return any(key in ids for table in HOOK_TABLES for key in getattr(module, table))


def test_removing_the_copys_handle_leaves_the_original() -> None:
    model, prompt = small_llava(), make_prompt()
    handle = vlmprune.apply(model, "hiprune", keep=0.25)
    pruned = logits(model, prompt)
    twin = copy.deepcopy(model)
    twin._vlmprune.remove()
    assert handle.active
    assert torch.equal(logits(model, prompt), pruned)
    vlmprune.apply(twin, "uniform", keep=0.5)
    assert torch.equal(logits(model, prompt), pruned)


def test_disabled_runs_the_dense_model() -> None:
    model, prompt = small_llava(), make_prompt((1, 1), True)
    dense, dense_ids = logits(model, prompt), generated(model, prompt)
    handle = vlmprune.apply(model, [everything(), FixedKeep(kept=pick_tokens([N, N]))])
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
    before = state(model)
    with vlmprune.applied(model, "hiprune", keep=0.5) as handle:
        assert handle.active and "active" in repr(handle)
    assert not handle.active and "removed" in repr(handle)
    with vlmprune.apply(model, "hiprune", keep=0.5):
        logits(model, prompt)
    with pytest.raises(KeyError), vlmprune.applied(model, "hiprune", keep=0.5):
        raise KeyError
    assert state(model) == before


def test_saving_while_applied(tmp_path: Path) -> None:
    model, prompt = small_llava(), make_prompt()
    dense = logits(model, prompt)
    model.save_pretrained(tmp_path / "before")
    handle = vlmprune.apply(model, [everything(), "uniform"], keep=[None, 0.25])
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
    policy = vlmprune.Compose((everything(), inside(), FixedKeep(kept=kept, site=Site.DECODER_LAYER, layer=3)))
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


class Boom(Exception):
    """Raised inside a policy."""


class Failing(FixedKeep):
    """Fails once it is asked."""

    def select(self, context: Context) -> Selection:
        if getattr(context, "site", None) == self.site and FAIL.is_set():
            raise Boom("from the policy")
        return super().select(context)


FAIL = threading.Event()


@pytest.mark.parametrize("site", [Site.POST_ENCODER, Site.DECODER_LAYER, Site.KV_CACHE])
def test_an_error_in_a_policy_leaves_the_model_usable(site: Site) -> None:
    model, prompt = small_llava(), make_prompt((1, 1), True)
    dense = logits(model, prompt)
    layer = None if site == Site.POST_ENCODER else 2
    handle = vlmprune.apply(model, Failing(kept=pick_tokens([N, N]), site=site, layer=layer, positions="keep"))
    pruned_ids = generated(model, prompt)
    assert handle.last_error is None
    FAIL.set()
    try:
        with pytest.raises(Boom, match="from the policy"):
            generated(model, prompt)
        assert isinstance(handle.last_error, Boom)
        with handle.disabled():
            assert torch.equal(logits(model, prompt), dense)
    finally:
        FAIL.clear()
    assert torch.equal(generated(model, prompt), pruned_ids)
    assert handle.last_error is None
    handle.remove()
    assert torch.equal(logits(model, prompt), dense)


def test_an_error_in_the_model_leaves_it_usable() -> None:
    model, prompt = small_llava(), make_prompt()
    handle = vlmprune.apply(model, FixedKeep(kept=((1, 5),), site=Site.DECODER_LAYER, layer=2))
    pruned = logits(model, prompt)

    def fail(*_: Any) -> None:
        raise Boom("from a layer")

    broken = model.model.language_model.layers[3].register_forward_pre_hook(fail)
    cache = PrunedDynamicCache()
    with pytest.raises(Boom):
        prefill(model, prompt, past_key_values=cache, use_cache=True)
    assert not cache.prompt.inside
    broken.remove()
    assert torch.equal(logits(model, prompt), pruned)
    handle.remove()


def test_a_cache_that_outlives_the_handle_is_refused() -> None:
    model, prompt = small_llava(), make_prompt((1, 1), True)
    handle = vlmprune.apply(model, FixedKeep(kept=pick_tokens([N, N]), site=Site.DECODER_LAYER, layer=2))
    cache = prefill(model, prompt, use_cache=True).past_key_values
    handle.remove()
    with pytest.raises(Exception, match="pruned.*fresh"):
        decode(model, prompt, cache, torch.tensor([[9], [9]]))


def test_a_second_apply_names_the_remedy() -> None:
    model = small_llava()
    handle = vlmprune.apply(model, "uniform", keep=0.5)
    for target in (model, model):
        with pytest.raises(ActiveError, match=r"handle\.remove\(\).*compose"):
            vlmprune.apply(target, "hiprune", keep=0.5)
    handle.remove()
    vlmprune.apply(model, "hiprune", keep=0.5).remove()


def test_registered_policies_are_the_ones_tested() -> None:
    assert set(registry.available()) == set(vlmprune.available())
