"""Scenes: coloured shapes and handwritten digit cards, among clutter, over photographs.

A scene is a function of the generator that is passed in. The test split uses test digits and photos only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .bank import SHAPES, Bank, Mask, load_bank

IMAGE_SIZE = 224
PATCH_SIZE = 16
GRID = IMAGE_SIZE // PATCH_SIZE
DIGIT = "digit"
KINDS = (*SHAPES, DIGIT)
PALETTE = {
    "red": (214, 30, 36),
    "green": (30, 156, 54),
    "blue": (36, 66, 214),
    "yellow": (244, 216, 30),
    "purple": (142, 44, 170),
    "orange": (246, 130, 20),
    "white": (244, 244, 244),
    "black": (18, 18, 18),
}
COLOURS = tuple(PALETTE)
COLOUR_JITTER = 14
MIN_COVERAGE = 10 * 255  # of a patch's 256 pixels, about 4 %
MARGIN = 3


@dataclass(frozen=True)
class SceneObject:
    """One object: kind (a shape or `"digit"`), colour, bbox `(x0, y0, x1, y1)` in pixels, digit value."""

    kind: str
    colour: str
    bbox: tuple[int, int, int, int]
    digit: int | None = None

    @property
    def centre(self) -> tuple[float, float]:
        """Middle of the bbox in pixels, `(x, y)`."""
        x0, y0, x1, y1 = self.bbox
        return (x0 + x1) / 2, (y0 + y1) / 2


@dataclass(frozen=True)
class Scene:
    """A picture with its ground truth.

    Attributes:
        image: uint8 `[H, W, 3]`, 224 x 224 unless the settings say otherwise.
        objects: what can be asked about, in painting order (no two overlap).
        patch_object: int16 `[H / 16, W / 16]`, index of the object that covers most of a patch, -1 for background.
        background: `"photo:<name>"` or `"plain"`.
    """

    image: np.ndarray
    objects: tuple[SceneObject, ...]
    patch_object: np.ndarray
    background: str

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels; known even where the picture itself was dropped."""
        rows, columns = self.patch_object.shape
        return rows * PATCH_SIZE, columns * PATCH_SIZE


@dataclass(frozen=True)
class SceneSettings:
    """What a scene holds.

    Attributes:
        objects: smallest and largest number of objects, both included.
        digit_weights: unnormalised probability of 0, 1, 2, ... digits.
        clutter: smallest and largest number of clutter sprites.
        plain: probability of a plain background instead of a photograph.
        shape_size: smallest and largest shape in pixels.
        digit_size: smallest and largest digit card in pixels.
        size: height and width of the picture in pixels, multiples of 16, at most 384 on a side.
    """

    objects: tuple[int, int] = (5, 9)
    digit_weights: tuple[float, ...] = (0.08, 0.42, 0.35, 0.15)
    clutter: tuple[int, int] = (3, 9)
    plain: float = 0.08
    shape_size: tuple[int, int] = (22, 36)
    digit_size: tuple[int, int] = (38, 46)
    size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE)


HELD_OUT = SceneSettings(plain=0.0)


def for_size(settings: SceneSettings, size: tuple[int, int]) -> SceneSettings:
    """The same scenes on a canvas of `size` pixels (height, width): fewer objects where it is smaller, from four up."""
    if size == settings.size:
        return settings
    ratio = size[0] * size[1] / (settings.size[0] * settings.size[1])
    low, high = settings.objects
    return replace(settings, size=size, objects=(min(low, 4), max(4, min(high, round(high * ratio)))))


