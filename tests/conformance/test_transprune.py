"""TransPrune against the official code on small Llama models.

Golden kinds -> settings:
- `ttv`: one module's transitions.
- `reference`: `TransPrune(keep=ratios, layers=prune_layers, accumulate=accumulate_layers - 1)` on the stock
  LlamaModel: the golden layers count from 1, and "after layer p" is before the 0-based layer p. Ratios of 1 plan no
  cut, so there the scores are recorded by a policy that acts all the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from golden_io import Case
from golden_llama import check_run
from torch import Tensor

from vlmprune.adapters.transitions import transition
from vlmprune.core.context import Context
from vlmprune.core.info import ModelInfo
from vlmprune.policies.transprune import TransPrune


@dataclass(frozen=True)
class Recorded(TransPrune):
    """TransPrune that writes down its scores, and acts where it keeps everything too."""

    tape: list[Tensor] = field(default_factory=list, compare=False)

    def reduces(self, info: ModelInfo) -> bool:
        return True

    def stage_scores(self, context: Context, stage: int) -> Tensor:
        self.tape.append(super().stage_scores(context, stage))
        return self.tape[-1]


def settings(case: Case) -> dict[str, tuple[float, ...]]:
    return {
        "keep": tuple(round(float(ratio), 6) for ratio in case.params["keep_ratios"]),
        "layers": tuple(case.params["prune_layers"].tolist()),
        "accumulate": tuple((case.params["accumulate_layers"] - 1).tolist()),
    }


@pytest.mark.golden("transprune", "ttv")
def test_transitions(case: Case) -> None:
    before, after = (torch.from_numpy(case.inputs[name]) for name in ("before", "after"))
    ratio, cosine = transition(before, after)
    valid = torch.ones(ratio.shape, dtype=torch.bool)
    expected = torch.from_numpy(case.outputs["ttv"])
    torch.testing.assert_close(TransPrune().variation(ratio, cosine, valid), expected, rtol=1e-5, atol=1e-6)
    # Padding of any value changes nothing.
    longer = [torch.cat([value, torch.full((len(value), 3), -7.0)], 1) for value in (ratio, cosine)]
    mask = torch.cat([valid, valid.new_zeros(len(valid), 3)], 1)
    padded = TransPrune().variation(*longer, mask)
    torch.testing.assert_close(padded[:, :-3], expected, rtol=1e-5, atol=1e-6)
    assert not padded[:, -3:].any()


@pytest.mark.golden("transprune", "reference")
def test_stages_in_a_decoder(case: Case) -> None:
    policy = Recorded(**settings(case))
    run = check_run(case, policy)
    report, layers = run.handle.last, policy.layers
    assert len(policy.tape) == len(report.sites) == len(layers)
    for stage, (site, layer) in enumerate(zip(report.sites, layers, strict=True)):
        expected = torch.from_numpy(case.outputs[f"stage{stage}/score"])
        torch.testing.assert_close(policy.tape[stage][0], expected, rtol=1e-5, atol=1e-6)
        assert report.kept(layer=layer) == case.outputs[f"stage{stage}/kept"].tolist()
        assert (site.layer, site.positions, site.tokens_in) == (layer, "compact", (len(expected),))
    assert run.lengths == run.stored


@pytest.mark.golden("transprune", "reference")
def test_the_policy_itself(case: Case) -> None:
    """Without the recorder: ratios of 1 cut nothing and give the same hidden states."""
    policy = TransPrune(**settings(case))
    run = check_run(case, policy)
    assert len(run.handle.last.sites) == (0 if policy.budget.is_all else len(policy.layers))
