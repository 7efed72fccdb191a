"""Pictures of one digit: determinism, disjoint splits, labels and patches recomputed independently."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from vlmprune.core.errors import InputError
from vlmprune.embedded.bank import load_bank
from vlmprune.embedded.digit_pictures import (
    HELD_OUT,
    LUMINANCE,
    PictureSettings,
    digit_picture,
    draw_picture,
)


def test_a_picture_is_a_function_of_its_number_split_and_seed():
    first, again = digit_picture(7), digit_picture(7)
    assert np.array_equal(first.image, again.image) and (first.bbox, first.source) == (again.bbox, again.source)
    assert first.image.shape == (224, 224, 3) and first.image.dtype == np.uint8
    for other in (digit_picture(17), digit_picture(7, "train"), digit_picture(7, seed=1)):
        assert other.label == 7 and not np.array_equal(other.image, first.image)


def test_labels_are_balanced_and_those_of_the_handwritten_digit():
    pictures = [digit_picture(number, split, seed=3) for split in ("train", "test") for number in range(30)]
    for number, picture in enumerate(pictures):
        bank = load_bank("train" if number < 30 else "test")
        assert picture.label == number % 10 == bank.digit_labels[picture.source]
    drawn = [draw_picture(np.random.default_rng(number)).label for number in range(200)]
    assert len(set(drawn)) == 10


def test_splits_share_no_digit_and_no_photo():
    train, test = load_bank("train"), load_bank("test")
    rows = {image.tobytes() for image in train.digit_images}
    assert len(rows) == len(train.digit_images) and not rows & {image.tobytes() for image in test.digit_images}
    used = {split: {digit_picture(n, split, 1).background for n in range(60)} for split in ("train", "test")}
    assert used["test"] == {f"photo:{name}" for name in test.photo_names}
    assert not used["train"] & used["test"]


def test_the_digit_lies_in_its_box_and_has_the_contrast():
    """Painted without clutter on a plain ground, the picture differs from the ground inside the box only."""
    settings = PictureSettings(clutter=(0, 0), plain=1.0, opacity=(1.0, 1.0))
    for seed in range(20):
        picture = draw_picture(np.random.default_rng(seed), "train", settings)
        x0, y0, x1, y1 = picture.bbox
        assert 36 <= x1 - x0 == y1 - y0 == picture.size <= 52 and min(x0, y0) >= 0 and max(x1, y1) <= 224
        outside = picture.image.astype(int)
        inside = outside[y0:y1, x0:x1] @ LUMINANCE
        edge = picture.size // 8  # the card's corners show the ground
        middle = inside[edge:-edge, edge:-edge]
        assert middle.max() - middle.min() == pytest.approx(picture.contrast, abs=3)
        outside[y0:y1, x0:x1] = outside[y0 - 1 if y0 else y1, x0]
        assert (outside == outside[0, 0]).all()


def test_patches_are_those_that_the_box_covers():
    for number in range(20):
        picture = digit_picture(number)
        x0, y0, x1, y1 = picture.bbox
        canvas = Image.new("L", (224, 224))
        ImageDraw.Draw(canvas).rectangle((x0, y0, x1 - 1, y1 - 1), fill=255)
        share = np.asarray(canvas, dtype=float).reshape(14, 16, 14, 16).mean(axis=(1, 3)) / 255
        np.testing.assert_allclose(picture.coverage, share, atol=1e-9)
        assert (picture.patches == (share > 0)).all() and 9 <= picture.patches.sum() <= 25


def test_bad_arguments_are_refused():
    for arguments in ((0, "valid"), (-1, "test"), (0, "test", -1)):
        with pytest.raises(InputError, match="split"):
            digit_picture(*arguments)
    assert HELD_OUT.plain == 0
