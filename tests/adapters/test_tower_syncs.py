"""A tower with a fixed number of merges reads nothing back from the GPU.

Fake tensors stand for CUDA tensors: every read of a value raises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import vlmprune
from vlmprune.adapters import sites
from vlmprune.core.context import Context
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import Policy, PolicyMeta
from vlmprune.core.selection import Selection
from vlmprune.core.signals import KeyMean
from vlmprune.core.sites import Site, SiteRequest
from vlmprune.embedded.random_models import random_vlm


@dataclass(frozen=True)
class Pairs(Policy):
    """Merges neighbours by the size of their keys, in blocks 0 and 2; ``reads`` the number of outputs."""

    meta = PolicyMeta(title="pairs of neighbours, for tests")
    name = "pairs"

    reads: bool = False
    keep: Any = 0.5

    def requests(self, info: ModelInfo) -> tuple[SiteRequest, ...]:
        return tuple(SiteRequest(Site.VISION_BLOCK, b, (KeyMean(b),), "keep", place="middle") for b in (0, 2))

    def select_vision_block(self, context: Context) -> Selection:
        token = torch.arange(context.width, device=context.device)
        group = torch.where(token < context.prefix, token, context.prefix + (token - context.prefix) // 2)
        weights = context.signal(KeyMean(context.layer or 0)).norm(dim=-1)
        left = context.prefix + (context.width - context.prefix + 1) // 2
        merged = Selection.merge(group.expand_as(context.valid), left, "wavg", weights, (left,) * context.n_items)
        return replace(merged, counts=None) if self.reads else merged


def without_events(device: torch.device) -> tuple[Callable[[], None], Callable[[None], Callable[[], None]]]:
    """A stopwatch that takes no time."""
    return nothing, unread


def nothing() -> None:
    """Neither a mark nor a time."""


def unread(mark: None) -> Callable[[], None]:
    return nothing


def on_fake_gpu(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                empty = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                module._parameters[name] = nn.Parameter(empty, requires_grad=False)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device="cuda")
    return model


@pytest.mark.parametrize(
    ("family", "side", "tokens"), [("llava", 24, 9), ("internvl", 24, 9), ("paligemma", 32, 16), ("gemma3", 32, 16)]
)
def test_a_fixed_number_of_merges(family: str, side: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites, "stopwatch", without_events)  # there is no GPU that could take the time
    for reads in (False, True):
        model = random_vlm(family)
        vlmprune.apply(model, Pairs(reads=reads))
        with FakeTensorMode(), torch.no_grad():
            encode = partial(
                on_fake_gpu(model).model.get_image_features, pixel_values=torch.zeros(2, 3, side, side, device="cuda")
            )
            if reads:
                with pytest.raises(DataDependentOutputException):
                    encode()
                continue
            found = encode()
            found = getattr(found, "pooler_output", found)
            features = found if isinstance(found, torch.Tensor) else torch.stack(list(found))
            assert features.shape[:2] == (2, tokens) and features.device.type == "cuda"
