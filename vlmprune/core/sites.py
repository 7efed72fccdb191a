"""Where a policy may act, and what a policy asks for there."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from vlmprune.core.signals import Signal

Positions = Literal["auto", "keep", "compact"]


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
        layer: 0-based. At ``vision_block`` and ``decoder_layer`` the reduction happens before this layer;
            at ``kv_cache`` the layer whose cache is reduced. None elsewhere.
        signals: what the adapter must deliver to ``select``.
        positions: ``keep`` leaves the position ids with which tokens entered the site; ``compact`` numbers
            the survivors and all later tokens as if the dropped ones had never been there. ``auto`` is
            resolved by the policy before the request reaches an adapter.
        projected: at ``post_encoder``: False selects among encoder outputs before the projector.
    """

    site: Site
    layer: int | None = None
    signals: tuple[Signal, ...] = ()
    positions: Positions = "keep"
    projected: bool = True
