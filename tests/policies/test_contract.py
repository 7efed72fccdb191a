"""What every policy promises, whatever it is. Settings come from the policy matrix."""

from __future__ import annotations

import doctest
import pickle
import sys
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import contexts
import pytest
import torch
from policy_matrix import CASES, MATRIX

from vlmprune.core import config
from vlmprune.core.context import Context
from vlmprune.core.errors import InputError
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import Policy
from vlmprune.core.registry import registry
from vlmprune.core.selection import Selection
from vlmprune.core.signals import Projected
from vlmprune.core.sites import Site

# Items of different sizes and kinds in one batch.
VIEWS = (
    contexts.image(6, 6),
    contexts.any_resolution(4, 3, 2),
    contexts.image(3, 8),
    contexts.frames(3, 3, 3),
)
SEEDS = (11, 22, 33, 44)
# The settings that choose tokens after the encoder.
ENCODER_CASES = [
    case
    for case in CASES
    if any(
        request.site == Site.POST_ENCODER
        for request in registry.create(case.values[0], **case.values[1]).requests(contexts.LLAVA)
    )
]
# Nothing is pinned for policies in which newlines compete.
PINNED_CASES = [case for case in ENCODER_CASES if registry.get(case.values[0]).newlines == "rows"]
INFOS = [pytest.param(contexts.LLAVA, id="cls"), pytest.param(contexts.QWEN, id="merger")]


def at_encoder(policy: Policy, info: ModelInfo, items: tuple[int, ...] = (0, 1, 2, 3)) -> Context:
    """A batch of some of `VIEWS`; the values of an item do not depend on the others."""
    signals: dict[Any, list[Any]] = {}
    for item in items:
        for signal, rows in contexts.random_signals(policy, [VIEWS[item]], info, seed=item).items():
            signals.setdefault(signal, []).extend(rows)
    seeds = tuple(SEEDS[item] for item in items) if policy.is_random(info) else None
    return contexts.post_encoder([VIEWS[item] for item in items], policy.keep, signals, info, seeds=seeds)


def rows_of(selection: Selection, context: Context) -> list[list[Any]]:
    """Per item the tokens in selection order, with the features that result."""
    anchors = selection.anchors()
    features = context.signals.get(Projected())
    if features is None:
        return [[t for t in row if t >= 0] for row in anchors.tolist()]
    out = selection.apply(features, features=True)
    return [
        [(token, tuple(out[i, place].tolist())) for place, token in enumerate(row) if token >= 0]
        for i, row in enumerate(anchors.tolist())
    ]


def test_every_policy_is_in_the_matrix() -> None:
    assert set(MATRIX) == set(registry.available())
    assert all(2 <= len(sets) <= 3 for sets in MATRIX.values())


@pytest.mark.parametrize("info", INFOS)
@pytest.mark.parametrize(("name", "parameters"), ENCODER_CASES)
def test_kept_tokens_are_distinct_ascending_and_real(name: str, parameters: dict[str, Any], info: ModelInfo) -> None:
    policy = registry.create(name, **parameters)
    context = at_encoder(policy, info)
    selection = policy.select(context)
    for tokens, n, count in zip(selection.anchors().tolist(), context.lengths, selection.out_counts(), strict=True):
        real = [token for token in tokens if token >= 0]
        assert real == sorted(set(real)) and len(real) == count
        assert tokens == real + [-1] * (len(tokens) - len(real))
        assert 0 < count < n and real[-1] < n
    assert torch.equal(selection.out_valid().sum(1), torch.tensor(selection.out_counts()))


@pytest.mark.parametrize("info", INFOS)
@pytest.mark.parametrize(("name", "parameters"), ENCODER_CASES)
def test_a_batch_gives_what_single_items_give(name: str, parameters: dict[str, Any], info: ModelInfo) -> None:
    policy = registry.create(name, **parameters)
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        context = at_encoder(policy, info, order)
        batch = rows_of(policy.select(context), context)
        for place, item in enumerate(order):
            single = at_encoder(policy, info, (item,))
            assert batch[place] == rows_of(policy.select(single), single)[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("name", "parameters"), ENCODER_CASES)
def test_features_of_any_precision(name: str, parameters: dict[str, Any], dtype: torch.dtype) -> None:
    """The result is that of the same values in float32. Attention comes as reductions in float32 always."""
    policy = registry.create(name, **parameters)
    context = at_encoder(policy, contexts.LLAVA)
    tensors = {signal: value for signal, value in context.signals.items() if isinstance(value, torch.Tensor)}
    rounded = {**context.signals, **{signal: v.clamp(-100, 100).to(dtype) for signal, v in tensors.items()}}
    wide = {**context.signals, **{signal: rounded[signal].float() for signal in tensors}}
    low = policy.select(replace(context, signals=rounded))
    assert torch.equal(low.anchors(), policy.select(replace(context, signals=wide)).anchors())
    if Projected() in rounded:
        assert low.apply(rounded[Projected()], features=True).dtype == dtype


