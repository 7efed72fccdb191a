"""Image-site policies: what happens to images before the model sees them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from PIL import Image

from vlmprune.adapters.encoding import PixelScale
from vlmprune.core.errors import InputError
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import Policy


class ReducingImageProcessor:
    """Stands in for a processor's image processor: reduces images, then calls the original.

    Everything else is the original's, its class for ``isinstance`` too, so that saving a processor while a policy
    is applied saves the original's settings.
    """

    def __init__(self, original: Any, policies: list[Policy]) -> None:
        self._original = original
        self._policies = policies
        self.enabled = True
        self.geometry: list[dict[str, Any]] = []

    def __call__(self, images: Any = None, *args: Any, **kwargs: Any) -> Any:
        if self.enabled and images is not None:
            self.geometry = []
            images = self._reduce(images)
        return self._original(images, *args, **kwargs)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._original)

    def __reduce__(self) -> Any:
        return ReducingImageProcessor, (self._original, self._policies)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_original":
            raise AttributeError(name)
        return getattr(self._original, name)

    def _reduce(self, images: Any) -> Any:
        if isinstance(images, (list, tuple)):
            return [self._reduce(image) for image in images]
        if not isinstance(images, Image.Image):
            raise InputError(f"Policies that act on images take PIL images, not {type(images).__name__}.")
        before = images.size
        for policy in self._policies:
            images = policy.resize(images)  # type: ignore[attr-defined]
        self.geometry.append({"size": list(before), "reduced_size": list(images.size)})
        return images


class ProcessorHook:
    """A processor whose image processor is replaced until :meth:`remove`."""

    def __init__(self, processor: Any, policies: list[Policy]) -> None:
        self._processor = processor
        self._original = processor.image_processor
        self._stand_in = ReducingImageProcessor(self._original, policies)
        processor.image_processor = self._stand_in

    def geometry(self) -> list[dict[str, Any]]:
        """Sizes before and after, of the last call's images."""
        return self._stand_in.geometry

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave images as they are inside this block."""
        before, self._stand_in.enabled = self._stand_in.enabled, False
        try:
            yield
        finally:
            self._stand_in.enabled = before

    def remove(self) -> None:
        """Give the processor its own image processor back."""
        if self._processor.image_processor is self._stand_in:
            self._processor.image_processor = self._original


def pixel_scale(processor: Any) -> PixelScale:
    """What a model's processor does to pixels.

    Raises:
        InputError: no processor, or one without an image processor, was given.
    """
    images = getattr(processor, "image_processor", None)
    if images is None:
        raise InputError("This policy looks at pixels; give processor=, the model's processor, which normalises them.")
    rescale = images.rescale_factor if getattr(images, "do_rescale", True) else 1.0
    if not getattr(images, "do_normalize", True):
        return PixelScale((0.0,) * 3, (1.0,) * 3, rescale)
    return PixelScale(tuple(images.image_mean), tuple(images.image_std), rescale)


def attach_processor(policy: Policy, processor: Any, info: ModelInfo) -> ProcessorHook | None:
    """Hook the image-site members of a policy into a processor; None where there are none.

    Raises:
        InputError: the policy needs a processor and none, or an unsuitable or already hooked one, was given.
    """
    members = [leaf for leaf in policy.leaves() if leaf.needs_processor() and leaf.reduces(info)]
    if not members:
        return None
    names = ", ".join(leaf.name for leaf in members)
    if processor is None:
        raise InputError(f"{names} acts on images before the model sees them; give processor=, the model's processor.")
    if not hasattr(processor, "image_processor"):
        raise InputError(f"{type(processor).__name__} has no image_processor; give the model's whole processor.")
    if type(processor.image_processor) is ReducingImageProcessor:
        raise InputError("This processor is in use by another applied policy; remove that one first.")
    return ProcessorHook(processor, members)
