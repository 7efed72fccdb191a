"""From pictures to the batch that `tiny-vit` takes, without torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .digit_pictures import CLASSES
from .fastpath import PIXEL_MEAN, PIXEL_STD
from .scenes import IMAGE_SIZE

RESAMPLE = Image.Resampling.BICUBIC


@dataclass(frozen=True)
class PictureTransform:
    """Resize the shorter side, crop the middle, scale to 0..1, normalise: what timm's evaluation transform does.

    Attributes:
        size: side of the square input in pixels.
        mean, std: per channel.
        labels: names of the classes, in the order of the logits.
    """

    size: int = IMAGE_SIZE
    mean: tuple[float, ...] = PIXEL_MEAN
    std: tuple[float, ...] = PIXEL_STD
    labels: tuple[str, ...] = CLASSES

    def __call__(self, images: Image.Image | Sequence[Image.Image]) -> Tensor:
        """Pixels of one picture or several, of any size and mode: float32 `[B, 3, size, size]`."""
        several = [images] if isinstance(images, Image.Image) else list(images)
        pixels = torch.from_numpy(np.stack([self._square(image) for image in several]))
        scaled = pixels.permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return (scaled - mean) / std

    def _square(self, image: Image.Image) -> np.ndarray:
        """Resized and cropped, uint8 `[size, size, 3]`."""
        image = image.convert("RGB")
        short = min(image.size)
        if short != self.size:
            width, height = (self.size * side // short for side in image.size)
            image = image.resize((width, height), RESAMPLE)
        left, top = (round((side - self.size) / 2.0) for side in image.size)
        return np.asarray(image.crop((left, top, left + self.size, top + self.size)))
