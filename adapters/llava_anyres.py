"""transformers' LLaVA-NeXT and LLaVA-OneVision: a thumbnail and a canvas of tiles, without its padding."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmprune.adapters.family import Encoded
from vlmprune.adapters.layout import ImageShape, Kind
from vlmprune.adapters.llava_tower import LlavaTowerFamily
from vlmprune.core.context import View
from vlmprune.core.errors import InputError
from vlmprune.core.views import Newline

VIDEO = "video"


class AnyResolutionFamily(LlavaTowerFamily):
    """Images are packed by the model's own code, for features and for scores alike.

    An image's ``geometry`` is its size (height, width) in pixels.
    """

    def shapes(
        self, kwargs: Mapping[str, Any], masks: Mapping[Kind, np.ndarray], encoded: Encoded
    ) -> dict[Kind, list[ImageShape]]:
        return {"image": self.image_shapes(kwargs, masks["image"])}

    def image_shapes(self, kwargs: Mapping[str, Any], mask: np.ndarray) -> list[ImageShape]:
        """Shapes of the images of a call."""
        sizes = kwargs.get("image_sizes")
        if sizes is None:
            if not mask.any():
                return []
            raise InputError(
                "The prompt holds image placeholders, but the call has no image_sizes, which say how many tokens each "
                "image has; pass what the processor returns, and leave out prefill_chunk_size."
            )
        rows = [tuple(int(side) for side in size) for size in (sizes.tolist() if isinstance(sizes, Tensor) else sizes)]
        tiled = self.tiled(kwargs, len(rows))
        found = {key: self._image_shape(*key) for key in set(zip(rows, tiled, strict=True))}
        return [found[key] for key in zip(rows, tiled, strict=True)]

    def tiled(self, kwargs: Mapping[str, Any], count: int) -> list[bool]:
        """Which of ``count`` images are cut into tiles."""
        return [True] * count

    def _image_shape(self, size: tuple[int, int], tiled: bool) -> ImageShape:
        config, cells = self.model.config, self.side**2
        count = 1
        if tiled:
            count = sys.modules[type(self.base).__module__].image_size_to_num_patches(
                image_size=size, grid_pinpoints=config.image_grid_pinpoints, patch_size=config.vision_config.image_size
            )
        number = torch.arange(count * cells, dtype=torch.float64).view(1, count, cells, 1)
        origin = self._pack_images(size, number, newline=-1.0)[0, :, 0].numpy()  # [n] patch behind each token
        marks = np.flatnonzero(origin == -1).tolist()
        starts = [cells if count > 1 else 0, *[place + 1 for place in marks[:-1]]]
        newlines = tuple(Newline(place, start) for place, start in zip(marks, starts, strict=True))
        thumbnail = View(self.side, self.side, 0, "thumbnail" if count > 1 else "image")
        views = (thumbnail, *self.canvas_views(origin, newlines)) if count > 1 else (thumbnail,)
        return ImageShape(len(origin), views, newlines, count, size)

    @abstractmethod
    def canvas_views(self, origin: np.ndarray, newlines: tuple[Newline, ...]) -> list[View]:
        """Views of the tokens behind the thumbnail.

        Args:
            origin: number of the patch behind each token, fractions where patches were interpolated.
        """

    def pack(self, shape: ImageShape, values: Tensor, newline: float) -> Tensor:
        return self._pack_images(shape.geometry, values, newline)

    def _pack_images(self, size: tuple[int, int], values: Tensor, newline: float) -> Tensor:
        """Tokens ``[I, n, C]`` of images of one size from ``values [I, V, P, C]``, by the model's own function."""
        separator = values.new_full((values.shape[3],), newline)
        return torch.stack([self._pack_image(size, image, separator) for image in values])

    @abstractmethod
    def _pack_image(self, size: tuple[int, int], image: Tensor, newline: Tensor) -> Tensor:
        """Tokens ``[n, C]`` of one image."""


class LlavaNextFamily(AnyResolutionFamily):
    """LLaVA-NeXT (1.6): every tile is a view, with what unpadding left of it."""

    name = "llava_next"
    classes = ("LlavaNextForConditionalGeneration", "LlavaNextModel")

    def canvas_views(self, origin: np.ndarray, newlines: tuple[Newline, ...]) -> list[View]:
        cells, views = self.side**2, []
        number = origin.astype(np.int64)
        for tile in range(1, int(number.max()) // cells + 1):
            places = np.flatnonzero(number // cells == tile)
            if len(places):
                width = len(set((number[places] % self.side).tolist()))
                index = tuple(places.tolist())
                views.append(View(len(places) // width, width, kind="tile", index=index))
        return views

    def _pack_image(self, size: tuple[int, int], image: Tensor, newline: Tensor) -> Tensor:
        strategy = self.model.config.vision_feature_select_strategy
        packed, _ = self.base.pack_image_features([image], [size], strategy, image_newline=newline)
        return packed[0]


class LlavaOnevisionFamily(AnyResolutionFamily):
    """LLaVA-OneVision: the canvas, interpolated where it is large, is one view; images beside others have no tiles;
    video frames are pooled."""

    name = "llava_onevision"
    classes = ("LlavaOnevisionForConditionalGeneration", "LlavaOnevisionModel")
    kinds = ("image", "video")

    def tiled(self, kwargs: Mapping[str, Any], count: int) -> list[bool]:
        numbers = kwargs.get("batch_num_images")
        if numbers is None:
            return [True] * count
        numbers = numbers.tolist() if isinstance(numbers, Tensor) else list(numbers)
        return [n == 1 for n in numbers for _ in range(n)]

    def canvas_views(self, origin: np.ndarray, newlines: tuple[Newline, ...]) -> list[View]:
        separators = {mark.place for mark in newlines}
        index = tuple(place for place in range(newlines[0].start, len(origin)) if place not in separators)
        return [View(len(newlines), len(index) // len(newlines), kind="tile", index=index)]

    def shapes(
        self, kwargs: Mapping[str, Any], masks: Mapping[Kind, np.ndarray], encoded: Encoded
    ) -> dict[Kind, list[ImageShape]]:
        return {**super().shapes(kwargs, masks, encoded), "video": self._video_shapes(kwargs, masks["video"], encoded)}

    def _video_shapes(self, kwargs: Mapping[str, Any], mask: np.ndarray, encoded: Encoded) -> list[ImageShape]:
        pixels, pooled = kwargs.get("pixel_values_videos"), -(-self.side // 2)
        if pixels is not None:
            count, frames = pixels.shape[:2]
        elif "video" in encoded:
            count = len(encoded["video"].features)
            frames = encoded["video"].n_views // count
        else:
            return [ImageShape(int(mask.sum()))] if mask.any() else []
        views = tuple(View(pooled, pooled, i * pooled**2, "frame") for i in range(frames))
        end = frames * pooled**2
        return [ImageShape(end + 1, views, (Newline(end, 0),), frames, VIDEO)] * count

    def pack(self, shape: ImageShape, values: Tensor, newline: float) -> Tensor:
        if shape.geometry != VIDEO:
            return super().pack(shape, values, newline)
        pooled = self.base.apply_pooling(values.flatten(0, 1)).unflatten(0, values.shape[:2]).flatten(1, 2)
        return torch.cat([pooled, pooled.new_full((len(pooled), 1, pooled.shape[2]), newline)], 1)

    def _pack_image(self, size: tuple[int, int], image: Tensor, newline: Tensor) -> Tensor:
        packed, _ = self.base.pack_image_features(
            [image], [size], image_newline=newline, vision_aspect_ratio=self.model.config.vision_aspect_ratio
        )
        return packed[0]
