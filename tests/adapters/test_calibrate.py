"""The driver of calibrations: its objective, its file, and what it refuses. The search itself is tested elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fixed_policy import FixedKeep
from llava_prompts import make_prompt, prefill, small_llava
from model_state import model_state
from torch import Tensor, nn

import vlmprune
from vlmprune.adapters.detect import find_family
from vlmprune.calibration import LastToken, agreement
from vlmprune.core.artefact import read_artefact
from vlmprune.core.errors import ActiveError, InputError, UnsupportedError
from vlmprune.core.info import ModelInfo
from vlmprune.policies.vflowopt import VFlowOpt

pytestmark = pytest.mark.filterwarnings("ignore:.*nothing was reduced")


@dataclass
class Listed:
    """Proposes fixed numbers of tokens and remembers what came out."""

    counts: tuple[int, ...]
    done: list[tuple[dict[str, Any], float]] = field(default_factory=list)

    def propose(self) -> Mapping[str, Any] | None:
        return {"first": self.counts[len(self.done)]} if len(self.done) < len(self.counts) else None

    def update(self, settings: Mapping[str, Any], measured: Mapping[str, Any]) -> None:
        self.done.append((dict(settings), measured["objective"]))

    def result(self) -> Mapping[str, Any]:
        if not self.done:
            return {}
        best, value = max(self.done, key=lambda pair: pair[1])
        return {"best": best, "value": value}


@dataclass(frozen=True)
class FirstTokens(FixedKeep):
    """Keeps the first tokens of every image; how many is searched among 2, 12, 5 and 16."""

    name = "first_tokens"
    first: float = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "kept", (tuple(range(int(self.first))),))

    def calibration(self, info: ModelInfo, *, calls: int = 50, seed: int = 0) -> Listed:
        return Listed((2, 12, 5, 16)[:calls])


def samples(count: int = 2) -> list[dict[str, Tensor]]:
    return [make_prompt((1,), seed=seed).inputs for seed in range(1, count + 1)]


def states(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The last prompt token's state behind the final norm, by transformers' own output."""
    with torch.no_grad():
        return model(**inputs, output_hidden_states=True).hidden_states[-1][:, -1]


def expected(model: nn.Module, count: int, given: list[dict[str, Tensor]]) -> float:
    total = 0.0
    for inputs in given:
        dense = states(model, inputs)[0]
        with vlmprune.applied(model, FirstTokens(first=count)):
            pruned = states(model, inputs)[0]
        total += float(dense @ pruned / dense.norm() / pruned.norm())
    return total


def test_the_objective_is_the_summed_cosine(tmp_path: Path) -> None:
    model, given, path = small_llava(), samples(), tmp_path / "found.json"
    calls: list[tuple[int, int, float, float]] = []
    prefill(model, make_prompt((1,)))  # transformers installs hooks of its own
    before = model_state(model)
    found = vlmprune.calibrate(
        model, FirstTokens(), given, calls=4, seed=5, output=path, progress=lambda *facts: calls.append(facts)
    )
    assert model_state(model) == before
    values = [trial.measured["objective"] for trial in found.history]
    assert values == pytest.approx([expected(model, count, given) for count in (2, 12, 5, 16)], abs=1e-5)
    assert values[3] == pytest.approx(2.0, abs=1e-6) and min(values) < 1.999
    assert found.best == {"first": 16} and found.value == values[3]
    assert [facts[:3] for facts in calls] == [(i + 1, 4, value) for i, value in enumerate(values)]
    assert [facts[3] for facts in calls] == [max(values[: i + 1]) for i in range(4)]
    assert read_artefact(path) == found
    assert (found.policy, found.seed, found.calls, found.samples) == ("first_tokens", 5, 4, 2)
    assert found.model["class"] == "LlavaForConditionalGeneration" and found.model["text_depth"] == 4
    assert found.versions["vlmprune"] == vlmprune.__version__ and "transformers" in found.versions


def test_padding_on_either_side() -> None:
    model = small_llava()
    inputs = make_prompt((1,)).inputs
    alone = LastToken(find_family(model))(inputs)
    torch.testing.assert_close(alone, states(model, inputs))
    for left in (True, False):
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        extra = torch.zeros(1, 3, dtype=torch.long)
        order = (extra, ids) if left else (ids, extra)
        padded = {**inputs, "input_ids": torch.cat(order, 1)}
        padded["attention_mask"] = torch.cat((extra, mask) if left else (mask, extra), 1)
        torch.testing.assert_close(LastToken(find_family(model))(padded), alone, rtol=1e-4, atol=1e-4)


def test_states_without_a_direction_count_nothing() -> None:
    dense = [torch.tensor([[1.0, 0.0], [0.0, 2.0]])]
    assert agreement(dense, [torch.tensor([[2.0, 0.0], [torch.nan, 1.0]])]) == 1.0
    assert agreement(dense, [torch.tensor([[0.0, 1.0], [0.0, -1.0]])]) == -1.0


