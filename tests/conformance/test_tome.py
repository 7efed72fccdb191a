"""Token merging against `tests/golden/tome.npz`, made with the authors' functions.

Golden kinds and settings, each through `ToMe.select` on a context: `reference` -> `ToMe(r)`, the class and distillation
token as the tower's prefix (where both exist the unmerged values are those of each token's group: the authors' unmerge
mixes up that layout); `chain` -> `ToMe(r=[...])` block after block; `kth` -> `ToMe(r=[1], matching="kth", k)`;
`parse` -> `ToMe(r, inflect).schedule`; `propattn` -> what the requests ask for. `reference` and `chain` also run on
both implementations of the kernel. `vit` -> `vlmprune.apply(timm_model, ToMe(r=[...], prop_attn))`, end to end.
"""

from __future__ import annotations

from dataclasses import replace

import contexts
import pytest
import torch
from golden_io import Case
from torch import Tensor

import vlmprune
from vlmprune.core.info import ModelInfo
from vlmprune.core.selection import Selection
from vlmprune.core.signals import KeyMean
from vlmprune.kernels.bipartite import bipartite_match, merge_groups
from vlmprune.kernels.gather import compose_groups, segment_merge, unmerge
from vlmprune.policies.tome import ToMe

BACKENDS = ("reference", "torch")


def tensor(array: object) -> Tensor:
    return torch.from_numpy(array)


def sources(group_id: Tensor, n_out: int) -> Tensor:
    """``[B, n_out, N]``: 1 where a token belongs to an output."""
    return (group_id[:, None] == torch.arange(n_out)[:, None]).float()


@pytest.mark.golden("tome", "reference")
@pytest.mark.parametrize("backend", BACKENDS)
def test_matching(case: Case, backend: str) -> None:
    x, want = tensor(case.inputs["x"]), {name: tensor(value) for name, value in case.outputs.items()}
    size = tensor(case.inputs["size"])[..., 0] if "size" in case.inputs else torch.ones(x.shape[:2])
    distilled = bool(case.integer("distill_token"))
    protect = case.integer("class_token") + distilled
    match = bipartite_match(tensor(case.inputs["metric"]), case.integer("r"), protect=protect, backend=backend)
    assert match.n_out == want["x"].shape[1] and (match.counts == match.n_out).all()
    merged = merge_groups(x, match.group_id, match.n_out, "wavg", size, backend=backend)
    torch.testing.assert_close(merged, want["x"], atol=1e-5, rtol=0)
    total = segment_merge(size[..., None], match.group_id, match.n_out, mode="sum")
    torch.testing.assert_close(total, want["size"], atol=1e-5, rtol=0)
    if "source" in want:
        assert torch.equal(sources(match.group_id, match.n_out), want["source"])
        mean = merge_groups(x, match.group_id, match.n_out, "mean", backend=backend)
        torch.testing.assert_close(mean, want["x_mean"], atol=1e-5, rtol=0)
        back = want["source"].mT @ want["x"] if distilled else want["unmerged"]
        torch.testing.assert_close(unmerge(merged, match.group_id), back, atol=1e-5, rtol=0)


@pytest.mark.golden("tome", "chain")
@pytest.mark.parametrize("backend", BACKENDS)
def test_layers(case: Case, backend: str) -> None:
    x = tensor(case.inputs["x"])
    size = torch.ones(*x.shape[:2], 1)
    groups = torch.arange(x.shape[1]).expand(x.shape[:2])
    for layer, r in enumerate(case.params["r"].tolist()):
        metric = x @ tensor(case.inputs[f"w{layer}"]) + (0.3 if layer else 0.0)
        match = bipartite_match(metric, r, protect=1, backend=backend)
        x = merge_groups(x, match.group_id, match.n_out, "wavg", size[..., 0], backend=backend)
        size = segment_merge(size, match.group_id, match.n_out, mode="sum")
        groups = compose_groups(groups, match.group_id)
        torch.testing.assert_close(x, tensor(case.outputs[f"x{layer}"]), atol=1e-5, rtol=0)
        torch.testing.assert_close(size, tensor(case.outputs[f"size{layer}"]), atol=1e-5, rtol=0)
    assert torch.equal(sources(groups, x.shape[1]), tensor(case.outputs["source"]))


def tower(blocks: int, prefix: int) -> ModelInfo:
    """A tower of so many blocks, all of which feed what comes next."""
    return replace(
        contexts.LLAVA, vision_depth=blocks, feature_block=blocks - 1, prefix_tokens=prefix, has_cls=prefix > 0
    )


def merged(policy: ToMe, metric: Tensor, info: ModelInfo, block: int, size: Tensor | None) -> Selection:
    """What the policy's own method does in one block."""
    batch, n, _ = metric.shape
    context = contexts.vision_block([n] * batch, block, {KeyMean(block): metric}, info, sizes=size)
    return policy.select(context)


def sizes_after(selection: Selection, size: Tensor) -> Tensor:
    return (replace(selection, mode="sum") if selection.group_id is not None else selection).apply(size)


