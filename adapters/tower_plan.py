"""What has to hold for the steps of a plan that act inside a vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlmprune.core.errors import InputError
from vlmprune.core.info import ModelInfo
from vlmprune.core.sites import Site, SiteRequest

if TYPE_CHECKING:
    from vlmprune.adapters.sites import Step


def check_tower_layer(name: str, request: SiteRequest, info: ModelInfo) -> None:
    """Refuse a block that does not exist, or behind which nothing is read.

    Args:
        name: of the policy.

    Raises:
        InputError: it is one.
    """
    last = info.feature_block if info.feature_block is not None else (info.vision_depth or 0) - 1
    block = request.layer or 0
    if 0 <= block <= last:
        return
    reason = f"its tower has {info.vision_depth} blocks"
    if block < (info.vision_depth or 0):
        reason = f"features are read behind block {last}, so nothing that happens later counts"
    raise InputError(
        f"{name!r} acts at vision_block {block}, but on {info.model_class} {reason}; give a block from 0 to {last}."
    )


def check_tower_steps(steps: Sequence[Step]) -> None:
    """Refuse policies inside one tower that do not go together.

    Raises:
        InputError: signals of a block's attention would be asked for after another step reduced the tokens that they
            are over, or policies want the LLM to number what is left in different ways.
    """
    inside = [step for step in steps if step.request.site == Site.VISION_BLOCK]
    numbering = {step.request.positions: step.policy.name for step in inside}
    if len(numbering) > 1:
        wishes = " and ".join(f"{positions!r} ({name})" for positions, name in numbering.items())
        raise InputError(
            f"Policies inside one tower reduce the same tokens, but ask for the positions {wishes}; give all of them "
            "the same positions."
        )
    reduced: dict[int, str] = {}  # block whose attention ran last -> who has reduced tokens since
    for step in sorted(inside, key=_when):
        attended = (step.request.layer or 0) - (step.request.place == "before")
        if attended in reduced and step.request.signals:
            raise InputError(
                f"{step.policy.name!r} reads the attention of tower block {attended} after {reduced[attended]!r} "
                "reduced the tokens that it is over; let one of them act at another block."
            )
        reduced[attended] = step.policy.name


def _when(step: Step) -> tuple[int, bool]:
    """Steps of one place run in the order of the policies."""
    return step.request.layer or 0, step.request.place == "middle"
