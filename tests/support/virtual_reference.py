"""The dense model in which merged tokens are one: the reference of virtual unmerging.

It knows nothing of the adapters. The sequence keeps its full length with the model's own masks, rotary tables and
cache; what enters each decoder layer and what its attention returns is averaged over the members of every group, so
that all of them hold what a merged token holds. Averaging behind the output projection is the same as before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from masked_reference import decoder_layers, hidden_keys
from prompt_runs import Prompt
from torch import Tensor, nn

Groups = tuple[tuple[int, ...], ...]


def pick_groups(widths: Sequence[int], dropped: int = 0, seed: int = 3) -> Groups:
    """About half as many groups as each image has tokens, scattered, of one to many members; the first ``dropped``
    tokens of each image belong to none."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for width in widths:
        draw = torch.randint(0, max(1, width // 2), (width - dropped,), generator=generator).tolist()
        names = {group: i for i, group in enumerate(dict.fromkeys(draw))}
        order = torch.randperm(len(names), generator=generator).tolist()
        found.append((-1,) * dropped + tuple(order[names[group]] for group in draw))
    return tuple(found)


def group_places(prompt: Prompt, groups: Groups) -> Tensor:
    """``[B, L]`` number of the group at each place: its own place for text, negative for dropped tokens."""
    number = torch.arange(prompt.length).repeat(len(prompt.real), 1)
    item = 0
    for row, images in enumerate(prompt.places()):
        for tokens in images:
            first: dict[int, int] = {}
            for place, group in zip(tokens, groups[item], strict=True):
                number[row, place] = -1 - place if group < 0 else first.setdefault(group, place)
            item += 1
    return number


def unique(prompt: Prompt, groups: Groups) -> Tensor:
    """``[B, L]`` True at the first place of every token."""
    return prompt.real & (group_places(prompt, groups) == torch.arange(prompt.length))


@contextmanager
def unmerged(
    model: nn.Module, prompt: Prompt, groups: Groups, gone: dict[int, Tensor] | None = None, decode_only: bool = False
) -> Iterator[None]:
    """Run a dense model in which the members of each group are one token.

    Args:
        groups: per image the group of each token, -1 for dropped ones.
        gone: per layer ``[B, L]`` bool, places of groups that are dropped there besides.
        decode_only: those are dropped after the prefill only.
    """
    number = group_places(prompt, groups)
    same = (number[:, :, None] == number[:, None]).to(torch.float64)
    mean = same / same.sum(-1, keepdim=True)
    layers = decoder_layers(model)
    never = number < 0
    dropped = {layer: never | (gone or {}).get(layer, torch.zeros_like(never)) for layer in range(len(layers))}
    handles = []
    for layer in layers:
        handles.append(layer.register_forward_pre_hook(partial(_enter, mean), with_kwargs=True))
        handles.append(layer.self_attn.register_forward_hook(partial(_leave, mean)))
    try:
        with hidden_keys(layers, dict.fromkeys(dropped, never) if decode_only else dropped, prompt.real):
            if not decode_only:
                yield
            else:
                with hidden_keys(layers, dropped, prompt.real, decode_only=True):
                    yield
    finally:
        for handle in handles:
            handle.remove()


def _averaged(mean: Tensor, hidden: Tensor) -> Tensor:
    """Group means of a prompt's (and later) tokens; steps on a cache stay as they are."""
    length = mean.shape[1]
    if hidden.shape[1] < length:
        return hidden
    mean = mean.repeat_interleave(len(hidden) // len(mean), 0).to(hidden.dtype)
    return torch.cat([mean @ hidden[:, :length].nan_to_num(), hidden[:, length:]], 1)


def _enter(mean: Tensor, module: nn.Module, args: Any, kwargs: Any) -> Any:
    if args:
        return (_averaged(mean, args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": _averaged(mean, kwargs["hidden_states"])}


def _leave(mean: Tensor, module: nn.Module, args: Any, output: Any) -> Any:
    return (_averaged(mean, output[0]), *output[1:])
