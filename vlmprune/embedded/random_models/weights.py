"""Random weights under which attention is far from uniform and every parameter matters."""

from __future__ import annotations

import torch
from torch import nn


def randomise(model: nn.Module, std: float) -> None:
    """Draw every parameter, also norms, biases and layer scales, so that a test notices a skipped one.

    Args:
        model: the model; drawn in place, from the global generator.
        std: standard deviation of matrices and embeddings.
    """
    drawn: set[int] = set()  # tied parameters once
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in drawn:
                    drawn.add(id(parameter))
                    noise = torch.randn(parameter.shape)  # float32, so that all dtypes get the same
                    parameter.copy_(_mean(module, name) + _scale(module, name, parameter, std) * noise)


def _mean(module: nn.Module, name: str) -> float:
    if name in ("lambda_1", "lambda_2"):
        return 1.0
    if _is_norm(module) and name == "weight":
        return 0.0 if "Gemma" in type(module).__name__ else 1.0  # Gemma's norms multiply by 1 + weight
    return 0.0


def _scale(module: nn.Module, name: str, parameter: nn.Parameter, std: float) -> float:
    if name == "image_newline":
        return 1.0  # of the size of the projector's features
    return std if parameter.ndim > 1 and not _is_norm(module) else 0.1


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__
