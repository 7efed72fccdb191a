"""Puts the recorders of decoder signals in place: taps, hooks around modules, probes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

from vlmprune.adapters import tap
from vlmprune.adapters.call import Prefill
from vlmprune.adapters.delivery import FROM_ATTENTION
from vlmprune.adapters.family import Family
from vlmprune.adapters.hooks import HookStack
from vlmprune.adapters.probe import LayerProbe
from vlmprune.adapters.text_signals import LayerRecorder
from vlmprune.adapters.transitions import TransitionRecorder
from vlmprune.core import signals as s


def install(
    family: Family, wanted: Iterable[s.Signal], current: Callable[[], Prefill | None], hooks: HookStack
) -> dict[int, LayerProbe]:
    """Record the decoder signals among ``wanted`` at every prefill until ``hooks`` is removed.

    Args:
        current: gives the prefill under way, None outside one.

    Returns:
        The probes of the layers whose attention is wanted before they run.
    """
    attention: dict[int, set[s.Signal]] = defaultdict(set)
    for signal in wanted:
        if isinstance(signal, s.ModuleTransition):
            TransitionRecorder(signal, current).install(family.decoder_layers()[signal.layer], hooks)
        elif isinstance(signal, (*FROM_ATTENTION, s.ProbeAttention)) and signal.stack_name == "text":
            attention[signal.layer].add(signal)
    probes = {}
    for layer, signals in attention.items():
        recorder = LayerRecorder(signals, current)
        tap.install(family.text_attention(layer), recorder, hooks)
        if any(isinstance(signal, s.ProbeAttention) for signal in signals):
            probes[layer] = LayerProbe(family.decoder_layers()[layer], recorder)
    return probes
