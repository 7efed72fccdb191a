"""How the processors of all families write prompts.

Everything here is computed from the sizes of images and from what the processors are documented to do; nothing asks a
model or an adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import llava_parts
import qwen_parts
import tiled_parts
from prompt_parts import Draw, Part, Size, cat
from torch import Tensor


@dataclass(frozen=True)
class Style:
    """How a family writes prompts.

    Attributes:
        image: makes an image from its size; ``alone`` says whether it is its row's only image.
        sizes: sizes of images that are used where a test gives none, in turn.
        video: makes a video, where the family takes some.
        collate: joins the tensors of all rows.
        type_ids: name of the input that holds the kinds of the tokens, where there is one.
        images_first: True if images stand before bos.
    """

    image: Callable[[Draw, Size, bool], Part]
    sizes: tuple[Size, ...]
    video: Callable[[Draw, Size], Part] | None = None
    collate: Callable[[list[list[Part]]], dict[str, Tensor]] = cat
    type_ids: str | None = None
    images_first: bool = False


NEXT_SIZES = ((30, 70), (60, 40), (20, 44), (24, 24))
IDEFICS_SIZES = ((24, 48), (24, 16), (48, 24), (16, 20))
QWEN_SIZES = ((32, 40), (24, 40), (40, 24), (16, 48))
STYLES = {
    "llava": Style(llava_parts.llava_image, ((24, 24),)),
    "llava_next": Style(llava_parts.next_image, NEXT_SIZES, collate=llava_parts.collate),
    "llava_onevision": Style(
        llava_parts.onevision_image, NEXT_SIZES, llava_parts.onevision_video, collate=llava_parts.onevision_collate
    ),
    "qwen2_vl": Style(qwen_parts.image, QWEN_SIZES, qwen_parts.video, type_ids="mm_token_type_ids"),
    "qwen2_5_vl": Style(qwen_parts.image, QWEN_SIZES, qwen_parts.video_2_5, type_ids="mm_token_type_ids"),
    "qwen3_vl": Style(qwen_parts.image, QWEN_SIZES, qwen_parts.video_3, type_ids="mm_token_type_ids"),
    "internvl": Style(tiled_parts.internvl_image, ((24, 48), (24, 24), (48, 24), (24, 72))),
    "idefics3": Style(tiled_parts.idefics_image, IDEFICS_SIZES, collate=tiled_parts.idefics_collate),
    "smolvlm": Style(tiled_parts.idefics_image, IDEFICS_SIZES, collate=tiled_parts.idefics_collate),
    "paligemma": Style(tiled_parts.paligemma_image, ((32, 32),), type_ids="token_type_ids", images_first=True),
    "gemma3": Style(tiled_parts.gemma3_image, ((32, 32),), type_ids="token_type_ids"),
}
