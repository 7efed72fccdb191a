"""Where a policy may act, and what a policy asks for there."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from vlmprune.core.signals import Signal

Positions = Literal["auto", "keep", "compact", "virtual"]
Place = Literal["before", "middle"]


class Site(StrEnum):
    """Places where visual tokens can be reduced, in the order in which a forward reaches them."""

    IMAGE = "image"
    VISION_BLOCK = "vision_block"
    POST_ENCODER = "post_encoder"
    DECODER_LAYER = "decoder_layer"
    KV_CACHE = "kv_cache"


@dataclass(frozen=True)
class SiteRequest:
    """One place where a policy acts.

    Attributes:
        site: where.
        layer: 0-based. At ``vision_block`` and ``decoder_layer`` the reduction happens before this layer, or at
            the ``place`` inside it; at ``kv_cache`` the layer whose cache is reduced. None elsewhere.
        signals: what the adapter must deliver to ``select``.
        positions: ``keep`` leaves the position ids with which tokens entered the site; ``compact`` numbers
            the survivors and all later tokens as if the dropped ones had never been there. ``virtual`` (merges
            at ``vision_block`` and ``post_encoder``): in the decoder's attention a merged token stands at the
            positions of all tokens that went into it; for a selection that only drops it is ``keep``. ``auto``
            is resolved by the policy before the request reaches an adapter.
        projected: at ``post_encoder``: False selects among encoder outputs before the projector.
        place: at ``vision_block``: ``"before"`` the block, with signals of the block before it, or in its
            ``"middle"``, between the attention's residual and the MLP, with signals of its own attention.
        size_bias: at ``vision_block``: later attention adds ``log(size)`` of merged tokens to their keys' scores
            (proportional attention).
    """

    site: Site
    layer: int | None = None
    signals: tuple[Signal, ...] = ()
    positions: Positions = "keep"
    projected: bool = True
    place: Place = "before"
    size_bias: bool = True
