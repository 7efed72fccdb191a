"""ToDRE against an independent float64 reference of the paper's formulas.

Golden kind -> settings:
- `select`: `ToDRE(keep=k, variant="max_sum" | "k_center")` with the pivot taken from the CLS row.
- `ratio`: `ToDRE(tau=...)`, stage 2 on group masses of the case's attention.
- `e2e`: `ToDRE(keep=1.0, tau=..., check_layers=check_layer - 1)` on the stock LlamaModel (the golden layer
  counts from 1), original position ids kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import contexts
import numpy as np
import pytest
import torch
from golden_io import Case
from golden_llama import llama, record_lengths
from torch import Tensor

from vlmprune.core.context import Context
from vlmprune.core.selection import Selection
from vlmprune.core.signals import ClsRow, GroupMass, Projected
from vlmprune.core.views import View
from vlmprune.policies.todre import ToDRE, mass_shares


def views_of(case: Case) -> tuple[View, ...]:
    n = len(case.inputs["features"])
    thumbnail, n_frames = case.integer("thumbnail_len"), case.integer("frames")
    if thumbnail:
        return View(1, thumbnail, 0, "thumbnail"), View(1, n - thumbnail, thumbnail, "tile")
    return contexts.frames(1, n // n_frames, n_frames) if n_frames else contexts.image(1, n)


@pytest.mark.golden("todre", "select")
@pytest.mark.parametrize("variant", ["max_sum", "k_center"])
def test_selection(case: Case, variant: str) -> None:
    policy = ToDRE(keep=case.integer("k"), variant=variant)
    features = torch.from_numpy(case.inputs["features"])
    # Attention outside the thumbnail is larger than any in it: only the thumbnail may give the pivot.
    cls_row = torch.full((len(features),), 10.0)
    given = torch.from_numpy(case.inputs["cls_attention"]).flatten()
    cls_row[: len(given)] = given
    [stage1] = [request for request in policy.requests(contexts.LLAVA) if request.layer is None]
    assert stage1.signals == (Projected(), ClsRow(contexts.LLAVA.feature_block))
    signals = {Projected(): [features], ClsRow(contexts.LLAVA.feature_block): [cls_row]}
    context = contexts.post_encoder([views_of(case)], policy.keep, signals)
    order = policy.order(context)
    assert order[0, 0] == case.outputs["pivot"]
    assert order.tolist() == [case.outputs[f"{variant}_order"].tolist()]
    assert contexts.kept_tokens(policy.select(context)) == [case.outputs[f"{variant}_kept"].tolist()]


@pytest.mark.golden("todre", "ratio")
def test_ratios(case: Case) -> None:
    attention = case.inputs["attn"].astype(np.float64).mean(0)
    system, visual = case.integer("sys_len"), case.integer("vis_len")
    groups = [slice(0, system), slice(system + visual, None), slice(system, system + visual)]
    mass = torch.tensor([[[attention[rows, columns].sum() for columns in groups] for rows in groups[1:]]])
    t2v, v2t = mass_shares(mass)
    assert t2v.item() == pytest.approx(float(case.outputs["alpha_t2v"]), abs=1e-6)
    assert v2t.item() == pytest.approx(float(case.outputs["alpha_v2t"]), abs=1e-6)
    policy = ToDRE(keep=1.0, tau=case.ratio("tau"), check_layers=3)
    [request] = policy.requests(contexts.LLAVA)
    context = contexts.decoder([visual], request.layer, {request.signals[0]: mass.float()})
    [kept] = contexts.kept_tokens(policy.select(context))
    assert kept == ([] if case.outputs["drop"] else list(range(visual)))


@dataclass(frozen=True)
class Recorded(ToDRE):
    """ToDRE that writes down the ratios it decides by."""

    ratios: list[tuple[Tensor, Tensor]] = field(default_factory=list, compare=False)

    def select_decoder_layer(self, context: Context) -> Selection:
        assert context.layer is not None
        self.ratios.append(mass_shares(context.signal(GroupMass(context.layer - 1))))
        return super().select_decoder_layer(context)


@pytest.mark.golden("todre", "e2e")
@torch.no_grad()
def test_stage_2_in_a_decoder(case: Case) -> None:
    import vlmprune

    model, inputs = llama(case), torch.from_numpy(case.inputs["inputs_embeds"])
    start, n_visual, checked = (case.integer(name) for name in ("image_start", "image_len", "check_layer"))
    dropped, length, depth = bool(case.outputs["dropped"]), inputs.shape[1], len(model.layers)
    policy = Recorded(keep=1.0, tau=case.ratio("tau"), check_layers=checked - 1)
    dense = model(inputs_embeds=inputs).last_hidden_state
    handle = vlmprune.apply(model, policy, spans=[[(start, n_visual)]], restore_length=False)
    assert policy.checked_layers(handle.info) == (checked - 1,)
    lengths = record_lengths(model)
    output = model(inputs_embeds=inputs, use_cache=True)

    expected = torch.from_numpy(case.outputs["last_hidden_state"])
    torch.testing.assert_close(output.last_hidden_state, expected, rtol=1e-4, atol=1e-4)
    [(t2v, v2t)] = policy.ratios
    assert t2v.item() == pytest.approx(float(case.outputs["alpha_t2v"]), abs=1e-5)
    assert v2t.item() == pytest.approx(float(case.outputs["alpha_v2t"]), abs=1e-6)
    stored = [layer.keys.shape[-2] for layer in output.past_key_values.layers]
    assert stored == case.outputs["kv_len"].tolist()
    # The hooks did it: layers behind the check are entered by fewer tokens.
    after = length - n_visual if dropped else length
    assert lengths == [length] * checked + [after] * (depth - checked)
    [site] = handle.last.sites
    assert (site.layer, site.tokens_in) == (checked, (n_visual,))
    assert site.tokens_out == (0 if dropped else n_visual,)

    handle.remove()
    assert torch.equal(model(inputs_embeds=inputs).last_hidden_state, dense)
