"""Hooks a policy into a model that is only a vision tower; its handle sees the same as of ``Engine``."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.adapters.hooked_engine import HookedEngine
from vlmprune.adapters.hooks import uncompiled
from vlmprune.adapters.sites import Step, plan
from vlmprune.adapters.tower_lineage import tower_record
from vlmprune.adapters.tower_reduction import TowerReducer
from vlmprune.adapters.vit_family import VitFamily, named
from vlmprune.adapters.vit_run import VitRun
from vlmprune.core import config
from vlmprune.core.errors import ActiveError, InputError, UnsupportedError
from vlmprune.core.flops import tower_flops
from vlmprune.core.policy import Policy
from vlmprune.core.randomness import tensor_digest
from vlmprune.core.records import ImageRecord, SiteRecord
from vlmprune.core.report import Report
from vlmprune.core.selection import Selection
from vlmprune.core.views import View

FORWARD = "forward"


class VisionEngine(HookedEngine):
    """See :class:`HookedEngine`; for image models.

    Args:
        family: adapter of the model.
        policy: what to do.
        restore_length: features that leave the model have their full length: a merged token's are copied to its
            members, those of dropped tokens are 0.

    Attributes:
        report: what the last run did, None before the first.
        tower_sites: the selections of the last run, one per block that acts; items are images.
        sample_ids: ids of the images of the next runs, for policies that draw; None seeds by content.
    """

    def __init__(self, family: VitFamily, policy: Policy, restore_length: bool = True) -> None:
        super().__init__(family, policy)
        self.family = family
        self.report: Report | None = None
        self.tower_sites: tuple[SiteRecord, ...] = ()
        self.sample_ids: list[str] | None = None
        self._run = VitRun(restore_length)
        self._reducer: TowerReducer | None = None
        if self.steps:
            parts = family.parts()
            self._reducer = TowerReducer(self.steps, self.info, parts, [family.attention_port(part) for part in parts])
            self._run.noted = self._reducer.noted
        self._images: Tensor | None = None
        self._begun = False
        self._nested = uncompiled(self._open_here)

    def _plan(self) -> tuple[Step, ...]:
        """Checked for the size of the config, and made for any size: many of these models take others."""
        plan(self.policy, self.info)
        return plan(self.policy, replace(self.info, any_size=True))

    @property
    def main(self) -> nn.Module:
        """The module that bears the handle beside the model itself."""
        return self.family.tower

    def switch(self, on: bool) -> None:
        """Turn the policy on or off without touching the hooks."""
        super().switch(on)
        if not on:
            self._run.forget()

    def _install(self) -> None:
        hooks, tower = self._hooks, self.family.tower
        hooks.before(tower, self._before, prepend=True)
        hooks.after(tower, self._after, always=True, prepend=True)
        for name in self.family.entries:
            hooks.wrap_method(tower, name, partial(self._call, name, getattr(tower, name)))
        blocks = [part.block for part in self.family.parts()]
        if self._reducer is not None:
            if self.family.entries:
                for index, block in enumerate(blocks):
                    hooks.after(block, partial(self._hand_out, index), prepend=True)
            self._reducer.install(hooks)
            if self.family.entries:
                for block in blocks[1:]:
                    hooks.before(block, self._hand_back, prepend=True)
            self.family.install(self._run, hooks)
        hooks.before(blocks[0], self._begin, prepend=True)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.enabled:
            self._open(FORWARD, module.forward, args, kwargs)

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Runs after errors too, then without an output."""
        if not self._open_here():
            return None
        if output is None:
            self.last_error = sys.exc_info()[1]
        try:
            return None if output is None else self._finish(FORWARD, output)
        except BaseException as error:
            self.last_error = error
            raise
        finally:
            self._close()

    def _call(self, name: str, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Stands in for a method of the tower that runs its blocks."""
        if not self.enabled:
            return original(*args, **kwargs)
        if self._nested():
            self._check(name, original, args, kwargs)
            return original(*args, **kwargs)
        self._open(name, original, args, kwargs)
        try:
            return self._finish(name, original(*args, **kwargs))
        except BaseException as error:
            self.last_error = error
            raise
        finally:
            self._close()

    def _open(self, entry: str, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call that may run the blocks starts."""
        self._busy.setdefault("thread", threading.get_ident())  # atomic
        if not self._open_here():
            raise ActiveError("Another thread is running this model while a policy acts; use one copy per thread.")
        self.last_error = None
        self._begun = False
        try:
            arguments = self._check(entry, method, args, kwargs)
            self._images = next((v for v in arguments.values() if isinstance(v, Tensor)), None)
        except BaseException as error:
            self.last_error = error
            self._close()
            raise

    def _check(self, entry: str, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The call's arguments by name, after refusing those that cannot be served."""
        arguments = named(method, args, kwargs)
        if self._reducer is not None:
            self.family.check_call(entry, arguments, self._run.restore_length)
            if self._run.restore_length:
                self._run.taken |= self.family.taken(entry, arguments)
        return arguments

    def _close(self) -> None:
        if self._reducer is not None:
            self._reducer.end()
        self._run.end()
        self._images = None
        self._busy.clear()

    def _open_here(self) -> bool:
        """True while a call of this thread is under way."""
        return self._busy.get("thread") == threading.get_ident()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The first block is about to run."""
        if not self._open_here():
            return
        if self._begun:
            self._close()
            raise UnsupportedError(
                "The blocks ran twice in one call of the model, which a policy inside cannot serve; if the call before "
                "was interrupted, call again."
            )
        states = args[0] if args else kwargs["hidden_states"]
        if not len(states):
            return
        self._begun = True
        tokens = self.family.tokens(states)
        self._run.begin(tokens)
        if self._reducer is not None:
            self._reducer.begin(tokens, self._contents(len(tokens.entered)))

    def _contents(self, images: int) -> Sequence[str]:
        """What seeds the draw of each image, where a policy draws."""
        if not self._draws:
            return ()
        if self.sample_ids is not None and len(self.sample_ids) != images:
            raise InputError(f"handle.sample_ids has {len(self.sample_ids)} ids, but the batch has {images} images.")
        assert self._images is not None
        return self.sample_ids or [tensor_digest(image) for image in self._images]

    def _hand_out(
        self, block: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Tensor | None:
        return self._run.hand_out(block, output) if self._run.taken else None

    def _hand_back(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        handed = self._run.handed(args[0]) if self._run.taken else None
        return None if handed is None else ((handed.short, *args[1:]), kwargs)

    @torch.no_grad()
    def _report(self) -> Report:
        """What the run did."""
        assert self._run.tokens is not None and self._images is not None
        tokens, images = self._run.tokens, len(self._run.tokens.entered)
        patches = tokens.entered[0] - tokens.prefix
        height, width = self.family.grid(self._images)
        views = (View(height, width),) if height * width == patches else ()
        report = Report(
            model_class=self.info.model_class,
            policy=config.to_dict(self.policy),
            n_samples=images,
            images=tuple(ImageRecord(image, 0, patches, views) for image in range(images)),
        )
        reducer = self._reducer
        depth = self.info.vision_depth or 0
        dense = [float(tokens.entered[0])] * depth
        report.tower_flops = report.tower_flops_dense = tower_flops(self.info, dense, dense, images)
        if reducer is None:
            return report
        done = reducer.outcome()
        self.tower_sites = done.records
        report.take_tower(done.records, done.attended, done.passed)
        report.tower_flops, report.tower_flops_dense = done.flops(self.info)
        groups = tokens.groups()
        if groups is not None:
            report.sites.append(self._site(done.records, groups, images))
        return report

    def _site(self, records: tuple[SiteRecord, ...], groups: Tensor, images: int) -> SiteRecord:
        """What all blocks together did to the patches."""
        assert self._run.tokens is not None
        prefix, lengths = self._run.tokens.prefix, self._run.map.lengths
        counts = tuple(length - prefix for length in lengths)
        selection = Selection.merge(groups, self._run.map.width - prefix, "mean", counts=counts)
        return tower_record(records, selection, tuple(range(images)), (groups.shape[1],) * images, "keep")

    def _finish(self, entry: str, output: Any) -> Any:
        """The blocks are done: write the report, and give features their length back."""
        if not self._begun:
            return output
        self.report = self._report()
        if self.steps and self._run.map.lengths == self._run.tokens.entered:  # type: ignore[union-attr]
            self._warn()
        return self.family.leave(entry, output, self._run)

    def _warn(self) -> None:
        """Say, in the report and once as a warning, that nothing was reduced."""
        assert self.report is not None
        names = ", ".join(sorted({step.policy.name for step in self.steps}))
        text = f"{names}: nothing was reduced; the images have {self.report.images[0].n_tokens} patches."
        self.report.warnings.append(text)
        if not self._warned:
            warnings.warn(text, stacklevel=2)
        self._warned = True
