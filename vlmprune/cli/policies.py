"""``vlmprune list`` and ``vlmprune info``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vlmprune.cli.options import JsonOption, KeepOption, ParamOption, build_policy, load, parse_parameters
from vlmprune.cli.output import print_json, print_table, print_text, yes_no
from vlmprune.core.errors import InputError


def list_policies(
    pattern: Annotated[str, typer.Argument(help="Names to show; * and ? are wildcards.")] = "*",
    as_json: JsonOption = False,
) -> None:
    """List the policies. Sites are those used on LLaVA-1.5 with default parameters."""
    from vlmprune.cli.catalogue import policy_facts
    from vlmprune.core.registry import registry, suggest

    names = registry.available(pattern)
    if not names:
        raise InputError(f"No policy matches {pattern!r}.{suggest(pattern, registry.available())}")
    facts = [policy_facts(name) for name in names]
    if as_json:
        print_json(facts)
        return
    columns = (
        "name",
        "title",
        "arXiv",
        "sites",
        "training-free",
        "batch",
        "video",
        "licence of official code",
    )
    print_table(
        columns,
        (
            (
                f["name"],
                f["title"],
                f["arxiv"],
                ", ".join(f["sites"]),
                yes_no(f["training_free"]),
                yes_no(f["batch"]),
                yes_no(f["video"]),
                f["code_licence"],
            )
            for f in facts
        ),
    )


def info(
    policy: Annotated[str | None, typer.Argument(help="Name of a policy.")] = None,
    model: Annotated[str | None, typer.Option(help="Also show this model and where the policy acts on it.")] = None,
    keep: KeepOption = None,
    param: ParamOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a policy's parameters, a model's facts, or both and the layers that the policy uses there."""
    if policy is None and model is None:
        raise InputError("Give a policy, --model, or both; `vlmprune list` names the policies.")
    shown: dict[str, Any] = {}
    if policy is not None:
        from vlmprune.cli.catalogue import parameter_facts, policy_facts, summary
        from vlmprune.core.registry import registry

        cls = registry.get(policy)
        shown["policy"] = {
            **policy_facts(policy),
            "summary": summary(cls),
            "parameters": parameter_facts(cls),
        }
    if model is not None:
        from vlmprune.adapters.detect import model_info
        from vlmprune.cli.catalogue import model_facts, request_facts

        facts = model_info(load(model, device="cpu")[0])
        shown["model"] = {"name": model, **model_facts(facts)}
        if policy is not None:
            chosen = build_policy(policy, keep, parse_parameters(param))
            chosen.check_count(facts)
            shown["requests"] = request_facts(chosen, facts)
    if as_json:
        print_json(shown)
    else:
        _print_info(shown)


def _print_info(shown: dict[str, Any]) -> None:
    if "policy" in shown:
        facts = dict(shown["policy"])
        parameters = facts.pop("parameters")
        print_text(f"{facts.pop('name')}: {facts.pop('summary')}")
        print_table(("fact", "value"), ((name, _plain(value)) for name, value in facts.items()))
        rows = ((p["name"], p["type"], _plain(p["default"]) or "None", p["doc"]) for p in parameters)
        print_table(("parameter", "type", "default", "meaning"), rows, "Parameters")
    if "model" in shown:
        print_table(("fact", "value"), ((name, _plain(value)) for name, value in shown["model"].items()), "Model")
    if "requests" in shown:
        rows = ((r["site"], r["layer"], r["positions"], ", ".join(r["signals"])) for r in shown["requests"])
        print_table(("site", "before layer", "positions", "signals"), rows, "Where the policy acts (layers from 0)")


def _plain(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool):
        return yes_no(value)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
