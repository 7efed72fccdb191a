"""Bipartite soft matching and merging against `tests/golden/tome.npz`, made with the authors' functions.

Golden kinds and settings: `reference` -> `bipartite_match(r, protect=class_token + distill_token)` and merging of the
features with their sizes; where something is protected and a distillation token exists the unmerged values are
those of each token's group (the authors' unmerge mixes up that layout). `chain` -> four matchings in a row, class
token protected, groups composed. The other kinds wait for the policy (`golden_io.PENDING_KINDS`).
"""

from __future__ import annotations

import pytest
import torch
from golden_io import Case
from torch import Tensor

from vlmprune.kernels.bipartite import bipartite_match, merge_groups
from vlmprune.kernels.gather import compose_groups, segment_merge, unmerge

BACKENDS = ("reference", "torch")


def tensor(array: object) -> Tensor:
    return torch.from_numpy(array)


def sources(group_id: Tensor, n_out: int) -> Tensor:
    """``[B, n_out, N]``: 1 where a token belongs to an output."""
    return (group_id[:, None] == torch.arange(n_out)[:, None]).float()


@pytest.mark.golden("tome", "reference")
@pytest.mark.parametrize("backend", BACKENDS)
def test_matching(case: Case, backend: str) -> None:
    x, want = tensor(case.inputs["x"]), {name: tensor(value) for name, value in case.outputs.items()}
    size = tensor(case.inputs["size"])[..., 0] if "size" in case.inputs else torch.ones(x.shape[:2])
    distilled = bool(case.integer("distill_token"))
    protect = case.integer("class_token") + distilled
    match = bipartite_match(tensor(case.inputs["metric"]), case.integer("r"), protect=protect, backend=backend)
    assert match.n_out == want["x"].shape[1] and (match.counts == match.n_out).all()
    merged = merge_groups(x, match.group_id, match.n_out, "wavg", size, backend=backend)
    torch.testing.assert_close(merged, want["x"], atol=1e-5, rtol=0)
    total = segment_merge(size[..., None], match.group_id, match.n_out, mode="sum")
    torch.testing.assert_close(total, want["size"], atol=1e-5, rtol=0)
    if "source" in want:
        assert torch.equal(sources(match.group_id, match.n_out), want["source"])
        mean = merge_groups(x, match.group_id, match.n_out, "mean", backend=backend)
        torch.testing.assert_close(mean, want["x_mean"], atol=1e-5, rtol=0)
        back = want["source"].mT @ want["x"] if distilled else want["unmerged"]
        torch.testing.assert_close(unmerge(merged, match.group_id), back, atol=1e-5, rtol=0)


@pytest.mark.golden("tome", "chain")
@pytest.mark.parametrize("backend", BACKENDS)
def test_layers(case: Case, backend: str) -> None:
    x = tensor(case.inputs["x"])
    size = torch.ones(*x.shape[:2], 1)
    groups = torch.arange(x.shape[1]).expand(x.shape[:2])
    for layer, r in enumerate(case.params["r"].tolist()):
        metric = x @ tensor(case.inputs[f"w{layer}"]) + (0.3 if layer else 0.0)
        match = bipartite_match(metric, r, protect=1, backend=backend)
        x = merge_groups(x, match.group_id, match.n_out, "wavg", size[..., 0], backend=backend)
        size = segment_merge(size, match.group_id, match.n_out, mode="sum")
        groups = compose_groups(groups, match.group_id)
        torch.testing.assert_close(x, tensor(case.outputs[f"x{layer}"]), atol=1e-5, rtol=0)
        torch.testing.assert_close(size, tensor(case.outputs[f"size{layer}"]), atol=1e-5, rtol=0)
    assert torch.equal(sources(groups, x.shape[1]), tensor(case.outputs["source"]))
