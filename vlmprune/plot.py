"""Pictures of what a policy kept, drawn on the image as the model saw it."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from vlmprune.core.errors import InputError, UnsupportedError
from vlmprune.core.views import View

if TYPE_CHECKING:
    from vlmprune.core.report import ImageRecord, Report

WHITE = (255, 255, 255)
# Dark blue over green to yellow: lightness rises with the score, so the ramp also reads without colour.
SCORE_RAMP = ((45, 30, 110), (40, 110, 142), (53, 183, 121), (253, 231, 37))
GOLDEN_TURN = 0.618034  # successive hues lie far apart
MIN_CELL = 24


def plot_selection(
    image: Image.Image,
    report: Report | None,
    sample: int = 0,
    image_index: int = 0,
    dim: float = 0.25,
    groups: bool = True,
    scores: bool = False,
    processor: Any = None,
) -> Image.Image:
    """Draw which visual tokens of an image survived the last forward.

    Kept tokens stay bright with a thin outline, dropped ones are dimmed. Tokens that were merged into one are
    outlined together, in one colour per destination token. An any-resolution image is drawn twice, side by side:
    as thumbnail and as the canvas of its tiles.

    Args:
        image: the picture that was given to the processor.
        report: ``handle.last``.
        sample: row of the batch. image_index: 0-based image of that sample.
        dim: brightness of dropped tokens, 0 (black) to 1 (unchanged).
        groups: outline merged tokens by destination; False outlines every token that is part of one.
        scores: colour the outlines of unmerged kept tokens by their score, dark to bright.
        processor: the processor that prepared the image: its resizing and cropping are repeated. Without it
            the centre square is shown, which is right for processors that crop a square and nothing else, or the
            whole image where it has the shape of the grid.

    Returns:
        An RGB picture, enlarged by a whole number so that single tokens can be seen.

    Raises:
        InputError: no forward yet, no such sample or image, or no scores.
        UnsupportedError: the image was cut into views whose places in it are not known (frames; tiles that the
            model does not put together).
    """
    drawn = []
    for shown, grid, cells in panels(image, report, sample, image_index, processor):
        assert report is not None
        kept = [cells[token] for token in report.kept(sample, image_index) if token in cells]
        merged = [[cells[t] for t in g if t in cells] for g in report.groups(sample, image_index)] if groups else None
        values = None
        if scores:
            given = report.scores(sample, image_index)
            if given is None:
                raise InputError(f"{report.policy} gave no scores; draw without them.")
            values = [given[token] for token in cells]
        drawn.append(draw_tokens(shown, grid, kept, merged, values, dim))
    return side_by_side(drawn)


def panels(
    image: Image.Image, report: Report | None, sample: int, image_index: int, processor: Any
) -> Iterator[tuple[Image.Image, tuple[int, int], dict[int, int]]]:
    """The views of an image that are drawn: the picture, its grid, and the cell of each of the image's tokens there.

    Raises:
        InputError, UnsupportedError: see :func:`plot_selection`.
    """
    record = _image_record(report, sample, image_index)
    for view in _drawn_views(record):
        grid = (view.height, view.width)
        fits = processor is None and view.height * image.width == view.width * image.height
        whole = len(record.views) > 1 or fits or _keeps_whole_image(processor)
        shown = image.convert("RGB") if whole else model_view(image, processor)
        yield _at_least(shown, grid), grid, {token: cell for cell, token in enumerate(view.tokens().tolist())}


def draw_tokens(
    image: Image.Image,
    grid: tuple[int, int],
    kept: Iterable[int],
    groups: Sequence[Sequence[int]] | None = None,
    scores: Sequence[float] | None = None,
    dim: float = 0.25,
    min_cell: int = MIN_CELL,
) -> Image.Image:
    """Draw a set of tokens over a view.

    Args:
        image: the view as the encoder saw it.
        grid: rows and columns of tokens; token ``i`` lies in row ``i // columns``.
        kept: tokens that stay bright.
        groups: tokens that became one token, per destination; those of two or more members share an outline
            in the destination's colour. A token in several groups is drawn in the first.
        scores: one value per token of the grid; colours the outlines of kept tokens without a group.
        dim: brightness of the other tokens, 0 to 1.
        min_cell: the picture is enlarged by a whole number until every side of a token has this many pixels.

    Raises:
        InputError: a token outside the grid, a grid finer than the pixels, or a value out of range.
    """
    height, width = grid
    _check(image, grid, dim, scores)
    labels, colours = _label_tokens(height * width, kept, groups, scores)
    pixels, owner, cell = enlarged(image, grid, labels, min_cell)
    pixels = np.where((owner >= 0)[..., None], pixels, np.round(pixels * dim))
    border = _border(owner, max(1, cell // 24)) & (owner >= 0)
    pixels[border] = colours[owner[border]]
    return Image.fromarray(pixels.astype(np.uint8))


def enlarged(
    image: Image.Image, grid: tuple[int, int], labels: np.ndarray, min_cell: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Pixels ``[H, W, 3]`` of a view, enlarged by a whole number until a cell has ``min_cell`` of them; the label of
    every pixel ``[H, W]`` by ``labels [height * width]`` of the cells; the shorter side of a cell."""
    height, width = grid
    factor = max(1, -(-min_cell * height // image.height), -(-min_cell * width // image.width))
    size = (image.width * factor, image.height * factor)
    shown = image.convert("RGB").resize(size, Image.Resampling.BICUBIC) if factor > 1 else image.convert("RGB")
    rows, columns = np.arange(size[1]) * height // size[1], np.arange(size[0]) * width // size[0]
    owner = labels[rows[:, None] * width + columns[None, :]]
    return np.asarray(shown).astype(np.float32), owner, min(size[1] // height, size[0] // width)


def model_view(image: Image.Image, processor: Any = None, size: int | None = None) -> Image.Image:
    """Cut an image as the model saw it.

    Args:
        image: the original picture.
        processor: a processor or image processor: it is run without normalisation.
        size: without a processor: resize the shorter edge to this many pixels, then crop the centre square.
            None crops the centre square at full resolution.

    Raises:
        UnsupportedError: the processor makes something else than one picture of the image.
    """
    image = image.convert("RGB")
    if processor is not None:
        return _processed(image, processor)
    if size is not None:
        scale = size / min(image.size)
        edges = (size if edge == min(image.size) else int(edge * scale) for edge in image.size)
        image = image.resize(tuple(edges), Image.Resampling.BICUBIC)  # type: ignore[arg-type]
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _drawn_views(record: ImageRecord) -> list[View]:
    """The views of an image that can be laid over it: its only one, or thumbnail and canvas.

    Raises:
        UnsupportedError: where its views lie in the image is not known.
    """
    views = list(record.views)
    if len(views) == 1:
        return views
    thumbnails = [view for view in views if view.kind == "thumbnail"]
    if len(thumbnails) != 1 or not record.newlines:
        raise UnsupportedError(
            f"Image {record.index} of sample {record.sample} has {len(views)} views, which the model does not put "
            "together to one picture, so they cannot be drawn over it; draw_tokens() takes any single view."
        )
    rows = [range(newline.start, newline.place) for newline in record.newlines]
    index = tuple(place for row in rows for place in row)
    return [*thumbnails, View(len(rows), len(rows[0]), kind="tile", index=index)]


def _keeps_whole_image(processor: Any) -> bool:
    """True if a processor only resizes an image, to a grid that fits it (Qwen-VL)."""
    return hasattr(getattr(processor, "image_processor", processor), "merge_size")


def _at_least(image: Image.Image, grid: tuple[int, int]) -> Image.Image:
    """The image, enlarged where it has fewer pixels than the grid has cells."""
    size = (max(image.width, grid[1]), max(image.height, grid[0]))
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def side_by_side(pictures: Sequence[Image.Image], gap: int = 8) -> Image.Image:
    """Pictures of one height in a row; a single one as it is."""
    if len(pictures) == 1:
        return pictures[0]
    height = max(picture.height for picture in pictures)
    scaled = [picture.resize((round(picture.width * height / picture.height), height)) for picture in pictures]
    sheet = Image.new("RGB", (sum(panel.width + gap for panel in scaled) - gap, height), WHITE)
    left = 0
    for panel in scaled:
        sheet.paste(panel, (left, 0))
        left += panel.width + gap
    return sheet


def group_colours(n: int) -> list[tuple[int, int, int]]:
    """``n`` distinct RGB colours that stand out against photographs."""
    colours: list[tuple[int, int, int]] = []
    for index in range(n):
        hue = index * GOLDEN_TURN % 1.0
        red, green, blue = colorsys.hsv_to_rgb(hue, (1.0, 0.7, 0.85)[index % 3], (1.0, 1.0, 0.8)[index % 3])
        colours.append((round(red * 255), round(green * 255), round(blue * 255)))
    return colours


def _image_record(report: Report | None, sample: int, image_index: int) -> ImageRecord:
    if report is None:
        raise InputError("There is no report: run a forward with an image while the policy is applied, then draw.")
    records = [record for record in report.images if record.sample == sample]
    if not 0 <= image_index < len(records):
        raise InputError(
            f"Sample {sample} has {len(records)} images in the last forward (batch of {report.n_samples}); "
            f"image_index={image_index} does not exist."
        )
    return records[image_index]


def _processed(image: Image.Image, processor: Any) -> Image.Image:
    image_processor = getattr(processor, "image_processor", processor)
    batch = image_processor(images=image, do_rescale=False, do_normalize=False, return_tensors="pt")
    pixels = batch["pixel_values"].float().numpy()
    if pixels.ndim != 4 or pixels.shape[0] != 1:
        raise UnsupportedError(
            f"{type(image_processor).__name__} makes {list(pixels.shape)} of one image, not one picture [1, C, H, W]."
        )
    return Image.fromarray(np.clip(np.round(pixels[0].transpose(1, 2, 0)), 0, 255).astype(np.uint8))


def _check(image: Image.Image, grid: tuple[int, int], dim: float, scores: Sequence[float] | None) -> None:
    height, width = grid
    if not (1 <= height <= image.height and 1 <= width <= image.width):
        raise InputError(f"A grid of {height} x {width} tokens does not fit {image.height} x {image.width} pixels.")
    if not 0 <= dim <= 1:
        raise InputError(f"dim={dim} is out of range; give a brightness from 0 to 1.")
    if scores is not None and len(scores) != height * width:
        raise InputError(f"{len(scores)} scores for {height * width} tokens; give one per token.")


def _label_tokens(
    n: int, kept: Iterable[int], groups: Sequence[Sequence[int]] | None, scores: Sequence[float] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Outline number of every token ``[n]`` (-1 where dropped) and the colour of every outline ``[L, 3]``."""
    kept = sorted(set(kept))
    merged = [group for group in groups or () if len(group) > 1]
    for token in (*kept, *(token for group in merged for token in group)):
        if not 0 <= token < n:
            raise InputError(f"Token {token} lies outside the grid of {n} tokens.")
    labels = np.full(n, -1)
    colours: list[tuple[int, int, int]] = []
    for group, colour in zip(merged, group_colours(len(merged)), strict=True):
        fresh = [token for token in group if labels[token] < 0]
        labels[fresh] = len(colours)
        colours.append(colour)
    single = [token for token in kept if labels[token] < 0]
    labels[single] = range(len(colours), len(colours) + len(single))
    colours += [WHITE] * len(single) if scores is None else _score_colours([scores[token] for token in single])
    return labels, np.asarray(colours, dtype=np.float32).reshape(-1, 3)


def _score_colours(scores: Sequence[float]) -> list[tuple[int, int, int]]:
    values = np.asarray(scores, dtype=np.float64)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    spread = high - low if high > low else 1.0
    place = np.nan_to_num((values - low) / spread, nan=0.0, posinf=1.0, neginf=0.0)
    knots, ramp = np.linspace(0, 1, len(SCORE_RAMP)), np.asarray(SCORE_RAMP, dtype=np.float64)
    mixed = np.stack([np.interp(place, knots, ramp[:, channel]) for channel in range(3)], 1)
    return [(int(red), int(green), int(blue)) for red, green, blue in mixed.round()]


def _border(owner: np.ndarray, line: int) -> np.ndarray:
    """``[H, W]`` bool: pixels within ``line`` pixels of another label or of the picture's edge."""
    height, width = owner.shape
    padded = np.pad(owner, line, constant_values=-2)
    border = np.zeros_like(owner, dtype=bool)
    for step in range(1, line + 1):
        for down, right in ((step, 0), (-step, 0), (0, step), (0, -step)):
            shifted = padded[line + down : line + down + height, line + right : line + right + width]
            border |= shifted != owner
    return border
