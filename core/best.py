"""Which checkpoint has the lowest held-out loss, and whether it is time to stop. No torch.

All of it is told from the trainer's log, which every checkpoint carries: a resumed stage decides as an unbroken one.
"""

import json
import math
from pathlib import Path
from typing import Any

from core.plan import StagePlan

History = list[dict[str, Any]]


def held_out_losses(history: History) -> list[tuple[int, float]]:
    """(step, loss) of every evaluation so far; a loss that is not finite is infinite."""
    found = [(int(entry["step"]), float(entry["eval_loss"])) for entry in history if "eval_loss" in entry]
    return [(step, loss if math.isfinite(loss) else math.inf) for step, loss in found]


def best_step(history: History) -> int | None:
    """The step with the lowest held-out loss, the first of equals; None before the first finite one."""
    losses = [(loss, step) for step, loss in held_out_losses(history) if loss < math.inf]
    return min(losses)[1] if losses else None


def waited(history: History, threshold: float) -> int:
    """Evaluations since the loss last fell by more than `threshold` below the lowest before."""
    lowest, count = math.inf, 0
    for _, loss in held_out_losses(history):
        lowest, count = (loss, 0) if loss < lowest - threshold else (lowest, count + 1)
    return count


def patience_is_over(history: History, stage: StagePlan) -> bool:
    patience = stage.early_stopping_patience
    return patience is not None and waited(history, stage.early_stopping_threshold) >= patience


def history_of(checkpoint: Path) -> History:
    """The trainer's log in a checkpoint; empty where it cannot be read."""
    try:
        found = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    except (OSError, ValueError, LookupError, TypeError):
        return []
    return found if isinstance(found, list) else []
