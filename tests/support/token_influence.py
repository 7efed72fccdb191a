"""Of which patches a model makes each token of the LLM, by the gradients of its embeddings."""

from __future__ import annotations

from typing import Any

import torch
from eager_reference import CLS, EagerReference, blocks_of, projector_of
from family_prompts import FamilyPrompt
from masked_reference import decoder_layers
from torch import Tensor, nn


def influences(model: nn.Module, prompt: FamilyPrompt, reference: EagerReference) -> list[Tensor]:
    """Per view, in prompt order, ``[tokens, P_v]`` bool: patches of the feature block that a token depends on."""
    leaves, embeds = [], []
    block = len(blocks_of(model)) - 1 - int(prompt.family in CLS and prompt.family != "internvl")

    def cut_off(module: nn.Module, args: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        leaves.append(states.detach().requires_grad_())
        return (leaves[-1], *output[1:]) if isinstance(output, tuple) else leaves[-1]

    def cut_off_before(module: nn.Module, args: Any) -> Any:
        return (cut_off(module, (), args[0]), *args[1:])

    if prompt.family == "llava_onevision":  # transformers 4 reads its features below the hooks of the block
        first = projector_of(model).register_forward_pre_hook(cut_off_before)
    else:
        first = blocks_of(model)[block].register_forward_hook(cut_off, prepend=True)
    hooks = [
        first,
        decoder_layers(model)[0].register_forward_pre_hook(
            lambda m, a, k: embeds.append(a[0] if a else k["hidden_states"]), with_kwargs=True
        ),
    ]
    try:
        model(**prompt.inputs, position_ids=prompt.position_ids(model))
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for row, images in enumerate(prompt.places()):
        found += [gradients(embeds[0][row, place], leaves) for tokens in images for place in tokens]
    by_run = {id(run): torch.stack(parts) for run, *parts in zip(reference.runs, *found, strict=True)}
    numbers = reference.patches(lambda run: torch.arange(by_run[id(run)].shape[1]).view(run.entering[0].shape[:-1]))
    return [by_run[id(run)][:, number] for (run, _), number in zip(reference.views, numbers, strict=True)]


def gradients(embedding: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Per leaf ``[..., D]`` which of its places the embedding depends on, flat."""
    if embedding.grad_fn is None:
        return [leaf.new_zeros(leaf.shape[:-1]).flatten().bool() for leaf in leaves]
    weights = torch.linspace(1, 2, len(embedding), dtype=embedding.dtype)
    found = torch.autograd.grad((embedding * weights).sum(), leaves, retain_graph=True, materialize_grads=True)
    return [grad.abs().sum(-1).flatten() > 0 for grad in found]