@pytest.mark.parametrize("info", INFOS)
@pytest.mark.parametrize(("name", "parameters"), ENCODER_CASES)
def test_keeping_all_keeps_all_in_order(name: str, parameters: dict[str, Any], info: ModelInfo) -> None:
    strict = {**parameters, "compat": None} if "compat" in parameters else parameters
    policy = registry.create(name, **strict)
    context = at_encoder(policy, info)
    for keep in (1.0, max(context.lengths)):
        everything = policy.select(replace(context, budget=type(context.budget).parse(keep)))
        assert everything.out_counts() == context.lengths
        features = torch.randn(*context.valid.shape, 2)
        if Projected() in context.signals:
            features = context.signals[Projected()]
        out = everything.apply(features, features=True)
        assert torch.equal(out[context.valid], features[context.valid])


@pytest.mark.parametrize(("name", "parameters"), PINNED_CASES)
def test_pinned_tokens_are_neither_chosen_nor_counted(name: str, parameters: dict[str, Any]) -> None:
    """An image of three rows with a newline token behind each: the framework keeps newlines by itself."""
    policy = registry.create(name, **parameters)
    height, width = 3, 6
    cells = tuple(row * (width + 1) + column for row in range(height) for column in range(width))
    view = contexts.View(height, width, index=cells)
    signals = {
        signal: [torch.full((height * (width + 1), *rows[0].shape[1:]), 50.0)]
        for signal, rows in contexts.random_signals(policy, [(view,)]).items()
    }
    for signal, rows in contexts.random_signals(policy, [(view,)]).items():
        signals[signal][0][list(cells)] = rows[0]
    plain = contexts.post_encoder(
        [contexts.image(height, width)], policy.keep, contexts.random_signals(policy, [(view,)]), seeds=(1,)
    )
    n = height * (width + 1)
    pinned = torch.ones(1, n, dtype=torch.bool)
    pinned[0, list(cells)] = False
    context = Context(
        site=Site.POST_ENCODER,
        info=contexts.LLAVA,
        budget=plain.budget,
        lengths=(n,),
        valid=torch.ones(1, n, dtype=torch.bool),
        signals={signal: torch.stack(rows) for signal, rows in signals.items()},
        views=((view,),),
        pinned=pinned,
        seeds=(1,),
    )
    chosen = policy.select(context).anchors()
    expected = policy.select(plain).anchors()
    assert chosen.tolist() == [[cells[token] for token in expected[0].tolist() if token >= 0]]


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_settings_survive_files_and_pickling(name: str, parameters: dict[str, Any], tmp_path: Any) -> None:
    policy = registry.create(name, **parameters)
    for path in (tmp_path / "policy.yaml", tmp_path / "policy.json"):
        config.dump(policy, path)
        assert config.load(path) == policy
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert config.build(name, parameters) == policy
    with pytest.raises(FrozenInstanceError):
        policy.keep = 0.9  # type: ignore[misc]
    with pytest.raises(InputError, match="no parameter 'kep'"):
        registry.create(name, kep=0.3)
    with pytest.raises(InputError, match="out of range"):
        registry.create(name, keep=1.5)


@pytest.mark.parametrize("name", registry.available(wrappers=True))
def test_documentation(name: str) -> None:
    cls = registry.get(name)
    text = cls.__doc__ or ""
    first = text.splitlines()[0]
    assert first.endswith(".") and "Args:" in text and "Example:" in text
    if not cls.is_wrapper:
        assert "Cost" in text
        assert cls.meta.arxiv is None or cls.meta.arxiv in text
        assert cls.meta.venue is None or cls.meta.venue in text
    inherited = {"positions", "keep"} if name == "compose" else {"positions"}
    for parameter in {field.name for field in fields(cls)} - inherited:
        assert f"        {parameter}:" in text, f"{name} does not document {parameter}"


@pytest.mark.parametrize("name", registry.available(wrappers=True))
def test_examples_in_documentation(name: str) -> None:
    module = sys.modules[registry.get(name).__module__]
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_requests(name: str, parameters: dict[str, Any]) -> None:
    policy = registry.create(name, **parameters)
    assert policy.reduces(contexts.LLAVA)
    requests = policy.requests(contexts.LLAVA)
    virtual = getattr(policy, "unmerge", False)
    assert requests and all(
        request.positions in (("virtual",) if virtual else ("keep", "compact")) for request in requests
    )
    wide = "virtual" if virtual else "keep"
    assert all(request.positions == wide for request in policy.requests(contexts.QWEN))
    forced = replace(policy, positions="compact")
    assert all(request.positions == "compact" for request in forced.requests(contexts.QWEN))


@pytest.mark.parametrize("name", registry.available())
def test_dense_settings_reduce_nothing(name: str) -> None:
    policy = registry.create(name, keep=1.0)
    assert not policy.reduces(contexts.LLAVA)
    with pytest.raises(InputError, match="positions='original' is unknown"):
        registry.create(name, positions="original")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_known_budget_needs_no_synchronisation() -> None:
    for case in ENCODER_CASES:
        name, parameters = case.values
        if parameters.get("compat") or name == "vflowopt":
            continue  # they keep a number of tokens that only the device knows
        policy = registry.create(name, **parameters)
        context = at_encoder(policy, contexts.LLAVA, (0, 0))
        on_gpu = replace(
            context,
            valid=context.valid.cuda(),
            signals={signal: value.cuda() for signal, value in context.signals.items()},
        )
        policy.select(on_gpu)  # loads kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            selection = policy.select(on_gpu)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(selection.anchors().cpu(), policy.select(context).anchors())
