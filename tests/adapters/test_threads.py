"""One model serves one thread at a time; a second one is refused and disturbs nothing."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fixed_policy import FixedKeep
from llava_prompts import fixed_keep, make_prompt, prefill, small_llava

import vlmprune
from vlmprune.core.context import Context
from vlmprune.core.errors import ActiveError
from vlmprune.core.selection import Selection

SITES = [pytest.param(None, id="post_encoder"), pytest.param(2, id="layer2")]


@dataclass(frozen=True)
class Waiting(FixedKeep):
    """Waits inside its selection until it is released."""

    def select(self, context: Context) -> Selection:
        if threading.current_thread().name == "first":
            ENTERED.set()
            assert RELEASE.wait(30)
        return super().select(context)


ENTERED, RELEASE = threading.Event(), threading.Event()


@pytest.mark.parametrize("where", SITES)
def test_two_threads_on_one_model(where: int | None) -> None:
    """The second call is refused, and the first one is not disturbed."""
    model, prompt = small_llava(), make_prompt()
    plain = fixed_keep(where=where)
    policy = Waiting(kept=plain.kept, site=plain.site, layer=where, positions="keep")
    ENTERED.clear()
    RELEASE.clear()
    results: list[Any] = []
    with vlmprune.applied(model, policy) as handle:
        expected = prefill(model, prompt).logits
        first = threading.Thread(target=lambda: results.append(prefill(model, prompt).logits), name="first")
        first.start()
        try:
            assert ENTERED.wait(30)
            for _ in range(2):
                with pytest.raises(ActiveError, match="Another thread.*one model copy per thread"):
                    prefill(model, prompt)
                with pytest.raises(ActiveError, match="Another thread"), torch.no_grad():
                    model.model.language_model(inputs_embeds=torch.zeros(1, 3, 32))
        finally:
            RELEASE.set()
            first.join(30)
        assert len(results) == 1 and torch.equal(results[0], expected)
        assert torch.equal(prefill(model, prompt).logits, expected)
        assert handle.last_error is None


def test_images_encoded_by_another_thread_in_between() -> None:
    """``generate`` of transformers 5.23 encodes before the first forward; such signals are never taken for ours."""
    model, prompt = small_llava(), make_prompt()
    with vlmprune.applied(model, "hiprune", keep=0.5) as handle:
        expected = prefill(model, prompt).logits

        def encode(*_: Any) -> None:
            other = threading.Thread(target=lambda: model.model.get_image_features(pixel_values=prompt.pixels * 2))
            other.start()
            other.join(30)

        between = model.model.multi_modal_projector.register_forward_hook(
            lambda *_: encode() if threading.current_thread() is threading.main_thread() else None
        )
        with pytest.raises(ActiveError, match="Another thread encoded images.*one model copy per thread"):
            prefill(model, prompt)
        between.remove()
        assert torch.equal(prefill(model, prompt).logits, expected)
        assert handle.last_error is None
