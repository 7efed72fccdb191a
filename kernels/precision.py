"""Matrix products in full float32, whatever precision switches the process has set."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any of the tensors is float64, else float32."""
    double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def precise_matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of float32 or float64 tensors without TF32, bfloat16 or autocast rounding.

    Where the process allows reduced float32 products, the product is taken in float64: a global switch
    cannot be changed here without disturbing other threads.
    """
    if torch.is_autocast_enabled(a.device.type):
        with torch.autocast(a.device.type, enabled=False):
            return precise_matmul(a, b)
    if a.dtype == torch.float32 and _reduced(a.device.type):
        return (a.double() @ b.double()).float()
    return a @ b


def _reduced(device_type: str) -> bool:
    """True if float32 products on this device may be rounded to fewer bits."""
    backend = torch.backends.mkldnn if device_type == "cpu" else torch.backends.cuda
    setting = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if setting is None:  # before PyTorch 2.9
        return torch.get_float32_matmul_precision() != "highest"
    return setting not in ("none", "ieee")
