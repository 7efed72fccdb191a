"""Accuracy of `tiny-qwen` at several resolutions, measured with stock transformers only.

    python -m vlmprune.embedded.qwen_check --write

Shares no code with training. Answers come from `generate`; *text only* is the same question in a prompt without
an image. `--write` puts the JSON object beside the weights, where the model card takes it from.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .easyvqa import load_easy_vqa
from .tasks import scene_questions

logger = logging.getLogger("vlmprune.embedded.qwen_check")
SIZES = ((160, 160), (224, 224), (320, 320), (160, 256))


class Answerer:
    """The stock model and processor of a folder."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(path)

    @torch.no_grad()
    def answers(self, questions: list[str], images: list[Image.Image] | None, batch: int = 16) -> list[str]:
        """Greedy answers, stripped and lower-case; `images` None asks without any."""
        words: list[str] = []
        for start in range(0, len(questions), batch):
            part = slice(start, start + batch)
            pictures = {} if images is None else {"images": images[part]}
            texts = [self._text(question, images is not None) for question in questions[part]]
            inputs = self.processor(text=texts, padding=True, return_tensors="pt", **pictures)
            out = self.model.generate(**inputs, max_new_tokens=3, do_sample=False)
            new = out[:, inputs["input_ids"].shape[1] :]
            words += [w.strip().lower() for w in self.processor.batch_decode(new, skip_special_tokens=True)]
        return words

    def _text(self, question: str, pictured: bool) -> str:
        content = [{"type": "image"}] * pictured + [{"type": "text", "text": question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def scene_counts(answerer: Answerer, size: tuple[int, int], n: int, seed: int) -> dict[str, dict[str, int]]:
    """Per family: questions, right answers, right answers without the image."""
    rows = scene_questions(seed, n, size=size)
    questions = [row.question for row in rows]
    seen = answerer.answers(questions, [row.image for row in rows])
    blind = answerer.answers(questions, None)
    table: dict[str, dict[str, int]] = defaultdict(lambda: {"n": 0, "right": 0, "right_text_only": 0})
    for row, word, guess in zip(rows, seen, blind, strict=True):
        for family in (row.family, "all"):
            table[family]["n"] += 1
            table[family]["right"] += word == row.answer
            table[family]["right_text_only"] += guess == row.answer
    return dict(table)


def easy_counts(answerer: Answerer, limit: int) -> dict[str, dict[str, int]]:
    """The first `limit` questions of the easy-VQA test split, which the processor enlarges to 160 x 160."""
    data = load_easy_vqa("test")
    rows = data.questions[:limit]
    seen = answerer.answers([row.question for row in rows], [data.image(row.image_id) for row in rows])
    blind = answerer.answers([row.question for row in rows], None)
    right = sum(word == row.answer for word, row in zip(seen, rows, strict=True))
    guessed = sum(word == row.answer for word, row in zip(blind, rows, strict=True))
    return {"all": {"n": len(rows), "right": right, "right_text_only": guessed}}


def main() -> None:
    folder = Path(__file__).parent / "assets" / "tiny-qwen"
    parser = argparse.ArgumentParser(description="Accuracy of tiny-qwen through stock transformers.")
    parser.add_argument("--path", type=Path, default=folder)
    parser.add_argument("--questions", type=int, default=400, help="held-out scene questions per resolution")
    parser.add_argument("--easy", type=int, default=1000, help="easy-VQA test questions; 0 for none")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write check.json into the folder of the model")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    answerer = Answerer(args.path)
    result: dict[str, Any] = {"seed": args.seed, "scenes": {}}
    for size in SIZES:
        result["scenes"][f"{size[0]} x {size[1]}"] = scene_counts(answerer, size, args.questions, args.seed)
        logger.info("%s done", size)
    if args.easy:
        result["easy_vqa_test"] = easy_counts(answerer, args.easy)
    text = json.dumps(result, indent=2) + "\n"
    if args.write:
        (args.path / "check.json").write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
