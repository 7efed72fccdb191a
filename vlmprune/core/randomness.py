"""Seeds that depend on the sample, not on batch order, device or process."""

from __future__ import annotations

import hashlib

import torch

SEED_BITS = 63


def item_seed(seed: int, content: str, image_index: int) -> int:
    """Seed of one image.

    Args:
        seed: the policy's global seed.
        content: digest of the image (:func:`tensor_digest`) or a sample id set by a harness.
        image_index: 0-based place of the image in its sample.

    Returns:
        An integer in ``[0, 2**63)``: blake2b of the three values.
    """
    digest = hashlib.blake2b(f"{seed}\x1f{content}\x1f{image_index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def tensor_digest(values: torch.Tensor) -> str:
    """Digest of a tensor's values, the same on every device (copies the tensor to the host)."""
    array = values.detach().to("cpu", torch.float32).contiguous().numpy()
    return hashlib.blake2b(array.tobytes(), digest_size=16).hexdigest()


def generator(seed: int) -> torch.Generator:
    """A CPU generator, so that draws do not depend on the device."""
    return torch.Generator(device="cpu").manual_seed(seed)
