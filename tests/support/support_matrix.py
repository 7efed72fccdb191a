"""What runs on what: every policy of the test matrix on every family, by asking the plan that `apply` makes.

`tests/adapters/test_family_policies.py` runs each cell that is not refused; `docs/generate.py` prints the table.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from policy_matrix import MATRIX

from vlmprune.adapters.detect import find_family
from vlmprune.adapters.sites import plan
from vlmprune.core.errors import VlmpruneError
from vlmprune.core.info import ModelInfo
from vlmprune.core.registry import registry
from vlmprune.embedded.random_models import FAMILIES, random_vlm

# Family -> how its users call it.
NAMES = {
    "llava": "LLaVA-1.5",
    "llava_next": "LLaVA-NeXT",
    "llava_onevision": "LLaVA-OneVision",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "internvl": "InternVL",
    "idefics3": "Idefics3",
    "smolvlm": "SmolVLM",
    "paligemma": "PaliGemma",
    "gemma3": "Gemma 3",
}
# Families whose images may be cut into tiles, each with the tests' name for it.
TILED = ("llava_next", "llava_onevision", "internvl", "idefics3", "smolvlm")
VIDEO = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
ATTENTION = ("sdpa", "eager")


@cache
def family_info(family: str) -> ModelInfo:
    """Facts about the family's random-weight model."""
    return find_family(random_vlm(family)).info()


def model_class(family: str) -> str:
    """Name of the class that users load."""
    return type(random_vlm(family)).__name__


def refusal(name: str, parameters: dict[str, Any], info: ModelInfo) -> str | None:
    """Why a policy cannot run on a model, None if it can."""
    try:
        plan(registry.create(name, **parameters), info)
    except VlmpruneError as error:
        return str(error)
    return None


def supported(name: str, family: str) -> bool:
    """True if the policy runs on the family with at least one set of parameters of the matrix."""
    return any(refusal(name, parameters, family_info(family)) is None for parameters in MATRIX[name])


def policy_table() -> str:
    """Policies x families, as Markdown."""
    lines = [["policy", *NAMES.values(), "batch > 1", "video"], ["---", *[":-:"] * (len(NAMES) + 2)]]
    for name in sorted(MATRIX):
        meta = registry.get(name).meta
        cells = ["yes" if supported(name, family) else "–" for family in NAMES]
        lines.append([f"`{name}`", *cells, _yes(meta.batch), _yes(meta.video)])
    return markdown(lines)


def family_table() -> str:
    """Families and what is tested on each, as Markdown."""
    header = [
        "family",
        "class in transformers",
        "attention",
        "batch > 1",
        "images per prompt",
        "tiles",
        "video",
        "CLS",
        "tower",
    ]
    lines = [header, ["---", "---", *[":-:"] * (len(header) - 2)]]
    for family, title in NAMES.items():
        info = family_info(family)
        lines.append(
            [
                title,
                f"`{model_class(family)}`",
                ", ".join(ATTENTION),
                "yes",
                "several",
                _yes(family in TILED),
                _yes(family in VIDEO),
                _yes(info.has_cls),
                "patches" if info.merge_unit == 1 else f"units of {info.merge_unit}",
            ]
        )
    return markdown(lines)


def _yes(value: bool) -> str:
    return "yes" if value else "–"


def markdown(lines: list[list[str]]) -> str:
    """A table; the second line is the rule below the header."""
    assert set(NAMES) == set(FAMILIES)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
