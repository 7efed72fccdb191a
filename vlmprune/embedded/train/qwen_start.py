"""Between the stages: give `tiny-qwen` tiny-llava's decoder, and fit a first layer that writes positions.

Rotary positions in two dimensions tell the decoder where a visual token is only through attention. The first
layer turns them into the left-right and top-bottom parts of tiny-llava's features: two of its heads weigh the
tokens before the image against each other by their distance in width and in height.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import load_embedded
from ..fastdecoder import Layout, decoder_layer
from ..qwen_fast import mrope_tables, prompt_positions
from ..qwen_model import (
    HEADS,
    MROPE_SECTION,
    THETA,
    VISION_END_ID,
    VISION_START_ID,
    WIDTH,
    build_model,
)
from ..scenes import GRID, generate_scene
from .common import FlatParameters, load_checkpoint, logger, save_checkpoint
from .qwen_teacher import USUAL, make_teacher, patch_centres

START_SEED = 54
BEFORE, AFTER = 3, 2  # <s> USER: <|vision_start|> image <|vision_end|> newline
TURNS = (4, 5)  # rotary pairs with frequency .1 and .056: the last of height and the first of width
BASE_PAIR = 15  # the slowest pair, whose turn is negligible
HEIGHTS, WIDTHS = (8, 21), (8, 21)


def transplant(model: Any) -> None:
    """Copy tiny-llava's decoder into the layers after the first; the new words start as copies of old ones."""
    source, processor = load_embedded("tiny-llava")
    old, new = source.model.language_model, model.model.language_model
    ids = processor.tokenizer("USER: <image>\n")["input_ids"]
    with torch.no_grad():
        new.embed_tokens.weight.copy_(old.embed_tokens.weight)
        new.embed_tokens.weight[VISION_START_ID] = old.embed_tokens.weight[ids[1]]
        new.embed_tokens.weight[VISION_END_ID] = old.embed_tokens.weight[ids[-1]]
        new.norm.weight.copy_(old.norm.weight)
        for target, layer in zip(new.layers[1:], old.layers, strict=True):
            target.load_state_dict(layer.state_dict(), strict=False)  # Llama has no biases: they stay 0


