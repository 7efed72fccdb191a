"""Pictures of one handwritten digit among clutter on a photograph, for classification: which digit is it?

The digit stands anywhere, on a card that the photograph shines through, at a random size and contrast; scribbles,
noise and checkers lie around it. `digit_picture(index, split)` is a pure function. The test split uses test digits and
test photos only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlmprune.core.errors import InputError

from .bank import SPLITS, Bank, Mask, load_bank
from .scenes import GRID, IMAGE_SIZE, PATCH_SIZE, SceneSettings, draw_background, paint_clutter

CLASSES = tuple(str(digit) for digit in range(10))
STREAM = 7_003  # keeps these pictures apart from every scene
TINT = 50  # most that a channel of card or stroke differs from its luminance
LUMINANCE = np.asarray((0.299, 0.587, 0.114), dtype=np.float32)


@dataclass(frozen=True)
class DigitPicture:
    """One picture with its label.

    Attributes:
        image: uint8 `[224, 224, 3]`.
        label: the digit, 0 to 9.
        bbox: `(x0, y0, x1, y1)` of the card in pixels.
        contrast: difference of luminance between stroke and card, 0..255.
        background: `"photo:<name>"` or `"plain"`.
        source: row of the split's handwritten digits.
    """

    image: np.ndarray
    label: int
    bbox: tuple[int, int, int, int]
    contrast: float
    background: str
    source: int

    @property
    def size(self) -> int:
        """Side of the card in pixels; the longer side of the stroke is 78 % of it."""
        return self.bbox[2] - self.bbox[0]

    @property
    def coverage(self) -> np.ndarray:
        """Share of each patch of 16 pixels that the card covers, its corners taken as square: `[14, 14]`."""
        x0, y0, x1, y1 = self.bbox
        edges = np.arange(GRID + 1) * PATCH_SIZE
        across, down = (np.diff(np.clip(edges, low, high)) / PATCH_SIZE for low, high in ((x0, x1), (y0, y1)))
        return down[:, None] * across[None, :]

    @property
    def patches(self) -> np.ndarray:
        """Bool `[14, 14]`: the patches that the card touches."""
        return self.coverage > 0


@dataclass(frozen=True)
class PictureSettings:
    """How the pictures are drawn; every pair is smallest and largest.

    Attributes:
        size: side of the digit's card in pixels.
        contrast: difference of luminance between stroke and card.
        opacity: of the card over the photograph.
        angle: largest rotation of the digit in degrees, either way.
        shear: largest horizontal shear, either way.
        clutter: number of clutter sprites.
        plain: probability of a plain background.
    """

    size: tuple[int, int] = (36, 52)
    contrast: tuple[float, float] = (100.0, 220.0)
    opacity: tuple[float, float] = (0.75, 1.0)
    angle: float = 5.0
    shear: float = 0.05
    clutter: tuple[int, int] = (3, 9)
    plain: float = 0.0


HELD_OUT = PictureSettings()
HARDER = PictureSettings(size=(32, 52), contrast=(70.0, 210.0), opacity=(0.6, 1.0), angle=10.0, shear=0.12)


def digit_picture(index: int, split: str = "test", seed: int = 0, settings: PictureSettings = HELD_OUT) -> DigitPicture:
    """Picture number `index` of a split.

    Args:
        index: 0 or more; label `index % 10`, so that any run of ten pictures is balanced.
        split: `"train"` or `"test"`: which photos and digits are used.
        seed: another seed gives other pictures.
        settings: how they are drawn.

    Raises:
        InputError: unknown split, or a negative index or seed.
    """
    if split not in SPLITS or index < 0 or seed < 0:
        raise InputError(f"need split 'train' or 'test', index >= 0 and seed >= 0, got {split!r}, {index}, {seed}")
    rng = np.random.default_rng([STREAM, SPLITS.index(split), seed, index])
    return draw_picture(rng, split, settings, label=index % len(CLASSES))


def draw_picture(
    rng: np.random.Generator, split: str = "train", settings: PictureSettings = HELD_OUT, label: int | None = None
) -> DigitPicture:
    """Draw one picture.

    Args:
        rng: the only source of randomness.
        split: `"train"` or `"test"`.
        settings: how it is drawn.
        label: the digit; None draws one.

    Raises:
        InputError: unknown split.
    """
    bank = load_bank(split)
    image, background = draw_background(rng, bank, SceneSettings(plain=settings.plain))
    for _ in range(int(rng.integers(settings.clutter[0], settings.clutter[1] + 1))):
        paint_clutter(rng, bank, image)
    mask, source = _draw_digit(rng, bank, settings, int(rng.integers(len(CLASSES))) if label is None else label)
    side = len(mask.fill)
    x, y = rng.integers(0, IMAGE_SIZE - side + 1, size=2).tolist()
    box = (x, y, x + side, y + side)
    contrast = _paint(rng, image, mask, box, settings)
    return DigitPicture(image, int(bank.digit_labels[source]), box, contrast, background, source)


def _draw_digit(rng: np.random.Generator, bank: Bank, settings: PictureSettings, label: int) -> tuple[Mask, int]:
    rows = np.flatnonzero(bank.digit_labels == label)
    source = int(rows[rng.integers(len(rows))])
    size = int(rng.integers(settings.size[0], settings.size[1] + 1))
    angle, shear = rng.uniform(-settings.angle, settings.angle), rng.uniform(-settings.shear, settings.shear)
    return bank.digit(source, size, float(angle), float(shear)), source


def _paint(
    rng: np.random.Generator, image: np.ndarray, mask: Mask, box: tuple[int, ...], settings: PictureSettings
) -> float:
    """Blend card and stroke into the image in place; returns their contrast."""
    contrast = rng.uniform(*settings.contrast)
    low = rng.uniform(0.0, 255.0 - contrast)
    dark, light = _tinted(rng, low), _tinted(rng, low + contrast)
    card, stroke = (dark, light) if rng.random() < 0.5 else (light, dark)
    x0, y0, x1, y1 = box
    region = image[y0:y1, x0:x1].astype(np.float32)
    opacity = np.float32(rng.uniform(*settings.opacity) / 255)
    region += (card - region) * (mask.ground[..., None] * opacity)
    region += (stroke - region) * (mask.fill[..., None] * np.float32(1 / 255))
    image[y0:y1, x0:x1] = region
    return contrast


def _tinted(rng: np.random.Generator, luminance: float) -> np.ndarray:
    """A colour `[3]` of this luminance: its channels differ as far as the range 0..255 allows, at most by `TINT`."""
    tint = rng.uniform(-1.0, 1.0, size=3).astype(np.float32)
    tint -= tint @ LUMINANCE
    room = min(luminance, 255.0 - luminance, TINT)
    return np.float32(luminance) + tint * np.float32(room / max(1.0, float(np.abs(tint).max())))
