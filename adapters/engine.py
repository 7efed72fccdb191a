"""Hooks a policy into one model and drives it through prefill and decoding."""

from __future__ import annotations

import logging
import threading
import warnings
from collections import defaultdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.adapters import cache as caches
from vlmprune.adapters import decoder, masks, prompt, tap
from vlmprune.adapters.call import Decode, Prefill
from vlmprune.adapters.family import Family
from vlmprune.adapters.hooks import HookStack
from vlmprune.adapters.layout import PromptLayout
from vlmprune.adapters.sites import Step, plan
from vlmprune.adapters.source import SignalSource
from vlmprune.adapters.text_signals import LayerRecorder
from vlmprune.adapters.vision import TowerRecorder
from vlmprune.core import config
from vlmprune.core import signals as s
from vlmprune.core.errors import ActiveError, UnsupportedError
from vlmprune.core.policy import Policy
from vlmprune.core.randomness import item_seed, tensor_digest
from vlmprune.core.report import ImageRecord, Report
from vlmprune.core.sites import Site

logger = logging.getLogger("vlmprune")

REFUSED_ATTENTION = ("flex_attention",)


class Engine:
    """One policy on one model: installs hooks, keeps the report, and can be switched off and removed.

    Args:
        family: adapter of the model.
        policy: what to do.
        restore_length: give the text model's output its full length again (zeros at dropped places).
    """

    def __init__(self, family: Family, policy: Policy, restore_length: bool = True) -> None:
        self.family = family
        self.policy = policy
        self.info = family.info()
        self.steps = plan(policy, self.info)
        self.restore_length = restore_length
        self.enabled = True
        self.report: Report | None = None
        self.last_error: BaseException | None = None
        self.sample_ids: list[str] | None = None
        self._hooks = HookStack()
        self._call: Prefill | Decode | None = None
        self._layout: PromptLayout | None = None
        self._in_base = False
        self._thread: int | None = None
        self._warned = False
        wanted = {signal for step in self.steps for signal in step.request.signals}
        draws = any(leaf.is_random(self.info) for leaf in policy.leaves())
        self.tower = TowerRecorder(family, self.info, wanted, digests=draws)

    # ---- life of the hooks

    def install(self) -> None:
        """Register the hooks; on failure none stays."""
        try:
            self._install()
        except BaseException:
            self._hooks.remove()
            raise

    def _install(self) -> None:
        implementation = self.family.text_model.config._attn_implementation
        if self.steps and implementation in REFUSED_ATTENTION:
            raise UnsupportedError(f"attn_implementation={implementation!r} is not supported; use 'sdpa' or 'eager'.")
        if self.family.base is not None:
            self._hooks.before(self.family.base, self._before_base, prepend=True)
            self._hooks.after(self.family.base, self._after_base, always=True)
        self._hooks.before(self.family.text_model, self._before_text)
        self._hooks.after(self.family.text_model, self._after_text, always=True, prepend=True)
        self.tower.install(self._hooks)
        self._install_layers()

    def _install_layers(self) -> None:
        by_layer: dict[int, set[s.Signal]] = defaultdict(set)
        cuts = []
        for step in self.steps:
            if step.request.site in (Site.DECODER_LAYER, Site.KV_CACHE):
                cuts.append(step.request.layer or 0)
                for signal in step.request.signals:
                    if isinstance(signal, (s.GroupMass, s.AttentionRows)):
                        by_layer[signal.layer].add(signal)
        for layer, signals in by_layer.items():
            recorder = LayerRecorder(tuple(signals), self._prefill)
            tap.install(self.family.text_attention(layer), recorder, self._hooks)
        if cuts:
            # Layers before the first cut need no hook; those of a cache eviction differ from layer 0 at decode only.
            for index, layer in enumerate(self.family.decoder_layers()):
                if index >= min(cuts) or any(step.request.site == Site.KV_CACHE for step in self.steps):
                    self._hooks.before(layer, partial(self._before_layer, index), prepend=True)

    @property
    def hook_ids(self) -> frozenset[int]:
        """Ids of our hooks in the modules' tables."""
        return self._hooks.ids

    def remove(self) -> None:
        """Take every hook and tap away."""
        self._hooks.remove()
        self.tower.forget()

    # ---- the module that merges images into the prompt

    def _before_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.tower.enabled = self.enabled
        if not self.enabled:
            return
        self._enter()
        try:
            self._layout = None
            self._in_base = True
            if kwargs.get("pixel_values") is not None:
                self.tower.forget()
            self.family.check_call(kwargs)
            self._layout = self._read_layout(kwargs)
        except BaseException as error:
            self._leave(error)
            raise

    def _after_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._leave(None)

    def _read_layout(self, kwargs: dict[str, Any]) -> PromptLayout | None:
        cache = kwargs.get("past_key_values")
        filled = cache is not None and cache.get_seq_length() > 0
        if not filled:
            layout = self.family.layout(kwargs)
            if layout is not None:
                self._check_prefill(cache, layout.length)
            return layout
        if not isinstance(cache, caches.PrunedDynamicCache) and not self.family.brings_images(kwargs):
            return None
        new = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        if self.family.brings_images(kwargs) or (
            new is not None and new.shape[1] > 1 and self.family.base is not None and self.family.layout(kwargs)
        ):
            raise UnsupportedError(
                "Images arrived while the KV cache already holds tokens (a second image turn, or chunked prefill). "
                "Start again with a fresh cache and the whole conversation, without prefill_chunk_size."
            )
        return None

    def _check_prefill(self, cache: Any, length: int) -> None:
        if not self.steps:
            return
        caches.check_cache(cache)
        caches.check_window(cache, getattr(self.family.text_model.config, "sliding_window", None), length)
        text = self.family.text_model
        checkpointing = any(getattr(m, "gradient_checkpointing", False) for m in text.modules())
        if text.training and checkpointing:
            raise UnsupportedError(
                "Gradient checkpointing re-runs layers without the prompt's state; call "
                "model.gradient_checkpointing_disable() or run inside handle.disabled()."
            )

    # ---- the text model

    def _before_text(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self.enabled:
            self._refuse_pruned(kwargs)
            return None
        if not self._in_base:
            self._enter()
        try:
            if not self._in_base and self.family.base is None:
                self._layout = self._read_layout(kwargs)
            cache = kwargs.get("past_key_values")
            if self._layout is not None:
                return args, self._begin_prefill(self._layout, kwargs)
            if isinstance(cache, caches.PrunedDynamicCache) and cache.stored() > 0:
                return args, self._begin_decode(cache, kwargs)
            return None
        except BaseException as error:
            self._leave(error)
            raise

    def _refuse_pruned(self, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if isinstance(cache, caches.PrunedDynamicCache) and cache.stored() > 0:
            raise UnsupportedError("This KV cache was pruned; a dense run needs a fresh one.")

    def _begin_prefill(self, layout: PromptLayout, kwargs: dict[str, Any]) -> dict[str, Any]:
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            embeds = self.family.text_model.get_input_embeddings()(kwargs["input_ids"])
        call = self._new_prefill(layout, kwargs, embeds)
        self._call = call
        self.report = call.report
        steps = tuple(step for step in self.steps if step.request.site == Site.POST_ENCODER)
        if steps:
            source = SignalSource(call, embeds, self.tower, self.family.projector, self.sample_ids)
            reduced = prompt.reduce_images(steps, call, embeds, self.info, source)
            if reduced is not None:
                kwargs = prompt.shorten(kwargs, call, *reduced)
        self._attach_cache(call, kwargs)
        return kwargs

    def _new_prefill(self, layout: PromptLayout, kwargs: dict[str, Any], embeds: Tensor) -> Prefill:
        device, rows, length = embeds.device, layout.rows, layout.length
        mask = kwargs.get("attention_mask")
        flat = isinstance(mask, Tensor) and mask.ndim == 2
        real = mask.bool() if flat else torch.ones(rows, length, dtype=torch.bool, device=device)
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(length, device=device)[None]
        positions = positions.expand(*positions.shape[:-2], rows, length)
        index = torch.arange(length, device=device).expand(rows, length)
        tokens = caches.LayerTokens(index, real, all(n == length for n in layout.real))
        report = Report(
            model_class=self.info.model_class,
            policy=config.to_dict(self.policy),
            n_samples=rows,
            prompt_tokens=length,
            images=tuple(ImageRecord(i.sample, i.index, len(i.positions), i.views) for i in layout.images),
            text_depth=self.info.text_depth or 0,
        )
        return Prefill(
            layout=layout,
            report=report,
            image_id=layout.image_id(device),
            real=real,
            positions=positions,
            base=tokens,
            tokens=tokens,
            removed=torch.zeros(rows, length, dtype=torch.bool, device=device),
            visual=layout.visual_per_row(),
        )

    def _attach_cache(self, call: Prefill, kwargs: dict[str, Any]) -> None:
        """Give the call's KV cache the prompt's state, creating it where the model would."""
        later = any(step.request.site in (Site.DECODER_LAYER, Site.KV_CACHE) for step in self.steps)
        if call.tokens.length == call.layout.length and not later:
            return
        cache = kwargs.get("past_key_values")
        text_config = self.family.text_model.config
        if cache is None:
            use = kwargs.get("use_cache")
            if not (text_config.use_cache if use is None else use):
                return
            cache = kwargs["past_key_values"] = caches.DynamicCache(config=text_config)
            caches.check_window(cache, getattr(text_config, "sliding_window", None), call.layout.length)
        state = caches.PromptState(call.layout.length, [call.tokens] * (self.info.text_depth or 0), inside=True)
        call.cache = caches.PrunedDynamicCache.adopt(cache, state)

    def _begin_decode(self, cache: caches.PrunedDynamicCache, kwargs: dict[str, Any]) -> dict[str, Any]:
        embeds = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        queries, past = embeds.shape[1], cache.get_seq_length()
        total = past + queries
        caches.check_window(cache, getattr(self.family.text_model.config, "sliding_window", None), total)
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(past, total, device=embeds.device).expand(embeds.shape[0], -1)
        mask = kwargs.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            raise UnsupportedError("On a pruned cache only 2-D attention masks are supported; pass a 2-D mask or none.")
        if mask is not None and mask.shape[1] != total:
            raise UnsupportedError(
                f"attention_mask has {mask.shape[1]} columns, but the unpruned sequence has {total} tokens; give one "
                "column per token of the whole conversation."
            )
        call = self._call = Decode(cache, mask, positions, queries, total)
        base = cache.prompt.layers[0]
        changed = {**kwargs, "position_ids": positions}
        if base.shift is not None:
            changed["position_ids"] = positions - base.shift[:, None]
        if mask is not None or not base.full:
            changed["attention_mask"] = call.valid(base).long()
        if kwargs.get("cache_position") is not None:
            changed["cache_position"] = kwargs["cache_position"] - cache.prompt.dropped(0)
        cache.prompt.inside = True
        return changed

    def _after_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        call = self._call
        if call is None:
            if not self._in_base and self.enabled:
                self._leave(None)
            return None
        try:
            if call.cache is not None:
                call.cache.prompt.inside = False
            if isinstance(call, Prefill) and output is not None:
                output = self._end_prefill(call, output)
        except BaseException as error:
            self._leave(error)
            raise
        self._call = None
        if not self._in_base:
            self._leave(None)
        return output

    def _end_prefill(self, call: Prefill, output: Any) -> Any:
        if call.cache is not None:
            for step in self.steps:
                if step.request.site == Site.KV_CACHE:
                    decoder.evict(step, call, self.info, self._seeds)
        self._measure_cache(call, output)
        self._warn_if_inactive(call)
        if not self.restore_length or call.tokens.length == call.layout.length:
            return output
        if isinstance(output, tuple):
            return (prompt.restore(output[0], call), *output[1:])
        output["last_hidden_state"] = prompt.restore(output["last_hidden_state"], call)
        return output

    def _measure_cache(self, call: Prefill, output: Any) -> None:
        cache = call.cache if isinstance(output, tuple) else output.get("past_key_values")
        if not isinstance(cache, caches.DynamicCache):
            return
        stored = [layer for layer in cache.layers if layer.keys is not None]
        call.report.kv_bytes_per_layer = tuple(
            sum(part.numel() * part.element_size() for part in (layer.keys, layer.values)) for layer in stored
        )
        call.report.kv_bytes_per_layer_dense = tuple(
            2 * k.shape[0] * k.shape[1] * k.shape[3] * k.element_size() * call.layout.length
            for k in (layer.keys for layer in stored)
        )

    def _warn_if_inactive(self, call: Prefill) -> None:
        asked = [step for step in self.steps if not step.policy.budget.is_all and step.request.site != Site.IMAGE]
        if not asked or tuple(call.visual) != call.report.visual_tokens:
            return
        if any(r.site == Site.KV_CACHE or r.tokens_out != r.lengths for r in call.report.sites):
            return
        text = (
            f"{', '.join(sorted({step.policy.name for step in asked}))}: nothing was reduced, although the budget "
            f"{asked[0].policy.budget} asks for it; the images have {call.report.visual_tokens} visual tokens."
        )
        call.report.warnings.append(text)
        if not self._warned:
            self._warned = True
            warnings.warn(text, stacklevel=2)

    # ---- decoder layers

    def _before_layer(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        call = self._call
        if call is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        try:
            if isinstance(call, Decode):
                kwargs = decoder.decode_kwargs(call, index, kwargs, hidden, self._rotary, self._mask_form)
            else:
                for step in self.steps:
                    if step.request.site == Site.DECODER_LAYER and step.request.layer == index:
                        hidden = decoder.cut(step, call, hidden, self.info, self.family.text_model.norm, self._seeds)
                if call.cache is not None:
                    call.cache.prompt.layers[index] = call.tokens
                if call.relative is not None:
                    kwargs = decoder.prefill_kwargs(call, kwargs, hidden, self._rotary, self._mask_form)
        except BaseException as error:
            self.last_error = error
            raise
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def _rotary(self, hidden: Tensor, positions: Tensor) -> Any:
        return self.family.text_model.rotary_emb(hidden, positions)

    @property
    def _mask_form(self) -> masks.MaskForm:
        return masks.mask_form(self.family.text_model.config._attn_implementation)

    # ---- helpers

    def _prefill(self) -> Prefill | None:
        return self._call if isinstance(self._call, Prefill) else None

    def _seeds(self, policy: Policy, rows: list[int]) -> tuple[int, ...] | None:
        """Seed per row for decoder-site policies that draw."""
        seed = getattr(policy, "seed", None)
        call = self._call
        if seed is None or not policy.is_random(self.info) or not isinstance(call, Prefill):
            return None
        if self.sample_ids is not None:
            content = [self.sample_ids[row * len(self.sample_ids) // call.layout.rows] for row in rows]
        else:
            content = [tensor_digest(call.positions[..., row, :]) for row in rows]
        return tuple(item_seed(seed, c, 0) for c in content)

    def _enter(self) -> None:
        if self._thread is not None and self._thread != threading.get_ident():
            raise ActiveError("Another thread is running this pruned model; use one model copy per thread.")
        self._thread = threading.get_ident()
        self._call = None
        self.last_error = None

    def _leave(self, error: BaseException | None) -> None:
        if error is not None:
            self.last_error = error
        if self._call is not None and self._call.cache is not None:
            self._call.cache.prompt.inside = False
        self._call = None
        self._layout = None
        self._in_base = False
        self._thread = None
