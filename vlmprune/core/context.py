"""What a policy's ``select`` receives: one padded batch of items at one site."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlmprune.core.budget import Budget, Rounding
from vlmprune.core.errors import SignalError
from vlmprune.core.info import ModelInfo
from vlmprune.core.randomness import generator
from vlmprune.core.signals import Signal
from vlmprune.core.sites import Site
from vlmprune.core.views import Newline, View, ViewGroup, on_device, split_count


@dataclass(frozen=True)
class Context:
    """A padded batch of ``I`` items of up to ``N`` visual tokens.

    An item is a view at ``vision_block`` (a window of it in towers that attend in windows), an image with all its
    views at ``post_encoder``, and a sample at ``decoder_layer`` and ``kv_cache``.

    A token at ``vision_block`` is a patch, or in a VLM whose projector joins ``info.merge_unit`` patches such a unit
    of patches; ``prefix`` tokens (CLS, distillation, registers) stand before them in every item.

    Attributes:
        site, layer: where this is (``layer`` as in the request).
        info: the model's facts.
        budget: what ``keep`` says for this policy.
        lengths: tokens per item, known on the host.
        valid: ``[I, N]`` bool; padding is False.
        features: ``[I, N, D]`` tokens as they stand here, or None where the site has none.
        signals: what was asked for, keyed by the signal.
        views: per item its views (empty at decoder sites).
        newlines: per item its newline tokens (any-resolution images). A policy whose ``newlines`` is ``"rows"``
            leaves them out: the framework keeps the newline of every row that still has tokens.
        pinned: ``[I, N]`` those newline tokens, None where they compete with all others for the budget; at
            ``vision_block`` units of patches of which some are padding.
        image_id: ``[I, N]`` image of each token inside the sample, -1 for padding (decoder sites).
        position: ``[I, N]`` place of each token in the current sequence, padding not counted (decoder sites).
        image_lengths: per item the tokens of each of its images as they entered the decoder (decoder sites).
        sample: sample that each item belongs to.
        sizes: ``[I, N]`` tokens that entered the tower and that each token stands for, None while all are 1.
        prefix: tokens at the front of every item that must stay there as they are (``vision_block``).
        entered: tokens of each item as it entered the tower, prefix included (``vision_block``).
        carry: per-token values kept by earlier selections of this forward; those of the tower end with it.
        seeds: per item, only for policies that draw.
        encoder_items: item of each encoder view, in LLM order (``post_encoder``; see :mod:`vlmprune.core.signals`).
        patch_valid: ``[V, P]`` bool, False for the padding of views with fewer patches; None where there is none.
        to_tokens: ``to_tokens(values, newline=0.0)`` maps per-patch values ``[V, P, ...]`` to per-token values
            ``[I, N, ...]``, just as patch features become tokens; ``newline`` is the value of newline tokens.
    """

    site: Site
    info: ModelInfo
    budget: Budget
    lengths: tuple[int, ...]
    valid: Tensor
    layer: int | None = None
    features: Tensor | None = None
    signals: Mapping[Signal, Any] = field(default_factory=dict)
    views: tuple[tuple[View, ...], ...] = ()
    newlines: tuple[tuple[Newline, ...], ...] = ()
    pinned: Tensor | None = None
    image_id: Tensor | None = None
    position: Tensor | None = None
    image_lengths: tuple[tuple[int, ...], ...] = ()
    sample: tuple[int, ...] = ()
    sizes: Tensor | None = None
    carry: Mapping[str, Tensor] = field(default_factory=dict)
    seeds: tuple[int, ...] | None = None
    prefix: int = 0
    entered: tuple[int, ...] = ()
    encoder_items: tuple[int, ...] = ()
    patch_valid: Tensor | None = None
    to_tokens: Callable[..., Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """Device of the batch."""
        return self.valid.device

    @property
    def n_items(self) -> int:
        """Number of items ``I``."""
        return self.valid.shape[0]

    @property
    def width(self) -> int:
        """Padded number of tokens ``N``."""
        return self.valid.shape[1]

    def signal(self, signal: Signal) -> Any:
        """A delivered signal.

        Raises:
            SignalError: it was not requested, or the model could not give it.
        """
        try:
            return self.signals[signal]
        except KeyError:
            raise SignalError(f"{signal} was not delivered at {self.site}; request it in requests().") from None

    @property
    def candidates(self) -> Tensor:
        """``[I, N]`` bool: the tokens that a policy chooses among, neither padding nor pinned."""
        return self.valid if self.pinned is None else self.valid & ~self.pinned

    def item_views(self, item: int) -> tuple[View, ...]:
        """The views of one item; a single row of all its tokens where the grid is not known."""
        views = self.views[item] if self.views else ()
        return views or (View(1, self.lengths[item]),)

    def item_budget(self, item: int) -> Budget:
        """The budget of one item; a list names one entry per image of the sample."""
        return self.budget.part(self.image_index(item)) if self.budget.parts else self.budget

    def item_generator(self, item: int) -> torch.Generator:
        """A CPU generator of one item's own seed, for policies that draw.

        Raises:
            SignalError: the policy did not declare that it draws.
        """
        if self.seeds is None:
            raise SignalError("No seeds were derived; a policy that draws must return True from is_random().")
        return generator(self.seeds[item])

    def counts(self, rounding: Rounding = "floor", minimum: int = 1) -> tuple[int, ...]:
        """Tokens to keep per item by the budget: of its views' cells where newlines are pinned, else of all tokens."""
        cells = [sum(view.length for view in self.item_views(item)) for item in range(self.n_items)]
        sizes = self.lengths if self.pinned is None else cells
        return tuple(self.item_budget(item).count(n, rounding, minimum) for item, n in enumerate(sizes))

    def view_counts(self, counts: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Each item's count shared among its views in proportion to their tokens; the shares add up."""
        return tuple(
            tuple(split_count(count, [v.length for v in self.item_views(item)])) for item, count in enumerate(counts)
        )

    def image_index(self, item: int) -> int:
        """Place of item ``item`` among the items of its sample."""
        if not self.sample:
            return 0
        return sum(1 for other in self.sample[:item] if other == self.sample[item])

    def view_groups(self, view_counts: Sequence[Sequence[int]]) -> Iterator[ViewGroup]:
        """Group all views by grid and budget.

        Args:
            view_counts: per item the tokens to keep in each of its views, see :meth:`view_counts`.
        """
        groups: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
        for item in range(self.n_items):
            for number, (view, count) in enumerate(zip(self.item_views(item), view_counts[item], strict=True)):
                groups.setdefault((view.height, view.width, count), []).append((item, number))
        for (height, width, count), places in groups.items():
            item_index = on_device([item for item, _ in places], self.device)
            tokens = [self.item_views(item)[number].tokens(self.device) for item, number in places]
            yield ViewGroup(height, width, count, item_index, torch.stack(tokens), tuple(places))
