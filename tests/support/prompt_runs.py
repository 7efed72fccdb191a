"""What batches of prompts of all families have in common, and runs over them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.core.sites import Site


class Prompt(ABC):
    """A left-padded batch of prompts. Subclasses hold ``ids`` and ``real`` ``[B, L]``; ``real`` marks tokens that are
    not padding."""

    ids: Tensor
    real: Tensor

    @property
    @abstractmethod
    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the model and of ``generate``."""

    @abstractmethod
    def places(self) -> list[list[list[int]]]:
        """Per row and image, where its tokens stand."""

    @property
    def length(self) -> int:
        """Padded prompt length."""
        return self.ids.shape[1]

    @property
    def positions(self) -> Tensor:
        """``[B, L]`` positions in the row, without padding."""
        return (self.real.long().cumsum(1) - 1).clamp_min(0)

    def position_ids(self, model: nn.Module) -> Tensor:
        """Position ids as ``generate`` gives them to ``model``."""
        return self.positions

    def widths(self, site: Site = Site.POST_ENCODER) -> list[int]:
        """Number of tokens of each image (after the encoder) or of each sample with images (in the decoder)."""
        per_row = [[len(tokens) for tokens in images] for images in self.places()]
        return sum(per_row, []) if site == Site.POST_ENCODER else [sum(row) for row in per_row if row]

    def dropped(self, kept: Sequence[Sequence[int]], site: Site = Site.POST_ENCODER) -> Tensor:
        """``[B, L]`` True at dropped tokens. ``kept`` lists per image (after the encoder) or per sample with
        images (in the decoder) the tokens that stay."""
        mask = torch.zeros_like(self.real)
        item = 0
        for row, images in enumerate(self.places()):
            merged = [sum(images, [])] if images else []
            for tokens in images if site == Site.POST_ENCODER else merged:
                mask[row, tokens] = True
                mask[row, [tokens[i] for i in kept[item]]] = False
                item += 1
        return mask


@torch.no_grad()
def prefill(model: nn.Module, prompt: Prompt, **arguments: Any) -> Any:
    """One forward over the prompt, with positions as ``generate`` gives them."""
    return model(**{**prompt.inputs, "position_ids": prompt.position_ids(model), **arguments})


@torch.no_grad()
def decode(model: nn.Module, prompt: Prompt, cache: Any, forced: Tensor, turn: bool = False) -> Tensor:
    """Logits ``[B, S, V]`` of forced tokens ``[B, S]`` after the prompt: one at a time, or as one ``turn``."""
    chunks = [forced] if turn else list(forced.split(1, dim=1))
    real, start, logits = prompt.real.long(), prompt.position_ids(model)[..., -1:], []
    for chunk in chunks:
        real = torch.cat([real, torch.ones_like(chunk)], 1)
        steps = torch.arange(1, chunk.shape[1] + 1)
        out = model(
            input_ids=chunk,
            attention_mask=real,
            position_ids=start + steps,
            past_key_values=cache,
            use_cache=True,
        )
        start = start + chunk.shape[1]
        logits.append(out.logits)
    return torch.cat(logits, 1)
