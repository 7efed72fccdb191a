"""What the signal ``ModuleTransition`` delivers."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Transition(NamedTuple):
    """What one module did to every token of the sequence that its layer worked on (``L`` tokens with padding).

    Attributes:
        ratio: ``[I, L]`` norm of the output over norm of the input.
        cosine: ``[I, L]`` cosine of output and input.
        valid: ``[I, L]`` bool, text and visual tokens; False for padding.
        place: ``[I, N]`` where the visual tokens of this site stood in that sequence.
    """

    ratio: Tensor
    cosine: Tensor
    valid: Tensor
    place: Tensor
