"""Accuracy of an embedded LLaVA, measured with stock transformers only.

    python -m vlmprune.embedded.check --questions 480 --easy 9673

Shares no code with training. Dense answers come from `generate`; three plain token selections before the
decoder (random, CLS attention, k-center) show whether the task separates policies. Writes one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .easyvqa import load_easy_vqa
from .tasks import SceneQuestion, scene_questions

logger = logging.getLogger("vlmprune.embedded.check")


class Answerer:
    """A stock model and processor that answer questions, with all or with chosen visual tokens."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        self.model = LlavaForConditionalGeneration.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.processor = AutoProcessor.from_pretrained(path)

    def text(self, question: str) -> str:
        """The prompt that the chat template makes."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        message = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(message, add_generation_prompt=True)

    @torch.no_grad()
    def generate(self, images: list[Image.Image], questions: list[str], batch: int = 32) -> list[str]:
        """Greedy answers by stock `generate`, stripped and lower-case."""
        answers: list[str] = []
        for start in range(0, len(questions), batch):
            part = slice(start, start + batch)
            prompts = [self.text(q) for q in questions[part]]
            inputs = self.processor(text=prompts, images=images[part], padding=True, return_tensors="pt")
            out = self.model.generate(**inputs, max_new_tokens=4, do_sample=False)
            new = out[:, inputs["input_ids"].shape[1] :]
            answers += [a.strip().lower() for a in self.processor.batch_decode(new, skip_special_tokens=True)]
        return answers

    @torch.no_grad()
    def encode(self, images: list[Image.Image]) -> tuple[Tensor, Tensor]:
        """Projected tokens `[I, 196, C]` and CLS attention of the feature block `[I, 196]`."""
        pixels = self.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
        core = self.model.model
        out = core.vision_tower(pixels, output_hidden_states=True, output_attentions=True)
        layer = self.model.config.vision_feature_layer
        tokens = core.multi_modal_projector(out.hidden_states[layer][:, 1:])
        return tokens, out.attentions[layer][:, :, 0, 1:].mean(1)

    @torch.no_grad()
    def first_words(self, tokens: Tensor, questions: list[str]) -> list[str]:
        """Greedy first token for questions about one image whose visual tokens are `[V, C]`."""
        core, tokenizer = self.model.model, self.processor.tokenizer
        table = core.language_model.embed_tokens.weight
        rows = []
        for question in questions:
            ids = torch.tensor(tokenizer(self.text(question))["input_ids"])
            place = int((ids == self.model.config.image_token_index).nonzero()[0])
            rows.append(torch.cat([table[ids[:place]], tokens, table[ids[place + 1 :]]]))
        length = max(len(row) for row in rows)
        embeds = torch.stack([F.pad(row, (0, 0, length - len(row), 0)) for row in rows])
        mask = torch.stack([F.pad(torch.ones(len(row), dtype=torch.long), (length - len(row), 0)) for row in rows])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        hidden = core.language_model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions)[0][:, -1]
        return [tokenizer.decode([i]).strip().lower() for i in self.model.lm_head(hidden).argmax(-1).tolist()]


def select(name: str, tokens: Tensor, cls: Tensor, keep: int, seed: int) -> Tensor:
    """Ascending indices `[keep]` of kept visual tokens of one image `[N, C]`, `[N]`."""
    if name == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(len(tokens), generator=generator)[:keep].sort().values
    if name == "cls":
        return cls.topk(keep).indices.sort().values
    unit = F.normalize(tokens, dim=-1)
    chosen = [int(cls.argmax())]
    nearest = unit @ unit[chosen[0]]
    while len(chosen) < keep:  # k-center: add the token that is least like any chosen one
        chosen.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, unit @ unit[chosen[-1]])
    return torch.tensor(sorted(chosen))


def scene_accuracy(answerer: Answerer, rows: list[SceneQuestion], budgets: tuple[int, ...]) -> dict[str, Any]:
    """Dense accuracy by `generate` and accuracy per selection and budget, each per family and overall."""
    words = answerer.generate([r.image for r in rows], [r.question for r in rows])
    result = {"dense": _by_family(rows, [w == r.answer for w, r in zip(words, rows, strict=True)])}
    groups: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        groups[row.image_id].append(number)
    hits: dict[str, list[bool]] = defaultdict(lambda: [False] * len(rows))
    for image_number, members in enumerate(groups.values()):
        tokens, cls = (t[0] for t in answerer.encode([rows[members[0]].image]))
        plans = {"all tokens": torch.arange(len(tokens)), "no tokens": torch.arange(0)}
        for name in ("random", "cls", "k-center"):
            plans |= {f"{name} {k}": select(name, tokens, cls, k, image_number) for k in budgets}
        for name, kept in plans.items():
            answers = answerer.first_words(tokens[kept], [rows[i].question for i in members])
            for i, word in zip(members, answers, strict=True):
                hits[name][i] = word == rows[i].answer
    return result | {name: _by_family(rows, right) for name, right in hits.items()}


def _by_family(rows: list[SceneQuestion], right: list[bool]) -> dict[str, float]:
    table: dict[str, list[bool]] = defaultdict(list)
    for row, ok in zip(rows, right, strict=True):
        table[row.family].append(ok)
    table["all"] = list(right)
    return {family: round(float(np.mean(oks)), 4) for family, oks in table.items()}


def easy_accuracy(answerer: Answerer, limit: int, confirm: int = 200) -> dict[str, float]:
    """Accuracy on easy-VQA test questions, each image encoded once; `confirm` of them by `generate`."""
    data = load_easy_vqa("test")
    questions = data.questions[:limit]
    by_image: dict[int, list[int]] = defaultdict(list)
    for number, item in enumerate(questions):
        by_image[item.image_id].append(number)
    words = [""] * len(questions)
    for image_id, members in by_image.items():
        tokens, _ = answerer.encode([data.image(image_id)])
        answers = answerer.first_words(tokens[0], [questions[i].question for i in members])
        for i, word in zip(members, answers, strict=True):
            words[i] = word
    picks = np.random.default_rng(0).choice(len(questions), size=min(confirm, len(questions)), replace=False).tolist()
    stock = answerer.generate(
        [data.image(questions[i].image_id) for i in picks], [questions[i].question for i in picks]
    )
    agree = np.mean([words[i] == word for i, word in zip(picks, stock, strict=True)])
    return {
        "n": len(questions),
        "accuracy": round(float(np.mean([w == q.answer for w, q in zip(words, questions, strict=True)])), 4),
        "confirmed_by_generate": len(picks),
        "agreement": round(float(agree), 4),
        "accuracy_generate": round(
            float(np.mean([questions[i].answer == w for i, w in zip(picks, stock, strict=True)])), 4
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy of tiny-llava through stock transformers.")
    parser.add_argument("--path", type=Path, default=Path(__file__).parent / "assets" / "tiny-llava")
    parser.add_argument("--questions", type=int, default=480, help="held-out scene questions")
    parser.add_argument("--easy", type=int, default=9673, help="easy-VQA test questions; 0 for none")
    parser.add_argument("--budgets", type=int, nargs="*", default=[98, 43, 22, 10], help="kept visual tokens")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    answerer = Answerer(args.path)
    rows = scene_questions(args.seed, args.questions)
    result: dict[str, Any] = {"scenes": scene_accuracy(answerer, rows, tuple(args.budgets))}
    if args.easy:
        result["easy_vqa_test"] = easy_accuracy(answerer, args.easy)
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
