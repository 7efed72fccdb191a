"""What a tower returns when tokens were reduced inside it."""

from __future__ import annotations

from typing import Any

from vlmprune.adapters.tower_reduction import TowerReducer


def leave_tower(reducer: TowerReducer, output: Any, whole: bool) -> Any:
    """A tower's output behind a reduction; None where it stays as it is.

    Hidden states that the model noted on the way get their values; the length of each is that behind its block.

    Args:
        reducer: at the end of its run.
        output: as the tower returned it: a ``ModelOutput``, or (Qwen-VL of transformers 4) its features alone.
        whole: give the last state and all noted ones the tower's full length.
    """
    tokens = reducer.tokens
    if tokens is None or not tokens.changed:
        return None
    if whole:
        output["last_hidden_state"] = tokens.whole(output["last_hidden_state"])
    if isinstance(output, dict) and output.get("hidden_states") is not None:
        output["hidden_states"] = reducer.noted(output["hidden_states"], whole)
    return output
