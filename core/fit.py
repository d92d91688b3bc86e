"""How a stage's micro-batch shrinks until it fits: the sizes to try, and the one found, kept with the run. No torch."""

import json
from pathlib import Path
from typing import Any

from core.paths import writing_whole
from core.plan import KTOPlan, StagePlan


def smaller_batches(stage: StagePlan) -> list[int]:
    """Micro-batches below the plan's that divide its effective batch, largest first. KTO compares at least two rows."""
    least = 2 if isinstance(stage, KTOPlan) else 1
    return [size for size in range(stage.batch_size - 1, least - 1, -1) if stage.effective_batch % size == 0]


def with_batch(stage: StagePlan, size: int) -> StagePlan:
    """The stage with micro-batches of `size` rows and as many of them as keep the effective batch."""
    steps = stage.effective_batch // size
    return stage.model_copy(update={"batch_size": size, "gradient_accumulation_steps": steps})


def keep_batch(folder: Path, size: int) -> None:
    """Remember for this stage, and for every resume of it, that only `size` rows fit at once."""
    with writing_whole(folder / "batch.json") as stream:
        json.dump({"batch_size": size}, stream)


def kept_batch(folder: Path, stage: StagePlan) -> StagePlan:
    """The stage with the micro-batch that was found to fit; as it is where none was kept or it does not suit."""
    try:
        found: Any = json.loads((folder / "batch.json").read_bytes())["batch_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return stage
    return with_batch(stage, found) if found in smaller_batches(stage) else stage
