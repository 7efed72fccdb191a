"""Stage `qwen-decoder`: adapt merger and decoder to the trained tower, on pictures of several sizes.

The tower is frozen. As for tiny-llava, two heads of one layer are told in training which visual tokens belong to
the object asked about; the layer is the one that this was done to in tiny-llava's decoder.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..easyvqa import load_easy_vqa
from ..fastdecoder import decode
from ..questions import FAMILIES, ask
from ..qwen_fast import merge_cells, mrope_tables, prompt_positions, tower_cells
from ..qwen_model import CELL, HEADS, MROPE_SECTION, THETA, WIDTH
from ..qwen_processor import IMAGE_TOKEN, qwen_prompt
from ..scenes import HELD_OUT, for_size, generate_scene
from .batches import ALL, LATE, Batch, Encoder, choose_tokens, make_batch
from .common import StageSettings
from .decoder import (
    FOCUS_LAYER,
    INSTRUCTION_SHARE,
    LATE_FROM,
    POSITION_WEIGHT,
    QUESTIONS_PER_IMAGE,
    Fixed,
    answer_loss,
    position_loss,
    read_answers,
)
from .qwen_cache import SIZES, SizeCache
from .run import Run
from .scene_cache import Entry

FOCUS = FOCUS_LAYER + 1  # the decoder has one more layer in front
STAGE_SEED, CACHE_SEED = 61, 62
EVAL_SIZES = ((224, 224), (160, 160), (320, 320))


def make_encoder(tokenizer: Any) -> Encoder:
    """Encoder of the prompts of `tiny-qwen`."""
    return Encoder(tokenizer, qwen_prompt, IMAGE_TOKEN, n_after=2)


def question_logits(
    model: Any, encoder: Encoder, cells: Tensor, batch: Batch, grid: tuple[int, int]
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Logits at `ASSISTANT:` and at the answer, attention; and visual tokens after the first layer `[B, V, C]`.

    Args:
        model: `tiny-qwen`.
        encoder: from `make_encoder`.
        cells: tower output of the kept tokens `[B, V, 4, D]`.
        batch: questions on them.
        grid: rows and columns of visual tokens.
    """
    core, start = model.model, len(encoder.before)
    table = core.language_model.embed_tokens.weight
    visual = merge_cells(core.visual.merger, cells)
    before, after = (table[torch.tensor(ids)].expand(len(visual), -1, -1) for ids in (encoder.before, encoder.after))
    prefix = torch.cat([before, visual, after], dim=1)
    positions = prompt_positions(batch.kept, grid, start, len(encoder.after), tuple(batch.ids.shape[1:]))
    tables = mrope_tables(positions, WIDTH // HEADS, MROPE_SECTION, THETA, torch.bfloat16)
    output = decode(core.language_model, prefix, batch.ids, FOCUS, tables=tables)
    return read_answers(output, table, batch, start), output.first[:, start : start + visual.shape[1]]


def gather_cells(cells: Tensor, kept: Tensor) -> Tensor:
    """Rows `kept` `[B, V]` of `[B, N, 4, D]`."""
    return cells[torch.arange(len(cells))[:, None], kept]


class HeldOutSize:
    """Fixed held-out scenes of one size with one question per family, encoded once."""

    def __init__(self, visual: Any, size: tuple[int, int], n_scenes: int, seed: int = 97) -> None:
        rng = np.random.default_rng([seed, *size])
        self.grid = (size[0] // CELL, size[1] // CELL)
        scenes = [generate_scene(rng, "test", for_size(HELD_OUT, size)) for _ in range(n_scenes)]
        parts = []
        with torch.no_grad():
            for start in range(0, n_scenes, 8):
                images = torch.from_numpy(np.stack([s.image for s in scenes[start : start + 8]]))
                parts.append(tower_cells(visual, images).flatten(1, 2).bfloat16())
        self.cells = torch.cat(parts)
        self.entries: list[Entry] = []
        for scene in scenes:
            asked = [ask(rng, scene, family) for family in FAMILIES]
            self.entries.append(Fixed(scene.patch_object.reshape(-1), [q for q in asked if q is not None]))

    @torch.no_grad()
    def accuracy(self, model: Any, encoder: Encoder, keep: int | None = None) -> dict[str, float]:
        """First-token accuracy per family; `keep` random tokens per image instead of all."""
        rng = np.random.default_rng(3)
        hits: dict[str, list[bool]] = defaultdict(list)
        for start in range(0, len(self.entries), 8):
            entries = self.entries[start : start + 8]
            noise = rng.random((len(entries), self.grid[0] * self.grid[1]))
            kept = np.sort(np.argsort(noise, axis=1)[:, : keep or noise.shape[1]], axis=1)
            batch = make_batch(rng, encoder, entries, len(FAMILIES), ALL, kept, False)
            cells = gather_cells(self.cells[start : start + 8], batch.kept)
            logits, _ = question_logits(model, encoder, cells, batch, self.grid)
            right = logits[0].argmax(-1) == batch.answers
            for b, entry in enumerate(entries):
                for q, item in enumerate(entry.questions(rng, 0, ALL)):
                    hits[item.family].append(bool(right[b, q]))
        return {family: float(np.mean(hits[family])) for family in FAMILIES if hits[family]}


class HeldOut:
    """Held-out scenes of `EVAL_SIZES`; the first size in full, of the others the mean."""

    def __init__(self, visual: Any, n_scenes: int) -> None:
        self.sizes = [
            HeldOutSize(visual, s, n_scenes if i == 0 else -(-n_scenes // 3)) for i, s in enumerate(EVAL_SIZES)
        ]

    def accuracy(self, model: Any, encoder: Encoder) -> dict[str, float]:
        """Per family at 224 x 224, with 22 random tokens there, and means at the other sizes."""
        first, *others = self.sizes
        found = first.accuracy(model, encoder)
        found["random22"] = float(np.mean(list(first.accuracy(model, encoder, keep=22).values())))
        for held_out, size in zip(others, EVAL_SIZES[1:], strict=True):
            accuracy = held_out.accuracy(model, encoder)
            found[f"mean{size[0]}"] = float(np.mean(list(accuracy.values())))
            found[f"side{size[0]}"] = accuracy["side"]
        return found


def train_qwen_decoder(rank: int, world: int, out: Path, settings: StageSettings, model: Any, tokenizer: Any) -> None:
    """Run or resume the stage on a model from `load_start`; checkpoints go to `out/qwen_decoder.pt`."""
    core, encoder = model.model, make_encoder(tokenizer)
    core.visual.requires_grad_(False)
    core.visual.merger.requires_grad_(True)
    run = Run("qwen_decoder", out, settings, [core.visual.merger, core.language_model], rank, world)
    held_out = HeldOut(core.visual, settings.eval_scenes if rank == 0 else 3)
    cache = SizeCache(core.visual, run.rng(CACHE_SEED), settings.cache, load_easy_vqa("train"))
    run.begin()
    while run.progress < 1.0:
        # Ranks share what decides how long a step takes, so that neither waits for the other.
        rng, shared = run.rng(STAGE_SEED), run.rng(STAGE_SEED, shared=True)
        number = int(shared.choice(len(SIZES), p=[item.share for item in SIZES]))
        grid = (SIZES[number].size[0] // CELL, SIZES[number].size[1] // CELL)
        cache.renew(rng, number, settings.batch // 4)
        entries, cells = cache.sample(rng, number, settings.batch)
        kept = choose_tokens(shared, np.stack([entry.owner for entry in entries]), run.progress)
        instruction = bool(shared.random() < INSTRUCTION_SHARE)
        weights = ALL if run.progress < LATE_FROM else LATE
        batch = make_batch(rng, encoder, entries, QUESTIONS_PER_IMAGE, weights, kept, instruction)
        run.flat.zero_grad()
        logits, first = question_logits(model, encoder, gather_cells(cells, batch.kept), batch, grid)
        loss, right, mass = answer_loss(logits, batch, tokenizer.eos_token_id)
        loss = loss + POSITION_WEIGHT * position_loss(model, encoder, first, batch)
        loss.backward()
        recent = {"loss": loss.item(), "mass": mass.item(), "train": right.float().mean().item()}
        run.finish_step(recent, lambda: held_out.accuracy(model, encoder))
