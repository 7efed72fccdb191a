"""Turn pictures and questions into token arrays for the branched decoder pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..model import PAD_ID
from ..processor import prompt
from ..questions import INSTRUCTION, Question
from .scene_cache import Entry

LOOKUP = {"shape": 1.2, "colour": 1.3, "digit": 1.4, "digit_colour": 1.0, "side": 1.1}
ALL = {**LOOKUP, "count": 1.3, "exist": 1.2, "relation": 1.7}
# Look-up is learned within minutes; later most questions are of the families that are still open.
LATE = {
    "shape": 0.6, "colour": 0.6, "digit": 1.0, "digit_colour": 0.6,
    "side": 1.8, "count": 1.6, "exist": 1.0, "relation": 2.6,
}  # fmt: skip


class Encoder:
    """Cached tokenisation of `template(question)` around the visual tokens.

    Attributes:
        before: ids before the image.
        after: ids after the image that belong to the prefix of every question.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: Callable[[str], str] = prompt,
        image_token: str = "<image>",
        n_after: int = 1,
    ) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.cache: dict[tuple[str, str], tuple[list[int], int]] = {}
        ids = tokenizer(template("what?")).input_ids
        place = ids.index(tokenizer.convert_tokens_to_ids(image_token))
        self.before, self.after = ids[:place], ids[place + 1 : place + 1 + n_after]

    def word_ids(self, words: tuple[str, ...]) -> list[int]:
        """Ids of words as they stand in a sentence (with a leading space)."""
        return [self.tokenizer(f" {word}", add_special_tokens=False).input_ids[0] for word in words]

    def branch(self, text: str, answer: str) -> tuple[list[int], int]:
        """Ids of the question up to and including `ASSISTANT:`, and the id of the answer."""
        key = (text, answer)
        if key not in self.cache:
            ids = self.tokenizer(f"{self.template(text)} {answer}").input_ids
            start = len(self.before) + 1 + len(self.after)
            self.cache[key] = (ids[start:-1], ids[-1])
        return self.cache[key]


@dataclass(frozen=True)
class Batch:
    """Arrays of one step.

    Attributes:
        kept: patch numbers `[B, V]`, ascending.
        ids: branches `[B, Q, T]`: question, answer, padding.
        place: position of `ASSISTANT:` in each branch `[B, Q]`.
        answers: answer ids `[B, Q]`.
        focus: bool `[B, Q, 2, V]`, tokens of the deciding object for two heads; all false without one.
        positions: object centre of each kept token, float32 `[B, V, 2]`, NaN on background.
        families: family name of each question.
    """

    kept: Tensor
    ids: Tensor
    place: Tensor
    answers: Tensor
    focus: Tensor
    positions: Tensor
    families: list[list[str]]


def choose_tokens(rng: np.random.Generator, owners: np.ndarray, progress: float) -> np.ndarray:
    """Patch numbers `[B, V]` of this step: all, a random subset, or objects first.

    Random subsets make the decoder degrade gently when a policy drops tokens.
    """
    total = owners.shape[1]
    late = progress > 0.8
    dice = rng.random()
    if dice < (0.4 if late else 0.15):
        return np.tile(np.arange(total), (len(owners), 1))
    if progress > 0.3 and dice < (0.7 if late else 0.4):
        count, priority = int(rng.integers(8, 150)), rng.random(owners.shape)
    else:
        count, priority = int(rng.choice((72, 96))), rng.random(owners.shape) + 2.0 * (owners >= 0)
    count = min(count, total)
    return np.sort(np.argpartition(-priority, count - 1, axis=1)[:, :count], axis=1)


def make_batch(
    rng: np.random.Generator,
    encoder: Encoder,
    entries: list[Entry],
    count: int,
    weights: dict[str, float],
    kept: np.ndarray,
    instruction: bool,
) -> Batch:
    """Draw `count` questions per picture and pack them."""
    rows: list[list[Question]] = []
    for entry in entries:
        drawn = entry.questions(rng, count, weights)
        rows.append((drawn * count)[:count])  # a scene that allows few questions repeats them
    suffix = INSTRUCTION if instruction else ""
    coded = [[encoder.branch(q.text + suffix, q.answer) for q in row] for row in rows]
    length = max(len(ids) for row in coded for ids, _ in row) + 1
    ids = np.full((len(rows), count, length), PAD_ID, dtype=np.int64)
    place = np.empty((len(rows), count), dtype=np.int64)
    answers = np.empty((len(rows), count), dtype=np.int64)
    focus = np.zeros((len(rows), count, 2, kept.shape[1]), dtype=bool)
    for b, row in enumerate(coded):
        owner = entries[b].owner[kept[b]]
        for q, (question, answer) in enumerate(row):
            n = len(question)
            ids[b, q, :n], ids[b, q, n] = question, answer
            place[b, q], answers[b, q] = n - 1, answer
            item = rows[b][q]
            if item.targets:
                focus[b, q, 0] = np.isin(owner, item.targets)
                if item.family != "count":
                    focus[b, q, 1] = np.isin(owner, item.second)
    positions = np.stack([e.positions()[k] for e, k in zip(entries, kept, strict=True)])
    families = [[q.family for q in row] for row in rows]
    kept_t, ids_t, place_t, answers_t, focus_t, positions_t = (
        torch.from_numpy(array) for array in (kept, ids, place, answers, focus, positions)
    )
    return Batch(kept_t, ids_t, place_t, answers_t, focus_t, positions_t, families)
