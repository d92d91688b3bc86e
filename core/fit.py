"""How a stage's effective batch goes through memory: rows at once, how often, what is computed twice. No torch.

The one function that decides is `arrange`; what it found is kept with the run, so that a resume goes the same way.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from core.memory import CONTEXT, GIB, SHAPES, Lengths, Shape, estimate, open_layer_bytes
from core.paths import writing_whole
from core.plan import KTOPlan, Plan, StagePlan

MARGIN = 0.93
"""Share of the memory that an arrangement may be estimated to take; estimates were within 8 % of what was measured."""


@dataclass(frozen=True)
class Arrangement:
    """Rows a forward pass, and how many layers keep their activations instead of computing them again.

    `checkpointing` is off where all of them do.
    """

    batch_size: int
    open_layers: int = 0
    checkpointing: Literal["on", "off"] = "on"
    why: str = ""

    def applied(self, stage: StagePlan) -> StagePlan:
        """The stage in these micro-batches, as many as keep the effective batch, and checkpointing settled."""
        return with_batch(stage, self.batch_size).model_copy(update={"gradient_checkpointing": self.checkpointing})


def with_batch(stage: StagePlan, size: int) -> StagePlan:
    """The stage with micro-batches of `size` rows and as many of them as keep the effective batch."""
    steps = stage.effective_batch // size
    return stage.model_copy(update={"batch_size": size, "gradient_accumulation_steps": steps})


def planned_arrangement(stage: StagePlan) -> Arrangement:
    """The plan's own: what a CPU trains with."""
    return Arrangement(stage.batch_size, 0, "off" if stage.gradient_checkpointing == "off" else "on")


def batch_sizes(stage: StagePlan) -> list[int]:
    """Micro-batches that divide the stage's effective batch, largest first. KTO compares at least two rows."""
    least = 2 if isinstance(stage, KTOPlan) else 1
    return [size for size in range(stage.effective_batch, least - 1, -1) if stage.effective_batch % size == 0]


def smaller_batches(stage: StagePlan) -> list[int]:
    """Those below the stage's own."""
    return [size for size in batch_sizes(stage) if size < stage.batch_size]


def arrange(
    plan: Plan, name: str, shape: Shape | None, lengths: Lengths, largest: Callable[[int], int], budget: int,
    folder: Path | None = None, *, padded: bool = False,
) -> Arrangement:  # fmt: skip
    """The arrangement that is quickest as far as `budget` bytes of GPU memory allow, by the estimate.

    `largest` gives the tokens of the largest micro-batch that rows in groups of a size will ever make. With
    ``regroup`` every size that keeps the effective batch is tried, largest first; without, the plan's and smaller ones.
    What memory is left then lets layers keep their activations, where ``gradient_checkpointing`` is auto.
    """
    stage = plan.stage(name)
    asked: Literal["on", "off"] = "off" if stage.gradient_checkpointing == "off" else "on"
    sizes = batch_sizes(stage) if stage.regroup == "on" else [stage.batch_size, *smaller_batches(stage)]
    room, tokens, need = budget * MARGIN, 0, 0
    for size in sizes:
        tried, tokens = plan.model_copy(update={name: with_batch(stage, size)}), largest(size)
        found = shape and estimate(tried, name, shape, lengths, folder=folder, padded=padded, tokens=tokens)
        if not shape or not found:
            return Arrangement(stage.batch_size, 0, asked, "this model's memory is not known beforehand")
        need = found.total - found.items["CUDA context"]
        if need <= room:
            break
    assert shape
    why = f"{need / GIB:.1f} of {budget / GIB:.1f} GiB"
    if need > room:
        return Arrangement(size, 0, asked, f"{why}, by the estimate more than fits")
    opened = 0 if stage.gradient_checkpointing != "auto" else _open_layers(plan, name, shape, tokens, room - need)
    if opened:
        why += f"; what is left lets {opened} of {shape.layers} layers keep their activations"
    return Arrangement(size, opened % shape.layers, "off" if opened == shape.layers else asked, why)


def _open_layers(plan: Plan, name: str, shape: Shape, tokens: int, room: float) -> int:
    """Layers that need not be checkpointed; with plain TRL it is all or none, and experts were not measured."""
    count = min(int(room // max(open_layer_bytes(plan, name, shape, tokens), 1)), shape.layers)
    least = shape.layers if plan.backend != "unsloth" else 2
    return count if count >= least and not shape.experts else 0


def cut_adapter(plan: Plan, room: int) -> bool:
    """Halve the rank of an adapter on experts until every stage's longest row fits `room` bytes; whether it did.

    At the preset's rank 128 gpt-oss would train 1.4 billion parameters. `room` is what PyTorch may take.
    """
    shape = SHAPES.get(plan.model.size or "")
    if shape is None or not shape.experts:
        return False
    first = plan.lora.r
    while plan.lora.r > 4 and not all(_alone_fits(plan, name, shape, room) for name in plan.training_stages):
        plan.lora.r, plan.lora.alpha = plan.lora.r // 2, max(plan.lora.alpha // 2, 1)
    return plan.lora.r < first


def _alone_fits(plan: Plan, name: str, shape: Shape, room: int) -> bool:
    """Whether the fewest rows that can go through at once fit, each as long as the plan allows."""
    stage = plan.stage(name)
    alone = plan.model_copy(update={name: with_batch(stage, batch_sizes(stage)[-1])})
    found = estimate(alone, name, shape, Lengths.at_most(stage))
    return found is not None and found.total - CONTEXT <= MARGIN * room


def keep_arrangement(folder: Path, found: Arrangement) -> None:
    """Remember it for this stage and for every resume of it."""
    with writing_whole(folder / "batch.json") as stream:
        json.dump(asdict(found), stream)


def kept_arrangement(folder: Path, stage: StagePlan) -> Arrangement | None:
    """What was kept with the run; None where nothing was, or it does not suit the plan."""
    try:
        kept: Any = json.loads((folder / "batch.json").read_bytes())
        found = Arrangement(**kept)
    except (OSError, ValueError, TypeError):
        return None
    whole = isinstance(found.open_layers, int) and not isinstance(found.open_layers, bool) and found.open_layers >= 0
    return found if found.batch_size in batch_sizes(stage) and whole and found.checkpointing in ("on", "off") else None
