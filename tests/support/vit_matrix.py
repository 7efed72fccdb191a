"""Which policies run on which image models, by asking the plan that `apply` makes; `docs/generate.py` prints the table.

`tests/adapters/test_vit_policies.py` runs every cell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from clip_models import clip_model, timm_clip
from hf_vit_models import hf_model
from policy_matrix import MATRIX
from support_matrix import markdown, refusal
from timm_models import timm_model
from torch import nn

from vlmprune.adapters.detect import find_family

# How users call a model -> its random-weight version.
NAMES: Mapping[str, Callable[[], nn.Module]] = MappingProxyType(
    {
        "timm `VisionTransformer`": partial(timm_model, "token"),
        "timm DeiT distilled": partial(timm_model, "distilled"),
        "timm `Eva`": partial(timm_model, "eva"),
        "open_clip `CLIP`": clip_model,
        "open_clip with a timm tower": timm_clip,
        "transformers `CLIPModel`": partial(hf_model, "CLIPModel"),
        "transformers `SiglipModel`": partial(hf_model, "SiglipModel"),
        "transformers `ViTForImageClassification`": partial(hf_model, "ViTForImageClassification"),
        "transformers `Dinov2ForImageClassification`": partial(hf_model, "Dinov2ForImageClassification"),
        "transformers `DINOv3ViTModel`": partial(hf_model, "DINOv3ViTModel"),
    }
)


def vit_table() -> str:
    """Policies x image models, as Markdown; only policies that run on one of them."""
    infos = [find_family(build()).info() for build in NAMES.values()]
    lines = [["policy", *NAMES], ["---", *[":-:"] * len(NAMES)]]
    for name in sorted(MATRIX):
        served = [any(refusal(name, parameters, info) is None for parameters in MATRIX[name]) for info in infos]
        if any(served):
            lines.append([f"`{name}`", *("yes" if yes else "–" for yes in served)])
    return markdown(lines)
