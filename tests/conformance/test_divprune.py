"""DivPrune against the official code's picks.

Golden kind -> settings: `set` -> `DivPrune(keep=ratio)` on one image. Where equal rows make the official code take a
token twice (`n_unique` below the budget), the reference is `ref/selection_order_f64_exclude`, which never does; equal
rows may then stand for one another.
"""

from __future__ import annotations

import contexts
import numpy as np
import pytest
import torch
from golden_io import Case

from vlmprune.core.context import Context
from vlmprune.core.signals import Projected
from vlmprune.policies.divprune import DivPrune


def context_of(case: Case) -> Context:
    features = torch.from_numpy(case.inputs["features"])
    views = [contexts.image(1, len(features))]
    return contexts.post_encoder(views, case.ratio("ratio"), {Projected(): [features]})


@pytest.mark.golden("divprune", "set")
def test_order(case: Case) -> None:
    context = context_of(case)
    [order] = DivPrune(keep=case.ratio("ratio")).order(context).tolist()
    assert len(order) == len(set(order)) == case.integer("budget")
    if case.outputs["n_unique"] == case.integer("budget"):
        assert order == case.outputs["selection_order"].tolist()
        return
    rows, reference = case.inputs["features"], case.refs["selection_order_f64_exclude"]
    np.testing.assert_array_equal(rows[order], rows[reference])


@pytest.mark.golden("divprune", "set")
def test_kept(case: Case) -> None:
    selection = DivPrune(keep=case.ratio("ratio")).select(context_of(case))
    [kept] = contexts.kept_tokens(selection)
    assert selection.out_counts() == (case.integer("budget"),)
    if case.outputs["n_unique"] == case.integer("budget"):
        assert kept == case.outputs["indices_sorted"].tolist()
    rows, reference = case.inputs["features"], np.sort(case.refs["selection_order_f64_exclude"])
    assert sorted(map(tuple, rows[kept])) == sorted(map(tuple, rows[reference]))
