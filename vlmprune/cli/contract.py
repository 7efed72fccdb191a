"""What every policy must keep to, tried on a model.

Nothing changes at ``keep=1.0`` or after removal, tokens fall, a batch gives what single prompts give, and the
same call gives the same result.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlmprune.adapters.detect import model_info
from vlmprune.api import applied
from vlmprune.cli.catalogue import REFERENCE
from vlmprune.core.config import compose, from_dict, to_dict
from vlmprune.core.errors import InputError
from vlmprune.core.policy import Policy
from vlmprune.core.report import Report
from vlmprune.measurement import measure

ROWS = 3
BATCH_TOLERANCE = 1e-4  # of logits; sums run in another order in a padded batch
_HOOK_TABLES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@dataclass(frozen=True)
class Subject:
    """A model to try policies on. ``encode`` makes the inputs of some of the ``ROWS`` prompts."""

    model: Any
    processor: Any
    encode: Callable[[Sequence[int]], Any]


@dataclass(frozen=True)
class Finding:
    """One check of one policy; ``detail`` says what went wrong."""

    policy: str
    check: str
    passed: bool
    detail: str = ""


def check_policy(policy: Policy, subject: Subject) -> list[Finding]:
    """Try a policy with a budget below 1.0.

    A check that raises has failed. Later checks run in any case.
    """
    findings = []
    for name, check in _CHECKS.items():
        try:
            detail = check(policy, subject)
        except Exception as error:  # the policy is the thing under test
            detail = f"{type(error).__name__}: {error}"
        findings.append(Finding(policy.name, name, not detail, detail))
    return findings


def prepared(policy: Policy, subject: Subject) -> Policy:
    """The policy, with what has to be measured on the subject's tower before it can be applied."""
    info = model_info(subject.model)
    measurement = policy.measurement(info)
    if measurement is None:
        return policy
    found = measure(subject.model, policy, [subject.encode(range(ROWS))] * 2, least=2)
    measurement.means = found.values
    return measurement.result()


def mini_subject() -> Subject:
    """A LLaVA of random weights with 16 visual tokens; three prompts of different length, left-padded."""
    from transformers import CLIPImageProcessor

    from vlmprune.embedded.tiny_configs import PAD_ID, random_inputs, random_llava

    model = random_llava()
    size = model.config.vision_config.image_size
    crop = {"height": size, "width": size}
    processor = SimpleNamespace(image_processor=CLIPImageProcessor(size={"shortest_edge": size}, crop_size=crop))
    ids = random_inputs(model, batch=ROWS, before=2 + ROWS)["input_ids"]
    images = _pictures()

    def encode(rows: Sequence[int]) -> dict[str, torch.Tensor]:
        # Row i starts i tokens later than row 0.
        start = min(rows)
        chosen, mask = (
            ids[list(rows), start:].clone(),
            torch.ones(len(rows), ids.shape[1] - start, dtype=torch.long),
        )
        for place, row in enumerate(rows):
            chosen[place, : row - start] = PAD_ID
            mask[place, : row - start] = 0
        pixels = processor.image_processor(images=[images[row] for row in rows], return_tensors="pt")["pixel_values"]
        return {"input_ids": chosen, "attention_mask": mask, "pixel_values": pixels}

    return Subject(model, processor, encode)


def real_subject(model: Any, processor: Any) -> Subject:
    """A model with a processor; three pictures and questions of different length."""
    from vlmprune.demos.compare import chat_prompt
    from vlmprune.evaluation.prompts import encode

    questions = (
        "what is it?",
        "what color is the shape on the left?",
        "how many blue shapes are there in the image?",
    )
    prompts = [chat_prompt(processor, question) for question in questions]
    images = _pictures(224)

    def encode_rows(rows: Sequence[int]) -> Any:
        return encode(model, processor, [prompts[row] for row in rows], [[images[row]] for row in rows])

    return Subject(model, processor, encode_rows)


def _pictures(size: int = 48) -> list[Image.Image]:
    """Noise of 8 x 8 cells, so that patches differ."""
    rng = np.random.default_rng(0)
    cells = [rng.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(ROWS)]
    return [Image.fromarray(cell).resize((size, size), Image.Resampling.NEAREST) for cell in cells]


def _forward(subject: Subject, rows: Sequence[int]) -> torch.Tensor:
    """Logits ``[R, L, V]`` of the dense or of the pruned model, whichever it is now."""
    with torch.no_grad():
        return subject.model(**subject.encode(rows)).logits