def test_the_dense_model_runs_once_per_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    model, runs = small_llava(), []
    monkeypatch.setattr(LastToken, "__call__", lambda self, sample: runs.append(sample) or torch.ones(1, 2))
    vlmprune.calibrate(model, FirstTokens(), samples(3), calls=4)
    assert len(runs) == 3 + 4 * 3


def test_a_run_goes_on_where_its_file_stops(tmp_path: Path) -> None:
    model, given, path = small_llava(), samples(), tmp_path / "found.json"
    whole = vlmprune.calibrate(model, FirstTokens(), given, calls=4)
    vlmprune.calibrate(model, FirstTokens(), given, calls=2, output=path)
    done: list[int] = []
    resumed = vlmprune.calibrate(
        model, FirstTokens(), given, calls=4, output=path, progress=lambda done_now, *_: done.append(done_now)
    )
    assert done == [3, 4] and resumed == whole == read_artefact(path)
    again = vlmprune.calibrate(model, FirstTokens(), given, calls=4, output=path, progress=lambda *_: done.append(0))
    assert again == whole and done == [3, 4]
    vlmprune.calibrate(model, FirstTokens(), given, calls=1, output=path, resume=False)
    assert len(read_artefact(path).history) == 1


def test_a_file_of_another_run_is_not_continued(tmp_path: Path) -> None:
    model, path = small_llava(), tmp_path / "found.json"
    vlmprune.calibrate(model, FirstTokens(), samples(), calls=1, output=path)
    for changes, what in (({"seed": 1}, "seed"), ({"data": samples(3)}, "data"), ({"keep": 0.25}, "settings")):
        policy = replace(FirstTokens(), **{k: v for k, v in changes.items() if k == "keep"})
        options = {"seed": changes.get("seed", 0), "output": path}
        with pytest.raises(InputError, match=f"calibration of another {what}.*resume=False"):
            vlmprune.calibrate(model, policy, changes.get("data", samples()), calls=2, **options)
    other = small_llava(text_layers=5)
    with pytest.raises(InputError, match="another model"):
        vlmprune.calibrate(other, FirstTokens(), samples(), calls=2, output=path)
    path.write_text("{")
    with pytest.raises(InputError, match="no calibration artefact"):
        vlmprune.calibrate(model, FirstTokens(), samples(), calls=2, output=path)


def test_refusals(tmp_path: Path) -> None:
    model = small_llava()
    with pytest.raises(InputError, match="'hiprune' has nothing to calibrate"):
        vlmprune.calibrate(model, "hiprune", samples(), keep=0.5)
    with pytest.raises(InputError, match="no samples"):
        vlmprune.calibrate(model, FirstTokens(), [])
    with pytest.raises(InputError, match="Folder .* does not exist"):
        vlmprune.calibrate(model, FirstTokens(), samples(), output=tmp_path / "none" / "found.json")
    with vlmprune.applied(model, "random", keep=0.5), pytest.raises(ActiveError, match="pruned already"):
        vlmprune.calibrate(model, FirstTokens(), samples())
    with pytest.raises(UnsupportedError):
        vlmprune.calibrate(model.model.language_model, FirstTokens(), samples())


def test_vflowopt_is_calibrated_and_loads_what_was_found(tmp_path: Path) -> None:
    model, given, path = small_llava(), samples(), tmp_path / "found.json"
    found = vlmprune.calibrate(model, "vflowopt", given, keep=0.4, alpha=0.0, calls=5, output=path)
    assert len(found.history) == 5 and found.best["alpha"] == 0.0
    assert all("r3" not in trial.settings for trial in found.history)
    best = max(found.history, key=lambda trial: trial.measured["objective"]).settings
    policies = (
        {"artefact": str(path)},
        {"artefact": path},
        {name: best[name] for name in ("r1", "r2", "t", "a")},
    )
    outputs = []
    for settings in policies:
        with vlmprune.applied(model, "vflowopt", keep=0.4, **settings):
            outputs.append(prefill(model, make_prompt((1,))).logits)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    with vlmprune.applied(model, "vflowopt", keep=0.4):
        assert not torch.equal(prefill(model, make_prompt((1,))).logits, outputs[0])
    with pytest.raises(InputError, match="calibrated for keep=0.4, not 0.5"):
        vlmprune.apply(model, "vflowopt", keep=0.5, artefact=str(path))
    with pytest.raises(InputError, match="calibrated for layers="):
        vlmprune.apply(model, "vflowopt", keep=0.4, layers=(1, 2), artefact=str(path))
    with pytest.raises(InputError, match="text_depth 4, not 6.*vlmprune calibrate vflowopt"):
        vlmprune.apply(small_llava(text_layers=6), "vflowopt", keep=0.4, artefact=str(path))
    with pytest.raises(InputError, match="loads an artefact already"):
        vlmprune.calibrate(model, VFlowOpt(keep=0.4, artefact=str(path)), given)
    assert json.loads(path.read_text())["best"]["r3"] == found.best["r3"]
