"""Source maps: which input tokens each output token stands for, with their algebra."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SourceMap:
    """Weights ``[I, M, N]``: row ``m`` says how output ``m`` is made of the ``N`` inputs.

    Rows of real outputs sum to 1; rows of padding are zero. Lineage is the composition of all sites' maps.
    """

    weights: Tensor

    @classmethod
    def identity(cls, valid: Tensor) -> SourceMap:
        """Every valid token stands for itself. ``valid`` is ``[I, N]``."""
        return cls(torch.diag_embed(valid.float()))

    @classmethod
    def from_kept(cls, kept: Tensor, n_in: int) -> SourceMap:
        """Outputs that are single tokens: ``kept [I, M]``, -1 for padding, of ``n_in`` tokens."""
        return cls((kept[..., None] == torch.arange(n_in, device=kept.device)).float())

    @classmethod
    def from_groups(cls, group_id: Tensor, n_out: int, weights: Tensor | None = None) -> SourceMap:
        """Outputs that stand for groups of tokens.

        Args:
            group_id: int64 ``[I, N]`` output of each token, -1 for dropped.
            n_out: number of outputs, padding included.
            weights: ``[I, N]`` share of each token in its group, up to a factor; default equal shares.
        """
        weights = torch.ones_like(group_id) if weights is None else weights
        row = torch.where(group_id < 0, n_out, group_id)[:, None]
        rows = torch.zeros(len(group_id), n_out + 1, group_id.shape[1], device=group_id.device)
        rows = rows.scatter(1, row, weights[:, None].float())[:, :-1]  # the last row takes what is dropped
        return cls(rows / rows.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny))

    def apply(self, values: Tensor) -> Tensor:
        """Outputs ``[I, M, ...]`` from inputs ``[I, N, ...]``, in float32 or wider."""
        flat = values.flatten(2) if values.ndim > 2 else values[..., None]
        dtype = torch.promote_types(flat.dtype, self.weights.dtype)
        out = self.weights.to(dtype) @ flat.to(dtype)
        return out.reshape(*self.weights.shape[:2], *values.shape[2:])

    def unmerge(self, outputs: Tensor) -> Tensor:
        """Inputs ``[I, N, ...]`` from outputs ``[I, M, ...]``: the mean of the outputs that a token is part
        of, by its weights; zero where a token was dropped."""
        share = self.weights.transpose(1, 2)
        share = share / share.sum(-1, keepdim=True).clamp_min(torch.finfo(share.dtype).tiny)
        return SourceMap(share).apply(outputs)

    def compose(self, later: SourceMap) -> SourceMap:
        """The map of this reduction followed by ``later``."""
        dtype = torch.promote_types(self.weights.dtype, later.weights.dtype)
        return SourceMap(later.weights.to(dtype) @ self.weights.to(dtype))

    def kept(self) -> Tensor:
        """``[I, N]`` bool: inputs that some output stands for."""
        return (self.weights != 0).any(1)

    def groups(self) -> list[list[list[int]]]:
        """Per item and output, the inputs it stands for (on the host)."""
        host = (self.weights != 0).cpu()
        return [[row.nonzero()[:, 0].tolist() for row in item] for item in host]
