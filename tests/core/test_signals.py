"""Signals and site requests are values: frozen, hashable, equal by content."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

from vlmprune.core import signals
from vlmprune.core.signals import AttentionRows, ClsRow, ColumnMass, Hidden, Keys, Signal
from vlmprune.core.sites import Site, SiteRequest

# Arguments of one signal of every kind, and another one that differs from it.
SAMPLES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ColumnMass": ({"stack": "vision", "layer": 3}, {"stack": "vision", "layer": 3, "reduce": "sum"}),
    "ClsRow": ({"layer": 3}, {"layer": 4}),
    "ClsLogits": ({"layer": 3}, {"layer": 4}),
    "Keys": ({"stack": "vision", "layer": 3}, {"stack": "text", "layer": 3}),
    "KeyMean": ({"layer": 3}, {"layer": 4}),
    "HeadAttention": ({"layer": 3}, {"layer": 4}),
    "QK": ({"stack": "vision", "layer": 3}, {"stack": "text", "layer": 3}),
    "Attention": ({"layer": 3}, {"layer": 4}),
    "Hidden": ({"stack": "text", "layer": 3}, {"stack": "text", "layer": 3, "when": "in"}),
    "PreProjector": ({}, {"optional": True}),
    "Projected": ({}, {"optional": True}),
    "Projector": ({}, {"optional": True}),
    "TextEmbeddings": ({}, {"optional": True}),
    "JointEmbeddings": ({}, {"optional": True}),
    "Pixels": ({}, {"optional": True}),
    "AttentionRows": ({"stack": "text", "layer": 3, "rows": (1, 2)}, {"stack": "text", "layer": 3}),
    "ProbeAttention": ({"layer": 3}, {"layer": 3, "rows": "text_after"}),
    "GroupMass": ({"layer": 3}, {"layer": 4}),
    "ModuleTransition": ({"layer": 3, "module": "attn"}, {"layer": 3, "module": "mlp"}),
    "FinalNorm": ({}, {"optional": True}),
    "DecodeRows": ({"layer": 3}, {"layer": 4}),
}


def kinds() -> dict[str, type[Signal]]:
    found = inspect.getmembers(signals, inspect.isclass)
    return {name: cls for name, cls in found if issubclass(cls, Signal) and cls is not Signal}


def test_every_kind_is_tested() -> None:
    assert set(kinds()) == set(SAMPLES)


@pytest.mark.parametrize("name", SAMPLES)
def test_signals_are_values(name: str) -> None:
    cls, (arguments, others) = kinds()[name], SAMPLES[name]
    signal, twin, other = cls(**arguments), cls(**arguments), cls(**others)
    assert signal == twin and hash(signal) == hash(twin) and signal is not twin
    assert signal != other
    assert {signal: 1, other: 2}[twin] == 1
    assert not signal.optional and cls(**{**arguments, "optional": True}).optional
    with pytest.raises(dataclasses.FrozenInstanceError):
        signal.optional = True  # type: ignore[misc]
    assert cls.__doc__ and not cls.__doc__.startswith(f"{name}(")


def test_signals_of_different_kinds_differ() -> None:
    built = [kinds()[name](**arguments) for name, (arguments, _) in SAMPLES.items()]
    assert len(set(built)) == len(SAMPLES)


@pytest.mark.parametrize(
    ("signal", "stack"),
    [
        (ColumnMass("vision", 1), "vision"),
        (ColumnMass("text", 1), "text"),
        (ClsRow(1), "vision"),
        (signals.ClsLogits(1), "vision"),
        (signals.PreProjector(), "vision"),
        (signals.Pixels(), "vision"),
        (Keys("text", 1), "text"),
        (signals.KeyMean(1), "vision"),
        (signals.HeadAttention(1), "vision"),
        (signals.GroupMass(1), "text"),
        (signals.DecodeRows(1), "text"),
        (AttentionRows("text", 1), "text"),
    ],
)
def test_stacks(signal: Signal, stack: str) -> None:
    assert signal.stack_name == stack


def test_per_token_says_which_tensors_follow_a_selection() -> None:
    """Single tensors whose second axis counts visual tokens: no pairs, callables or rows of attention."""
    assert {name for name, cls in kinds().items() if cls.per_token} == {
        "ClsLogits",
        "ClsRow",
        "ColumnMass",
        "DecodeRows",
        "Hidden",
        "KeyMean",
        "Keys",
        "PreProjector",
        "Projected",
    }


def test_sites_stand_in_the_order_of_a_forward() -> None:
    assert [site.value for site in Site] == [
        "image",
        "vision_block",
        "post_encoder",
        "decoder_layer",
        "kv_cache",
    ]
    assert Site("kv_cache") is Site.KV_CACHE
    assert f"{Site.POST_ENCODER}" == "post_encoder"


def test_requests_are_values() -> None:
    request = SiteRequest(Site.DECODER_LAYER, 2, (Hidden("text", 1),))
    assert request == SiteRequest(Site.DECODER_LAYER, 2, (Hidden("text", 1),))
    assert len({request, SiteRequest(Site.DECODER_LAYER, 3)}) == 2
    assert (request.positions, request.projected) == ("keep", True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.layer = 5  # type: ignore[misc]
