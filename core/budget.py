"""What a plan needs of memory against what is there, in words: `finetui fit` and the wizard's review. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from core import gpu
from core.config import resolve
from core.fit import batch_sizes, cut_adapter, with_batch
from core.memory import (
    CONTEXT,
    GIB,
    KEPT_LENGTHS,
    LEFT_FREE,
    SHAPES,
    Estimate,
    Lengths,
    Shape,
    estimate,
    estimate_cpu,
    shape_in,
)  # fmt: skip
from core.plan import Plan

TIGHT = 0.92


@dataclass(frozen=True)
class Place:
    """Where a plan would train: a card (or one that is only imagined), or this machine's RAM. Bytes."""

    name: str
    total: int
    free: int

    @property
    def words(self) -> str:
        return f"{self.free / GIB:.1f} of {self.total / GIB:.1f} GiB free on {self.name}"


def place_of(plan: Plan) -> Place | None:
    """The plan's device; None where the driver does not say how much memory it has."""
    if plan.device != "cuda":
        memory = psutil.virtual_memory()
        return Place("this machine (RAM)", memory.total, memory.available)
    card = gpu.sample_of(gpu.gpus(), gpu.visible_card(plan.gpu))
    if card is None or not card.memory_total_bytes:
        return None
    free, total = card.memory_free_bytes, card.memory_total_bytes
    return Place(card.name or f"GPU {card.index}", total, total if free is None else free)


def need(plan: Plan, name: str, shape: Shape | None, lengths: Lengths, folder: Path | None = None) -> Estimate | None:
    """What stage `name` of the plan needs as it stands; None where the model's shape is not known."""
    if shape is None:
        return None
    if plan.device != "cuda":
        return estimate_cpu(plan, name, shape, lengths)
    return estimate(plan, name, shape, lengths, folder=folder)


def largest_that_fits(
    plan: Plan, name: str, shape: Shape | None, lengths: Lengths, room: int, folder: Path | None = None
) -> Estimate | None:
    """What the largest micro-batch needs that keeps the step's rows and fits `room` bytes, else the smallest one."""
    stage, found = plan.stage(name), None
    for size in batch_sizes(stage):
        tried = plan.model_copy(update={name: with_batch(stage, size)})
        found = need(tried, name, shape, lengths, folder)
        if found and found.total <= room:
            break
    return found


@dataclass(frozen=True)
class Verdict:
    """One stage against the place: what it needs as planned, and what is done about it where that does not fit."""

    stage: str
    estimate: Estimate
    fits: bool
    words: str


def verdict(
    plan: Plan, name: str, shape: Shape | None, lengths: Lengths, place: Place, folder: Path | None = None
) -> Verdict | None:
    """Whether stage `name` fits the place, in the micro-batches that the run would choose; None where not known."""
    found = need(plan, name, shape, lengths, folder)
    if found is None:
        return None
    room = place.free
    if plan.device == "cuda":
        room = min(room - LEFT_FREE, int(plan.memory_limit * GIB) + CONTEXT) if plan.memory_limit else room - LEFT_FREE
    stage, why = plan.stage(name), ""
    if plan.device == "cuda" and (stage.regroup == "on" or found.total > TIGHT * room):
        found = largest_that_fits(plan, name, shape, lengths, int(TIGHT * room), folder) or found
        why = f", instead of {stage.batch_size}" if found.rows < stage.batch_size else ""
    steps = stage.effective_batch // max(found.rows, 1)
    often = "once" if steps == 1 else f"{steps} times"
    batch = f"{found.rows} rows at once{why}, {often} a step, {found.tokens:,} tokens at most"
    if found.total <= TIGHT * room:
        return Verdict(name, found, True, f"✔ fits: {batch}")
    if found.total <= room:
        return Verdict(name, found, True, f"~ tight: {batch}")
    if found.total > place.total:
        return Verdict(name, found, False, f"✘ too large for {place.name}: {batch}")
    return Verdict(name, found, False, f"✘ more than is free: {batch}")


def preset_needs(method: str, cards: bool, tokens: int = 512) -> dict[str, float]:
    """GiB that each size's preset needs for rows of `tokens`, the highest of the method's stages.

    `cards` says that there is a GPU; without one the smallest size is worked out for the CPU.
    """
    needs = {}
    for size, shape in SHAPES.items():
        plan = resolve(method, None, {"model.size": (size, "")}, gpu_present=True).plan
        plan.device = "cuda" if cards or size != "135m" else "cpu"
        plan.backend, plan.model.dtype = "unsloth", "bf16" if plan.device == "cuda" else "fp32"
        cut_adapter(plan, 22 * GIB)
        for name in plan.training_stages:
            plan.stage(name).optim = "adamw_8bit"
        found = [need(plan, name, shape, Lengths([tokens] * KEPT_LENGTHS)) for name in plan.training_stages]
        needs[size] = max(one.total for one in found if one) / GIB
    return needs


def item_lines(found: Estimate) -> list[tuple[str, float]]:
    """Each item that takes anything, in GiB, largest first."""
    items = sorted(found.items.items(), key=lambda item: -item[1])
    return [(name, count / GIB) for name, count in items if count >= GIB / 100]


def verdicts(
    plan: Plan, lengths: Mapping[str, Lengths], place: Place, folder: Path | None
) -> dict[str, Verdict | None]:
    """Of every training stage; rows as long as the plan allows where their lengths are not known."""
    shape = shape_in(folder, plan.model.size)
    return {
        name: verdict(plan, name, shape, lengths.get(name) or Lengths.at_most(plan.stage(name)), place, folder)
        for name in plan.training_stages
    }
