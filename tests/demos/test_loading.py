"""Models and images from what a user types."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from vlmprune.core.errors import InputError
from vlmprune.embedded import model_path
from vlmprune.loading import first_line, load_model, open_image


def test_a_folder_and_the_embedded_name_give_the_same_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = load_model("tiny-llava")
    assert not model.training and hasattr(processor, "image_processor")
    monkeypatch.chdir(model_path().parent)
    for name in (str(model_path()), "./tiny-llava"):
        other = load_model(name)[0]
        pairs = zip(model.state_dict().items(), other.state_dict().items(), strict=True)
        assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("name", ["tiny-llava", str(model_path())])
def test_dtype(name: str) -> None:
    assert load_model(name, dtype="bfloat16")[0].dtype == torch.bfloat16
    assert load_model(name, dtype=torch.float16)[0].dtype == torch.float16


def test_a_folder_without_a_processor(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (tmp_path / name).symlink_to(model_path() / name)
    with pytest.raises(InputError, match=r"cannot be loaded|no image processor"):
        load_model(str(tmp_path))


def test_a_folder_without_or_with_damaged_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to(model_path() / "config.json")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes((model_path() / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(str(tmp_path))


def test_a_folder_with_a_damaged_tokenizer(tmp_path: Path) -> None:
    for path in model_path().iterdir():
        if path.is_file() and path.name != "tokenizer.json":
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(str(tmp_path))


def test_a_hub_id_that_cannot_be_reached() -> None:
    with pytest.raises(InputError, match="could not be loaded from the hub") as caught:
        load_model("some-owner/some-model")
    assert "\n" not in str(caught.value)


def test_images_are_turned_upright_and_made_rgb(tmp_path: Path) -> None:
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[274] = 6  # stored turned by 90 degrees
    Image.linear_gradient("L").resize((40, 20)).save(path, exif=exif)
    image = open_image(path)
    assert image.mode == "RGB" and image.size == (20, 40)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_a_damaged_file_is_read_or_refused(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # lmms-eval's tasks switch it on when imported
    path, rng = tmp_path / f"picture.{form.lower()}", np.random.default_rng(0)
    Image.effect_noise((40, 30), 90).convert("RGB").save(path, format=form, exif=Image.Exif())
    whole, refused = path.read_bytes(), 0
    for _ in range(60):
        content = bytearray(whole)
        for place in rng.integers(0, len(whole), 8):
            content[place] = rng.integers(256)
        path.write_bytes(content[: rng.integers(1, len(whole))] if rng.random() < 0.5 else content)
        try:
            assert open_image(path).mode == "RGB"
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 10


def test_bounds_are_checked_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.png"
    Image.new("RGB", (200, 100)).save(path)
    assert open_image(path, max_pixels=20_000).size == (200, 100)

    def decode(*arguments: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", decode)
    with pytest.raises(InputError, match="200 x 100 pixels, more than 19999"):
        open_image(path, max_pixels=19_999)


def test_a_label_hides_the_path(tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(b"nothing")
    with pytest.raises(InputError) as caught:
        open_image(path, label="The image")
    assert "secret" not in str(caught.value) and str(caught.value).startswith("The image cannot be read")


def test_first_line() -> None:
    assert first_line(ValueError("\n  one\ntwo")) == "one"
    assert first_line(ValueError("")) == "ValueError"
    assert len(first_line(ValueError("word " * 200))) <= 250
