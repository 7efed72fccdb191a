"""What the adapters of all models share."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn

from vlmprune.core.info import ModelInfo


class ModelFamily(ABC):
    """Names a model's parts. Instances belong to one model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @classmethod
    @abstractmethod
    def matches(cls, model: nn.Module) -> bool:
        """True if this family serves ``model`` (unwrapped)."""

    @abstractmethod
    def info(self) -> ModelInfo:
        """The model's facts.

        Raises:
            UnsupportedError: a configuration that this family cannot serve.
        """
