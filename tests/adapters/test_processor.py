"""Policies that act on images: the processor instance is wrapped while the policy is applied, and only then."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vlmprune
from vlmprune.core.errors import InputError

PROMPT = "USER: <image>\nwhat shape is at the top? ASSISTANT:"


@pytest.fixture(scope="module")
def model() -> Any:
    return vlmprune.load_embedded("tiny-llava")[0]


@pytest.fixture
def processor() -> Any:
    from transformers import AutoProcessor

    from vlmprune.embedded import model_path

    return AutoProcessor.from_pretrained(model_path("tiny-llava"))


def picture(width: int = 224, height: int = 224, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def pixels(processor: Any, *images: Image.Image) -> torch.Tensor:
    texts = [PROMPT] * len(images)
    return processor(images=list(images), text=texts, return_tensors="pt", padding=True)["pixel_values"]


def test_the_model_sees_a_smaller_image(model: Any, processor: Any) -> None:
    image = picture(300, 200)
    dense = pixels(processor, image)
    small = image.resize((150, 100), Image.Resampling.BICUBIC)
    expected = pixels(processor, small)
    with vlmprune.applied(model, "downsample", keep=0.25, processor=processor):
        got = pixels(processor, image)
        assert torch.equal(got, expected) and not torch.equal(got, dense)
        assert image.size == (300, 200)
    assert torch.equal(pixels(processor, image), dense)


def test_geometry_is_reported(model: Any, processor: Any) -> None:
    images = [picture(300, 200), picture(90, 91, seed=1)]
    with vlmprune.applied(model, "downsample", factor=3, processor=processor) as handle:
        inputs = processor(images=images, text=[PROMPT] * 2, return_tensors="pt", padding=True)
        with torch.no_grad():
            model(**inputs)
        assert handle.last.geometry == [
            {"size": [300, 200], "reduced_size": [100, 66]},
            {"size": [90, 91], "reduced_size": [30, 30]},
        ]
        assert handle.last.summary()["geometry"] == handle.last.geometry
        # This model's number of tokens is fixed: it sees a blurred image, and that is no reason to warn.
        assert handle.last.kept_tokens == handle.last.visual_tokens == (196, 196)
        assert handle.last.warnings == []


def test_members_of_a_composition_all_act(model: Any, processor: Any) -> None:
    image = picture()
    dense = pixels(processor, image)
    policies = [vlmprune.Downsample(keep=0.25), vlmprune.Uniform(keep=0.5)]
    with vlmprune.applied(model, policies, processor=processor) as handle, torch.no_grad():
        inputs = processor(images=[image], text=[PROMPT], return_tensors="pt")
        assert not torch.equal(inputs["pixel_values"], dense)
        model(**inputs)
        assert handle.last.kept_tokens == (98,)
        assert handle.last.geometry == [{"size": [224, 224], "reduced_size": [112, 112]}]


def test_a_nested_batch_and_a_single_image(model: Any, processor: Any) -> None:
    with vlmprune.applied(model, "downsample", keep=0.25, processor=processor) as handle:
        single = processor(images=picture(), text=PROMPT, return_tensors="pt")["pixel_values"]
        nested = processor(
            images=[[picture()], [picture(seed=1)]], text=[PROMPT] * 2, return_tensors="pt", padding=True
        )["pixel_values"]
        assert torch.equal(single[0], nested[0])
        assert nested.shape[0] == 2
        processor(text="no image here", return_tensors="pt")
        with torch.no_grad():
            model(**processor(images=picture(), text=PROMPT, return_tensors="pt"))
        assert len(handle.last.geometry) == 1


def test_remove_gives_the_same_object_back(model: Any, processor: Any) -> None:
    original = processor.image_processor
    before = dict(processor.__dict__)
    handle = vlmprune.apply(model, "downsample", keep=0.25, processor=processor)
    assert processor.image_processor is not original
    assert processor.image_processor.size == original.size
    handle.remove()
    assert processor.image_processor is original
    assert processor.__dict__ == before
    handle.remove()
    assert processor.image_processor is original


def test_another_instance_is_left_alone(model: Any, processor: Any) -> None:
    other = copy.deepcopy(processor)
    image = picture()
    dense = pixels(other, image)
    with vlmprune.applied(model, "downsample", keep=0.25, processor=processor):
        assert torch.equal(pixels(other, image), dense)


def test_disabled_leaves_images_alone(model: Any, processor: Any) -> None:
    image = picture()
    dense = pixels(processor, image)
    with vlmprune.applied(model, "downsample", keep=0.25, processor=processor) as handle:
        small = pixels(processor, image)
        with handle.disabled():
            assert torch.equal(pixels(processor, image), dense)
            with handle.disabled():
                pass
            assert torch.equal(pixels(processor, image), dense)
        assert torch.equal(pixels(processor, image), small)


def test_saving_while_applied_writes_the_original_settings(model: Any, processor: Any, tmp_path: Path) -> None:
    from transformers import AutoProcessor

    image = picture()
    dense = pixels(processor, image)
    processor.save_pretrained(tmp_path / "before")
    with vlmprune.applied(model, "downsample", keep=0.25, processor=processor):
        processor.save_pretrained(tmp_path / "applied")
        assert not torch.equal(pixels(processor, image), dense)
    names = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "applied").iterdir())
    for name in names:
        before, applied = ((tmp_path / folder / name).read_text() for folder in ("before", "applied"))
        assert before == applied, name
        if name.endswith(".json"):
            json.loads(applied)
    assert torch.equal(pixels(AutoProcessor.from_pretrained(tmp_path / "applied"), image), dense)


def test_keeping_everything_needs_no_processor(model: Any, processor: Any) -> None:
    original = processor.image_processor
    with vlmprune.applied(model, "downsample", keep=1.0):
        pass
    with vlmprune.applied(model, "downsample", keep=1.0, processor=processor):
        assert processor.image_processor is original


def test_copies_while_applied(model: Any, processor: Any) -> None:
    """A copied processor still reduces; a copied model's handle owns a processor of its own."""
    image = picture()
    dense = pixels(processor, image)
    with vlmprune.applied(model, "downsample", keep=0.25, processor=processor) as handle:
        small = pixels(processor, image)
        assert torch.equal(pixels(copy.deepcopy(processor), image), small)
        assert torch.equal(pixels(pickle.loads(pickle.dumps(processor)), image), small)
        twin = copy.deepcopy(model)
        twin._vlmprune.remove()
        assert torch.equal(pixels(processor, image), small)
        assert handle.active
    assert torch.equal(pixels(processor, image), dense)


def test_other_policies_ignore_the_processor(model: Any, processor: Any) -> None:
    original = processor.image_processor
    with vlmprune.applied(model, "uniform", keep=0.5, processor=processor):
        assert processor.image_processor is original


def test_refusals(model: Any, processor: Any) -> None:
    with pytest.raises(InputError, match="downsample acts on images.*give processor=, the model's processor"):
        vlmprune.apply(model, "downsample", keep=0.25)
    with pytest.raises(InputError, match="has no image_processor; give the model's whole processor"):
        vlmprune.apply(model, "downsample", keep=0.25, processor=processor.tokenizer)
    second = copy.deepcopy(model)
    original = processor.image_processor
    with vlmprune.applied(model, "downsample", keep=0.25, processor=processor):
        with pytest.raises(InputError, match="in use by another applied policy; remove that one first"):
            vlmprune.apply(second, "downsample", keep=0.25, processor=processor)
        assert "_vlmprune" not in second.__dict__
        with pytest.raises(InputError, match="take PIL images, not ndarray"):
            pixels(processor, np.zeros((4, 4, 3), np.uint8))  # type: ignore[arg-type]
    assert processor.image_processor is original
