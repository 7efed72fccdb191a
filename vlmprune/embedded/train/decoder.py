"""Stage 2: train projector and decoder on questions, with the tower frozen as in LLaVA.

Two heads of decoder layer 2 are told in training which visual tokens belong to the object asked about.
Without this aid look-up questions stay on a plateau for tens of thousands of images. The model stays stock.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..easyvqa import load_easy_vqa
from ..fastdecoder import DecoderOutput, decode
from ..fastpath import patchify, project, tower_features
from ..questions import FAMILIES, Question, ask
from ..scenes import GRID, HELD_OUT, Scene, generate_scene
from .batches import ALL, LATE, LOOKUP, Batch, Encoder, choose_tokens, make_batch
from .common import StageSettings
from .run import Run
from .scene_cache import Entry, SceneCache

FOCUS_LAYER = 2
FOCUS_HEADS = (0, 1)
FOCUS_WEIGHT = 0.5
END_WEIGHT = 0.1
POSITION_WEIGHT = 0.5
POSITION_SCALE = 10.0  # visual tokens reach a norm of about 45
QUESTIONS_PER_IMAGE = 10
LOOKUP_SHARE = 0.15  # of the time, before the other families join
LATE_FROM = 0.3
INSTRUCTION_SHARE = 0.12
STAGE_SEED, CACHE_SEED = 21, 22


def prefix_embeddings(model: Any, encoder: Encoder, features: Tensor) -> Tensor:
    """`<s> USER:`, projected visual tokens, newline: float32 `[B, P, C]`."""
    core = model.model
    visual = project(core.multi_modal_projector, features)
    table = core.language_model.embed_tokens.weight
    before = table[torch.tensor(encoder.before)].expand(len(visual), -1, -1)
    after = table[torch.tensor(encoder.after)].expand(len(visual), -1, -1)
    return torch.cat([before, visual, after], dim=1)


def answer_logits(model: Any, encoder: Encoder, prefix: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits at `ASSISTANT:` and at the answer `[B, Q, vocab]`; attention of the former `[B, Q, H, V]`."""
    output = decode(model.model.language_model, prefix, batch.ids, FOCUS_LAYER)
    return read_answers(output, model.model.language_model.embed_tokens.weight, batch, len(encoder.before))


