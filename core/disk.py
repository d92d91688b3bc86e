"""What a run will put on the disk: the model's download, checkpoints and results, what is made of them. Estimates.

Looked at before step 0, by the command line and by the wizard's review. No torch.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from core.errors import FinetuiError
from core.memory import GIB, shape_in
from core.outlook import export_bytes
from core.paths import cache_dir, nearest
from core.plan import Plan
from core.sources import DEMO_MODEL, ModelSource, model_folder

DOWNLOAD_GIB = {"135m": 0.1, "3b": 2.1, "7b": 3.9, "13b": 6.8, "20b": 12.0}
"""About what the presets' models take on disk: not measured, the 135m apart."""
DEMO_DOWNLOAD, DEMO_MODEL_BYTES = 98e6, 540e6
CACHED = ("model", "16-bit base")
"""What goes into a cache, which may lie on another disk than the run."""


@dataclass(frozen=True)
class Disk:
    """Bytes by what they are for; what is not known yet is named in `unknown`. `free` is where the runs lie."""

    needed: dict[str, float]
    unknown: tuple[str, ...]
    free: int

    @property
    def total(self) -> float:
        return sum(self.needed.values())

    @property
    def enough(self) -> bool:
        return self.total <= self.free


def disk_of(plan: Plan, source: ModelSource, steps: Mapping[str, int], folder: Path) -> Disk:
    """What the whole plan writes, with optimiser steps by stage where they are known, and what is free in `folder`."""
    needed: dict[str, float] = {}
    unknown = []
    parameters = adapter_parameters(plan, source)
    if parameters:
        needed["checkpoints and result"] = checkpoint_bytes(plan, steps, parameters)
    else:
        unknown.append("checkpoints")
    download = download_bytes(plan, source)
    if download is None:
        unknown.append("model")
    elif download:
        needed["model"] = download
    exports = export_bytes(plan)
    if exports is None:
        unknown.append("export")
    needed |= exports or {}
    return Disk(needed, tuple(unknown), shutil.disk_usage(nearest(folder)).free)


def refuse_small_disk(plan: Plan, source: ModelSource, steps: Mapping[str, int], folder: Path) -> None:
    """Refuse, before step 0, what the disk under `folder` cannot hold. Raises FinetuiError with exit code 3."""
    found = disk_of(plan, source, steps, folder)
    needed = dict(found.needed)
    if os.stat(nearest(cache_dir())).st_dev != os.stat(nearest(folder)).st_dev:
        needed = {what: count for what, count in needed.items() if what not in CACHED}
    blocks = os.statvfs(nearest(folder)).f_blocks if hasattr(os, "statvfs") else 1
    if blocks and sum(needed.values()) > found.free:  # without blocks (/proc) it is no disk: no run can be made there
        words = ", ".join(f"{what} {size_words(count)}" for what, count in needed.items())
        raise FinetuiError(
            f"The run and what is made of it take about {size_words(sum(needed.values()))} ({words}); "
            f"{size_words(found.free)} are free in {nearest(folder)}.",
            "Free some space, choose another --runs-dir, keep fewer checkpoints (save_total_limit), or export less.",
            exit_code=3,
        )


def adapter_parameters(plan: Plan, source: ModelSource) -> int | None:
    """Parameters of the LoRA on the plan's projections; None where the model's shape is not known."""
    shape = shape_in(model_folder(source), plan.model.size)
    return shape.adapter_parameters(plan.lora.target_modules, plan.lora.r) if shape else None


def download_bytes(plan: Plan, source: ModelSource) -> float | None:
    """Bytes that getting the model will put on the disk, 0 where it is here; None where they are not known."""
    if model_folder(source):
        return 0.0
    if plan.model.name == DEMO_MODEL:
        return DEMO_DOWNLOAD + DEMO_MODEL_BYTES
    known = DOWNLOAD_GIB.get(plan.model.size or "")
    return known * GIB if known else None


def checkpoint_bytes(plan: Plan, steps: Mapping[str, int], parameters: int) -> float:
    """Bytes of checkpoints (fp32 adapter and two moments each) and final adapters that the run keeps."""
    total = 0.0
    for stage in plan.training_stages:
        settings, count = plan.stage(stage), steps.get(stage)
        moment = 1 if "8bit" in settings.optim else 4
        kept = settings.save_total_limit
        if count:
            kept = min(kept, count // settings.save_steps + 1)
        reference = 4 if stage == "kto" and plan.method == "sft-kto" else 0
        total += parameters * ((4 + 2 * moment + reference) * (kept + 1) + 4)  # one more while the newest is written
    return total


def size_words(count: float) -> str:
    """Bytes for people."""
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / (1 << 20):.0f} MiB"
