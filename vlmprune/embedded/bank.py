"""The bank of sprites that scenes are made of: photos, handwritten digits, shape masks, scribbles.

Everything comes from files in `assets/` (see `assets/LICENSES.md`) or is drawn in code. Train and test photos
and digits are disjoint.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from vlmprune.core.errors import InputError

ASSETS = Path(__file__).parent / "assets"
SPLITS = ("train", "test")
SHAPES = ("circle", "rectangle", "triangle", "star", "cross", "diamond", "ring")
PHOTO_SIDES = (260, 384)  # shorter side in pixels at which a photo is cropped
SUPERSAMPLE = 4


@dataclass(frozen=True)
class Mask:
    """Coverage of one sprite, uint8 0..255, all `[h, w]`.

    `fill` is painted in the object's colour, `ground` (which contains it) in the contrast colour below it.
    """

    fill: np.ndarray
    ground: np.ndarray


@dataclass(frozen=True)
class Bank:
    """Photos (uint8 `[H, W, 3]` at each of `PHOTO_SIDES`) and digits (uint8 `[n, 28, 28]`) of a split."""

    split: str
    photo_names: tuple[str, ...]
    photos: tuple[tuple[np.ndarray, ...], ...]
    digit_images: np.ndarray
    digit_labels: np.ndarray
    scribbles: tuple[np.ndarray, ...]
    _shapes: dict[tuple[str, int, int], Mask] = field(default_factory=dict, repr=False)

    def shape(self, kind: str, size: int, turn: int) -> Mask:
        """Mask of a shape: `size` in pixels, `turn` one of 0..7 (steps of a small rotation)."""
        key = (kind, size, turn)
        if key not in self._shapes:
            self._shapes[key] = draw_shape(kind, size, turn)
        return self._shapes[key]

    def digit(self, index: int, size: int, angle: float, shear: float) -> Mask:
        """Mask of digit number `index`: strokes on a rounded card of `size` pixels.

        Args:
            index: row of `digit_images`.
            size: side of the card in pixels.
            angle: rotation in degrees.
            shear: horizontal shear (0 is none).
        """
        return draw_digit(self.digit_images[index], size, angle, shear)


@functools.lru_cache(maxsize=2)
def load_bank(split: str) -> Bank:
    """Load the bank of `"train"` or `"test"`.

    Raises:
        InputError: unknown split.
    """
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}; choose 'train' or 'test'")
    names, photos = [], []
    for path in sorted((ASSETS / "photos" / split).glob("*.jpg")):
        image = Image.open(path).convert("RGB")
        names.append(path.stem)
        photos.append(tuple(np.asarray(_shorter_side(image, side)) for side in PHOTO_SIDES))
    with np.load(ASSETS / "digits.npz", allow_pickle=False) as arrays:
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    return Bank(split, tuple(names), tuple(photos), images, labels, _scribbles())


def _shorter_side(image: Image.Image, side: int) -> Image.Image:
    scale = side / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def draw_shape(kind: str, size: int, turn: int) -> Mask:
    """Draw one of `SHAPES`; the ground is the shape grown by two pixels."""
    side = (size + 6) * SUPERSAMPLE
    canvas = Image.new("L", (side, side))
    draw = ImageDraw.Draw(canvas)
    middle, radius = side / 2, size * SUPERSAMPLE / 2
    if kind in ("circle", "ring"):
        draw.ellipse([middle - radius, middle - radius, middle + radius, middle + radius], fill=255)
        if kind == "ring":
            hole = radius * 0.52
            draw.ellipse([middle - hole, middle - hole, middle + hole, middle + hole], fill=0)
    else:
        tilt = math.radians((turn - 3.5) * 4.0)
        points = [
            (
                middle + radius * (x * math.cos(tilt) - y * math.sin(tilt)),
                middle + radius * (x * math.sin(tilt) + y * math.cos(tilt)),
            )
            for x, y in _outline(kind, turn)
        ]
        draw.polygon(points, fill=255)
    fill = canvas.resize((size + 6, size + 6), Image.Resampling.BOX)
    ground = fill.filter(ImageFilter.MaxFilter(5))
    return Mask(np.asarray(fill), np.asarray(ground))


def _outline(kind: str, turn: int) -> list[tuple[float, float]]:
    """Corner points of a polygon in the unit square [-1, 1]."""
    if kind == "rectangle":
        flat = 0.55 if turn % 2 else 0.95
        width, height = (1.0, flat) if turn % 4 < 2 else (flat, 1.0)
        return [(-width, -height), (width, -height), (width, height), (-width, height)]
    if kind == "triangle":
        return [(0.0, -1.0), (0.95, 0.8), (-0.95, 0.8)]
    if kind == "diamond":
        return [(0.0, -1.0), (0.75, 0.0), (0.0, 1.0), (-0.75, 0.0)]
    if kind == "cross":
        a = 0.33
        return [
            (-a, -1),
            (a, -1),
            (a, -a),
            (1, -a),
            (1, a),
            (a, a),
            (a, 1),
            (-a, 1),
            (-a, a),
            (-1, a),
            (-1, -a),
            (-a, -a),
        ]
    if kind == "star":
        radii = (1.05, 0.45)
        return [
            (radii[i % 2] * math.sin(i * math.pi / 5), -radii[i % 2] * math.cos(i * math.pi / 5)) for i in range(10)
        ]
    raise InputError(f"unknown shape {kind!r}; choose one of {', '.join(SHAPES)}")


def draw_digit(image: np.ndarray, size: int, angle: float, shear: float) -> Mask:
    """Paint a 28 x 28 handwritten digit on a rounded card of `size` pixels."""
    rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    # Output pixel -> source pixel: scale the stroke's longer side to 78 % of the card, then rotate and shear.
    scale = max(bottom - top, right - left) / (0.78 * size)
    cos, sin = math.cos(math.radians(angle)) * scale, math.sin(math.radians(angle)) * scale
    a, b, d, e = cos, sin + shear * cos, -sin, cos - shear * sin
    half = size / 2
    x0, y0 = (left + right) / 2, (top + bottom) / 2
    matrix = (a, b, x0 - a * half - b * half, d, e, y0 - d * half - e * half)
    stroke = Image.fromarray(image).transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    # Handwriting is thin and grey at its edges: steepen it so that the colour of the stroke stays readable.
    fill = np.minimum(np.asarray(stroke).astype(np.uint16) * 3 // 2, 255).astype(np.uint8)
    return Mask(fill, _card(size))


@functools.lru_cache(maxsize=64)
def _card(size: int) -> np.ndarray:
    side = size * SUPERSAMPLE
    canvas = Image.new("L", (side, side))
    ImageDraw.Draw(canvas).rounded_rectangle([0, 0, side - 1, side - 1], radius=side // 6, fill=255)
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX))


def _scribbles() -> tuple[np.ndarray, ...]:
    """Thirty-two random curves; a fixed seed, since clutter is never asked about."""
    rng = np.random.default_rng(20250101)
    out = []
    for _ in range(32):
        side = int(rng.integers(24, 60))
        canvas = Image.new("L", (side * 2, side * 2))
        points = rng.uniform(4, side * 2 - 4, size=(int(rng.integers(4, 8)), 2))
        ImageDraw.Draw(canvas).line([tuple(p) for p in points], fill=255, width=int(rng.integers(3, 7)), joint="curve")
        out.append(np.asarray(canvas.resize((side, side), Image.Resampling.BOX)))
    return tuple(out)
