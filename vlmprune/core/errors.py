"""Errors raised by the toolkit. Every message says what was wrong and what to do."""

from __future__ import annotations


class VlmpruneError(Exception):
    """Base class of every error raised by this package."""


class InputError(VlmpruneError, ValueError):
    """A value that the caller gave is not usable (unknown name, budget out of range, bad image, ...)."""


class BudgetError(InputError):
    """A budget is out of range, or cannot be met by the model at hand."""


class UnsupportedError(VlmpruneError, NotImplementedError):
    """The model, cache or call pattern is one that the adapter cannot serve."""


class SignalError(UnsupportedError):
    """A policy needs a signal that the model cannot give."""


class ActiveError(VlmpruneError, RuntimeError):
    """The model is already pruned, or a call overlaps another one on the same model."""
