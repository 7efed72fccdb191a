"""One forward after the other through the text model: prefill with visual tokens, then decoding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlmprune.adapters import cache as caches
from vlmprune.adapters import decoder, deepstack, finish, guards, masks, prompt
from vlmprune.adapters.call import Decode, Prefill
from vlmprune.adapters.encoding import EncodingRecorder
from vlmprune.adapters.expansion import VirtualPrompt
from vlmprune.adapters.family import Family
from vlmprune.adapters.layout import PromptLayout
from vlmprune.adapters.probe import LayerProbe
from vlmprune.adapters.sites import Step
from vlmprune.adapters.source import SignalSource
from vlmprune.adapters.tokens import LayerTokens
from vlmprune.adapters.vision_family import VisionFamily
from vlmprune.core import config
from vlmprune.core.errors import UnsupportedError
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import Policy
from vlmprune.core.report import ImageRecord, Report
from vlmprune.core.signals import ProbeAttention
from vlmprune.core.sites import Site
from vlmprune.kernels.gather import gather_tokens


class TextForward:
    """Changes what the text model and its layers receive.

    Args:
        family, info: the model. policy, steps: what to do. encoder: where image signals come from.
        restore_length: give the output the prompt's full length again.

    Attributes:
        probes: of the layers whose attention a step asks for before they run.
    """

    def __init__(
        self,
        family: Family,
        info: ModelInfo,
        policy: Policy,
        steps: tuple[Step, ...],
        encoder: EncodingRecorder | None,
        restore_length: bool,
    ) -> None:
        self._family = family
        self._info = info
        self._policy = policy
        self._steps = steps
        self._encoder = encoder
        self._active = any(step.request.site != Site.IMAGE for step in steps)
        self._restore_length = restore_length
        self._warned = False
        self.call: Prefill | Decode | None = None
        self.report: Report | None = None
        self.sample_ids: list[str] | None = None
        self.probes: Mapping[int, LayerProbe] = {}

    def prefill(self) -> Prefill | None:
        """The current call if it is a prefill."""
        return self.call if isinstance(self.call, Prefill) else None

    def current(self) -> Prefill | Decode | None:
        """The call under way."""
        return self.call

    def begin_prefill(self, layout: PromptLayout, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments of the text model for a prompt with images, shortened where a policy says so."""
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            embeds = self._family.text_model.get_input_embeddings()(kwargs["input_ids"])
        call = self.call = new_prefill(layout, kwargs, embeds, self._new_report(layout))
        self.report = call.report
        family = self._family if isinstance(self._family, VisionFamily) else None
        source = SignalSource(call, embeds, family, self._encoder, self.sample_ids)
        if self._active:
            kwargs = deepstack.take_over(call, kwargs)
        if any(step.policy.is_random(self._info) for step in self._steps):
            call.contents = source.contents()
        steps = tuple(step for step in self._steps if step.request.site == Site.POST_ENCODER)
        if steps or (self._encoder is not None and self._encoder.reduces):
            reduced = prompt.reduce_images(steps, call, embeds, self._info, source)
            if reduced is not None:
                if call.is_virtual:
                    kwargs = prompt.stay_long(kwargs, call, *reduced)
                else:
                    kwargs = prompt.shorten(kwargs, call, *reduced, self._mask_form)
        call.lengths = [call.tokens.length] * (self._info.text_depth or 0)
        call.attended = [call.seen.length] * len(call.lengths)
        return self._with_cache(call, kwargs)

    def begin_decode(self, cache: caches.PrunedDynamicCache, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments of the text model for new tokens on a pruned cache.

        Raises:
            UnsupportedError: the mask is not over the unpruned sequence, or the window is full.
        """
        new = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        queries, past = new.shape[1], cache.get_seq_length()
        total = past + queries
        caches.check_window(guards.sliding_window(self._family), total)
        mask = kwargs.get("attention_mask")
        if self._family.prepares_masks:
            mask = masks.visible_keys(mask)
        mask = checked_mask(mask, total)
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(past, total, device=new.device).expand(new.shape[0], -1)
        call = self.call = Decode(cache, mask, positions, queries, total)
        cache.prompt.inside = True
        given = cache.prompt.given
        changed = {**kwargs, "position_ids": positions}
        if given.shift is not None:
            changed["position_ids"] = positions - given.shift[:, None]
        told = kwargs.get("attention_mask") is not None
        if not given.full and mask is None or told and not call.is_virtual:
            changed["attention_mask"] = call.valid(given).long()
        if kwargs.get("cache_position") is not None:
            changed["cache_position"] = kwargs["cache_position"] - (cache.prompt.length - given.length)
        return changed

    def layer(self, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Hidden states and keyword arguments of decoder layer ``index``, cut where a policy says so."""
        call = self.call
        if isinstance(call, Decode):
            return hidden, decoder.decode_kwargs(call, index, kwargs, hidden, self._family, self._mask_form)
        assert isinstance(call, Prefill)
        if index == 0 and call.is_virtual:
            hidden = gather_tokens(hidden, call.tokens.index)
        hidden = deepstack.add(call, index, hidden)
        for step in self._steps:
            if step.request.site == Site.DECODER_LAYER and step.request.layer == index:
                self._probe(step, call, hidden, kwargs)
                hidden = decoder.cut(step, call, hidden, self._info, self._family.text_model.norm, self._seeds)
        call.lengths[index], call.attended[index] = call.tokens.length, call.seen.length
        if call.cache is not None:
            call.cache.prompt.store(index, call.tokens, call.expansion)
        if call.relative is not None:
            kwargs = decoder.prefill_kwargs(call, index, kwargs, hidden, self._family, self._mask_form)
        if self.is_flash and call.tokens is not call.whole:
            kwargs = {**kwargs, "position_ids": None}  # gaps would be taken for several packed sequences
        return hidden, kwargs

    def end(self, output: Any) -> Any:
        """The text model's output: full length again after a prefill, which is also where caches are evicted."""
        call = self.call
        if not isinstance(call, Prefill) or output is None:
            return output
        if call.cache is not None:
            for step in self._steps:
                if step.request.site == Site.KV_CACHE:
                    decoder.evict(step, call, self._info, self._seeds)
        finish.measure_cache(call, output)
        finish.measure_flops(call, self._info)
        self._warned = finish.warn_if_inactive(call, self._steps, self._warned)
        if not self._restore_length or call.tokens is call.whole:
            return output
        return finish.restore_output(output, call)

    def _probe(self, step: Step, call: Prefill, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Read the attention of the coming layer over the tokens that a step will cut, if it asks for it."""
        if not any(isinstance(signal, ProbeAttention) for signal in step.request.signals) or not any(call.visual):
            return
        if call.relative is not None:
            layer = step.request.layer or 0
            kwargs = decoder.prefill_kwargs(call, layer, kwargs, hidden, self._family, self._mask_form)
        self.probes[step.request.layer or 0].run(hidden, kwargs)

    def close(self) -> None:
        """Forget the call; also after an error."""
        if self.call is not None and self.call.cache is not None:
            self.call.cache.prompt.inside = False
        self.call = None

    def _new_report(self, layout: PromptLayout) -> Report:
        return Report(
            model_class=self._info.model_class,
            policy=config.to_dict(self._policy),
            n_samples=layout.rows,
            prompt_tokens=layout.length,
            images=tuple(
                ImageRecord(i.sample, i.index, len(i.positions), i.views, i.shape.newlines) for i in layout.images
            ),
            text_depth=self._info.text_depth or 0,
        )

    def _with_cache(self, call: Prefill, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Give the call's KV cache the prompt's state, creating it where the model would."""
        later = any(step.request.site in (Site.DECODER_LAYER, Site.KV_CACHE) for step in self._steps)
        if call.tokens is call.whole and not later:
            return kwargs
        cache = kwargs.get("past_key_values")
        text_config = self._family.text_model.config
        if cache is None:
            use = kwargs.get("use_cache")
            if not (text_config.use_cache if use is None else use):
                return kwargs
            cache = caches.DynamicCache(config=text_config)
            kwargs = {**kwargs, "past_key_values": cache}
        depth = self._info.text_depth or 0
        stand = None if call.expansion is None else VirtualPrompt(call.whole, [call.expansion] * depth, call.tables)
        state = caches.PromptState(
            call.layout.length, [call.tokens] * depth, True, call.layout.text_after_images(), stand
        )
        call.cache = caches.PrunedDynamicCache.adopt(cache, state)
        return kwargs

    @property
    def is_flash(self) -> bool:
        """True if the decoder uses flash attention."""
        return self._mask_form == "flat"

    @property
    def _mask_form(self) -> masks.MaskForm:
        return masks.mask_form(self._family.text_model.config._attn_implementation)

    def _seeds(self, policy: Policy, rows: list[int]) -> tuple[int, ...] | None:
        """Seed per row for decoder-site policies that draw."""
        call = self.call
        if not policy.is_random(self._info) or not isinstance(call, Prefill):
            return None
        return call.row_seeds(getattr(policy, "seed", 0), rows)


def new_prefill(layout: PromptLayout, kwargs: dict[str, Any], embeds: Tensor, report: Report) -> Prefill:
    """The state of a prefill before anything is reduced."""
    device, rows, length = embeds.device, layout.rows, layout.length
    mask = layout.mask
    real = torch.ones(rows, length, dtype=torch.bool, device=device) if mask is None else mask.bool().to(device)
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(length, device=device)[None]
    index = torch.arange(length, device=device).expand(rows, length)
    tokens = LayerTokens(index, real, all(n == length for n in layout.real))
    return Prefill(
        layout=layout,
        report=report,
        image_id=layout.image_id(device),
        real=real,
        positions=positions.expand(*positions.shape[:-2], rows, length),
        whole=tokens,
        tokens=tokens,
        removed=torch.zeros(rows, length, dtype=torch.bool, device=device),
        visual=layout.visual_per_row(),
    )


def checked_mask(mask: Any, total: int) -> Tensor | None:
    """A 2-D mask over the unpruned sequence of ``total`` tokens, or None."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise UnsupportedError("On a pruned cache only 2-D attention masks are supported; pass a 2-D mask or none.")
    if mask.shape[1] != total:
        raise UnsupportedError(
            f"attention_mask has {mask.shape[1]} columns, but the unpruned sequence has {total} tokens; give one "
            "column per token of the whole conversation."
        )
    return mask
