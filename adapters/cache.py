"""A KV cache that knows which prompt tokens it holds.

Two-faced length: outside the text model (``generate``, mask builders) lengths are those of the unpruned sequence;
inside it they are what is stored, unless stored tokens stand at several places of the sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from vlmprune.adapters.expansion import Expansion, VirtualPrompt
from vlmprune.adapters.tokens import LayerTokens, change_shared
from vlmprune.core.errors import UnsupportedError

PRUNED = "This KV cache was pruned; a dense run, or one after handle.remove(), needs a fresh one."


@dataclass
class PromptState:
    """Kept prompt tokens of every decoder layer.

    Attributes:
        length: tokens of the unpruned prompt.
        layers: what each layer stores of them.
        inside: the text model runs, so lengths are those of what is stored.
        tail: last tokens of the prompt that every layer stores: the text after the last image of any row.
        virtual: where merged tokens stand, if at several places. The text model then runs at the length of the
            unpruned sequence, too.
    """

    length: int
    layers: list[LayerTokens] = field(default_factory=list)
    inside: bool = False
    tail: int = 0
    virtual: VirtualPrompt | None = None

    @property
    def short(self) -> bool:
        """The text model runs on what is stored."""
        return self.inside and self.virtual is None

    @property
    def given(self) -> LayerTokens:
        """Prompt tokens of the sequence that the text model is given."""
        return self.layers[0] if self.virtual is None else self.virtual.whole

    def seen(self, layer: int) -> LayerTokens:
        """Prompt tokens, or places, that a layer's attention is over."""
        return self.layers[layer] if self.virtual is None else self.virtual.layers[layer].places

    def as_given(self, layer: int) -> bool:
        """True if that is what the text model is given."""
        return self.layers[layer] is self.layers[0] if self.virtual is None else self.virtual.layers[layer].whole

    def store(self, layer: int, tokens: LayerTokens, expansion: Expansion | None) -> None:
        """Set what a layer stores, and where it stands."""
        self.layers[layer] = tokens
        if self.virtual is not None and expansion is not None:
            self.virtual.layers[layer] = expansion

    def dropped(self, layer: int) -> int:
        """Prompt tokens that ``layer`` does not store."""
        return self.length - self.layers[layer].length if layer < len(self.layers) else 0

    def select_rows(self, index: Tensor) -> None:
        """Follow a change of batch rows."""
        change_shared(self.layers, lambda tokens: tokens.rows(index))
        if self.virtual is not None:
            self.virtual.select_rows(index)

    def cut_tail(self, count: int) -> None:
        """Forget the last ``count`` tokens of the prompt."""
        self.length -= count
        self.tail -= count
        change_shared(self.layers, lambda tokens: tokens.without_last(count))
        if self.virtual is not None:
            self.virtual.cut_tail(count)


class PrunedDynamicCache(DynamicCache):
    """``DynamicCache`` with a :class:`PromptState`; a plain one becomes it when its prompt is pruned."""

    prompt: PromptState

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prompt = PromptState(0)

    @classmethod
    def adopt(cls, cache: DynamicCache, prompt: PromptState) -> PrunedDynamicCache:
        """Turn ``cache`` into this class, in place."""
        cache.__class__ = cls
        cache.prompt = prompt  # type: ignore[attr-defined]
        return cache  # type: ignore[return-value]

    def _outside(self, layer: int) -> int:
        return 0 if self.prompt.short or not self._filled(layer) else self.prompt.dropped(layer)

    def _filled(self, layer: int) -> bool:
        return self.stored(layer) > 0

    @property
    def holds_prompt(self) -> bool:
        """A prompt with images is stored here."""
        return bool(self.prompt.layers) and self.stored() > 0

    def stored(self, layer: int = 0) -> int:
        """Tokens that ``layer`` holds."""
        return super().get_seq_length(layer)

    def generated(self, layer: int = 0) -> int:
        """Tokens that ``layer`` holds beyond the prompt."""
        return self.stored(layer) - (self.prompt.layers[layer].length if self.prompt.layers else 0)

    def hold(self, layer: int, places: Tensor, tokens: LayerTokens, expansion: Expansion | None = None) -> None:
        """Keep only the keys and values at ``places [B, n]`` of a layer; they belong to the prompt's ``tokens``, with
        the positions that they have."""
        store = self.layers[layer]
        index = places[:, None, :, None].expand(-1, store.keys.shape[1], -1, store.keys.shape[3])
        store.keys, store.values = store.keys.gather(2, index), store.values.gather(2, index)
        if hasattr(store, "cumulative_length"):  # layers with a sliding window count what they have seen
            store.cumulative_length = places.shape[1]
        if expansion is not None and self.prompt.virtual is not None:
            expansion = replace(expansion, numbering=self.prompt.virtual.layers[layer].numbering)
        self.prompt.store(layer, tokens, expansion)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if self.prompt.layers and not self.prompt.inside:
            raise UnsupportedError(PRUNED)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0, *args: Any, **kwargs: Any) -> int:
        return super().get_seq_length(layer_idx, *args, **kwargs) + self._outside(layer_idx)

    def get_mask_sizes(self, query: Any, layer_idx: int = 0, *args: Any, **kwargs: Any) -> tuple[int, int]:
        length, offset = super().get_mask_sizes(query, layer_idx, *args, **kwargs)
        return length + self._outside(layer_idx), offset

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.prompt.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.prompt.layers:
            index = self.prompt.layers[0].index
            self.prompt.select_rows(torch.arange(index.shape[0], device=index.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.prompt.select_rows(indices)

    def crop(self, length: int) -> None:
        """Remove tokens from the end; transformers 4 gives the length to keep, 5 a negative count."""
        remove = self.get_seq_length() - length if length > 0 else -length
        if remove <= 0:
            return
        # Speculative decoding appends candidates to the prompt and removes them after the first forward.
        of_prompt = max(0, remove - self.generated())
        if of_prompt > self.prompt.tail:
            raise UnsupportedError(
                f"crop would cut {of_prompt} tokens into the pruned prompt, of which only the last "
                f"{self.prompt.tail} are text that can go; start again from the prompt."
            )
        super().crop(-remove)
        if of_prompt:
            self.prompt.cut_tail(of_prompt)

    def reset(self) -> None:
        super().reset()
        for layer in self.layers:  # before transformers 5.23 the tokens stay, as zeros
            layer.keys = layer.values = None
            layer.is_initialized = False
        self.prompt = PromptState(0)


def check_cache(cache: Any) -> None:
    """Refuse caches that pruning cannot serve.

    Raises:
        UnsupportedError: naming the cache and the way out.
    """
    if cache is None or (type(cache) in (DynamicCache, PrunedDynamicCache) and not getattr(cache, "offloading", False)):
        return
    kind = "an offloaded DynamicCache" if type(cache) is DynamicCache else type(cache).__name__
    raise UnsupportedError(
        f"Pruning works on the default DynamicCache, not on {kind}. Drop cache_implementation / past_key_values, "
        "or run this call inside handle.disabled()."
    )


def check_window(window: int | None, total: int) -> None:
    """Refuse sequences that outgrow a sliding attention window: the model masks by distance in what is stored.

    Raises:
        UnsupportedError: the unpruned sequence of ``total`` tokens is longer than the window.
    """
    if window is not None and total > window:
        raise UnsupportedError(
            f"The sequence of {total} tokens exceeds the model's sliding attention window of {window}; pruning serves "
            "sequences inside the window. Shorten the prompt or run inside handle.disabled()."
        )