def start_positions(layer: Any, sinks: Tensor, place: Tensor, gate: Tensor) -> None:
    """Starting weights of the first layer.

    Args:
        layer: first decoder layer.
        sinks: normalised embeddings of `<s>` and `USER:` `[2, C]`; a head weighs one against the other.
        place: change of a feature from the middle to the right and to the bottom edge `[2, C]`.
        gate: direction that is positive on visual tokens and negative on words, `[C]`.
    """
    attention, head_dim = layer.self_attn, WIDTH // HEADS
    solve = torch.linalg.pinv(sinks)  # [C, 2]: directions that are 1 on one of the sinks and 0 on the other
    with torch.no_grad():
        for module in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            module.weight.mul_(0.1)
        layer.mlp.down_proj.weight.zero_()
        for head, pair in enumerate(TURNS):
            first = head * head_dim
            turn, base = first + pair, first + BASE_PAIR
            middle = torch.tensor((BEFORE + (GRID - 1) / 2) * THETA ** (-pair / (head_dim / 2)))
            # Score of `<s>`: base + 3.5 sin(frequency * (position - middle)); of `USER:`: base.
            # Rotary halves: component `turn` is the cosine part, `turn + 16` the sine part.
            attention.q_proj.bias[turn] = -middle.sin() * 4.5
            attention.q_proj.bias[turn + head_dim // 2] = middle.cos() * 4.5
            attention.k_proj.weight[turn + head_dim // 2] = 0
            attention.k_proj.weight[turn] = 0
            attention.k_proj.weight[turn + head_dim // 2] += -4.5 * solve[:, 0]
            attention.q_proj.weight[base] = 8.0 * gate
            attention.k_proj.weight[base] = 8.0 * solve.sum(1)
            attention.v_proj.weight[first] = solve[:, 0] - solve[:, 1]
            attention.o_proj.weight[:, first] = 1.3 * place[1 - head]


class PositionData:
    """Random prompts with teacher features: what goes in and what the first layer should add."""

    def __init__(self, model: Any, features: Tensor, place: Tensor, question_ids: Tensor) -> None:
        self.table = model.model.language_model.embed_tokens.weight.detach()
        self.features, self.place, self.question_ids = features, place, question_ids

    def draw(self, rng: np.random.Generator, ids: Tensor, batch: int = 8) -> tuple[Tensor, Layout, Tensor]:
        """Input `[B, T, C]`, layout and wanted change `[B, T, C]`; grids of many sizes, many tokens dropped."""
        rows, columns = int(rng.integers(*HEIGHTS)), int(rng.integers(*WIDTHS))
        if rng.random() < 0.4:
            rows = columns = GRID
        n = int(rng.integers(8, min(rows * columns, 150) + 1))
        kept = torch.from_numpy(np.sort(np.argsort(rng.random((batch, rows * columns)), axis=1)[:, :n], axis=1))
        visual = self.features[torch.from_numpy(rng.integers(0, len(self.features), size=(batch, n)))]
        words = self.question_ids[torch.from_numpy(rng.integers(0, len(self.question_ids), size=(batch, 12)))]
        x = torch.cat([
            self.table[ids[:BEFORE]].expand(batch, -1, -1), visual, self.table[ids[BEFORE:]].expand(batch, -1, -1),
            self.table[words],
        ], dim=1)  # fmt: skip
        positions = prompt_positions(kept, (rows, columns), BEFORE, AFTER, (1, 12))
        tables = mrope_tables(positions, WIDTH // HEADS, MROPE_SECTION, THETA, torch.float32)
        own = torch.stack([kept % columns, kept // columns], dim=-1).float().add(0.5) / (GRID / 2) - 1
        target = torch.zeros_like(x)
        target[:, BEFORE : BEFORE + n] = own @ self.place
        return x, Layout(*tables, BEFORE + n + AFTER, 1, 12), target


def separating_direction(words: Tensor, visual: Tensor, steps: int = 400) -> Tensor:
    """Direction whose product with normalised rows is above 1 on visual tokens and below -1 on words."""
    direction = torch.zeros(words.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([direction], lr=0.02)
    for _ in range(steps):
        loss = (1 - visual @ direction).relu().square().mean() + (1 + words @ direction).relu().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return direction.detach()


def normalise(x: Tensor) -> Tensor:
    """Rows at rms 1, as a norm with unit weights makes them."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


def fit_positions(model: Any, out: Path, prompt_ids: Tensor, vocabulary: int, steps: int, seed: int = 0) -> None:
    """Train the first layer alone to add each visual token's place and to leave words as they are.

    Args:
        model: after `transplant`.
        out: folder with `teacher.pt`.
        prompt_ids: ids of `<s> USER: <|vision_start|> <|vision_end|> newline`.
        vocabulary: number of ids in use.
        steps: steps of Adam.
        seed: seed of scenes and draws.
    """
    teacher, rng = make_teacher(out / "teacher.pt", seed), np.random.default_rng([seed, START_SEED])
    scenes = [generate_scene(rng, "train", USUAL) for _ in range(128)]
    parts = []
    for start in range(0, len(scenes), 32):
        part = scenes[start : start + 32]
        centres = torch.from_numpy(np.stack([patch_centres(s) for s in part]))
        parts.append(teacher.targets(np.stack([s.image for s in part]), centres).flatten(0, 1))
    features = torch.cat(parts)
    decoder = model.model.language_model
    words = torch.tensor([i for i in range(vocabulary) if i not in prompt_ids[:BEFORE].tolist()])
    data = PositionData(model, features, teacher.place, words)
    normal = normalise(data.table)
    gate = separating_direction(normal[words], normalise(features))
    layer = decoder.layers[0]
    start_positions(layer, normal[prompt_ids[:2]], teacher.place, gate)
    parameters = list(layer.parameters())
    optimizer = torch.optim.Adam(parameters, lr=2e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps) + 2e-5
        x, layout, target = data.draw(rng, prompt_ids)
        error = (decoder_layer(layer, x, layout, HEADS, torch.float32)[0] - x - target).square().mean(-1)
        loss = error[:, BEFORE : layout.n_prefix - AFTER].mean() + error[:, layout.n_prefix - AFTER :].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 100 == 0:
            visual = error[:, BEFORE : layout.n_prefix - AFTER].mean()
            logger.info("positions step %d visual %.4f words %.4f", step, visual.item(), (loss - visual).item())


def load_tokenizer() -> Any:
    """The tokenizer of `tiny-qwen`, made from tiny-llava's."""
    from transformers import PreTrainedTokenizerFast

    from .. import model_path
    from ..qwen_processor import build_qwen_tokenizer

    backend = build_qwen_tokenizer(model_path("tiny-llava") / "tokenizer.json")
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **names)


def prompt_ids(tokenizer: Any) -> Tensor:
    """Ids of `<s> USER: <|vision_start|>`, then of `<|vision_end|>` and the newline."""
    from ..qwen_processor import qwen_prompt

    ids = tokenizer(qwen_prompt("what?"))["input_ids"]
    place = ids.index(VISION_END_ID)
    return torch.tensor([*ids[:BEFORE], *ids[place : place + AFTER]])


def start_decoder(out: Path, tokenizer: Any, steps: int = 800, seed: int = 0) -> Any:
    """Make the starting point of stage `qwen-decoder`, tower left untrained; state goes to `out/qwen_start.pt`."""
    model = build_model(seed)
    transplant(model)
    fit_positions(model, out, prompt_ids(tokenizer), len(tokenizer), steps, seed)
    model.tie_weights()
    save_checkpoint(out / "qwen_start.pt", model.state_dict())
    return model


def load_start(out: Path, seed: int = 0) -> Any:
    """The model that `start_decoder` left in `out`, with the averaged tower of stage `qwen-tower`.

    Raises:
        FileNotFoundError: one of the two checkpoints is missing.
    """
    tower, start = load_checkpoint(out / "qwen_tower.pt"), load_checkpoint(out / "qwen_start.pt")
    if tower is None or start is None:
        raise FileNotFoundError(f"{out} needs qwen_tower.pt and qwen_start.pt; run the stages before this one first")
    model = build_model(seed)
    model.load_state_dict(start)
    flat = FlatParameters([model.model.visual], 0.0)
    flat.values.copy_(tower["average"])
    for parameter in model.model.visual.parameters():
        parameter.grad = None
    return model
