"""Facts about policies as plain values, read from the registry, the dataclasses and their docstrings."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, Field, asdict, fields
from typing import Any

from vlmprune.core.errors import VlmpruneError
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import Policy
from vlmprune.core.registry import registry
from vlmprune.core.sites import Site

# LLaVA-1.5-7B: the model on which most papers report. Sites that depend on the model are those used there.
REFERENCE = ModelInfo(
    family="llava",
    model_class="LlavaForConditionalGeneration",
    sites=frozenset(Site),
    vision_depth=24,
    text_depth=32,
    feature_block=22,
    has_cls=True,
    grid=(24, 24),
    tokens_per_image=576,
    text_hidden=4096,
    text_heads=32,
    text_kv_heads=32,
    text_head_dim=128,
    text_ffn=11008,
)
_PARAMETER = re.compile(r"(\w+(?:, \w+)*): (.*)")


def policy_facts(name: str) -> dict[str, Any]:
    """What ``list`` shows of a policy."""
    cls = registry.get(name)
    meta = asdict(cls.meta)
    return {
        "name": name,
        "title": meta.pop("title"),
        "arxiv": meta.pop("arxiv"),
        "sites": sites_of(cls),
        "basis": cls.basis,
        **meta,
    }


def sites_of(cls: type[Policy]) -> list[str]:
    """Where a policy with default parameters and half the tokens acts on LLaVA-1.5-7B, in order."""
    try:
        used = {request.site for request in cls(keep=0.5).requests(REFERENCE)}
    except (VlmpruneError, NotImplementedError):  # needs a calibration, a list of budgets, ...
        used = {site for site in Site if hasattr(cls, f"select_{site.value}") or getattr(cls, "site", None) == site}
    return [site.value for site in Site if site in used]


def parameter_facts(cls: type[Policy]) -> list[dict[str, Any]]:
    """Name, type, default and text of every parameter: the budget, the policy's own, then common ones."""
    docs = parameter_docs(cls)
    rows = [
        {"name": f.name, "type": _type_text(f.type), "default": _default(f), "doc": docs.get(f.name, "")}
        for f in fields(cls)
    ]
    common = {f.name for f in fields(Policy)}
    return sorted(rows, key=lambda row: (row["name"] != "keep", row["name"] in common))


def parameter_docs(cls: type) -> dict[str, str]:
    """Descriptions from the ``Args`` sections of a class and its bases; a subclass's text wins."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        docs.update(_args_section(inspect.cleandoc(base.__dict__.get("__doc__") or "")))
    return docs


def summary(cls: type) -> str:
    """First paragraph of a class's docstring, as one line."""
    return " ".join(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].split())


def model_facts(info: ModelInfo) -> dict[str, Any]:
    """A model's facts as plain values."""
    facts = {name: getattr(info, name) for name in info.__dataclass_fields__}
    facts["sites"] = [site.value for site in Site if site in info.sites]
    facts["signals"] = sorted(signal.__name__ for signal in info.signals)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in facts.items()}


def request_facts(policy: Policy, info: ModelInfo) -> list[dict[str, Any]]:
    """Where a policy acts on a model and what it reads there.

    Raises:
        InputError: the policy does not fit the model.
    """
    return [
        {
            "site": request.site.value,
            "layer": request.layer,
            "positions": request.positions,
            "signals": [str(signal) for signal in request.signals],
        }
        for request in policy.requests(info)
    ]


def _args_section(doc: str) -> dict[str, str]:
    found: dict[str, str] = {}
    names: list[str] = []
    inside = False
    for line in doc.splitlines():
        if line.strip() and not line.startswith(" "):
            inside = line == "Args:"
        elif inside and (match := _PARAMETER.fullmatch(line[4:])) and not line[4:].startswith(" "):
            names = match[1].split(", ")
            found.update(dict.fromkeys(names, match[2]))
        elif inside and line.strip():
            found.update({name: f"{found[name]} {line.strip()}" for name in names})
    return found


def _type_text(kind: Any) -> str:
    return kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))


def _default(field: Field[Any]) -> Any:
    if field.default is not MISSING:
        return list(field.default) if isinstance(field.default, tuple) else field.default
    return field.default_factory() if field.default_factory is not MISSING else "required"
