"""What a classifier does under a policy: answers, tokens per block, FLOPs, images per second."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vlmprune.core.randomness import generator, item_seed

Attach = Callable[[Any], AbstractContextManager[Any]]
"""Applies a policy to a model for the length of a `with` block; gives the handle, or None where there is none."""


@dataclass(frozen=True)
class Cost:
    """Means per picture; see :class:`~vlmprune.evaluation.vit_rows.CurveRow`."""

    attended: tuple[float, ...]
    passed: tuple[float, ...]
    exit: float
    flops: float


@dataclass(frozen=True)
class Speed:
    """Images per second and ratios of two that took turns; see :class:`~vlmprune.evaluation.vit_rows.CurveRow`."""

    own: float
    dense: float
    ratio: float
    low: float
    high: float


class RandomPatches:
    """Hooks on a timm vision transformer that leave random patches out; a context manager.

    Every picture has one random order of its patches, from a seed and the picture's number; before each block it
    loses the last of that order until `counts` are left. Tokens keep their place in the sequence.

    Args:
        model: timm vision transformer. counts: patches left in each block. seed: of the draws.
    """

    def __init__(self, model: Any, counts: Sequence[int], seed: int) -> None:
        self.model, self.counts, self.seed = model, tuple(counts), seed
        self.sample_ids: list[str] = []
        self._left = torch.empty(0, 0, dtype=torch.long)
        self._hooks: list[Any] = []

    def __enter__(self) -> RandomPatches:
        for number, block in enumerate(self.model.blocks):
            self._hooks.append(block.register_forward_pre_hook(partial(self._drop, number)))
        return self

    def __exit__(self, *error: object) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _drop(self, number: int, block: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, prefix = arguments[0], self.model.num_prefix_tokens
        if number == 0:
            # [B, N]: the rank of each patch in its picture's order.
            self._left = torch.stack([self._ranks(name, x.shape[1] - prefix) for name in self.sample_ids]).to(x.device)
        count = min(self.counts[number], self._left.shape[1])
        if count == self._left.shape[1]:
            return arguments
        kept = self._left.argsort(dim=1)[:, :count].sort(dim=1).values  # [B, K]
        self._left = self._left.gather(1, kept)
        patches = x[:, prefix:].gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))
        return (torch.cat([x[:, :prefix], patches], dim=1), *arguments[1:])

    def _ranks(self, name: str, count: int) -> Tensor:
        return torch.randperm(count, generator=generator(item_seed(self.seed, name, 0)))


@torch.inference_mode()
def answers(model: Any, batches: Sequence[Tensor], names: Sequence[str], attach: Attach) -> list[int]:
    """Class of every picture.

    Args:
        model: the classifier. batches: pixels `[B, 3, H, W]`. names: of all pictures, in their order.
        attach: applies the policy.

    Raises:
        Whatever the policy raised inside the forward.
    """
    found: list[int] = []
    with attach(model) as handle:
        for batch in batches:
            found += _forward(model, batch, names[len(found) : len(found) + len(batch)], handle).argmax(-1).tolist()
    return found


@torch.inference_mode()
def measure_cost(model: Any, pictures: Tensor, names: Sequence[str], attach: Attach) -> Cost:
    """Tokens and FLOPs, of pictures one by one, so that nothing is padding.

    Tokens are counted where they enter the blocks' attention and MLP and the norm behind the last block.

    Args:
        model: timm vision transformer. pictures: `[n, 3, H, W]`. names, attach: see :func:`answers`.
    """
    depth = len(model.blocks)
    lengths = torch.zeros(2 * depth + 1, dtype=torch.float64)
    flops = 0
    with attach(model) as handle, _counted(model, lengths):
        for number in range(len(pictures)):
            with FlopCounterMode(display=False) as counter:
                _forward(model, pictures[number : number + 1], names[number : number + 1], handle)
            flops += counter.get_total_flops()
    means = (lengths / len(pictures)).tolist()
    return Cost(tuple(means[0 : 2 * depth : 2]), tuple(means[1 : 2 * depth : 2]), means[-1], flops / len(pictures))


@torch.inference_mode()
def measure_speed(
    model: Any, dense: Any, batches: Sequence[Tensor], names: Sequence[str], attach: Attach, rounds: int
) -> Speed:
    """Time a policy and the dense model in turns (A B A B), after one round that does not count.

    Args:
        model: for the policy. dense: another, untouched instance with the same weights.
        batches: pixels; each round takes the next one. names: of the pictures of all batches, in their order.
        attach: see :func:`answers`. rounds: timed rounds, at least 1.
    """
    times: dict[bool, list[float]] = {True: [], False: []}
    size = len(batches[0])
    with attach(model) as handle:
        for turn in range(rounds + 1):
            place = turn % len(batches)
            batch, some = batches[place], names[place * size : (place + 1) * size]
            for is_dense in (True, False):
                _synchronise(batch)
                start = time.perf_counter()
                _forward(dense, batch, some, None) if is_dense else _forward(model, batch, some, handle)
                _synchronise(batch)
                if turn:
                    times[is_dense].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(times[True], times[False], strict=True)]
    own, other = (size / statistics.median(times[key]) for key in (False, True))
    return Speed(own, other, statistics.median(ratios), min(ratios), max(ratios))


def _forward(model: Any, batch: Tensor, names: Sequence[str], handle: Any) -> Tensor:
    """Logits; seeds of draws come from the pictures' names, and an error inside the policy is raised."""
    if handle is not None:
        handle.sample_ids = list(names)
    logits = model(batch)
    error = getattr(handle, "last_error", None)
    if error is not None:
        raise error
    return logits


@contextlib.contextmanager
def _counted(model: Any, lengths: Tensor) -> Iterator[None]:
    """Add the tokens that enter attention and MLP of each block, and the final norm, to `lengths` `[2 depth + 1]`."""
    modules = [module for block in model.blocks for module in (block.attn, block.mlp)]
    hooks = [
        module.register_forward_pre_hook(partial(_add_length, lengths, place))
        for place, module in enumerate([*modules, model.norm])
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _add_length(lengths: Tensor, place: int, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    lengths[place] += arguments[0].shape[-2]


def _synchronise(batch: Tensor) -> None:
    if batch.device.type == "cuda":
        torch.cuda.synchronize(batch.device)
