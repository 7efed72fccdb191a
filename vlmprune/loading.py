"""Models and images from what a user types: names, paths and hub ids."""

from __future__ import annotations

import difflib
import os
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps, UnidentifiedImageError

from vlmprune.core.errors import InputError

if TYPE_CHECKING:
    import torch

TIMM = "timm:"
"""What stands before the name of a timm model."""
Prepare = Callable[[Sequence[Image.Image]], dict[str, Any]]
"""Turns pictures into what the model's vision tower takes."""
MAX_PIXELS = 80_000_000
MAX_ASPECT = 100  # resizing the short edge of a longer strip would need memory without bound


def load_model(
    name: str, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> tuple[Any, Any]:
    """Load a vision-language model in eval mode.

    Args:
        name: an embedded model (``tiny-llava``, ``tiny-qwen``), a local folder, or a hub id.
        dtype: dtype of the weights; None keeps the checkpoint's.
        device: where to put the model; None leaves it on the CPU.

    Returns:
        ``(model, processor)``.

    Raises:
        InputError: nothing of this name can be loaded, or it is no image-text model.
    """
    from vlmprune.embedded import embedded_models, is_classifier, load_embedded

    if not name.strip():
        raise InputError(f"The model name is empty; give {embedded_models()[0]}, a folder, or a hub id.")
    folder = Path(name).expanduser()
    if name in embedded_models() and not folder.is_dir():
        if is_classifier(name):
            raise InputError(
                f"{name} classifies images and writes no text; give a vision-language model such as "
                f"{embedded_models()[0]}, or use it in Python: vlmprune.load_embedded({name!r})."
            )
        model, processor = load_embedded(name)
        model = model if dtype is None else model.to(_torch_dtype(dtype))
    else:
        if _is_path(name) and not folder.is_dir():
            raise InputError(f"Model folder {name!r} does not exist.")
        # Without this check transformers guesses a model type from the folder's name.
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise InputError(f"Model folder {name!r} holds no config.json, so it is no saved model.")
        model, processor = _from_pretrained(str(folder) if folder.is_dir() else name, dtype)
    return (model if device is None else model.to(device)).eval(), processor


def load_image_model(
    name: str, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> tuple[Any, Prepare]:
    """Load a model that takes pictures, whether or not it writes text, in eval mode.

    Args:
        name: ``tiny-vit``, ``timm:NAME`` (``timm:local-dir:FOLDER`` for a saved one), or see :func:`load_model`.
        dtype, device: see :func:`load_model`.

    Returns:
        ``(model, prepare)``; ``prepare(pictures)`` gives the inputs of its tower.

    Raises:
        InputError: nothing of this name can be loaded.
    """
    from vlmprune.embedded import is_classifier, load_embedded

    if name.startswith(TIMM):
        model, transform = _from_timm(name.removeprefix(TIMM))
    elif is_classifier(name):
        model, transform = load_embedded(name)
    else:
        model, processor = load_model(name, dtype, device)
        return model, partial(_processed, getattr(processor, "image_processor", processor))
    if dtype is not None:
        model = model.to(_torch_dtype(dtype))
    return (model if device is None else model.to(device)).eval(), partial(_transformed, transform)


def _processed(image_processor: Any, pictures: Sequence[Image.Image]) -> dict[str, Any]:
    return dict(image_processor(images=list(pictures), return_tensors="pt"))


def _transformed(transform: Callable[[Image.Image], Any], pictures: Sequence[Image.Image]) -> dict[str, Any]:
    import torch

    made = [transform(picture) for picture in pictures]
    return {"pixel_values": torch.stack([pixels.reshape(pixels.shape[-3:]) for pixels in made])}


def _from_timm(name: str) -> tuple[Any, Callable[[Image.Image], Any]]:
    """A timm model with its weights, and the transform of its configuration."""
    try:
        import timm
    except ImportError:
        raise InputError("timm is not installed; pip install 'vlmprune[vit]'.") from None
    try:
        model = timm.create_model(name, pretrained=True)
        return model, timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    except MemoryError:
        raise
    except Exception as error:  # missing, damaged or unsuited files make timm raise almost anything
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=1, cutoff=0.6)
        hint = f" Did you mean {TIMM + near[0]!r}?" if near and near[0] != name else ""
        raise InputError(f"timm cannot load {name!r}: {first_line(error)}{hint}") from error


def open_image(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS, label: str | None = None) -> Image.Image:
    """Read a picture as RGB, turned upright by its EXIF tag.

    Args:
        path: image file.
        max_pixels: larger pictures are refused before they are decoded.
        label: what errors call the picture; None names the path.

    Raises:
        InputError: the file is missing, no image, damaged, too large, or more than 100 times as long as wide.
    """
    path = Path(path)
    label = label or f"Image {str(path)!r}"
    if not path.is_file():
        raise InputError(f"{label} is not a file." if path.exists() else f"{label} does not exist.")
    try:
        with Image.open(path) as image:
            _check_size(image, label, max_pixels)
            return ImageOps.exif_transpose(image).convert("RGB")
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"{label} cannot be read: it is no image, or of an unknown format.") from None
    except Exception as error:  # on damaged files decoders raise almost anything
        raise InputError(f"{label} cannot be read: {first_line(error)}") from error


def _check_size(image: Image.Image, label: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise InputError(f"{label} has {width} x {height} pixels, more than {max_pixels}; make it smaller.")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InputError(f"{label} is a strip of {width} x {height} pixels; crop it.")


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something, shortened, or its type's name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return textwrap.shorten(lines[0], 250, placeholder=" ...") if lines else type(error).__name__


def _is_path(name: str) -> bool:
    """True if ``name`` can only be meant as a path: a hub id is ``name`` or ``owner/name``."""
    return name.startswith((".", "~", os.sep)) or name.endswith(("/", os.sep)) or name.count("/") > 1


def _torch_dtype(dtype: torch.dtype | str) -> torch.dtype:
    import torch

    if isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise InputError(f"Unknown dtype {dtype!r}; give float32, bfloat16 or float16.")
    return found


def _from_pretrained(name: str, dtype: torch.dtype | str | None) -> tuple[Any, Any]:
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    options = {} if dtype is None else {"dtype": _torch_dtype(dtype)}
    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            raise InputError(
                f"{name!r} is a {config.model_type!r} model, not one that takes images and writes text; "
                "give a vision-language model such as tiny-llava or llava-hf/llava-1.5-7b-hf."
            )
        model = AutoModelForImageTextToText.from_pretrained(name, **options)
        processor = AutoProcessor.from_pretrained(name)
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # missing, damaged or unsuited files make transformers raise almost anything
        raise InputError(_load_failure(name, error)) from error
    if not hasattr(processor, "image_processor"):
        raise InputError(f"{name!r} has no image processor; save the model's processor beside its weights.")
    return model, processor


def _load_failure(name: str, error: BaseException) -> str:
    if Path(name).is_dir():
        return f"Model folder {name!r} cannot be loaded: {first_line(error)}"
    from vlmprune.embedded import embedded_models

    near = difflib.get_close_matches(name, embedded_models(), n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return (
        f"{name!r} is no embedded model ({', '.join(embedded_models())}), no local folder, and could not be "
        f"loaded from the hub: {first_line(error)}{hint}"
    )
