"""The driver of measurements: what it measures on a real tower, its file, when it ends, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llava_prompts import N, make_prompt, prefill, small_llava
from model_state import model_state
from torch import Tensor, nn

import vlmprune
from vlmprune.core.errors import ActiveError, InputError, UnsupportedError
from vlmprune.core.measured import read_measured
from vlmprune.measurement import count_images, run_tower
from vlmprune.policies.dymu import DyMU

KEEP = 8
Batch = dict[str, Tensor]


def batches(count: int, size: int = 3, seed: int = 0) -> list[Batch]:
    """Pictures of noise, smoother ones and rougher ones."""
    found = []
    for number in range(count):
        pixels = make_prompt((1,) * size, seed=seed + number).pixels
        assert pixels is not None
        smooth = torch.linspace(0.1, 1, size)[:, None, None, None]
        found.append({"pixel_values": pixels * smooth})
    return found


def one_by_one(given: list[Batch], taken: list[int], stop_at: int | None = None) -> Iterator[Batch]:
    """The batches, noting which were asked for; a broken disk after ``stop_at``."""
    for number, batch in enumerate(given):
        if number == stop_at:
            raise OSError("disk")
        taken.append(number)
        yield batch


def first_threshold(model: nn.Module, batch: Batch, merges: int) -> float:
    """Threshold of block 0 by transformers' own modules: the best pair of the batch that does not merge."""
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    block = tower.encoder.layers[0]
    with torch.no_grad():
        states = tower.pre_layrnorm(tower.embeddings(batch["pixel_values"]))
        keys = block.self_attn.k_proj(block.layer_norm1(states))
    keys = keys.unflatten(-1, (block.self_attn.num_heads, -1)).mean(2).double()
    keys = keys / keys.norm(dim=-1, keepdim=True)
    even, odd = keys[:, 2::2], keys[:, 1::2]  # CLS stands at 0
    best = (even @ odd.mT).amax(2).flatten().sort(descending=True).values
    return float(best[merges])


def test_what_is_measured_on_a_tower(tmp_path: Path) -> None:
    model, given, path = small_llava(), batches(4), tmp_path / "found.json"
    prefill(model, make_prompt((1,)))  # transformers installs hooks of its own
    before, steps = model_state(model), []
    found = vlmprune.measure(
        model, "dymu", given, keep=KEEP, held_out=batches(2, seed=50), output=path, progress=lambda *s: steps.append(s)
    )
    assert model_state(model) == before
    assert read_measured(path) == found
    blocks = [mean.layer for mean in found.values]
    plan = DyMU(keep=KEEP).plan(_info(model), DyMU(keep=KEEP).budget, N)
    assert blocks == [block for block, r in enumerate(plan) if r > 0] and all(m.count == 4 for m in found.values)
    values = [first_threshold(model, batch, 3 * plan[0]) for batch in given]
    assert found.values[0].mean == pytest.approx(np.mean(values), abs=1e-5)
    assert found.values[0].standard_error == pytest.approx(np.std(values, ddof=1) / 2, abs=1e-5)
    assert (found.batches, found.samples, found.converged) == (4, 12, False)
    assert [step[0] for step in steps] == [1, 2, 3, 4] and steps[0][1] is None
    assert steps[-1][1] == max(m.standard_error for m in found.values if m.standard_error is not None)
    assert found.held_out is not None and found.held_out.samples == 6
    assert (found.held_out.entered, found.held_out.wanted) == (6 * N, 6 * KEEP)
    with vlmprune.applied(model, "dymu", keep=KEEP, artefact=path, unmerge=False) as handle:
        left = 0
        for batch in batches(2, seed=50):
            prompt = make_prompt((1,) * 3)
            with torch.no_grad():
                model(**{**prompt.inputs, **batch})
            left += sum(handle.last.kept_tokens)
            assert handle.tower_sites == tuple(handle.last.tower_sites)
    assert left == found.held_out.left
    assert found.held_out.deviation == pytest.approx(left / (6 * KEEP) - 1)


def _info(model: nn.Module) -> Any:
    with vlmprune.applied(model, "dymu") as handle:
        return handle.info


def test_it_ends_when_it_knows_enough() -> None:
    """Equal batches have no error; the next one is not even asked for."""
    model, taken = small_llava(), []
    found = vlmprune.measure(model, "dymu", one_by_one(batches(1) * 9, taken), keep=KEEP, least=4)
    assert found.converged and found.batches == 4 and taken == [0, 1, 2, 3]
    assert all(mean.standard_error == pytest.approx(0, abs=1e-9) for mean in found.values)
    found = vlmprune.measure(model, "dymu", batches(5), keep=KEEP, least=2, tolerance=10.0)
    assert found.converged and found.batches == 2 and found.held_out is None


def test_a_run_goes_on_where_its_file_stops(tmp_path: Path) -> None:
    model, given, path, taken = small_llava(), batches(5), tmp_path / "found.json", []
    whole = vlmprune.measure(model, "dymu", given, keep=KEEP)
    with pytest.raises(OSError, match="disk"):
        vlmprune.measure(model, "dymu", one_by_one(given, taken, stop_at=3), keep=KEEP, output=path)
    assert read_measured(path).batches == 3 and taken == [0, 1, 2]
    done: list[int] = []
    options: dict[str, Any] = {"keep": KEEP, "output": path, "progress": lambda number, error: done.append(number)}
    resumed = vlmprune.measure(model, "dymu", given, **options)
    assert resumed == whole == read_measured(path) and done == [4, 5]
    assert vlmprune.measure(model, "dymu", given, **options) == whole and done == [4, 5]
    more = vlmprune.measure(model, "dymu", [*given, *batches(1, seed=9)], **options)
    assert more.batches == 6 and done == [4, 5, 6]
    assert vlmprune.measure(model, "dymu", given[:1], resume=False, **options).batches == 1


