"""From questions and pictures to answers. Both runners go through here, so they cannot differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image

# For processors without a chat template: the form of LLaVA-1.5.
FALLBACK_PROMPT = "USER: {images}{text} ASSISTANT:"
# Processors that are told which images belong to which prompt; the others take one flat list.
NESTED_IMAGES = frozenset(
    {"Gemma3Processor", "Idefics3Processor", "LlavaOnevisionProcessor", "PaliGemmaProcessor", "SmolVLMProcessor"}
)
_GENERATION_KEYS = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "num_beams")


def user_message(text: str, n_images: int) -> list[dict[str, Any]]:
    """A conversation of one user turn: the images, then the text."""
    content: list[dict[str, Any]] = [{"type": "image"} for _ in range(n_images)]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def render_prompt(processor: Any, messages: Sequence[Mapping[str, Any]]) -> str:
    """The prompt of a conversation by the processor's chat template."""
    if getattr(processor, "chat_template", None):
        return processor.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    token = getattr(processor, "image_token", "<image>")
    content = [item for message in messages for item in message["content"]]
    n_images = sum(item["type"] == "image" for item in content)
    text = "".join(item["text"] for item in content if item["type"] == "text")
    return FALLBACK_PROMPT.format(images=f"{getattr(token, 'content', token)}\n" * n_images, text=text)


def encode(model: Any, processor: Any, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> Any:
    """Left-padded model inputs on the model's device, floating values in its dtype.

    Args:
        model, processor: a vision-language model and its processor.
        prompts: rendered prompts. images: pictures of each prompt, in the order of its placeholders.
    """
    flat: list[Any] = [image for row in images for image in row]
    given = [list(row) for row in images] if flat and type(processor).__name__ in NESTED_IMAGES else flat
    with _left_padding(processor.tokenizer):
        batch = processor(text=list(prompts), images=given or None, return_tensors="pt", padding=True)
    return batch.to(model.device, dtype=model.dtype)


def answer_batch(
    model: Any,
    processor: Any,
    prompts: Sequence[str],
    images: Sequence[Sequence[Image.Image]],
    generation: Mapping[str, Any],
) -> tuple[list[str], list[int], Any]:
    """Generate answers with the stock `model.generate`.

    Args:
        generation: the task's generation arguments; greedy unless `do_sample` is true.

    Returns:
        Decoded new tokens per prompt, number of new tokens per prompt (padding left out), and the model
        inputs.
    """
    inputs = encode(model, processor, prompts, images)
    options = generation_options(processor, generation)
    with torch.inference_mode():
        output = model.generate(**inputs, **options)
    new = output[:, inputs["input_ids"].shape[1] :]
    texts = processor.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    pad = options.get("pad_token_id")
    counts = (new != pad).sum(1).tolist() if pad is not None else [new.shape[1]] * len(texts)
    return [text.strip() for text in texts], counts, inputs


def generation_options(processor: Any, generation: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for `model.generate`: those it knows, without sampling settings where it does not sample."""
    options = {name: generation[name] for name in _GENERATION_KEYS if generation.get(name) is not None}
    sample = bool(options.get("do_sample")) and options.get("temperature", 1.0) != 0
    if not sample:
        for name in ("temperature", "top_p", "top_k"):
            options.pop(name, None)
    tokenizer = processor.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return {**options, "do_sample": sample} | ({} if pad is None else {"pad_token_id": pad})


def image_token_id(model: Any) -> int | None:
    """Id of the placeholder of a visual token in `input_ids`, or None where the config names none."""
    for name in ("image_token_id", "image_token_index"):
        value = getattr(model.config, name, None)
        if value is not None:
            return int(value)
    return None


def count_image_tokens(model: Any, inputs: Mapping[str, torch.Tensor]) -> list[int | None]:
    """Visual tokens per row of the batch, None where the config names no placeholder."""
    ids, token = inputs["input_ids"], image_token_id(model)
    return [None] * ids.shape[0] if token is None else (ids == token).sum(1).tolist()


@contextmanager
def _left_padding(tokenizer: Any) -> Iterator[None]:
    """Pad on the left, with the end token where there is no padding token; settings are restored."""
    side, pad = tokenizer.padding_side, tokenizer.pad_token
    tokenizer.padding_side = "left"
    if pad is None:
        tokenizer.pad_token = tokenizer.eos_token
    try:
        yield
    finally:
        tokenizer.padding_side = side
        if pad is None:
            tokenizer.pad_token = None
