"""Every policy of the matrix that acts inside a tower runs on image models of timm, open_clip and transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from policy_matrix import CASES

pytest.importorskip("timm")
pytest.importorskip("open_clip")

from hf_vit_models import answer
from timm_models import PATCHES, images, timm_model
from torch import Tensor, nn
from tower_policies import KeepPatches
from vit_matrix import NAMES

import vlmprune
from vlmprune.cli.catalogue import sites_of
from vlmprune.core.registry import registry


def run(model: nn.Module, pictures: Tensor) -> Tensor:
    if type(model).__module__.startswith("transformers."):
        return answer(model, pictures)
    return model.encode_image(pictures) if hasattr(model, "encode_image") else model(pictures)


INSIDE = [case for case in CASES if "vision_block" in sites_of(registry.get(case.values[0]))]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("policy", "parameters"), INSIDE)
@torch.no_grad()
def test_policies(policy: str, parameters: dict[str, Any], name: str) -> None:
    model, pictures = NAMES[name](), images(3, 64 if "open_clip" in name else 32)
    dense = run(model, pictures)
    with vlmprune.applied(model, policy, **parameters) as handle:
        logits = run(model, pictures)
        report = handle.last
        assert logits.isfinite().all() and not torch.equal(logits, dense)
        assert report.tower_flops < report.tower_flops_dense
        for sample in range(3):
            groups = report.groups(sample)
            assert len(groups) == report.kept_tokens[sample] < PATCHES
            members = sum(groups, [])
            assert len(members) == len(set(members)) and set(members) <= set(range(PATCHES))
        alone = []
        for sample, picture in enumerate(pictures):
            alone.append(run(model, picture[None]))
            assert handle.last.groups(0) == report.groups(sample)
        torch.testing.assert_close(logits, torch.cat(alone), rtol=1e-6, atol=1e-6)
    assert torch.equal(run(model, pictures), dense)


@torch.no_grad()
def test_one_after_the_other() -> None:
    """What one policy drops another one does not merge."""
    model, pictures = timm_model("avg"), images(2)
    kept = ((0, 3, 5, 10, 13, 15), (1, 2, 6, 8, 9, 14))
    tome = vlmprune.ToMe(r=(0, 2, 1), positions="keep")
    with vlmprune.applied(model, vlmprune.Compose((KeepPatches(kept=kept), tome))) as handle:
        logits, report = model(pictures), handle.last
        assert report.kept_tokens == (3, 3) and report.sites[0].policy == "keep_patches + tome"
        assert [record.policy for record in report.tower_sites] == ["keep_patches", "tome", "tome"]
        assert [sorted(sum(report.groups(sample), [])) for sample in (0, 1)] == [list(tokens) for tokens in kept]
    with vlmprune.applied(model, vlmprune.Compose((KeepPatches(kept=kept[1:]), tome))):
        torch.testing.assert_close(model(pictures[1:]), logits[1:], rtol=1e-6, atol=1e-6)
