"""FastV against the official code's KV-cache variant on small Llama models.

Golden kind -> settings: `reference`: `FastV(keep=1 - R, layer=K)` on the stock LlamaModel, original position ids.
R = 0 plans no cut, so there the score is recorded by a policy that acts all the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import contexts
import pytest
import torch
from golden_io import Case
from golden_llama import check_run
from torch import Tensor

from vlmprune.core.context import Context
from vlmprune.core.info import ModelInfo
from vlmprune.core.signals import AttentionRows
from vlmprune.policies.fastv import FastV


@dataclass(frozen=True)
class Recorded(FastV):
    """FastV that writes down its scores, and acts where it keeps everything too."""

    tape: list[Tensor] = field(default_factory=list, compare=False)

    def reduces(self, info: ModelInfo) -> bool:
        return True

    def scores(self, context: Context) -> Tensor:
        self.tape.append(super().scores(context))
        return self.tape[-1]


def keep_of(case: Case) -> float:
    return round(1 - case.ratio("R"), 6)


@pytest.mark.golden("fastv", "reference")
def test_a_cut_in_a_decoder(case: Case) -> None:
    policy = Recorded(keep=keep_of(case), layer=case.integer("K"))
    run = check_run(case, policy)
    torch.testing.assert_close(policy.tape[0][0], torch.from_numpy(case.outputs["score"]), rtol=1e-5, atol=1e-6)
    assert run.handle.last.kept() == case.outputs["kept"].tolist()
    [site] = run.handle.last.sites
    assert (site.layer, site.positions, site.tokens_in) == (case.integer("K"), "keep", (case.integer("image_len"),))
    assert run.lengths == run.stored


@pytest.mark.golden("fastv", "reference")
def test_kept_tokens_of_given_scores(case: Case) -> None:
    policy = FastV(keep=keep_of(case), layer=case.integer("K"))
    scores = torch.from_numpy(case.outputs["score"])
    signal = AttentionRows("text", policy.layer - 1, "last")
    context = contexts.decoder([len(scores)], policy.layer, {signal: scores[None, None]}, keep=policy.keep)
    assert contexts.kept_tokens(policy.select(context)) == [case.outputs["kept"].tolist()]


@pytest.mark.golden("fastv", "reference")
def test_the_policy_itself(case: Case) -> None:
    """Without the recorder: R = 0 cuts nothing and gives the same hidden states."""
    run = check_run(case, FastV(keep=keep_of(case), layer=case.integer("K")))
    assert len(run.handle.last.sites) == (case.ratio("R") > 0)
