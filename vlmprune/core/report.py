"""What the last forward did: ``handle.last``. Device values are read when asked for, never in the forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vlmprune.core.errors import InputError
from vlmprune.core.records import ImageRecord, SiteRecord
from vlmprune.core.report_summary import summarise
from vlmprune.core.sites import Site
from vlmprune.core.source_map import SourceMap

__all__ = ["ImageRecord", "Report", "SiteRecord"]


@dataclass
class Report:
    """The last forward with visual tokens.

    Attributes:
        model_class, policy: what ran (``policy`` as config).
        n_samples: rows of the batch.
        prompt_tokens: padded prompt length before any reduction.
        images: the batch's images, those of a sample in order.
        sites: selections in the order in which they happened.
        tower_sites: selections inside the vision tower, in order; items are its views (or windows of them), and what
            they mean for the LLM's tokens is the first of ``sites``.
        tower_attended, tower_passed: mean tokens per item in the attention and in the MLP of every tower block;
            empty where nothing acts there.
        tower_flops, tower_flops_dense: FLOPs of the tower's blocks over all images, reduced and unreduced, by
            :func:`vlmprune.core.flops.tower_flops`; None where they are not known.
        text_depth: decoder layers.
        lengths_per_layer: tokens per row that each decoder layer worked on, text and padding included.
        decoder_flops, decoder_flops_dense: FLOPs of the decoder layers over the prompt, pruned and unpruned, by
            :func:`vlmprune.core.flops.decoder_flops`; None where the model's sizes are not known.
        kv_bytes_per_layer: bytes of keys and values after the prefill, per layer; None without a cache.
        kv_bytes_per_layer_dense: what the dense model stores for the same prompt.
        geometry: how the images were resized or cut, where a policy changed it.
        warnings: things the user should know.
    """

    model_class: str
    policy: Any
    n_samples: int = 0
    prompt_tokens: int = 0
    images: tuple[ImageRecord, ...] = ()
    sites: list[SiteRecord] = field(default_factory=list)
    tower_sites: tuple[SiteRecord, ...] = ()
    tower_attended: tuple[float, ...] = ()
    tower_passed: tuple[float, ...] = ()
    tower_flops: float | None = None
    tower_flops_dense: float | None = None
    text_depth: int = 0
    lengths_per_layer: tuple[int, ...] = ()
    decoder_flops: float | None = None
    decoder_flops_dense: float | None = None
    kv_bytes_per_layer: tuple[int, ...] | None = None
    kv_bytes_per_layer_dense: tuple[int, ...] | None = None
    geometry: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def kv_bytes(self) -> int | None:
        """Bytes of keys and values after the prefill, all layers."""
        return None if self.kv_bytes_per_layer is None else sum(self.kv_bytes_per_layer)

    @property
    def kv_bytes_dense(self) -> int | None:
        """What the dense model stores for the same prompt."""
        return None if self.kv_bytes_per_layer_dense is None else sum(self.kv_bytes_per_layer_dense)

    @property
    def visual_tokens(self) -> tuple[int, ...]:
        """Visual tokens per sample before any reduction."""
        totals = [0] * self.n_samples
        for image in self.images:
            totals[image.sample] += image.n_tokens
        return tuple(totals)

    @property
    def kept_tokens(self) -> tuple[int, ...]:
        """Visual tokens per sample after the last site; after evictions, in the last layer's cache."""
        return self._after(self.path())

    @property
    def kept_tokens_per_layer(self) -> tuple[tuple[int, ...], ...]:
        """Visual tokens per decoder layer and sample; after an eviction, those left in the layer's cache."""
        return tuple(self._after(self.path(layer)) for layer in range(self.text_depth))

    @property
    def mean_kept_layers(self) -> float | None:
        """Mean of the visual tokens per sample over decoder layers."""
        rows = self.kept_tokens_per_layer
        return sum(map(sum, rows)) / (len(rows) * self.n_samples) if rows and self.n_samples else None

    @property
    def layers_used(self) -> dict[str, list[int]]:
        """Decoder or tower layers at which each policy acted."""
        used: dict[str, list[int]] = {}
        for record in [*self.tower_sites, *(record for record in self.sites if record.site != Site.VISION_BLOCK)]:
            if record.layer is not None and record.layer not in used.get(record.policy, ()):
                used.setdefault(record.policy, []).append(record.layer)
        return used

    @property
    def milliseconds(self) -> float | None:
        """Time of all selections."""
        times = [record.milliseconds for record in self.sites]
        return None if not times or None in times else sum(t for t in times if t is not None)

    def path(self, layer: int | None = None) -> list[SiteRecord]:
        """The selections behind the visual tokens of one decoder layer, in order.

        Args:
            layer: 0-based; None is the last one. Cuts before later layers and evictions from other layers'
                caches are not on the path.
        """
        if layer is None:
            layer = max([self.text_depth - 1, *(r.layer or 0 for r in self.sites if r.in_decoder)])
        return [record for record in self.sites if record.acts_on(layer)]

    def lineage(self, sample: int = 0, layer: int | None = None) -> SourceMap:
        """Source map ``[1, M, N]`` of a sample: from all its visual tokens (images one after the other) to
        what is left at decoder layer ``layer`` (see :meth:`path`)."""
        self._check_sample(sample)
        current = SourceMap.identity(torch.ones(1, self.visual_tokens[sample], dtype=torch.bool))
        for record in self.path(layer):
            if sample in record.samples:
                current = current.compose(record.source_map(sample))
        return current

    def kept(self, sample: int = 0, image: int = 0, layer: int | None = None) -> list[int]:
        """Tokens of one image that some surviving token stands for, ascending."""
        start, length = self._span(sample, image)
        kept = self.lineage(sample, layer).kept()[0, start : start + length]
        return kept.nonzero()[:, 0].tolist()

    def groups(self, sample: int = 0, image: int = 0, layer: int | None = None) -> list[list[int]]:
        """Per surviving token, the tokens of one image that it stands for; empty groups are left out."""
        start, length = self._span(sample, image)
        groups = self.lineage(sample, layer).groups()[0]
        inside = [[t - start for t in group if start <= t < start + length] for group in groups]
        return [group for group in inside if group]

    def scores(self, sample: int = 0, image: int = 0) -> list[float] | None:
        """Scores of one image's tokens at the first site that scored all of the sample's tokens, or None."""
        start, length = self._span(sample, image)
        for record in self.sites:
            scores = record.scores(sample)
            if scores is not None and len(scores) == self.visual_tokens[sample]:
                return scores[start : start + length]
        return None

    def take_tower(self, records: Sequence[SiteRecord], attended: Sequence[float], passed: Sequence[float]) -> None:
        """Write down what happened inside the tower."""
        self.tower_sites = (*self.tower_sites, *records)
        self.tower_attended, self.tower_passed = tuple(attended), tuple(passed)

    def take_notes(self) -> None:
        """Add what the selections noted to the warnings, each text once."""
        for record in [*self.tower_sites, *self.sites]:
            self.warnings += [note for note in record.selection.notes if note not in self.warnings]

    def summary(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return summarise(self)

    def _check_sample(self, sample: int) -> None:
        if not 0 <= sample < self.n_samples:
            raise InputError(f"Sample {sample} is out of range; the batch had {self.n_samples} (from 0).")

    def _span(self, sample: int, image: int) -> tuple[int, int]:
        self._check_sample(sample)
        lengths = [record.n_tokens for record in self.images if record.sample == sample]
        if not 0 <= image < len(lengths):
            raise InputError(f"Image {image} is out of range; sample {sample} has {len(lengths)} (from 0).")
        return sum(lengths[:image]), lengths[image]

    def _after(self, path: list[SiteRecord]) -> tuple[int, ...]:
        totals = list(self.visual_tokens)
        for record in path:
            counts = record.tokens_out
            for sample in set(record.samples):
                totals[sample] = sum(counts[item] for item in record.items(sample))
        return tuple(totals)
