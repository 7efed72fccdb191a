"""Delivers image-level signals to the post-encoder site of one call."""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmprune.adapters.call import Prefill
from vlmprune.adapters.encoding import EncodingRecorder
from vlmprune.adapters.layout import Kind, PromptImage
from vlmprune.adapters.tower_groups import TowerGroups, tower_groups
from vlmprune.adapters.vision_family import VisionFamily
from vlmprune.core import signals as s
from vlmprune.core.attention import AttentionMap
from vlmprune.core.errors import SignalError
from vlmprune.core.randomness import tensor_digest
from vlmprune.kernels.gather import gather_tokens, pack_indices


class SignalSource:
    """Where the signals of one call's images come from.

    Args:
        call: the prefill.
        embeds: ``[B, L, D]`` prompt embeddings with image features written in.
        family: the model, None for a bare decoder.
        encoder: what was read while images were encoded, None for a bare decoder.
        sample_ids: ids given by a harness, one per source row, or None.
    """

    def __init__(
        self,
        call: Prefill,
        embeds: Tensor,
        family: VisionFamily | None,
        encoder: EncodingRecorder | None,
        sample_ids: list[str] | None,
    ) -> None:
        self._call = call
        self._images = call.layout.images
        self._embeds = embeds
        self._family = family
        self._encoder = encoder
        self._sample_ids = sample_ids
        self._checked = False

    @property
    def encoder_items(self) -> tuple[int, ...]:
        """Image of each encoder view."""
        return tuple(item for item, image in enumerate(self._images) for _ in range(image.shape.encoded))

    def image_signal(self, signal: s.Signal, features: Tensor) -> Any:
        """One signal for all images: per-token ones ``[I, N, ...]`` over the unreduced tokens, per-patch ones over all
        encoder views.

        Raises:
            SignalError: it was not recorded.
        """
        if isinstance(signal, s.Projected):
            return features
        if isinstance(signal, s.Projector) and self._family is not None:
            return self._family.projector
        if isinstance(signal, s.TextEmbeddings):
            return self._text_embeddings()
        if signal.stack_name != "vision" or self._encoder is None:
            raise SignalError(f"{signal} is not available before the text model.")
        self._check_same_images()
        values = {kind: self._encoder.value(kind, signal) for kind in self._kinds}
        if isinstance(signal, s.Attention):
            return self._attention(values)
        if isinstance(signal, s.QK):
            return tuple(self._views({kind: pair[i] for kind, pair in values.items()}, 2) for i in (0, 1))
        patches = self._views(values, 1)
        return self.to_tokens(patches) if signal.per_token else patches

    def to_tokens(self, values: Tensor, newline: float = 0.0) -> Tensor:
        """Per-patch ``values [V, P, ...]`` as per-token values ``[I, N, ...]``.

        Args:
            values: over the patches of all encoder views, in LLM order.
            newline: value of newline tokens.
        """
        assert self._family is not None
        flat = values.flatten(2) if values.ndim > 2 else values[..., None]
        width = max(self._call.layout.lengths)
        first = [0]
        for image in self._images:
            first.append(first[-1] + image.shape.encoded)
        groups: dict[Any, list[int]] = {}
        for item, image in enumerate(self._images):
            groups.setdefault(image.shape, []).append(item)
        result: Tensor | None = None
        for shape, items in groups.items():
            rows = torch.tensor([[first[i] + v for v in range(shape.encoded)] for i in items], device=values.device)
            packed = self._family.pack(shape, flat[rows], newline)  # [items, n, C]
            if len(groups) == 1:
                result = packed
                break
            result = packed.new_zeros(len(self._images), width, packed.shape[2]) if result is None else result
            result[torch.tensor(items, device=values.device)] = pad(packed, (0, 0, 0, width - packed.shape[1]))
        assert result is not None
        return result.reshape(*result.shape[:2], *values.shape[2:])

    def tower(self) -> TowerGroups | None:
        """What was reduced inside the tower while the images of this call were encoded, None where no policy acts
        there."""
        if self._encoder is None or not self._encoder.reduces:
            return None
        self._check_same_images()
        return tower_groups({kind: self._encoder.encoding(kind) for kind in self._kinds}, partial(self._views, axis=1))

    def patch_valid(self) -> Tensor | None:
        """``[V, P]`` bool, None where every view has as many patches or none was encoded."""
        if self._encoder is None:
            return None
        runs = {kind: getattr(self._encoder.encoding(kind), "run", None) for kind in self._kinds}
        if None in runs.values():
            return None
        masks = {kind: run.patch_valid for kind, run in runs.items()}
        if len(masks) == 1:
            [mask] = masks.values()
            return None if mask is None else self._views({self._kinds[0]: mask}, 1)
        counts = {kind: run.patches_per_view for kind, run in runs.items()}
        full = {
            kind: torch.ones(runs[kind].n_views, counts[kind], dtype=torch.bool, device=self._embeds.device)
            for kind in runs
        }
        return self._views({kind: full[kind] if mask is None else mask for kind, mask in masks.items()}, 1)

    def contents(self) -> tuple[str, ...]:
        """What seeds each image's draw: the harness's id of its row, else a digest of its pixels, else (a bare
        decoder) of its embeddings."""
        if self._sample_ids is not None:
            repeats = self._repeats()
            return tuple(self._sample_ids[image.sample // repeats] for image in self._images)
        self._check_same_images()
        return tuple(self._content(image) for image in self._images)

    def _content(self, image: PromptImage) -> str:
        encoding = None if self._encoder is None else self._encoder.encoding(image.kind)
        if encoding is None or not encoding.digests:
            return tensor_digest(self._embeds[image.sample, list(image.positions)])
        return "".join(encoding.digests[image.first : image.first + image.shape.encoded])

    @cached_property
    def _kinds(self) -> tuple[Kind, ...]:
        return tuple(dict.fromkeys(image.kind for image in self._images))

    def _view_rows(self, kind: Kind) -> Tensor:
        """``[V]`` views of the images of a kind in that kind's encoding."""
        rows = [
            image.first + view for image in self._images if image.kind == kind for view in range(image.shape.encoded)
        ]
        return torch.tensor(rows, device=self._embeds.device)

    def _views(self, values: dict[Kind, Tensor], axis: int) -> Tensor:
        """Values of all encoder views in LLM order; patches stand on ``axis`` and are padded with zeros."""
        parts = {kind: value[self._view_rows(kind)] for kind, value in values.items()}
        if len(parts) == 1:
            return next(iter(parts.values()))
        width = max(part.shape[axis] for part in parts.values())
        grown = {kind: _grow(part, axis, width) for kind, part in parts.items()}
        whole = torch.cat(list(grown.values()))
        starts = dict(zip(grown, [0, *[part.shape[0] for part in grown.values()]], strict=False))
        order = []
        for image in self._images:
            order += range(starts[image.kind], starts[image.kind] + image.shape.encoded)
            starts[image.kind] += image.shape.encoded
        return whole[torch.tensor(order, device=whole.device)]

    def _attention(self, values: dict[Kind, Any]) -> AttentionMap:
        if len(values) > 1:
            raise SignalError(
                "Images and videos in one batch have no common attention map; run them in separate batches."
            )
        [(kind, found)] = values.items()
        return found.views(self._view_rows(kind))

    def _repeats(self) -> int:
        """Rows per source row (beams, several returned sequences)."""
        assert self._sample_ids is not None
        rows, given = self._call.layout.rows, len(self._sample_ids)
        if given == 0 or rows % given:
            raise SignalError(f"handle.sample_ids has {given} ids, but the batch has {rows} rows.")
        return rows // given

    def _check_same_images(self) -> None:
        """Refuse features that were not encoded last: the signals at hand belong to other images."""
        if self._checked or self._encoder is None or self._encoder.inside:
            return
        self._checked = True
        for kind in self._kinds:
            encoding = self._encoder.encoding(kind)
            if encoding is None or encoding.features is None:
                continue
            firsts: dict[int, PromptImage] = {}
            for image in self._images:
                if image.kind == kind:
                    firsts.setdefault(image.source, image)
            row = torch.tensor([image.sample for image in firsts.values() for _ in image.positions])
            place = torch.tensor([place for image in firsts.values() for place in image.positions])
            features = self._embeds[row.to(self._embeds.device), place.to(self._embeds.device)]
            made = encoding.tokens().to(features)
            if made.shape != features.shape or not torch.equal(features, made):
                raise SignalError(
                    "The image features of this prompt are not those that were encoded last, so the policy's signals "
                    "would be another image's; encode the images of one call right before it, or give pixel_values."
                )

    def _text_embeddings(self) -> tuple[Tensor, Tensor]:
        """Text embeddings of each image's row, ``[I, T, D]``, and which are real ``[I, T]``."""
        text = self._call.real & (self._call.image_id < 0)
        index, valid = pack_indices(text, width=max(self._call.text))
        rows = torch.tensor(self._call.layout.samples, device=text.device)
        return gather_tokens(self._embeds, index)[rows], valid[rows]


def _grow(values: Tensor, axis: int, width: int) -> Tensor:
    """``values`` with zeros appended on ``axis`` up to ``width``."""
    after = values.ndim - 1 - axis
    return pad(values, (*[0, 0] * after, 0, width - values.shape[axis]))
