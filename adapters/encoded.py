"""One encoding of a call's images: what the encoder was given, what was read in its tower, what it returned."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlmprune.adapters.layout import Kind
from vlmprune.adapters.tower_lineage import TowerOutcome
from vlmprune.adapters.towers import TowerRun
from vlmprune.core import signals as s


@dataclass(eq=False)
class Encoding:
    """One encoding of images or videos.

    Attributes:
        kind: what was encoded.
        arguments: what the encoder was given beside pixels (sizes, grids).
        thread: who did it.
        run: the tower's run, once it started.
        values: per signal ``[V, P, ...]``.
        digests: per view, where a policy draws.
        features: the tokens of the LLM that the encoder returned, a tensor or nested lists of them.
        tower: what was reduced inside the tower, None where nothing was.
    """

    kind: Kind
    arguments: dict[str, Any]
    thread: int = field(default_factory=threading.get_ident)
    run: TowerRun | None = None
    values: dict[s.Signal, Any] = field(default_factory=dict)
    digests: list[str] = field(default_factory=list)
    features: Any = None
    tower: TowerOutcome | None = None

    @property
    def n_views(self) -> int:
        """Encoder views."""
        return 0 if self.run is None else self.run.n_views

    def tokens(self) -> Tensor:
        """All tokens that were made, ``[N, D]``, image by image."""
        found = self.features
        while isinstance(found, (list, tuple)) and isinstance(found[0], (list, tuple)):
            found = found[0]
        parts = [found] if isinstance(found, Tensor) else found
        return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


@dataclass(frozen=True)
class PixelScale:
    """What an image processor did to pixels: ``(x * rescale - mean) / std``."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale: float

    def undo(self, pixels: Tensor) -> Tensor:
        """Pixels in 0..255 from ``[V, P, C, h, w]``, rounded to whole numbers."""
        mean, std = (torch.tensor(part, device=pixels.device).view(-1, 1, 1) for part in (self.mean, self.std))
        return ((pixels.float() * std + mean) / self.rescale).round().clamp(0, 255)
