"""VTC-Bench grouping against the official analysis (golden kind `vtc`)."""

from __future__ import annotations

import numpy as np
import pytest
from golden_io import Case

from vlmprune.evaluation.vtc import score_group, split_groups


def answers(values: np.ndarray) -> dict[str | int, bool]:
    return {number: bool(value) for number, value in enumerate(values)}


@pytest.mark.golden("baselines", "vtc")
def test_groups_and_accuracies(case: Case) -> None:
    dense, down = answers(case.inputs["dense_correct"]), answers(case.inputs["down_correct"])
    method = {
        number: bool(correct)
        for number, (correct, present) in enumerate(
            zip(case.inputs["method_correct"], case.inputs["method_present"], strict=True)
        )
        if present
    }
    groups = split_groups(dense, down)
    assert list(groups.a) == case.outputs["group_a"].tolist()
    assert list(groups.b) == case.outputs["group_b"].tolist()
    for name, group in (("a", groups.a), ("b", groups.b)):
        score = score_group(group, method)
        assert score.total == int(case.outputs[f"{name}_total"])
        assert score.correct == int(case.outputs[f"{name}_correct"])
        assert score.accuracy == pytest.approx(float(case.outputs[f"{name}_accuracy"]), rel=1e-6)


@pytest.mark.golden("baselines", "vtc")
def test_bounds_of_the_protocol(case: Case) -> None:
    """Downsampling itself scores 0 on group A and 100 on B; the groups split what the dense model solves."""
    dense, down = answers(case.inputs["dense_correct"]), answers(case.inputs["down_correct"])
    groups = split_groups(dense, down)
    assert score_group(groups.a, down).accuracy == 0
    assert score_group(groups.b, down).accuracy == 100
    assert not set(groups.a) & set(groups.b)
    assert set(groups.a) | set(groups.b) == {number for number, correct in dense.items() if correct}