def test_a_file_of_another_run_is_not_continued(tmp_path: Path) -> None:
    model, given, path = small_llava(), batches(2), tmp_path / "found.json"
    vlmprune.measure(model, "dymu", given, keep=KEEP, output=path)
    for other, parameters, what in (
        (given[::-1], {"keep": KEEP}, "data"),
        (given[:1], {"keep": KEEP}, "batches"),
        (given, {"keep": 9}, "settings"),
        (given, {"keep": KEEP, "schedule": "linear"}, "settings"),
    ):
        with pytest.raises(InputError, match=f"calibration of another {what}.*resume=False"):
            vlmprune.measure(model, "dymu", other, output=path, **parameters)
    with pytest.raises(InputError, match="calibration of another model"):
        vlmprune.measure(small_llava(text_layers=5), "dymu", given, keep=KEEP, output=path)


def test_refusals(tmp_path: Path) -> None:
    model = small_llava()
    with pytest.raises(InputError, match="'random' measures nothing"):
        vlmprune.measure(model, "random", batches(1), keep=0.5)
    with pytest.raises(InputError, match="'dymu' measures nothing"):
        vlmprune.measure(model, "dymu", batches(1), keep=0.5, thresholds=0.5)
    with pytest.raises(InputError, match="'dymu' is measured, not searched: vlmprune.measure"):
        vlmprune.calibrate(model, "dymu", batches(1), keep=0.5)
    with pytest.raises(InputError, match="no batch"):
        vlmprune.measure(model, "dymu", [], keep=0.5)
    with pytest.raises(InputError, match="needs pixel_values"):
        vlmprune.measure(model, "dymu", [{"input_ids": torch.ones(1, 3)}], keep=0.5)
    bad: list[tuple[Any, str]] = [
        ([torch.zeros(1, 3, 24, 24)], "A batch is a dict .* not Tensor"),
        (batches(1)[0], "A batch is a dict .* not str"),
        ([{"pixel_values": torch.zeros(1, 3, 24, 24, dtype=torch.uint8)}], "a floating tensor of an image or more"),
        ([{"pixel_values": torch.zeros(0, 3, 24, 24)}], "a floating tensor of an image or more"),
        (
            [*batches(1), {"pixel_values": torch.full_like(batches(1)[0]["pixel_values"], torch.nan)}],
            "hold NaN or infinity",
        ),
    ]
    for given, message in bad:
        with pytest.raises(InputError, match=message):
            vlmprune.measure(model, "dymu", given, keep=0.5)
    with pytest.raises(InputError, match="train mode"):
        vlmprune.measure(small_llava().train(), "dymu", batches(1), keep=0.5)
    with pytest.raises(InputError, match="Folder .* does not exist"):
        vlmprune.measure(model, "dymu", batches(1), keep=0.5, output=tmp_path / "none" / "found.json")
    for options, message in (({"least": 1}, "least=1"), ({"tolerance": 0.0}, "tolerance=0.0")):
        with pytest.raises(InputError, match=message):
            vlmprune.measure(model, "dymu", batches(1), keep=0.5, **options)
    with vlmprune.applied(model, "random", keep=0.5), pytest.raises(ActiveError, match="pruned already"):
        vlmprune.measure(model, "dymu", batches(1), keep=0.5)
    with pytest.raises(UnsupportedError):
        vlmprune.measure(model.model.language_model, "dymu", batches(1), keep=0.5)


class Tower(nn.Module):
    """Remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
        self.seen: dict[str, Any] = {}


class ByName(Tower):
    def forward(self, pixel_values: Tensor, pixel_attention_mask: Tensor | None = None) -> None:
        self.seen = {"pixel_values": pixel_values, "pixel_attention_mask": pixel_attention_mask}


class ByPlace(Tower):
    def forward(self, x: Tensor) -> None:
        self.seen = {"x": x}


class Dual(Tower):
    def encode_image(self, image: Tensor, normalize: bool = False) -> None:
        self.seen = {"image": image}


def test_every_kind_of_tower_is_given_its_pictures() -> None:
    pixels, mask = torch.rand(2, 3, 4, 4), torch.ones(2, 4, 4, dtype=torch.long)
    inputs = {"pixel_values": pixels, "pixel_attention_mask": mask, "input_ids": torch.ones(2, 5)}
    for tower, name in ((ByName(), "pixel_values"), (ByPlace(), "x"), (Dual(), "image")):
        run_tower(tower, inputs)
        assert torch.equal(tower.seen.pop(name), pixels.bfloat16())
        assert not tower.seen or torch.equal(tower.seen["pixel_attention_mask"], mask)
    assert count_images(inputs) == 2
    assert count_images({"pixel_values": torch.rand(24, 8), "image_grid_thw": torch.ones(3, 3)}) == 3