def generate_scene(rng: np.random.Generator, split: str = "train", settings: SceneSettings = SceneSettings()) -> Scene:
    """Draw one scene.

    Args:
        rng: the only source of randomness; the same state gives the same scene.
        split: `"train"` or `"test"`: which photos and digits are used.
        settings: numbers of objects, digits and clutter.

    Raises:
        ValueError: unknown split.
    """
    bank = load_bank(split)
    image, background = draw_background(rng, bank, settings)
    for _ in range(int(rng.integers(settings.clutter[0], settings.clutter[1] + 1))):
        paint_clutter(rng, bank, image)
    objects: list[SceneObject] = []
    grid = (settings.size[0] // PATCH_SIZE, settings.size[1] // PATCH_SIZE)
    patch_object = np.full(grid, -1, dtype=np.int16)
    best = np.full(grid, MIN_COVERAGE, dtype=np.int64)
    taken: list[tuple[int, int, int, int]] = []
    for wanted in _plan(rng, settings):
        mask, digit = _draw(rng, bank, wanted.kind, settings)
        box = _place(rng, settings.size, mask.ground.shape, taken)
        if box is None:
            continue
        taken.append(box)
        _paint(rng, image, mask, box, wanted.colour)
        _claim_patches(mask.ground, box, len(objects), best, patch_object)
        objects.append(replace(wanted, bbox=box, digit=digit))
    return Scene(image, tuple(objects), patch_object, background)


def _plan(rng: np.random.Generator, settings: SceneSettings) -> list[SceneObject]:
    """Kinds and colours, digits first because they need most room."""
    count = int(rng.integers(settings.objects[0], settings.objects[1] + 1))
    weights = np.asarray(settings.digit_weights)
    digits = min(int(rng.choice(len(weights), p=weights / weights.sum())), count)
    kinds = [DIGIT] * digits + [SHAPES[int(i)] for i in rng.integers(len(SHAPES), size=count - digits)]
    colours = rng.integers(len(COLOURS), size=count)
    return [SceneObject(kind, COLOURS[int(c)], (0, 0, 0, 0)) for kind, c in zip(kinds, colours, strict=True)]


def _draw(rng: np.random.Generator, bank: Bank, kind: str, settings: SceneSettings) -> tuple[Mask, int | None]:
    if kind != DIGIT:
        low, high = settings.shape_size
        size = int(rng.integers(low // 2, high // 2 + 1)) * 2
        return bank.shape(kind, size, int(rng.integers(8))), None
    index = int(rng.integers(len(bank.digit_labels)))
    size = int(rng.integers(settings.digit_size[0], settings.digit_size[1] + 1))
    angle, shear = rng.uniform(-10, 10), rng.uniform(-0.12, 0.12)
    return bank.digit(index, size, float(angle), float(shear)), int(bank.digit_labels[index])


def _place(
    rng: np.random.Generator, size: tuple[int, int], shape: tuple[int, int], taken: list[tuple[int, int, int, int]]
) -> tuple[int, int, int, int] | None:
    """Find a free box by rejection; None after 40 tries."""
    height, width = shape
    tries = rng.integers(0, (size[1] - width + 1, size[0] - height + 1), size=(40, 2)).tolist()
    for x, y in tries:
        x1, y1 = x + width, y + height
        free = all(
            x >= b[2] + MARGIN or x1 + MARGIN <= b[0] or y >= b[3] + MARGIN or y1 + MARGIN <= b[1] for b in taken
        )
        if free:
            return x, y, x1, y1
    return None


def _paint(rng: np.random.Generator, image: np.ndarray, mask: Mask, box: tuple[int, ...], colour: str) -> None:
    base = np.asarray(PALETTE[colour], dtype=np.float32)
    value = np.clip(base + rng.integers(-COLOUR_JITTER, COLOUR_JITTER + 1, size=3), 0, 255).astype(np.float32)
    # The ground contrasts with the colour, so that every object is visible on any background.
    luminance = float(value @ np.asarray((0.299, 0.587, 0.114), dtype=np.float32))
    dark = luminance > 128 if abs(luminance - 128) > 60 else rng.random() < 0.5
    ground = np.float32(rng.integers(10, 40) if dark else rng.integers(215, 250))
    x0, y0, x1, y1 = box
    region = image[y0:y1, x0:x1].astype(np.float32)
    alpha = mask.ground[..., None] * np.float32(1 / 255)
    region += (ground - region) * alpha
    alpha = mask.fill[..., None] * np.float32(1 / 255)
    region += (value - region) * alpha
    image[y0:y1, x0:x1] = region


def _claim_patches(
    ground: np.ndarray, box: tuple[int, ...], index: int, best: np.ndarray, patch_object: np.ndarray
) -> None:
    """Give every patch to the object that covers most of it."""
    x0, y0, x1, y1 = box
    px0, py0, px1, py1 = x0 // PATCH_SIZE, y0 // PATCH_SIZE, -(-x1 // PATCH_SIZE), -(-y1 // PATCH_SIZE)
    window = np.zeros(((py1 - py0) * PATCH_SIZE, (px1 - px0) * PATCH_SIZE), dtype=np.int64)
    window[y0 - py0 * PATCH_SIZE : y1 - py0 * PATCH_SIZE, x0 - px0 * PATCH_SIZE : x1 - px0 * PATCH_SIZE] = ground
    covered = window.reshape(py1 - py0, PATCH_SIZE, px1 - px0, PATCH_SIZE).sum(axis=(1, 3))
    part = (slice(py0, py1), slice(px0, px1))
    wins = covered > best[part]
    best[part] = np.where(wins, covered, best[part])
    patch_object[part] = np.where(wins, index, patch_object[part])


def draw_background(rng: np.random.Generator, bank: Bank, settings: SceneSettings) -> tuple[np.ndarray, str]:
    """A plain colour or a crop of a photograph, at a random contrast, and its name."""
    height, width = settings.size
    if rng.random() < settings.plain:
        colour = rng.integers(0, 256, size=3)
        return np.broadcast_to(colour.astype(np.uint8), (height, width, 3)).copy(), "plain"
    which = int(rng.integers(len(bank.photos)))
    large = [p for p in bank.photos[which] if p.shape[0] >= height and p.shape[1] >= width]
    photo = large[int(rng.integers(len(large)))]
    y = int(rng.integers(photo.shape[0] - height + 1))
    x = int(rng.integers(photo.shape[1] - width + 1))
    crop = photo[y : y + height, x : x + width]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    contrast = rng.uniform(0.45, 1.0)
    offset = rng.uniform(0.0, 255.0 * (1.0 - contrast))
    table = (np.arange(256) * contrast + offset).astype(np.uint8)
    return table[crop], f"photo:{bank.photo_names[which]}"


def paint_clutter(rng: np.random.Generator, bank: Bank, image: np.ndarray) -> None:
    """Scribbles, noise patches and checkers, in colours between grey and random."""
    style = int(rng.integers(3))
    side = int(rng.integers(14, 44))
    colour = rng.integers(0, 256, size=3) * 0.5 + float(rng.integers(0, 128))
    if style == 0:
        alpha = bank.scribbles[int(rng.integers(len(bank.scribbles)))]
        side = alpha.shape[0]
    x, y = rng.integers(0, (image.shape[1] - side + 1, image.shape[0] - side + 1)).tolist()
    region = image[y : y + side, x : x + side]
    if style == 0:
        blend = alpha[..., None] * np.float32(1 / 255)
        region[...] = region + (colour.astype(np.float32) - region) * blend
    elif style == 1:
        cells = rng.integers(0, 256, size=(-(-side // 4), -(-side // 4), 3), dtype=np.uint8)
        region[...] = cells.repeat(4, axis=0).repeat(4, axis=1)[:side, :side] // 2 + region // 2
    else:
        step = int(rng.integers(3, 8))
        rows = np.arange(side) // step
        board = (rows[:, None] + rows[None, :]) % 2 == 0
        region[board] = colour.astype(np.uint8)
