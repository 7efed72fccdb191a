"""The settings with which every policy is tested: one line per registered policy.

A test of all policies imports `MATRIX` or `CASES`:

    @pytest.mark.parametrize(("name", "parameters"), CASES)
    def test_something(name, parameters):
        policy = registry.create(name, **parameters)
"""

from __future__ import annotations

from typing import Any

import pytest

# Name -> parameter sets. They reduce something on every model that runs the policy, from 4 decoder layers on.
MATRIX: dict[str, tuple[dict[str, Any], ...]] = {
    "divprune": ({"keep": 0.3}, {"keep": 4, "newline": "protect"}),
    "downsample": ({"keep": 0.25}, {"factor": 3.0, "jpeg": True}),
    "dymu": (
        {"thresholds": 0.25},
        {"thresholds": 0.1, "unmerge": False},
        {"keep": 0.5, "mode": "instance", "schedule": "linear", "unmerge": False},
    ),
    "fastv": (
        {"keep": 0.3},
        {"keep": 4, "layer": 3},
        {"keep": 0.5, "layer": 0.5, "score": "mean_all", "per_image": True},
    ),
    "grid": ({"keep": 0.3}, {"keep": 4}),
    "grid_pool": ({"keep": 0.3}, {"keep": 4}),
    "hiprune": (
        {"keep": 0.34},
        {"keep": 7, "alpha": 0.7, "buffer": "grid"},
        {"keep": 0.5, "alpha": 1.0, "object_layer": 0, "compat": "official"},
    ),
    "random": ({"keep": 0.3}, {"keep": 4, "seed": 3}),
    "todre": (
        {"keep": 0.25, "tau": 0.0},
        {"keep": 0.5, "tau": 2.0, "check_layers": 0.5, "variant": "k_center", "pivot": "center"},
        {"keep": 1.0, "tau": 2.0, "check_layers": (0, 2)},
    ),
    "tome": (
        {"keep": 0.4},
        {"r": 1, "inflect": -1.0},
        {"r": (2, 1), "order": "original", "prop_attn": False, "matching": "random"},
    ),
    "transprune": (
        {"keep": 0.25},
        {"keep": 4, "alpha": 0.3, "direction": "abs", "positions": "keep"},
        {"keep": (0.7, 0.3), "layers": (1, 3), "accumulate": (0, 2), "use_iga": False},
    ),
    "uniform": ({"keep": 0.3}, {"keep": 4}),
    "vflowopt": (
        {"keep": 0.3},
        {"keep": 4, "preset": "released", "t": 0.0, "a": 2.0},
        {"keep": 0.4, "r1": 0.6, "r2": 0.7, "a": 1.5},
    ),
    "zero_tprune": (
        {"keep": 0.4},
        {"keep_rates": (1.0, 0.6), "layers": (1, 2), "s_prune": (1, 0), "partition": "random", "features": "mean"},
        {
            "keep": 0.6,
            "layers": (0.5,),
            "s_prune": 1,
            "iters": 3,
            "metric": "euclidean",
            "fusion": "scores",
            "tau": 0.5,
        },
    ),
}

CASES = [
    pytest.param(name, parameters, id=f"{name}-{number}")
    for name, parameter_sets in MATRIX.items()
    for number, parameters in enumerate(parameter_sets)
]
