"""Prompts of the tests have the shape that the real image processors of transformers give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from family_prompts import make_family_prompt
from PIL import Image
from prompt_parts import IMAGE, VIDEO
from prompt_styles import STYLES

from vlmprune.embedded.random_models import FAMILIES, gemma, llava, qwen, tiled
from vlmprune.embedded.random_models import tokens as t

MIXED = (2, 1, 0)


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def clip() -> Any:
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": llava.TILE}, crop_size=square(llava.TILE))


def llava_next() -> Any:
    from transformers import LlavaNextImageProcessor

    sizes = {"size": {"shortest_edge": llava.TILE}, "crop_size": square(llava.TILE)}
    return LlavaNextImageProcessor(**sizes, image_grid_pinpoints=llava.NEXT_PINPOINTS)


def llava_onevision() -> Any:
    from transformers import LlavaOnevisionImageProcessor

    pinpoints = llava.ONEVISION_PINPOINTS
    return LlavaOnevisionImageProcessor(size=square(llava.TILE), image_grid_pinpoints=pinpoints)


def qwen_vl() -> Any:
    from transformers import Qwen2VLImageProcessor

    sizes = {"patch_size": qwen.PATCH, "merge_size": qwen.MERGE, "temporal_patch_size": qwen.TEMPORAL}
    return Qwen2VLImageProcessor(**sizes, min_pixels=64, max_pixels=10000)


def internvl() -> Any:
    from transformers import GotOcr2ImageProcessor

    return GotOcr2ImageProcessor(size=square(tiled.TILE), crop_to_patches=True, min_patches=1, max_patches=3)


def idefics3() -> Any:
    from transformers import Idefics3ImageProcessor

    return Idefics3ImageProcessor(
        size={"longest_edge": 2 * tiled.TILE}, max_image_size={"longest_edge": tiled.TILE}, do_image_splitting=True
    )


def smolvlm() -> Any:
    from transformers import SmolVLMImageProcessor

    return SmolVLMImageProcessor(
        size={"longest_edge": 2 * tiled.TILE}, max_image_size={"longest_edge": tiled.TILE}, do_image_splitting=True
    )


def siglip() -> Any:
    from transformers import SiglipImageProcessor

    return SiglipImageProcessor(size=square(gemma.IMAGE))


def gemma3() -> Any:
    from transformers import Gemma3ImageProcessor

    return Gemma3ImageProcessor(size=square(gemma.IMAGE))


PROCESSORS: dict[str, Callable[[], Any]] = {
    "llava": clip,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "qwen2_vl": qwen_vl,
    "qwen2_5_vl": qwen_vl,
    "qwen3_vl": qwen_vl,
    "internvl": internvl,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "paligemma": siglip,
    "gemma3": gemma3,
}
# The processors of these two enlarge every image until its longest side has two tiles.
SIZES = dict.fromkeys(("idefics3", "smolvlm"), ((24, 48), (48, 24), (48, 48)))


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_are_those_of_the_image_processor(family: str) -> None:
    sizes = SIZES.get(family, STYLES[family].sizes)
    prompt = make_family_prompt(family, MIXED, sizes=sizes)
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 256, (*sizes[i % len(sizes)], 3), dtype=np.uint8)) for i in range(sum(MIXED))
    ]
    nested = family in ("llava_onevision", "idefics3", "smolvlm")
    rows = [pictures[:2], pictures[2:], *([[]] if family != "llava_onevision" else [])]
    real = PROCESSORS[family]()(rows if nested else pictures, return_tensors="pt")
    assert set(prompt.vision) == set(real) - {"num_crops", "num_patches", "rows", "cols"}
    for name, tensor in prompt.vision.items():
        assert tensor.shape == real[name].shape, name
        if not name.startswith("pixel_values"):
            assert torch.equal(tensor, real[name]), name


@pytest.mark.parametrize(
    ("family", "video"), [(f, v) for f in FAMILIES for v in (False, True) if not v or STYLES[f].video]
)
def test_places_are_those_of_the_placeholders(family: str, video: bool) -> None:
    prompt = make_family_prompt(family, MIXED, padded=True, video=video, between=0)
    placeholders = {t.IMAGE_TOKEN_ID: IMAGE, t.VIDEO_TOKEN_ID: VIDEO}
    for row, images in enumerate(prompt.places()):
        flat = sum(images, [])
        assert flat == sorted(set(flat)) and len(images) == MIXED[row]
        for place in range(prompt.length):
            kind = placeholders.get(int(prompt.ids[row, place]), 0)
            assert kind == prompt.kinds[row, place] and (place in flat) == (kind > 0)
        alone = prompt.row(row)
        shift = prompt.length - alone.length
        assert [[shift + place for place in tokens] for tokens in alone.places()[0]] == images
        assert torch.equal(alone.ids[0], prompt.ids[row][prompt.real[row]])


def test_the_default_sizes_meet_the_cases_that_matter() -> None:
    grids = {
        family: [part.grids for row in make_family_prompt(family, (1, 1, 1, 1)).rows for part in row.parts]
        for family in FAMILIES
    }
    assert grids["llava_next"] == [((3, 3), (3, 7)), ((3, 3), (6, 4)), ((3, 3), (3, 6)), ((3, 3), (3, 4))]
    assert (5, 3) in [views[-1] for views in grids["llava_onevision"]]  # 6 x 4, shrunk
    assert len(set(grids["qwen2_5_vl"])) == 4
    assert (3, 5) in [views[0] for views in grids["qwen2_5_vl"]]  # not a multiple of its 2 x 2 windows
    assert {len(views) for views in grids["internvl"]} == {1, 3, 4}
    masks = make_family_prompt("idefics3", (1, 1)).vision["pixel_attention_mask"]
    assert masks.flatten(2).sum(-1).tolist() == [[576, 576, 576], [24 * 16, 0, 0]]
