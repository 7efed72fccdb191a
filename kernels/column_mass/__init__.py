"""How much attention keys receive, without the attention matrix."""

from vlmprune.kernels.column_mass.masking import Masking
from vlmprune.kernels.column_mass.reductions import attention_rows, column_mass, group_mass

__all__ = ["Masking", "attention_rows", "column_mass", "group_mass"]
