"""Hooks a policy into one model: registration, errors, and the order of a forward's events."""

from __future__ import annotations

import inspect
import threading
from functools import partial
from typing import Any

from torch import nn

from vlmprune.adapters import guards, recorders, virtual
from vlmprune.adapters.cache import PrunedDynamicCache
from vlmprune.adapters.encoding import EncodingRecorder
from vlmprune.adapters.family import Family
from vlmprune.adapters.forward import TextForward
from vlmprune.adapters.hooked_engine import HookedEngine
from vlmprune.adapters.layout import PromptLayout
from vlmprune.adapters.processor import pixel_scale
from vlmprune.adapters.sites import needs_pixels
from vlmprune.adapters.vision_family import PIXELS, VisionFamily
from vlmprune.core.errors import ActiveError
from vlmprune.core.policy import Policy
from vlmprune.core.report import Report, SiteRecord
from vlmprune.core.sites import Site

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Engine(HookedEngine):
    """See :class:`HookedEngine`; for models with a decoder.

    Args:
        family: adapter of the model.
        policy: what to do.
        restore_length: give the text model's output its full length again (zeros at dropped places).
        processor: the model's processor, for policies that ask for pixels.
    """

    def __init__(self, family: Family, policy: Policy, restore_length: bool = True, processor: Any = None) -> None:
        super().__init__(family, policy)
        self.family = family
        outside = [step for step in self.steps if step.request.site != Site.VISION_BLOCK]
        self._wanted = {signal for step in outside for signal in step.request.signals}
        self.encoder: EncodingRecorder | None = None
        if isinstance(family, VisionFamily):
            scale = pixel_scale(processor) if needs_pixels(self.steps) else None
            reducer = family.reducer(self.steps)
            self.encoder = EncodingRecorder(family, self._wanted, digests=self._draws, scale=scale, reducer=reducer)
        self.forward = TextForward(family, self.info, policy, self.steps, self.encoder, restore_length)
        self._active = any(step.request.site != Site.IMAGE for step in self.steps)
        self._layout: PromptLayout | None = None
        self._in_base = False
        self._base_arguments: tuple[str, ...] = ()

    @property
    def report(self) -> Report | None:
        """What the last forward with visual tokens did."""
        return self.forward.report

    @property
    def main(self) -> nn.Module:
        """The module that bears the handle beside the model itself."""
        return self.family.text_model

    @property
    def sample_ids(self) -> list[str] | None:
        """Ids of the rows of the next forwards, for policies that draw; None seeds by content."""
        return self.forward.sample_ids

    @sample_ids.setter
    def sample_ids(self, ids: list[str] | None) -> None:
        self.forward.sample_ids = ids

    @property
    def tower_sites(self) -> tuple[SiteRecord, ...]:
        """The selections inside the tower of the last pictures that were encoded."""
        return () if self.encoder is None else self.encoder.tower_sites

    def remove(self) -> None:
        """Take every hook and tap away."""
        super().remove()
        if self.encoder is not None:
            self.encoder.forget()

    def switch(self, on: bool) -> None:
        """Turn pruning on or off without touching the hooks."""
        super().switch(on)
        if self.encoder is not None:
            self.encoder.enabled = on

    def _install(self) -> None:
        if self._active:
            guards.check_attention(self.family)
        if self.family.base is not None:
            self._base_arguments = tuple(inspect.signature(self.family.base.forward).parameters)
            self._hooks.before(self.family.base, self._before_base, prepend=True)
            self._hooks.after(self.family.base, self._after_base, always=True)
        self._hooks.before(self.family.text_model, self._before_text)
        self._hooks.after(self.family.text_model, self._after_text, always=True, prepend=True)
        if self.encoder is not None:
            self.encoder.install(self._hooks)
        if any(step.request.positions == "virtual" for step in self.steps):
            virtual.install(self.family, self.forward.current, self._hooks)
        self.forward.probes = recorders.install(self.family, self._wanted, self.forward.prefill, self._hooks)
        self._install_layers()

    def _install_layers(self) -> None:
        """Hook the layers whose tokens may differ from the text model's: from the first cut on, all if caches are
        evicted or tokens unmerged."""
        sites = [step.request for step in self.steps]
        cuts = [request.layer or 0 for request in sites if request.site == Site.DECODER_LAYER]
        if any(request.site == Site.KV_CACHE for request in sites):
            cuts.append(0)
        if any(request.positions == "virtual" for request in sites) or self._active and self.forward.is_flash:
            cuts.append(0)
        if self._active and self.family.deepstack_levels:
            cuts.append(1)
        first = min(cuts, default=None)
        if first is None:
            return
        for index, layer in enumerate(self.family.decoder_layers()):
            if index >= first:
                self._hooks.before(layer, partial(self._before_layer, index), prepend=True)

    def _before_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The module that merges images into the prompt starts: read where images stand."""
        if not self.enabled:
            return
        self._enter()
        if args:  # some models hand over their first argument by place
            kwargs = {**dict(zip(self._base_arguments, args, strict=False)), **kwargs}
        try:
            self._in_base = True
            assert self.encoder is not None
            self.encoder.inside = any(kwargs.get(name) is not None for name in PIXELS.values())
            self.family.check_call(kwargs)
            brought = self.encoder.brought(kwargs)
            self._layout = guards.read_layout(self.family, kwargs, self._active, brought)
            if self._active and self._layout is None:
                self._warned = guards.warn_if_unseen(kwargs, self._warned)
        except BaseException as error:
            self._leave(error)
            raise

    def _after_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self._busy_elsewhere():
            self._leave(None)

    def _before_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        if not self.enabled:
            guards.refuse_dense_on_pruned(kwargs)
            return None
        if not self._in_base or self._busy_elsewhere():
            self._enter()
        try:
            if self.family.base is None:
                self._layout = guards.read_layout(self.family, kwargs, self._active)
            cache = kwargs.get("past_key_values")
            if self._layout is not None:
                return args, self.forward.begin_prefill(self._layout, kwargs)
            if isinstance(cache, PrunedDynamicCache) and cache.holds_prompt:
                return args, self.forward.begin_decode(cache, kwargs)
            return None
        except BaseException as error:
            self._leave(error)
            raise

    def _after_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Runs after errors too, then without an output."""
        if not self.enabled or self._busy_elsewhere():
            return None
        try:
            changed = self.forward.end(output) if self.forward.call is not None else None
        except BaseException as error:
            self._leave(error)
            raise
        self.forward.close()
        if not self._in_base:
            self._leave(None)
        return changed

    def _before_layer(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        if self.forward.call is None:
            return None
        try:
            hidden, changed = self.forward.layer(index, args[0] if args else kwargs["hidden_states"], kwargs)
        except BaseException as error:
            self.last_error = error
            raise
        return ((hidden, *args[1:]), changed) if args else (args, {**changed, "hidden_states": hidden})

    def _enter(self) -> None:
        self._busy.setdefault("thread", threading.get_ident())  # atomic
        if self._busy_elsewhere():
            raise ActiveError("Another thread is running this pruned model; use one model copy per thread.")
        self.forward.close()
        self._layout = None
        self._in_base = False
        self.last_error = None

    def _leave(self, error: BaseException | None) -> None:
        if error is not None:
            self.last_error = error
        self.forward.close()
        self._layout = None
        self._in_base = False
        self._busy.clear()

    def _busy_elsewhere(self) -> bool:
        """True if another thread's forward is under way; hooks that run after a refused call must not end it."""
        me = threading.get_ident()
        return self._busy.get("thread", me) != me
