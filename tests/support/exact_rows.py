"""Feature rows whose cosines carry no rounding."""

from __future__ import annotations

import torch


def exact_rows() -> torch.Tensor:
    """Rows whose norms are powers of two: their cosines are exact, so every tie is one in any arithmetic."""
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4)
    rows = torch.cat([torch.eye(4), -torch.eye(4), corners, torch.zeros(2, 4)])
    return torch.cat([rows, 2 * rows])
