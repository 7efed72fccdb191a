"""Sizes of images and the visual tokens that they make on dynamic-resolution models (Qwen2-VL and later)."""

from __future__ import annotations

import math

from vlmprune.core.errors import InputError

MAX_ASPECT = 200


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size to which the model's processor brings an image.

    Both sides become multiples of ``factor``, the area stays within the limits, the aspect ratio nearly the
    same.

    Args:
        height, width: pixels of the image.
        factor: patch size times merge size (28 on Qwen2-VL).
        min_pixels, max_pixels: limits of the area.

    Returns:
        (height, width) in pixels.

    Raises:
        InputError: an empty image, or one side is more than 200 times the other.
    """
    if min(height, width) < 1:
        raise InputError(f"An image of {width} x {height} pixels is empty.")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise InputError(f"An image of {width} x {height} pixels is too long: sides may differ {MAX_ASPECT}-fold.")
    sides = (height, width)
    area = height * width
    nearest = [factor * round(side / factor) for side in sides]
    if math.prod(nearest) > max_pixels:
        shrink = math.sqrt(area / max_pixels)
        nearest = [max(factor, factor * math.floor(side / shrink / factor)) for side in sides]
    elif math.prod(nearest) < min_pixels:
        grow = math.sqrt(min_pixels / area)
        nearest = [factor * math.ceil(side * grow / factor) for side in sides]
    return nearest[0], nearest[1]


def visual_tokens(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> int:
    """LLM tokens that an image of ``height`` x ``width`` pixels makes: one per ``factor`` x ``factor``
    square."""
    rows, columns = smart_resize(height, width, factor, min_pixels, max_pixels)
    return (rows // factor) * (columns // factor)