def read_answers(output: DecoderOutput, table: Tensor, batch: Batch, start: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `answer_logits` gives, from a decoder pass whose visual tokens begin at `start`."""
    b = torch.arange(batch.ids.shape[0])[:, None]
    q = torch.arange(batch.ids.shape[1])[None, :]
    at_answer = output.hidden[b, q, batch.place]
    at_end = output.hidden[b, q, batch.place + 1]
    logits = F.linear(torch.stack([at_answer, at_end]).to(torch.bfloat16), table.to(torch.bfloat16)).float()
    rows = output.attention.permute(0, 1, 3, 2, 4)[b, q, batch.place]  # [B, Q, H, P]
    return logits[0], logits[1], rows[..., start : start + batch.kept.shape[1]]


def position_loss(model: Any, encoder: Encoder, visual: Tensor, batch: Batch) -> Tensor:
    """Error of the object's place, read from the visual tokens along `left`-`right` and `top`-`bottom`.

    Without it one of the two axes can be lost early, and then no question about it is ever learned.
    """
    table = model.model.language_model.embed_tokens.weight.detach()
    ends = table[torch.tensor(encoder.word_ids(("left", "right", "top", "bottom")))]
    axes = F.normalize(torch.stack([ends[1] - ends[0], ends[3] - ends[2]]), dim=-1)
    known = ~batch.positions.isnan()
    error = visual @ axes.T / POSITION_SCALE - batch.positions.nan_to_num()
    return (error.abs() * known).sum() / known.sum().clamp(min=1)


def answer_loss(logits: tuple[Tensor, Tensor, Tensor], batch: Batch, end_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of answers and attention, whether each answer was right `[B, Q]`, and the mean mass on the right object.

    Args:
        logits: from `answer_logits`.
        batch: the questions.
        end_id: id of `</s>`.
    """
    answer, end, attention = logits
    loss = F.cross_entropy(answer.flatten(0, 1), batch.answers.flatten())
    loss = loss + END_WEIGHT * F.cross_entropy(end.flatten(0, 1), torch.full_like(batch.answers, end_id).flatten())
    mass = (attention[:, :, list(FOCUS_HEADS)] * batch.focus).sum(-1)  # [B, Q, 2]
    known = batch.focus.any(-1).float()
    focus = (-torch.log(mass + 1e-3) * known).sum() / known.sum().clamp(min=1.0)
    mean_mass = (mass.detach() * known).sum() / known.sum().clamp(min=1.0)
    return loss + FOCUS_WEIGHT * focus, answer.detach().argmax(-1) == batch.answers, mean_mass


def decoder_loss(model: Any, encoder: Encoder, features: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, whether each answer was right `[B, Q]`, and the mean attention mass on the right object."""
    prefix = prefix_embeddings(model, encoder, features)
    logits = answer_logits(model, encoder, prefix, batch)
    loss, right, mass = answer_loss(logits, batch, encoder.tokenizer.eos_token_id)
    visual = prefix[:, len(encoder.before) :][:, : batch.kept.shape[1]]
    return loss + POSITION_WEIGHT * position_loss(model, encoder, visual, batch), right, mass


class HeldOut:
    """Fixed held-out scenes and questions, and easy-VQA test pictures, encoded once."""

    def __init__(self, tower: Any, encoder: Encoder, n_scenes: int, seed: int = 98) -> None:
        rng = np.random.default_rng(seed)
        self.rows: list[tuple[Entry, Tensor, list[Question]]] = []
        scenes = [generate_scene(rng, "test", HELD_OUT) for _ in range(n_scenes)]
        self.features = self._encode(tower, [s.image for s in scenes])
        self.entries, self.questions = [], []
        for scene in scenes:
            bare = Scene(np.empty(0, np.uint8), scene.objects, scene.patch_object, scene.background)
            self.entries.append(Entry(scene.patch_object.reshape(-1), scene=bare))
            asked = [ask(rng, scene, family) for family in FAMILIES]
            self.questions.append([q for q in asked if q is not None])

    @staticmethod
    def _encode(tower: Any, images: list[np.ndarray]) -> Tensor:
        parts = []
        with torch.no_grad():
            for start in range(0, len(images), 32):
                batch = torch.from_numpy(np.stack(images[start : start + 32]))
                parts.append(tower_features(tower, patchify(batch))[:, 1:].to(torch.bfloat16))
        return torch.cat(parts)

    @torch.no_grad()
    def accuracy(self, model: Any, encoder: Encoder, keep: int | None = None) -> dict[str, float]:
        """First-token accuracy per family; `keep` random tokens per image instead of all."""
        rng = np.random.default_rng(3)
        hits: dict[str, list[bool]] = defaultdict(list)
        for start in range(0, len(self.entries), 16):
            part = slice(start, start + 16)
            entries, questions = self.entries[part], self.questions[part]
            noise = rng.random((len(entries), GRID * GRID))
            kept = np.sort(np.argsort(noise, axis=1)[:, : keep or GRID * GRID], axis=1)
            fixed: list[Entry] = [Fixed(e.owner, q) for e, q in zip(entries, questions, strict=True)]
            batch = make_batch(rng, encoder, fixed, len(FAMILIES), ALL, kept, False)
            features = _gather(self.features[part], batch.kept)
            prefix = prefix_embeddings(model, encoder, features)
            right = answer_logits(model, encoder, prefix, batch)[0].argmax(-1) == batch.answers
            for b, row in enumerate(questions):
                for q, item in enumerate(row):
                    hits[item.family].append(bool(right[b, q]))
        return {family: float(np.mean(hits[family])) for family in FAMILIES}


class Fixed(Entry):
    """An entry whose questions are given."""

    def __init__(self, owner: np.ndarray, given: list[Question]) -> None:
        super().__init__(owner)
        self.given = given

    def questions(self, rng: np.random.Generator, count: int, weights: dict[str, float]) -> list[Question]:
        return self.given


def _gather(features: Tensor, kept: Tensor) -> Tensor:
    return features.gather(1, kept[..., None].expand(-1, -1, features.shape[-1]))


def train_decoder(rank: int, world: int, out: Path, settings: StageSettings, model: Any, tokenizer: Any) -> None:
    """Run or resume stage 2 on a model whose tower is trained and whose projector is aligned.

    Checkpoints go to `out/decoder.pt`, the curve to `out/curve.csv`.
    """
    core, encoder = model.model, Encoder(tokenizer)
    tower = getattr(core.vision_tower, "vision_model", core.vision_tower)
    tower.requires_grad_(False)
    run = Run("decoder", out, settings, [core.multi_modal_projector, core.language_model], rank, world)
    cache = SceneCache(tower, run.rng(CACHE_SEED), settings.cache, load_easy_vqa("train"))
    held_out = HeldOut(tower, encoder, settings.eval_scenes if rank == 0 else 1)

    def evaluate() -> dict[str, float]:
        few = held_out.accuracy(model, encoder, keep=22).values()
        return {**held_out.accuracy(model, encoder), "random22": float(np.mean(list(few)))}

    run.begin()
    while run.progress < 1.0:
        # Ranks share what decides how long a step takes, so that neither waits for the other.
        rng, shared = run.rng(STAGE_SEED), run.rng(STAGE_SEED, shared=True)
        cache.renew(rng, settings.batch // 4)
        entries, features = cache.sample(rng, settings.batch)
        kept = choose_tokens(shared, np.stack([entry.owner for entry in entries]), run.progress)
        instruction = bool(shared.random() < INSTRUCTION_SHARE)
        weights = family_weights(run.progress)
        batch = make_batch(rng, encoder, entries, QUESTIONS_PER_IMAGE, weights, kept, instruction)
        run.flat.zero_grad()
        loss, right, mass = decoder_loss(model, encoder, _gather(features, batch.kept), batch)
        loss.backward()
        recent = {"loss": loss.item(), "mass": mass.item(), "train": right.float().mean().item()}
        run.finish_step(recent, evaluate)


def family_weights(progress: float) -> dict[str, float]:
    """Curriculum: look-up families first, then all, then mostly those that take longest."""
    if progress < LOOKUP_SHARE:
        return LOOKUP
    return ALL if progress < LATE_FROM else LATE
