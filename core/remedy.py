"""What a person would change before resuming a run that failed, and changing it in the run's plan. No torch."""

import contextlib
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from core.causes import Cause
from core.errors import FinetuiError
from core.runs import Run, is_alive
from core.stages import TRAINING_STAGES

if TYPE_CHECKING:  # the app shows a card before it has read any plan
    from core.plan import Plan

SLOWER = 3
MEMORY = ("gpu-memory", "memory", "kernel-killed")
RATE = ("not-finite", "diverged")


@dataclass(frozen=True)
class Remedy:
    """Keys of the plan and their new values; none where resuming is the remedy."""

    words: str = ""
    changes: dict[str, Any] = field(default_factory=dict)


def remedy_for(cause: Cause, run: Run, stage: str) -> Remedy | None:
    """What answers the cause; None where only a person can do something."""
    try:
        plan = run.plan()
    except FinetuiError:
        return None
    if cause.kind in MEMORY and (changes := smaller(plan, stage, run)):
        return Remedy(_words(plan, changes), changes)
    if cause.kind in RATE and stage in TRAINING_STAGES:
        rate = float(f"{plan.stage(stage).learning_rate / SLOWER:.2g}")
        return Remedy(*_told(plan, {f"{stage}.learning_rate": rate}))
    if cause.kind == "disk-full":
        kept = {f"{stage}.save_total_limit": 1} if stage in TRAINING_STAGES else {}
        changes = {key: value for key, value in kept.items() if value_of(plan, key) != value}
        return Remedy(*_told(plan, changes))
    return Remedy() if cause.again else None


def smaller(plan: "Plan", stage: str, run: Run) -> dict[str, Any]:
    """Settings under which the stage needs less memory and learns the same; empty where there are none."""
    from core.fit import kept_arrangement, smaller_batches

    if stage == "evaluate":
        half = plan.evaluate.batch_size // 2
        return {"evaluate.batch_size": half} if half else {}
    if stage not in TRAINING_STAGES:
        return {}
    planned = plan.stage(stage)
    kept = kept_arrangement(run.stage_path(stage), planned)
    now = kept.applied(planned) if kept else planned
    sizes = smaller_batches(now)
    if sizes:
        size = next((one for one in sizes if one <= now.batch_size // 2), sizes[-1])
        found = {"batch_size": size, "gradient_accumulation_steps": now.effective_batch // size, "regroup": "off"}
    else:
        found = {"gradient_checkpointing": "on"}
    return {f"{stage}.{key}": value for key, value in found.items() if getattr(planned, key) != value}


def value_of(plan: "Plan", path: str) -> Any:
    found: Any = plan
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _told(plan: "Plan", changes: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return _words(plan, changes), changes


def _words(plan: "Plan", changes: dict[str, Any]) -> str:
    shown = {key: value for key, value in changes.items() if not key.endswith(".regroup")} or changes
    told = [f"{key} {_short(value_of(plan, key))} → {_short(value)}" for key, value in shown.items()]
    return f"sets {', '.join(told)}" if told else ""


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def apply(run: Run, remedy: Remedy) -> None:
    """Write the remedy into the run's plan and tell it in the log. Raises FinetuiError for a living run."""
    from core.config import Resolved, check, flatten, load_plan, read_yaml, save_plan

    if is_alive(run):
        raise FinetuiError(f"{run.name} is running already.", f"Watch it with `finetui watch {run.name}`.")
    if not remedy.changes:
        return
    before = load_plan(run.plan_path)
    values = flatten(read_yaml(run.plan_path), keep_auto=True)
    for stage in TRAINING_STAGES:
        if any(key.startswith(f"{stage}.") and key.endswith(("batch_size", "checkpointing")) for key in remedy.changes):
            with contextlib.suppress(OSError):  # what was found to fit, and did not
                (run.stage_path(stage) / "batch.json").unlink(missing_ok=True)
    sources = sources_in(run.plan_path.read_text(encoding="utf-8"))
    for key in remedy.changes:
        sources[key] = f"remedy; was {_short(value_of(before, key))}"
    save_plan(Resolved(check({**values, **remedy.changes}, sources), sources), run.plan_path)
    run.events.append("notice", stage="", level="info", text=f"A remedy {remedy.words}.", advice="")


def sources_in(text: str) -> dict[str, str]:
    """Where each value of an annotated plan came from, by dotted path."""
    found, sections = {}, [""] * 8
    for line in text.splitlines():
        if match := re.match(r"((?:  )*)([\w-]+):(?:(.*?)  # (.*))?$", line):
            depth = len(match[1]) // 2
            if match[4] is None and depth < len(sections) - 1:
                sections[depth + 1] = f"{sections[depth]}{match[2]}."
            elif match[4] is not None and depth < len(sections):
                found[f"{sections[depth]}{match[2]}"] = match[4].strip()
    return found
