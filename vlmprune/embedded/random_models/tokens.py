"""Token ids shared by all random-weight models. Ids from `FIRST_TEXT` to `LAST_TEXT` are plain text."""

from __future__ import annotations

from vlmprune.embedded.tiny_configs import BOS_ID, EOS_ID, IMAGE_TOKEN_ID, PAD_ID

START_ID = 3
"""Opens an image: `<|vision_start|>`, `<img>`, `<start_of_image>`, `<fake_token_around_image>`."""
END_ID = 4
"""Closes an image: `<|vision_end|>`, `</img>`, `<end_of_image>`."""
VIDEO_TOKEN_ID = 6
NEWLINE_ID = 7
"""`\\n`, or `\\n\\n` where a prompt has it."""
FIRST_TEXT, LAST_TEXT = 8, 63
GLOBAL_ID = 64
"""`<global-img>` of Idefics3 and SmolVLM."""
ROW_COLUMN_ID = 65
"""`<row_1_col_1>` of Idefics3 and SmolVLM; further rows are 4 ids apart, further columns 1."""
VOCAB_SIZE = 96

__all__ = [
    "BOS_ID",
    "END_ID",
    "EOS_ID",
    "FIRST_TEXT",
    "GLOBAL_ID",
    "IMAGE_TOKEN_ID",
    "LAST_TEXT",
    "NEWLINE_ID",
    "PAD_ID",
    "ROW_COLUMN_ID",
    "START_ID",
    "VIDEO_TOKEN_ID",
    "VOCAB_SIZE",
]
