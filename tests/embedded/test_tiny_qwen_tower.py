"""Tokens merged inside the tower of the shipped tiny-qwen, with policies behind, and the picture of what is left."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import vlmprune
from vlmprune.embedded import load_embedded
from vlmprune.embedded.qwen_processor import qwen_prompt
from vlmprune.embedded.scenes import HELD_OUT, for_size, generate_scene
from vlmprune.plot import draw_tokens, plot_selection

SIZES = ((224, 224), (160, 256))
"""Width and height of the pictures."""


@pytest.fixture(scope="module")
def tiny():
    return load_embedded("tiny-qwen")


def pictures():
    scenes = [
        generate_scene(np.random.default_rng(i), "test", for_size(HELD_OUT, (h, w))) for i, (w, h) in enumerate(SIZES)
    ]
    return [Image.fromarray(scene.image) for scene in scenes]


@pytest.mark.parametrize("policy", [vlmprune.HiPrune(keep=0.5), vlmprune.ToDRE(keep=0.5)], ids=lambda p: p.name)
def test_policies_behind_a_merge_and_their_picture(tiny, policy):
    model, processor = tiny
    images = pictures()
    prompts = [qwen_prompt(question) for question in ("what color is the circle?", "what digit is shown in the scene?")]
    inputs = processor(text=prompts, images=images, padding=True, return_tensors="pt")
    merging = vlmprune.ToMe(r=[6, 0, 3])
    with torch.no_grad(), vlmprune.applied(model, merging) as handle:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        groups = [handle.last.groups(row) for row in range(2)]
        widths = handle.last.tower_attended
    assert widths[0] > widths[1] == widths[2] > widths[3]
    for row, (width, height) in enumerate(SIZES):
        units = (width // 16) * (height // 16)
        assert sorted(token for group in groups[row] for token in group) == list(range(units))
        assert max(map(len, groups[row])) > 2 and len(groups[row]) < 0.5 * units
        assert all(len({window_of(token, width // 16) for token in group}) == 1 for group in groups[row])
    with torch.no_grad(), vlmprune.applied(model, [merging, policy]) as handle:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        report = handle.last
    for row, image in enumerate(images):
        left = report.groups(row)
        assert 0 < len(left) < len(groups[row]) and all(group in groups[row] for group in left)
        width, height = image.size
        drawn = plot_selection(image, report, sample=row, processor=processor)
        wish = draw_tokens(image, (height // 16, width // 16), sorted(sum(left, [])), left)
        assert np.array_equal(np.asarray(drawn), np.asarray(wish))


def window_of(token, columns):
    """Window of 4 x 4 tokens in which a token lies."""
    return token // columns // 4, token % columns // 4
