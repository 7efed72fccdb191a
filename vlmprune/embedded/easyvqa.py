"""easy-VQA 1.0 (Victor Zhou, MIT licence), read from the packaged zips with numpy and Pillow only."""

from __future__ import annotations

import io
import json
import os
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vlmprune.core.errors import InputError

from .bank import ASSETS, SPLITS

EASY_SHAPES = ("circle", "rectangle", "triangle")
EASY_COLOURS = ("black", "gray", "red", "blue", "green", "yellow", "teal", "brown")


@dataclass(frozen=True)
class EasyQuestion:
    """One question of easy-VQA; `image_id` counts within its split."""

    image_id: int
    question: str
    answer: str


@dataclass(frozen=True)
class EasyVQA:
    """A split of easy-VQA: PNG bytes per image id and the questions in their published order."""

    split: str
    png: dict[int, bytes]
    questions: tuple[EasyQuestion, ...]

    def image(self, image_id: int) -> Image.Image:
        """The 64 x 64 RGB picture."""
        return Image.open(io.BytesIO(self.png[image_id])).convert("RGB")


def load_easy_vqa(split: str = "test") -> EasyVQA:
    """Load a split: `"test"` (1000 images, 9673 questions) or `"train"` (4000 images, 38575 questions).

    Raises:
        InputError: unknown split.
    """
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}; choose 'train' or 'test'")
    with zipfile.ZipFile(ASSETS / f"easy_vqa_{split}.zip") as archive:
        rows = json.loads(archive.read("questions.json"))
        names = [name for name in archive.namelist() if name.endswith(".png")]
        png = {int(Path(name).stem): archive.read(name) for name in names}
    questions = tuple(EasyQuestion(image_id, question, answer) for question, answer, image_id in rows)
    return EasyVQA(split, png, questions)


def image_facts(questions: list[tuple[str, str]]) -> tuple[str | None, str | None]:
    """Shape and colour of an image as far as its own questions and answers give them away.

    Args:
        questions: `(question, answer)` pairs of one image.

    Returns:
        `(shape, colour)`, each None where no question tells.
    """
    shape = colour = None
    for question, answer in questions:
        words = question.rstrip("?").split()
        named_shape = next((word for word in words if word in EASY_SHAPES), None)
        named_colour = next((word for word in words if word in EASY_COLOURS), None)
        if words[0] == "what":
            shape = answer if answer in EASY_SHAPES else named_shape or shape
            colour = answer if answer in EASY_COLOURS else named_colour or colour
        elif (answer == "yes") != ("not" in words or "no" in words):
            shape, colour = named_shape or shape, named_colour or colour
    return shape, colour


def object_mask(image: np.ndarray, threshold: int = 24) -> np.ndarray:
    """Pixels that differ from the flat background, bool `[H, W]`; the background is the median border colour.

    Args:
        image: uint8 `[H, W, 3]`.
        threshold: smallest difference of a channel that counts.
    """
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]).astype(np.int16)
    background = np.median(border, axis=0)
    return (np.abs(image.astype(np.int16) - background) > threshold).any(axis=-1)


def write_parquet(path: Path, split: str = "test") -> Path:
    """Write a split as one parquet with an `image` column that `datasets` decodes (needs pyarrow).

    Columns: `image` (struct of `bytes` and `path`), `image_id`, `question`, `answer`. Written atomically.

    Raises:
        ImportError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError("writing the easy-VQA parquet needs pyarrow: pip install pyarrow") from error
    data = load_easy_vqa(split)
    images = [{"bytes": data.png[q.image_id], "path": f"{q.image_id}.png"} for q in data.questions]
    columns = {
        "image": pa.array(images, type=pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        "image_id": pa.array([q.image_id for q in data.questions], type=pa.int64()),
        "question": pa.array([q.question for q in data.questions]),
        "answer": pa.array([q.answer for q in data.questions]),
    }
    features = {
        "image": {"_type": "Image"},
        "image_id": {"dtype": "int64", "_type": "Value"},
        "question": {"dtype": "string", "_type": "Value"},
        "answer": {"dtype": "string", "_type": "Value"},
    }
    table = pa.table(columns)
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".parquet")
    os.close(handle)
    pq.write_table(table, temporary)
    os.replace(temporary, path)
    return path