def _pruned(policy: Policy, subject: Subject, rows: Sequence[int]) -> tuple[torch.Tensor, Report]:
    with applied(subject.model, policy, processor=subject.processor) as handle:
        logits = _forward(subject, rows)
        if handle.last is None:
            raise RuntimeError("there is no report: the forward brought no visual tokens to the policy")
        return logits, handle.last


def _check_config(policy: Policy, subject: Subject) -> str:
    again = from_dict(json.loads(json.dumps(to_dict(policy))))
    return "" if again == policy else f"its config, read again, gives {again}"


def _check_identity(policy: Policy, subject: Subject) -> str:
    full = [replace(leaf, keep=1.0) for leaf in policy.leaves()]
    info = model_info(subject.model)
    if any(leaf.reduces(info) and leaf != type(leaf)(keep=1.0) for leaf in full):
        return ""  # with thresholds of its own it may reduce at keep=1.0 too; with default parameters never
    dense = _forward(subject, range(ROWS))
    logits, _ = _pruned(full[0] if len(full) == 1 else compose(full), subject, range(ROWS))
    return "" if torch.equal(logits, dense) else "logits at keep=1.0 differ from the dense model's"


def _check_removal(policy: Policy, subject: Subject) -> str:
    dense, hooks = _forward(subject, range(ROWS)), _count_hooks(subject.model)
    _pruned(policy, subject, range(ROWS))
    if _count_hooks(subject.model) != hooks:
        return "hooks are left on the model after remove()"
    return "" if torch.equal(_forward(subject, range(ROWS)), dense) else "logits after remove() differ from before"


def _check_reduction(policy: Policy, subject: Subject) -> str:
    _, report = _pruned(policy, subject, range(ROWS))
    if any(leaf.needs_processor() for leaf in policy.leaves()):
        return "" if report.geometry else "the image was not changed"
    kept, total = report.mean_kept_layers, sum(report.visual_tokens) / ROWS
    return "" if kept is not None and kept < total else f"{kept} of {total} visual tokens stay on average over layers"


def _check_batch(policy: Policy, subject: Subject) -> str:
    together, whole = _pruned(policy, subject, range(ROWS))
    for row in range(ROWS):
        alone, single = _pruned(policy, subject, [row])
        if single.kept() != whole.kept(row):
            return f"row {row} keeps {whole.kept(row)} in a batch and {single.kept()} alone"
        error = (together[row, -1] - alone[0, -1]).abs().max().item()
        if not error <= BATCH_TOLERANCE * max(1.0, alone[0, -1].abs().max().item()):
            return f"logits of row {row} differ by {error:.2g} between batch and single prompt"
    return ""


def _check_repeatable(policy: Policy, subject: Subject) -> str:
    first, second = (_pruned(policy, subject, range(ROWS))[0] for _ in range(2))
    return "" if torch.equal(first, second) else "two equal calls give different logits"


def _check_generation(policy: Policy, subject: Subject) -> str:
    new = 3
    with applied(subject.model, policy, processor=subject.processor) as handle, torch.no_grad():
        inputs = subject.encode(range(ROWS))
        output = subject.model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        report = handle.last
    wanted = [ROWS, inputs["input_ids"].shape[1] + new]
    if list(output.shape) != wanted:
        return f"generate returned ids of shape {list(output.shape)} instead of {wanted}"
    return "" if report is not None else "there is no report after generate"


_CHECKS: dict[str, Callable[[Policy, Subject], str]] = {
    "config round trip": _check_config,
    "keep=1.0 is dense": _check_identity,
    "removal is exact": _check_removal,
    "tokens are reduced": _check_reduction,
    "batch equals single": _check_batch,
    "repeatable": _check_repeatable,
    "generation": _check_generation,
}


def check_names() -> list[str]:
    """Names of the checks in the order in which they run."""
    return list(_CHECKS)


def _count_hooks(model: torch.nn.Module) -> int:
    return sum(len(getattr(module, table)) for module in model.modules() for table in _HOOK_TABLES)


def require_reduction(policy: Policy) -> Policy:
    """The policy, if its settings ask for fewer tokens.

    Raises:
        InputError: it keeps everything, so that nothing could be checked.
    """
    if not any(leaf.reduces(REFERENCE) for leaf in policy.leaves()):
        raise InputError(f"{policy.budget} keeps every token; give a smaller budget to check.")
    return policy
