"""Tokenizer and processor of `tiny-llava`, built in code."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .easyvqa import load_easy_vqa
from .model import BOS_ID, VOCAB_SIZE
from .questions import ANSWERS, INSTRUCTION, draw_questions
from .scenes import IMAGE_SIZE, PATCH_SIZE, generate_scene

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlavaProcessor

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
ROLES = ("USER:", "ASSISTANT:")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}"
    "{% else %}{{ raise_exception('tiny-llava knows the roles user and assistant only') }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] if item['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for item in message['content'] if item['type'] == 'text' %}{{ item['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% else %}{{ ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def prompt(question: str, instruction: str = "") -> str:
    """The training prompt: `USER: <image>`, newline, question, optional instruction, ` ASSISTANT:`."""
    return f"USER: <image>\n{question}{instruction} ASSISTANT:"


def build_tokenizer() -> Tokenizer:
    """Byte-level BPE trained on generated questions; every answer with its leading space is one token."""
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(ROLES), special_tokens=list(SPECIAL), initial_alphabet=sorted(alphabet),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_tokens(
        [
            AddedToken(ROLES[0], rstrip=True, normalized=False),
            AddedToken(ROLES[1], lstrip=True, normalized=False),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS_ID)]
    )
    return tokenizer


def build_processor() -> LlavaProcessor:
    """Processor that expands one `<image>` into exactly 196 placeholders."""
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(),
        pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        padding_side="left", model_max_length=1024,
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    images = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )


def _corpus() -> list[str]:
    rng = np.random.default_rng(5)
    lines = [f" {word}" for word in ANSWERS for _ in range(400)]
    for _ in range(400):
        lines += [question.text for question in draw_questions(rng, generate_scene(rng), 10)]
    lines += [item.question for item in load_easy_vqa("train").questions[:4000]]
    return lines + [INSTRUCTION] * 400
