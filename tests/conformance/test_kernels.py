"""Kernel primitives against `tests/golden/kernels.npz`, an independent float64 reference.

Golden kinds and settings: `kcenter` -> `greedy_select` with the metric (0 cosine, 1 squared l2), start and
preselected tokens of the case, where -2 stands for +inf; `colmass` -> `column_mass` with its rows, causal
rule and row weights; `dpp` has no implementation yet (`golden_io.PENDING_KINDS`). The Triton version
replays the kind `kcenter` in `tests/kernels/interpreted_kcenter.py`.
"""

from __future__ import annotations

import pytest
import torch
from golden_io import Case

from vlmprune.kernels.column_mass import attention_rows, column_mass
from vlmprune.kernels.kcenter import greedy_select


@pytest.mark.golden("kernels", "kcenter")
@pytest.mark.parametrize(("backend", "route"), [("reference", "auto"), ("torch", "gram"), ("torch", "features")])
def test_kcenter(case: Case, backend: str, route: str) -> None:
    result = greedy_select(
        torch.from_numpy(case.inputs["x"])[None],
        case.integer("k"),
        metric=("cosine", "l2")[case.integer("metric")],
        start=case.integer("start"),
        valid=torch.from_numpy(case.inputs["valid"])[None].bool(),
        preselected=torch.from_numpy(case.params["preselected"]).long(),
        backend=backend,
        route=route,
    )
    assert torch.equal(result.indices[0], torch.from_numpy(case.outputs["indices"]).long())
    radius = result.radius[0].nan_to_num(posinf=-2.0)
    torch.testing.assert_close(radius, torch.from_numpy(case.outputs["radius"]), atol=1e-5, rtol=1e-5)
    distance = result.min_distance[0].nan_to_num(posinf=-2.0)
    torch.testing.assert_close(distance, torch.from_numpy(case.outputs["min_dist"]), atol=1e-5, rtol=1e-5)


@pytest.mark.golden("kernels", "colmass")
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_column_mass(case: Case, backend: str) -> None:
    q, k = (torch.from_numpy(case.inputs[name])[None] for name in ("q", "k"))
    rows = torch.from_numpy(case.params["rows"]).long()
    weight = case.inputs.get("row_weight")
    weight = None if weight is None else torch.from_numpy(weight)
    causal = bool(case.integer("causal"))
    mass = column_mass(q, k, rows=rows, row_weight=weight, causal=causal, backend=backend)
    torch.testing.assert_close(mass[0], torch.from_numpy(case.outputs["mass"]), atol=1e-6, rtol=1e-5)
    # The same from the attention rows themselves.
    share = attention_rows(q, k, rows, causal=causal, backend=backend)[0].mean(0)  # [R, N]
    weight = torch.ones(len(rows)) if weight is None else weight
    torch.testing.assert_close((share * weight[:, None]).sum(0) / weight.sum(), mass[0], atol=1e-6, rtol=1e-5)
