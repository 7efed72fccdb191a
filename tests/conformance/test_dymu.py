"""Matching by threshold against `tests/golden/dymu.npz`, made with the authors' functions.

Golden kinds and settings: `single` -> `bipartite_match(threshold)` in the order `"tome"` (the authors' path for one
image, which leaves tokens by rank without a class token); `batch` -> order `"position"`, even and odd positions given
as `split` (that path does not stop at half of the tokens), padding marked in `valid`, and its division by
`size + 1e-4` applied to our exact mean. The other kinds wait for the policy (`golden_io.PENDING_KINDS`).
"""

from __future__ import annotations

import pytest
import torch
from golden_io import Case
from torch import Tensor

from vlmprune.kernels.bipartite import bipartite_match, merge_groups
from vlmprune.kernels.gather import compose_groups, segment_merge

BACKENDS = ("reference", "torch")


def tensor(array: object) -> Tensor:
    return torch.from_numpy(array)


def by_members(tracking: Tensor, *values: Tensor) -> dict[tuple[int, ...], list[Tensor]]:
    """Values of one sample's outputs by the tokens in them; padding left out."""
    found = {}
    for row, *rest in zip(tracking, *values, strict=True):
        members = tuple(row.nonzero()[:, 0].tolist())
        if members:
            found[members] = rest
    return found


@pytest.mark.golden("dymu", "single")
@pytest.mark.parametrize("backend", BACKENDS)
def test_single(case: Case, backend: str) -> None:
    x = tensor(case.inputs["x"])
    size = tensor(case.inputs["size"])[..., 0] if "size" in case.inputs else torch.ones(x.shape[:2])
    options = {"threshold": case.ratio("threshold"), "protect": case.integer("class_token"), "backend": backend}
    match = bipartite_match(tensor(case.inputs["metric"]), **options)
    count = int(match.counts)
    assert count == case.outputs["x"].shape[1]
    merged = merge_groups(x, match.group_id, match.n_out, "wavg", size, backend=backend)
    torch.testing.assert_close(merged[:, :count], tensor(case.outputs["x"]), atol=1e-5, rtol=0)
    assert not merged[:, count:].any()
    total = segment_merge(size[..., None], match.group_id, count, mode="sum")
    torch.testing.assert_close(total, tensor(case.outputs["size"]), atol=1e-5, rtol=0)
    tracking = match.group_id[:, None] == torch.arange(count)[:, None]
    assert torch.equal(tracking.long(), tensor(case.outputs["pos_tracking"]))


@pytest.mark.golden("dymu", "batch")
@pytest.mark.parametrize("backend", BACKENDS)
def test_batch(case: Case, backend: str) -> None:
    x = tensor(case.inputs["x"])
    batch, n, _ = x.shape
    size, valid = torch.ones(batch, n), torch.ones(batch, n, dtype=torch.bool)
    groups = torch.arange(n).expand(batch, n)
    for layer in range(len(case.params["thresholds"])):
        slots = torch.arange(x.shape[1])
        match = bipartite_match(
            x @ tensor(case.inputs[f"w{layer}"]),
            threshold=round(float(case.params["thresholds"][layer]), 6),
            protect=case.integer("class_token"),
            order="position",
            split=(slots[0::2], slots[1::2]),  # the default halves, without the limit to half of the tokens
            valid=valid,
            backend=backend,
        )
        merged = merge_groups(x, match.group_id, match.n_out, "wavg", size, backend=backend)
        total = segment_merge(size[..., None], match.group_id, match.n_out, mode="sum")
        merged = merged * total / (total + 1e-4)
        members = compose_groups(groups, match.group_id)[:, None] == torch.arange(match.n_out)[:, None]
        # The next layer starts from the authors' layout: their sort may shuffle tokens.
        x, size, padding, tracking = (
            tensor(case.outputs[f"{name}{layer}"]) for name in ("x", "size", "padding", "pos_tracking")
        )
        for b in range(batch):
            got = by_members(members[b], merged[b], total[b])
            expected = by_members(tracking[b], x[b], size[b])
            assert got.keys() == expected.keys()
            assert len(got) == int(match.counts[b]) == int((padding[b] == 0).sum())
            for tokens, values in expected.items():
                torch.testing.assert_close(got[tokens], values, atol=1e-5, rtol=0)
        size, valid, groups = size[..., 0], padding == 0, tracking.argmax(1)
