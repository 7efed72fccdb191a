"""`vlmprune check` passes policies that keep to the contract and finds those that break it."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch

from vlmprune.cli import main
from vlmprune.cli.contract import Subject, check_names, check_policy, mini_subject
from vlmprune.core.bases import ScorePolicy
from vlmprune.core.context import Context
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import Policy, PolicyMeta
from vlmprune.core.registry import registry
from vlmprune.core.selection import Selection

META = PolicyMeta(title="broken on purpose, for tests")


@pytest.fixture(scope="module")
def subject() -> Subject:
    return mini_subject()


def failed(policy: Policy, subject: Subject) -> set[str]:
    findings = check_policy(policy, subject)
    assert [finding.check for finding in findings] == check_names()
    assert all(finding.detail for finding in findings if not finding.passed)
    return {finding.check for finding in findings if not finding.passed}


@dataclass(frozen=True)
class Harmless(ScorePolicy):
    """Keeps the first tokens."""

    meta = META
    name = "test_policy"

    def scores(self, context: Context) -> torch.Tensor:
        return -torch.arange(context.width, dtype=torch.float32).expand(context.n_items, -1)


@dataclass(frozen=True)
class KeepsAll(Harmless):
    def decide(self, context: Context) -> Selection:
        return Selection.keep_all(context.valid, context.lengths)


@dataclass(frozen=True)
class NeverAll(Harmless):
    def reduces(self, info: ModelInfo) -> bool:
        return True

    def decide(self, context: Context) -> Selection:
        return Selection.from_mask(context.valid & (torch.arange(context.width) < 3))


@dataclass(frozen=True)
class LooksAtTheBatch(Harmless):
    def scores(self, context: Context) -> torch.Tensor:
        return torch.arange(context.width, dtype=torch.float32).expand(context.n_items, -1) * (context.n_items - 1.5)


@dataclass(frozen=True)
class DrawsGlobally(Harmless):
    def scores(self, context: Context) -> torch.Tensor:
        return torch.rand(context.n_items, context.width)


@dataclass(frozen=True)
class ChangesSettings(Harmless):
    power: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "power", self.power + 1)


@dataclass(frozen=True)
class Raises(Harmless):
    def scores(self, context: Context) -> torch.Tensor:
        raise RuntimeError("broken")


def test_a_policy_that_keeps_to_the_contract(subject: Subject) -> None:
    registry.complete()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._classes, "test_policy", Harmless)
        assert failed(Harmless(keep=0.25), subject) == set()


@pytest.mark.filterwarnings("ignore:.*nothing was reduced")
@pytest.mark.parametrize(
    ("policy", "check"),
    [
        (KeepsAll, "tokens are reduced"),
        (NeverAll, "keep=1.0 is dense"),
        (LooksAtTheBatch, "batch equals single"),
        (DrawsGlobally, "repeatable"),
        (ChangesSettings, "config round trip"),
        (Raises, "generation"),
    ],
)
def test_a_broken_policy_is_found(
    policy: type[Policy], check: str, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.complete()
    monkeypatch.setitem(registry._classes, "test_policy", policy)
    assert check in failed(policy(keep=0.25), subject)


def test_hooks_that_stay_are_found(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmprune.adapters.hooks import HookStack

    registry.complete()
    monkeypatch.setitem(registry._classes, "test_policy", Harmless)
    subject = mini_subject()  # a model of its own: it is spoilt
    remove = HookStack.remove

    def forgetful(self: HookStack) -> None:
        remove(self)
        subject.model.register_forward_hook(lambda *arguments: None)

    monkeypatch.setattr(HookStack, "remove", forgetful)
    assert "removal is exact" in failed(Harmless(keep=0.25), subject)


def test_command_passes_every_built_in_policy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert {finding["policy"] for finding in findings} == set(registry.available())
    assert all(finding["passed"] for finding in findings)


def test_command_exits_with_1_and_says_why(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    registry.complete()
    monkeypatch.setitem(registry._classes, "test_policy", Raises)
    assert main(["check", "test_policy"]) == 1
    text = capsys.readouterr().out
    assert "FAIL" in text and "RuntimeError: broken" in text and "checks failed" in text


def test_command_on_a_model_and_a_composition(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "uniform+todre", "--keep", "0.5,0.5", "--model", "tiny-llava"]) == 0
    assert "All 7 checks passed" in capsys.readouterr().out
