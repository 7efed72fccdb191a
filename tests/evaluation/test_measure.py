from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vlmprune.api import applied
from vlmprune.evaluation import measure, native
from vlmprune.evaluation.prompts import encode, generation_options, render_prompt, user_message
from vlmprune.evaluation.tasks.definition import load_task


@pytest.fixture(scope="module")
def requests(tiny: tuple[Any, Any]) -> list[native.Request]:
    task = load_task("scenes")
    return [native.make_request(tiny[1], task, doc, "default") for doc in task.load_docs(2, 3)]


class Spy:
    """Records how many tokens the decoder saw, and which logits were asked for, in every forward."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lengths: list[int] = []
        self.logits: list[int] = []
        self.towers = 0
        self._forward = model.forward
        monkeypatch.setattr(model, "forward", self.forward)
        attention = model.model.language_model.layers[0].self_attn
        self.hooks = [
            attention.register_forward_pre_hook(self._seen, with_kwargs=True),
            model.model.vision_tower.register_forward_hook(self._tower),
        ]

    def forward(self, *args: Any, logits_to_keep: int = 0, **kwargs: Any) -> Any:
        self.logits.append(logits_to_keep)
        return self._forward(*args, logits_to_keep=logits_to_keep, **kwargs)

    def _seen(self, module: Any, args: Any, kwargs: Any) -> None:
        self.lengths.append(kwargs["hidden_states"].shape[1])

    def _tower(self, module: Any, args: Any, output: Any) -> None:
        self.towers += 1


def test_policy_and_dense_alternate(
    tiny: tuple[Any, Any], requests: list[native.Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(tiny[0], monkeypatch)
    with applied(tiny[0], "uniform", keep=46) as handle:
        prefill = measure.measure_prefill(*tiny, requests, handle, prompts=2, repeats=2)
    for hook in spy.hooks:
        hook.remove()
    assert len(spy.lengths) == 2 * 3 * 2 and spy.towers == 12  # prompts x (warm-up + repeats) x (A, B)
    assert [a - b for a, b in zip(spy.lengths[::2], spy.lengths[1::2], strict=True)] == [150] * 6
    assert set(spy.logits) == {1}
    assert prefill.ms > 0 and prefill.ms_dense > 0
    text = tiny[0].config.text_config
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4
    assert prefill.kv_bytes_dense - prefill.kv_bytes == 150 * per_token


def test_medians(tiny: tuple[Any, Any], requests: list[native.Request], monkeypatch: pytest.MonkeyPatch) -> None:
    """By a made-up clock dense takes 1, 3, 9 ms and the policy 2, 4, 100 ms; the warm-up does not count."""
    ticks = iter([0, 50, 0, 60, 0, 1, 0, 2, 0, 3, 0, 4, 0, 9, 0, 100])
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: next(ticks) / 1000))
    with applied(tiny[0], "uniform", keep=46) as handle:
        prefill = measure.measure_prefill(*tiny, requests, handle, prompts=1, repeats=3)
    assert (prefill.ms_dense, prefill.ms) == (pytest.approx(3), pytest.approx(4))


def test_without_time(tiny: tuple[Any, Any], requests: list[native.Request]) -> None:
    prefill = measure.measure_prefill(*tiny, requests, None, with_time=False, prompts=1)
    assert (prefill.ms, prefill.ms_dense, prefill.kv_bytes) == (None, None, None)
    assert prefill.kv_bytes_dense > 0


@pytest.mark.parametrize(("n", "count", "expected"), [(10, 2, [2, 7]), (3, 6, [0, 1, 2]), (1, 1, [0])])
def test_spread(n: int, count: int, expected: list[int]) -> None:
    assert measure.spread(list(range(n)), count) == expected


def test_batches_are_padded_on_the_left(tiny: tuple[Any, Any], requests: list[native.Request]) -> None:
    model, processor = tiny
    tokenizer = processor.tokenizer
    side, pad = tokenizer.padding_side, tokenizer.pad_token
    tokenizer.padding_side = "right"
    try:
        questions = ("short?", "a longer question?")
        prompts = [render_prompt(processor, user_message(text, 1)) for text in questions]
        batch = encode(model, processor, prompts, [requests[0].images] * 2)
        assert tokenizer.padding_side == "right" and tokenizer.pad_token == pad
    finally:
        tokenizer.padding_side = side
    assert batch["attention_mask"][0, 0] == 0 and bool(batch["attention_mask"][:, -1].all())
    assert batch["pixel_values"].dtype == torch.float32


def test_prompts(tiny: tuple[Any, Any]) -> None:
    class Bare:
        chat_template = None
        image_token = "<image>"

    assert render_prompt(tiny[1], user_message("why?", 1)) == "USER: <image>\nwhy? ASSISTANT:"
    assert render_prompt(tiny[1], user_message("why?", 0)) == "USER: why? ASSISTANT:"
    assert render_prompt(Bare(), user_message("why?", 2)) == "USER: <image>\n<image>\nwhy? ASSISTANT:"


def test_generation_is_greedy_unless_asked(tiny: tuple[Any, Any]) -> None:
    task = {"max_new_tokens": 8, "temperature": 0, "do_sample": False, "until": ["\n"]}
    pad = tiny[1].tokenizer.pad_token_id
    assert generation_options(tiny[1], task) == {"max_new_tokens": 8, "do_sample": False, "pad_token_id": pad}
    drawn = generation_options(tiny[1], {"do_sample": True, "temperature": 0.7, "top_p": 0.9})
    assert drawn == {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "pad_token_id": pad}
