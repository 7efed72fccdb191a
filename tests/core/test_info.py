"""Facts about models: layers by index, from the end, and by share of the depth."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmprune.core.errors import InputError
from vlmprune.core.info import ModelInfo

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True)


def model(vision: int | None = 24, text: int | None = 32, feature: int | None = 22) -> ModelInfo:
    return ModelInfo("llava", "LlavaModel", vision_depth=vision, text_depth=text, feature_block=feature)


def nearest(share: Fraction, depth: int) -> int:
    """Whole number of layers nearest to a share, halves up."""
    return math.floor(share * depth + Fraction(1, 2))


@pytest.mark.parametrize(("layer", "expected"), [(0, 0), (22, 22), (-1, 22), (-2, 21), (-23, 0)])
def test_vision_layers_count_up_to_the_feature_block(layer: int, expected: int) -> None:
    assert model().vision_layer(layer) == expected


@pytest.mark.parametrize("layer", [23, 24, 100, -24, -100])
def test_vision_layers_beyond_it_are_refused(layer: int) -> None:
    with pytest.raises(InputError, match=rf"Vision layer {layer} .*LlavaModel: blocks 0 to 22 .*24"):
        model().vision_layer(layer)


@pytest.mark.parametrize(
    ("depth", "share", "expected"),
    [(24, 0.5, 11), (24, 1.0, 22), (24, 0.0, 0), (12, 0.25, 2), (27, 0.5, 13), (24, 9 / 24, 8)],
)
def test_vision_shares(depth: int, share: float, expected: int) -> None:
    """A share of the depth is a number of blocks; its last block is meant, never beyond the feature block."""
    assert model(vision=depth, feature=depth - 2).vision_layer(share) == expected


@pytest.mark.parametrize(("layer", "expected"), [(0, 0), (2, 2), (31, 31), (-1, 31), (-32, 0)])
def test_text_layers(layer: int, expected: int) -> None:
    assert model().text_layer(layer) == expected


@pytest.mark.parametrize(("layer", "minimum"), [(32, 0), (-33, 0), (0, 1), (-32, 1), (2, 3)])
def test_text_layers_out_of_range(layer: int, minimum: int) -> None:
    message = rf"Decoder layer {layer} .* 32 layers, .*from {minimum} to 31 .*from 0"
    with pytest.raises(InputError, match=message):
        model().text_layer(layer, minimum)


@pytest.mark.parametrize(
    ("depth", "share", "minimum", "expected"),
    [
        (32, 0.0625, 1, 2),
        (28, 0.0625, 1, 2),
        (6, 0.0625, 1, 1),
        (6, 0.0, 0, 0),
        (32, 1.0, 0, 31),
        (32, 0.5, 20, 20),
        (3, 0.5, 0, 2),
    ],
)
def test_text_shares(depth: int, share: float, minimum: int, expected: int) -> None:
    assert model(text=depth).text_layer(share, minimum) == expected


@PROPERTY
@given(depth=st.integers(1, 80), numerator=st.integers(0, 64), minimum=st.integers(0, 3))
def test_shares_stay_in_range_and_near(depth: int, numerator: int, minimum: int) -> None:
    share = Fraction(numerator, 64)  # exact in binary
    info = model(vision=depth, text=depth, feature=depth - 1)
    assert info.vision_layer(float(share)) == min(depth - 1, max(0, nearest(share, depth) - 1))
    if minimum < depth:
        expected = min(depth - 1, max(minimum, nearest(share, depth)))
        assert info.text_layer(float(share), minimum) == expected
    else:
        with pytest.raises(InputError, match="out of range"):
            info.text_layer(float(share), minimum)


@PROPERTY
@given(depth=st.integers(1, 60), other=st.integers(1, 60))
def test_a_layer_of_one_depth_carries_over_to_another(depth: int, other: int) -> None:
    """Layer / depth of one model lands on the same layer there and on the nearest of another model."""
    for layer in range(depth):
        share = layer / depth
        assert model(text=depth).text_layer(share) == layer
        distance = [abs(candidate - share * other) for candidate in range(other)]
        assert distance[model(text=other).text_layer(share)] <= min(distance) + 1e-9


@pytest.mark.parametrize("layer", [1.5, 32.0, -0.1, math.nan, math.inf])
def test_shares_out_of_range(layer: float) -> None:
    for resolve in (model().text_layer, model().vision_layer):
        with pytest.raises(InputError, match=r"not a share .*\[0, 1\]; .*integer"):
            resolve(layer)


@pytest.mark.parametrize("layer", [0, 0.5, -1])
def test_missing_stacks(layer: Any) -> None:
    with pytest.raises(InputError, match="LlavaModel has no vision tower"):
        model(vision=None, feature=None).vision_layer(layer)
    with pytest.raises(InputError, match="LlavaModel has no decoder"):
        model(text=None).text_layer(layer)


def test_info_is_frozen_and_notes_do_not_count() -> None:
    info = model()
    assert dataclasses.replace(info, notes={"a": "b"}) == info
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.text_depth = 3  # type: ignore[misc]
