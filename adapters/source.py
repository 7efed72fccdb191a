"""Delivers image-level signals to the post-encoder site of one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.adapters.call import Prefill
from vlmprune.adapters.vision import TowerRecorder
from vlmprune.core import signals as s
from vlmprune.core.errors import SignalError
from vlmprune.core.randomness import tensor_digest
from vlmprune.kernels.gather import gather_tokens, pack_indices


class SignalSource:
    """Where the signals of one call's images come from.

    Args:
        call: the prefill.
        embeds: ``[B, L, D]`` prompt embeddings with image features written in.
        tower: the tower's recorder.
        projector: the projector module, if any.
        sample_ids: ids given by a harness, one per source row, or None.
    """

    def __init__(
        self,
        call: Prefill,
        embeds: Tensor,
        tower: TowerRecorder,
        projector: nn.Module | None,
        sample_ids: list[str] | None,
    ) -> None:
        self._call = call
        self._embeds = embeds
        self._tower = tower
        self._projector = projector
        self._sample_ids = sample_ids
        self._checked = False

    def image_signal(self, signal: s.Signal, features: Tensor) -> Any:
        """One signal for all images, per-token ones ``[I, N, ...]`` over the unreduced tokens.

        Raises:
            SignalError: it was not recorded.
        """
        if isinstance(signal, s.Projected):
            return features
        if isinstance(signal, s.Projector):
            return self._projector
        if isinstance(signal, s.TextEmbeddings):
            return self._text_embeddings()
        if signal.stack_name != "vision":
            raise SignalError(f"{signal} is not available before the text model.")
        return self._tower.signal(signal, self._tower_rows())

    def contents(self) -> tuple[str, ...]:
        """What seeds each image's draw: the harness's id of its row, else a digest of its pixels, else (a bare
        decoder) of its embeddings."""
        images = self._call.layout.images
        if self._sample_ids is not None:
            repeats = self._repeats()
            return tuple(self._sample_ids[image.sample // repeats] for image in images)
        record = self._tower.current()
        if record is not None and record.digests:
            return tuple(record.digests[row] for row in self._tower_rows().tolist())
        return tuple(tensor_digest(self._embeds[image.sample, list(image.positions)]) for image in images)

    def _repeats(self) -> int:
        """Rows per source row (beams, several returned sequences)."""
        assert self._sample_ids is not None
        rows, given = self._call.layout.rows, len(self._sample_ids)
        if given == 0 or rows % given:
            raise SignalError(f"handle.sample_ids has {given} ids, but the batch has {rows} rows.")
        return rows // given

    def _tower_rows(self) -> Tensor:
        """``[I]`` image of the tower's last run behind every image of the prompt.

        ``generate`` may expand rows after the images were encoded; each run of ``repeats`` rows then shares images.
        """
        images = self._call.layout.images
        record = self._tower.current()
        encoded = 0 if record is None else record.images
        if encoded == 0 or len(images) % encoded:
            raise SignalError(
                f"The prompt has {len(images)} images, but {encoded} were encoded since the policy was applied; "
                "apply first, then encode the images of this call."
            )
        repeats = len(images) // encoded
        per_row = [0] * self._call.layout.rows
        for image in images:
            per_row[image.sample] += 1
        first, start = [], 0
        for row in range(0, len(per_row), repeats):
            first += [start] * repeats
            start += per_row[row]
        rows = torch.tensor([first[image.sample] + image.index for image in images], device=self._embeds.device)
        if not self._checked and not self._tower.inside:
            self._check_same_images(rows)
            self._checked = True
        return rows

    def _check_same_images(self, rows: Tensor) -> None:
        """Refuse features that were not encoded by the tower's last run: its signals belong to other images."""
        record, layout = self._tower.current(), self._call.layout
        if record is None or record.projected is None:
            return
        sample = torch.tensor(layout.samples, device=rows.device)
        features = self._embeds[sample[:, None], layout.positions(rows.device)]
        if not torch.equal(features, record.projected[rows].to(features)):
            raise SignalError(
                "The image features of this prompt are not those that were encoded last, so the policy's signals would "
                "be another image's; encode the images of one call right before it, or give pixel_values."
            )

    def _text_embeddings(self) -> tuple[Tensor, Tensor]:
        """Text embeddings of each image's row, ``[I, T, D]``, and which are real ``[I, T]``."""
        text = self._call.real & (self._call.image_id < 0)
        index, valid = pack_indices(text, width=max(self._call.text))
        rows = torch.tensor(self._call.layout.samples, device=text.device)
        return gather_tokens(self._embeds, index)[rows], valid[rows]
