"""From the patches of a tower to the tokens of the LLM, for towers that merge groups of patches."""

from __future__ import annotations

from torch import Tensor


def merge_unit_mass(mass_per_patch: Tensor, unit: int, window_index: Tensor | None = None) -> Tensor:
    """Values per LLM token from values per patch: the mean of each merge group, in raster order.

    Args:
        mass_per_patch: ``[..., P]`` in the order in which the tower holds its patches: the ``unit`` patches
            of a merge group side by side, groups in window order if ``window_index`` is given.
        unit: patches per LLM token, at least 1.
        window_index: int64 ``[P / unit]``, raster number of the group at each place (Qwen2.5-VL's windows),
            or None where groups stand in raster order already.

    Returns:
        ``[..., P / unit]``, float32 or wider.

    Raises:
        ValueError: the number of patches is no multiple of ``unit``, or ``window_index`` has another length.
    """
    patches = mass_per_patch.shape[-1]
    if unit < 1 or patches % unit:
        raise ValueError(f"{patches} patches do not split into groups of {unit}.")
    mass = mass_per_patch if mass_per_patch.dtype.itemsize == 8 else mass_per_patch.float()
    mass = mass.unflatten(-1, (patches // unit, unit)).mean(-1)
    if window_index is None:
        return mass
    return to_raster(mass, window_index)


def to_raster(values: Tensor, window_index: Tensor) -> Tensor:
    """Values ``[..., G]`` of groups in window order, put into raster order.

    Args:
        values: any tensor whose last axis counts groups.
        window_index: int64 ``[G]``, raster number of the group at each place.

    Raises:
        ValueError: the lengths differ.
    """
    if window_index.shape != values.shape[-1:]:
        raise ValueError(
            f"window_index has shape {tuple(window_index.shape)}, but there are {values.shape[-1]} groups."
        )
    return values.index_select(-1, window_index.argsort())