@pytest.mark.golden("tome", "reference")
def test_policy(case: Case) -> None:
    x, want = tensor(case.inputs["x"]), {name: tensor(value) for name, value in case.outputs.items()}
    size = tensor(case.inputs["size"])[..., 0] if "size" in case.inputs else None
    distilled = bool(case.integer("distill_token"))
    info = tower(1, case.integer("class_token") + distilled)
    selection = merged(ToMe(r=case.integer("r")), tensor(case.inputs["metric"]), info, 0, size)
    assert selection.counts == (want["x"].shape[1],) * len(x)
    torch.testing.assert_close(selection.apply(x), want["x"], atol=1e-5, rtol=0)
    total = sizes_after(selection, torch.ones(x.shape[:2]) if size is None else size)
    torch.testing.assert_close(total[..., None], want["size"], atol=1e-5, rtol=0)
    if "source" in want:
        assert torch.equal(sources(selection.group_id, selection.n_out), want["source"])
        back = want["source"].mT @ want["x"] if distilled else want["unmerged"]
        torch.testing.assert_close(selection.unmerge(selection.apply(x)), back, atol=1e-5, rtol=0)


@pytest.mark.golden("tome", "chain")
def test_policy_layers(case: Case) -> None:
    """The list given as ``r``, sizes and sources carried from block to block."""
    x, schedule = tensor(case.inputs["x"]), case.params["r"].tolist()
    policy, info = ToMe(r=schedule), tower(len(schedule), 1)
    assert [request.layer for request in policy.requests(info)] == list(range(len(schedule)))
    size = torch.ones(x.shape[:2])
    groups = torch.arange(x.shape[1]).expand(x.shape[:2])
    for block in range(len(schedule)):
        metric = x @ tensor(case.inputs[f"w{block}"]) + (0.3 if block else 0.0)
        selection = merged(policy, metric, info, block, size if block else None)
        x, size = selection.apply(x), sizes_after(selection, size)
        groups = compose_groups(groups, selection.group_id)
        torch.testing.assert_close(x, tensor(case.outputs[f"x{block}"]), atol=1e-5, rtol=0)
        torch.testing.assert_close(size[..., None], tensor(case.outputs[f"size{block}"]), atol=1e-5, rtol=0)
    assert torch.equal(sources(groups, x.shape[1]), tensor(case.outputs["source"]))


@pytest.mark.golden("tome", "kth")
def test_kth(case: Case) -> None:
    x = tensor(case.inputs["x"])
    policy = ToMe(r=[1], matching="kth", k=case.integer("k"))
    selection = merged(policy, tensor(case.inputs["metric"]), tower(1, 0), 0, None)
    want, whole = tensor(case.outputs["x"]), case.outputs["unmerged"].shape[1]
    assert selection.counts == (want.shape[1],) * len(x)
    out = selection.apply(x)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=0)
    back = selection.unmerge(out)
    torch.testing.assert_close(back[:, :whole], tensor(case.outputs["unmerged"]), atol=1e-5, rtol=0)
    assert not back[:, whole:].any()  # the tokens behind the last group are gone


@pytest.mark.golden("tome", "parse")
def test_schedules(case: Case) -> None:
    r, blocks = case.params["r"], case.integer("layers")
    given = r.tolist() if r.ndim else int(r)
    policies = [ToMe(r=given)]
    if "inflect" in case.params:
        tilt = case.ratio("inflect")
        policies = [ToMe(r=(given, tilt)), ToMe(r=given, inflect=tilt)]
    for policy in policies:
        assert policy.schedule(blocks) == tuple(case.outputs["r"].tolist())


@pytest.mark.golden("tome", "propattn")
def test_proportional_attention(case: Case) -> None:
    """The policy asks for the mean of the keys, and for ``log(size)`` on the keys' scores: what the authors compute."""
    q, k, v = (tensor(case.inputs[name]) for name in "qkv")
    size = tensor(case.inputs["size"])[..., 0]
    info = tower(2, 0)
    request = ToMe(r=2).requests(info)[1]
    assert request.signals == (KeyMean(1),) and request.size_bias and request.place == "middle"
    assert not ToMe(r=2, prop_attn=False).requests(info)[1].size_bias
    metric = tensor(case.outputs["metric"])
    torch.testing.assert_close(k.mean(1), metric, atol=1e-6, rtol=0)
    context = contexts.vision_block([q.shape[2]] * len(q), 1, {KeyMean(1): k.mean(1)}, info, sizes=size)
    weights = ToMe(r=2).select(context).weights
    bias = weights.log()[:, None, None]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    torch.testing.assert_close(out.transpose(1, 2).flatten(2), tensor(case.outputs["o"]), atol=1e-5, rtol=0)


@pytest.mark.golden("tome", "vit")
@torch.no_grad()
def test_vision_transformer(case: Case) -> None:
    """The authors' patch of a timm model, end to end."""
    timm = pytest.importorskip("timm")
    number = {name: case.integer(name) for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
    model = timm.models.VisionTransformer(**number, mlp_ratio=case.integer("mlp_ratio_x2") / 2, num_classes=5).eval()
    model.load_state_dict({name: tensor(value) for name, value in case.state.items()})
    image, want = tensor(case.inputs["image"]), {name: tensor(value) for name, value in case.outputs.items()}
    torch.testing.assert_close(model(image), want["logits_dense"], atol=1e-5, rtol=0)
    policy = ToMe(r=case.params["r_schedule"].tolist(), prop_attn=bool(case.integer("prop_attn")))
    with vlmprune.applied(model, policy) as handle:
        torch.testing.assert_close(model(image), want["logits"], atol=1e-5, rtol=0)
        [site] = handle.last.sites
    source = sources(site.selection.group_id, site.selection.n_out)  # of the patches; CLS stands before them
    assert torch.equal(source, want["source"][:, 1:, 1:])
    assert torch.equal(source.sum(2, keepdim=True), want["size"][:, 1:])
    cls = torch.zeros(source.shape[2] + 1)
    cls[0] = 1
    assert (want["source"][:, 0] == cls).all() and (want["source"][:, 1:, 0] == 0).all()
