"""``vlmprune check``: does a policy keep to the contract?"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from vlmprune.cli.options import JsonOption, ParamOption, build_policy, load, parse_parameters
from vlmprune.cli.output import print_json, print_table, print_text

CHECK_KEEP = "0.25"


def check(
    policy: Annotated[str | None, typer.Argument(help="A policy; default: all of them.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Model to try it on; default: a small one with random weights.")
    ] = None,
    keep: Annotated[str | None, typer.Option(help="Budget as in `run`.", show_default=CHECK_KEEP)] = None,
    param: ParamOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check policies against the contract; exit code 1 if one fails."""
    from vlmprune.core.registry import registry

    parameters = parse_parameters(param) if policy is not None else {}
    names = [policy] if policy else registry.available()
    policies = [build_policy(name, keep, parameters, CHECK_KEEP) for name in names]

    from vlmprune.cli.contract import check_names, check_policy, mini_subject, prepared, real_subject, require_reduction

    policies = [require_reduction(chosen) for chosen in policies]
    subject = mini_subject() if model is None else real_subject(*load(model, device="cpu"))
    policies = [prepared(chosen, subject) for chosen in policies]
    findings = [finding for chosen in policies for finding in check_policy(chosen, subject)]
    failed = [finding for finding in findings if not finding.passed]
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        passed = {(finding.policy, finding.check): finding.passed for finding in findings}
        rows = [
            (chosen.name, *("pass" if passed[chosen.name, name] else "FAIL" for name in check_names()))
            for chosen in policies
        ]
        print_table(("policy", *check_names()), rows)
        for finding in failed:
            print_text(f"{finding.policy}: {finding.check}: {finding.detail}")
        print_text(
            f"{len(failed)} of {len(findings)} checks failed" if failed else f"All {len(findings)} checks passed"
        )
    if failed:
        raise typer.Exit(1)
