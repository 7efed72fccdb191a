"""Tokenizer and processor files of `tiny-qwen`: tiny-llava's words, Qwen's vision tokens and dynamic sizes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from .processor import CHAT_TEMPLATE
from .qwen_model import IMAGE_ID, VIDEO_ID, VISION_END_ID, VISION_START_ID

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer

VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_TOKEN, VIDEO_TOKEN = "<|image_pad|>", "<|video_pad|>"
PLACEHOLDER = f"{VISION_START}{IMAGE_TOKEN}{VISION_END}"
QWEN_CHAT_TEMPLATE = CHAT_TEMPLATE.replace("<image>", PLACEHOLDER).replace("tiny-llava", "tiny-qwen")


def qwen_prompt(question: str, instruction: str = "") -> str:
    """The training prompt: `USER: `, image between vision tokens, newline, question, ` ASSISTANT:`."""
    return f"USER: {PLACEHOLDER}\n{question}{instruction} ASSISTANT:"


def build_qwen_tokenizer(source: Path) -> Tokenizer:
    """tiny-llava's tokenizer with its image token renamed and three vision tokens added.

    Args:
        source: `tokenizer.json` of tiny-llava.
    """
    from tokenizers import AddedToken, Tokenizer

    data = json.loads(source.read_text())
    for entry in data["added_tokens"]:
        if entry["id"] == IMAGE_ID:
            entry["content"] = IMAGE_TOKEN
    vocabulary = data["model"]["vocab"]
    vocabulary[IMAGE_TOKEN] = vocabulary.pop("<image>")
    tokenizer = Tokenizer.from_str(json.dumps(data))
    names = {VISION_START: VISION_START_ID, VISION_END: VISION_END_ID, VIDEO_TOKEN: VIDEO_ID}
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    assert all(tokenizer.token_to_id(name) == number for name, number in names.items())
    return tokenizer
