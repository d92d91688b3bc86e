"""What a plan will take: steps, tokens, disk, memory, time; and what differs from the last run. No widgets."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core import gpu
from core.artefacts import seconds_expected
from core.budget import item_lines, place_of, verdicts
from core.config import OPTIONS
from core.disk import disk_of, size_words
from core.errors import FinetuiError
from core.memory import GIB, Lengths
from core.outlook import export_parameters
from core.plan import Plan
from core.prepare import planned_steps
from core.runs import Run, list_runs
from core.sources import DEMO_MODEL, ModelSource, model_folder, model_source
from core.text import clean, duration, number
from core.turns import device_of, in_use

LOOKED_AT_RUNS = 20


@dataclass(frozen=True)
class Count:
    """The rows of a stage: `examples` trained in a pass; tokens where the tokenizer has looked at them."""

    examples: int
    held_out: int = 0
    tokens: int | None = None
    trained: int | None = None
    longest: int | None = None
    about: bool = False
    """The figures come from a sample."""
    longest_rows: tuple[int, ...] = ()
    """Tokens of the longest rows, longest first; empty before they were tokenised."""
    left_out: int = 0

    @classmethod
    def of_reply(cls, reply: Mapping[str, Any]) -> "Count":
        """From what `core.lens` counted."""
        reasons = reply["totals"]["reasons"] if reply["totals"] else reply["left_out"]
        return cls(
            reply["examples"], reply["held_out"], reply["tokens"], reply["trained_tokens"], reply["longest"],
            reply["sampled"] < reply["rows"], tuple(reply["longest_rows"]), sum(reasons.values()),
        )  # fmt: skip

    @classmethod
    def of_rows(cls, used: int, holdout: float) -> "Count":
        """From the number of usable rows, before any was tokenised."""
        held = round(used * holdout)
        return cls(used - held, held, about=bool(held))


Counts = Mapping[str, Count]


def steps_of(plan: Plan, stage: str, count: Count) -> tuple[int, int]:
    """Optimiser steps (of a pass over the rows, of the whole stage)."""
    settings = plan.stage(stage)
    one_pass = settings.model_copy(update={"max_steps": -1, "num_train_epochs": 1})
    return planned_steps(one_pass, stage, count.examples), planned_steps(settings, stage, count.examples)


def consequence(plan: Plan, path: str, counts: Counts) -> str:
    """What a setting makes of this stage's rows; empty where nothing follows from it alone."""
    stage, _, key = path.partition(".")
    if path == "lora.alpha":
        return f"alpha / r = {plan.lora.alpha / plan.lora.r:g}"
    if stage not in plan.training_stages:
        return ""
    settings, count = plan.stage(stage), counts.get(stage)
    factors = f"{settings.batch_size} × {settings.gradient_accumulation_steps}"
    batch = f"{factors} = {settings.effective_batch} examples a step"
    if count is None:
        return batch if key in ("batch_size", "gradient_accumulation_steps") else ""
    epoch, steps = steps_of(plan, stage, count)
    about = "about " if count.about else ""
    if key in ("batch_size", "gradient_accumulation_steps"):
        return f"{batch}, {about}{epoch:,} steps an epoch"
    if key == "num_train_epochs":
        ended = f", ended by max_steps after {steps / epoch:.2g} epochs" if settings.max_steps > 0 else ""
        return f"{about}{steps:,} steps in all{ended}"
    if key == "max_steps" and settings.max_steps > 0:
        return f"{steps / epoch:.2g} epochs of {about}{epoch:,} steps"
    if key == "warmup_ratio":
        return f"{about}{math.ceil(settings.warmup_ratio * steps):,} of {steps:,} steps"
    if key == "save_steps":
        saved = steps // settings.save_steps
        kept = f"{saved:,} checkpoints, the newest {min(saved, settings.save_total_limit)} kept"
        return kept if saved else f"none before the end at step {steps:,}"
    if key == "data.holdout" and settings.data.holdout:
        return f"{about}{count.held_out:,} rows held out, {count.examples:,} trained"
    if key == "max_length" and count.longest:
        return f"the longest row kept has {count.longest:,} tokens"
    if key == "lr_reduction_step" and plan.kto.two_stage_lr and plan.kto.lr_reduction_step > steps:
        return f"never reached: the stage ends at step {steps:,}"
    return ""


def stage_words(plan: Plan, stage: str, count: Count | None) -> str:
    """Steps and tokens of a stage in a line."""
    settings = plan.stage(stage)
    if count is None:
        size = f"{settings.effective_batch} examples"
        return f"{settings.max_steps:,} steps of {size}" if settings.max_steps > 0 else f"steps of {size} over the rows"
    about = "about " if count.about else ""
    epoch, steps = steps_of(plan, stage, count)
    words = f"{about}{steps:,} steps of {settings.effective_batch} examples"
    words += f"; an epoch is {epoch:,} steps, {count.examples:,} examples"
    if count.tokens is not None:
        words += f", {count.tokens:,} tokens, {count.trained:,} of them trained"
    return words + (f"; {about}{count.left_out:,} rows left out" if count.left_out else "")


# --- memory ---


def fit(needed_gib: float, free_gib: float, total_gib: float) -> str:
    """Whether so much goes into a card, in a glyph and words."""
    if needed_gib > total_gib:
        return "✘ too large"
    if needed_gib > free_gib:
        return f"✘ {free_gib:.1f} free"
    return "✔ yes" if needed_gib <= 0.92 * free_gib else "~ tight"


def card() -> tuple[str, float, float] | None:
    """Name, free and total GiB of the card that would be used; None without one."""
    found = gpu.gpus()
    if not found:
        return None
    total = (found[0].memory_total_bytes or 0) / GIB
    free = found[0].memory_free_bytes
    return found[0].name or "GPU 0", total if free is None else free / GIB, total


def memory_words(plan: Plan, counts: Counts, source: ModelSource | None) -> tuple[str, bool]:
    """Memory needed, by stage and item, against what is free, and whether it is enough as far as can be told."""
    place = place_of(plan)
    if place is None:
        return "the driver does not say how much memory there is", True
    lengths = {name: Lengths(count.longest_rows) for name, count in counts.items() if count.longest_rows}
    found = verdicts(plan, lengths, place, model_folder(source) if source else None)
    known = {name: judged for name, judged in found.items() if judged}
    parts = [
        f"{name.upper()} {one.words[0]} takes {one.estimate.total / GIB:.1f} GiB with {one.estimate.rows} rows at once"
        for name, one in known.items()
    ]
    parts += [f"{name.upper()} not known for this model" for name, judged in found.items() if not judged]
    lines = [f"{', '.join(parts)}; {place.words}"]
    if known:
        name, highest = max(known.items(), key=lambda item: item[1].estimate.total)
        items = ", ".join(f"{item} {gib:.1f}" for item, gib in item_lines(highest.estimate)[:4] if gib >= 0.05)
        rows = "" if lengths else "for rows as long as allowed; "
        lines.append(f"{rows}{name.upper() + ': ' if len(found) > 1 else ''}of these GiB {items}")
    return "\n".join(lines), all(judged.fits for judged in known.values())


# --- disk ---


def disk_words(plan: Plan, source: ModelSource, counts: Counts, runs_folder: Path) -> tuple[str, bool]:
    """Disk needed (an estimate) against what is free where the runs lie, and whether it is enough."""
    steps = {name: steps_of(plan, name, count)[1] for name, count in counts.items() if name in plan.training_stages}
    found = disk_of(plan, source, steps, runs_folder)
    parts = [f"{what} {size_words(count)}" for what, count in found.needed.items() if what != "model"]
    if "checkpoints" in found.unknown:
        parts.insert(0, "checkpoints unknown for this model")
    if "model" in found.unknown:
        parts.append("the model's size is known once it is fetched")
    elif download := found.needed.get("model"):
        what = "the demo model's download and conversion" if plan.model.name == DEMO_MODEL else "the model's download"
        parts.append(f"{what} {size_words(download)}")
    else:
        parts.append("the model is here")
    if "export" in found.unknown:
        parts.append("what is made of it is known once the model is fetched")
    words = f"about {size_words(found.total)} (an estimate: {', '.join(parts)}), {size_words(found.free)} free"
    return words, found.enough


# --- the runs before ---


def earlier(runs_folder: Path) -> list[tuple[Run, Plan]]:
    """The newest runs whose plans can be read, newest first."""
    found = []
    for run in list_runs(runs_folder)[:LOOKED_AT_RUNS]:
        try:
            found.append((run, run.plan()))
        except FinetuiError:
            continue
    return found


def differences(before: Plan, now: Plan) -> list[tuple[str, str, str]]:
    """(path, value before, value now) of what differs, in the plan's order; names and notes do not count."""
    stages = {*before.training_stages, *now.training_stages}
    found = []
    for path in OPTIONS:
        section = path.split(".")[0]
        if path in ("name", "note") or (section in ("sft", "kto") and section not in stages):
            continue
        if path.endswith(".data.demo") and section in before.training_stages and section in now.training_stages:
            continue  # the rows say it
        old, new = (_value(plan, path) for plan in (before, now))
        if section in ("sft", "kto") and not (section in before.training_stages and section in now.training_stages):
            continue  # the method says it already
        if old != new:
            found.append((path, _words(path, old), _words(path, new)))
    return found


def _value(plan: Plan, path: str) -> Any:
    section, _, key = path.partition(".")
    if key == "data.file" and plan.stage(section).data.demo:
        return "the demo's rows"
    value: Any = plan
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _words(path: str, value: Any) -> str:
    if path.endswith(".max_steps") and value == -1:
        return "by epochs"
    if isinstance(value, bool):
        return str(value).lower()
    return number(value) if isinstance(value, float) else "–" if value in (None, "") else str(value)


def duration_words(plan: Plan, counts: Counts, runs: list[tuple[Run, Plan]]) -> str:
    """A rough duration from the newest run of the same model on the same device that trained; empty without one."""
    if any(stage not in counts or not counts[stage].tokens for stage in plan.training_stages):
        return ""
    for run, other in runs:
        same = (other.model.name, other.device, other.backend) == (plan.model.name, plan.device, plan.backend)
        if not same or not set(plan.training_stages) <= set(other.training_stages):
            continue
        state = run.state()
        total, rates = 0.0, []
        for name in plan.training_stages:
            stage, count = state.stage(name), counts[name]
            rate = _rate(stage)
            if not rate or not count.tokens:
                break
            steps = steps_of(plan, name, count)[1]
            total += steps * plan.stage(name).effective_batch * count.tokens / count.examples / rate
            total += sum(seconds for phase, seconds in stage.phase_seconds.items() if phase != "train")
            rates.append(f"{name.upper()} {number(rate)} tokens/s")
        else:
            scored = state.stage("evaluate")
            if plan.evaluate.enabled and scored.started and scored.ended:
                total += max(0.0, scored.ended - scored.started)
            total += sum(export_seconds(plan).values())
            return f"roughly {duration(total)}, going by {run.name} ({', '.join(rates)})"
    return ""


def export_seconds(plan: Plan) -> dict[str, float]:
    """About how long each stage after training takes; none where the model's size is not known."""
    parameters = export_parameters(plan) if plan.export.stages else None
    return seconds_expected(plan.export, parameters, cuda=plan.device == "cuda") if parameters else {}


def _rate(stage: Any) -> float | None:
    """Tokens a second of a finished stage: the median it logged, else worked out from its steps and times."""
    logged = [value for _, value in stage.series.get("tokens_per_s", []) if value]
    if logged:
        return statistics.median(logged)
    totals = stage.totals
    try:
        (begun, first), (ended, last) = stage.pace[0], stage.pace[-1]
        return totals["tokens"] / totals["examples"] * totals["batch"] * (last - first) / (ended - begun) or None
    except (IndexError, KeyError, TypeError, ZeroDivisionError):
        return None


def found_source(plan: Plan) -> ModelSource | None:
    """Where the plan's model lies; None where preflight will say what is wrong with it."""
    try:
        return model_source(plan.model, lambda text: None, fetch=False)
    except FinetuiError:
        return None


@dataclass(frozen=True)
class Forecast:
    """What the review says: (name, words, colour) a line, and the warnings that follow, heaviest first."""

    lines: list[tuple[str, str, str]]
    warnings: list[str]
    busy: bool = False
    """Another run trains on the plan's device, and this one would not wait for it."""
    other_gpu: int | None = None
    """A GPU on which nothing of ours trains, where the plan's is busy."""


def forecast(plan: Plan, counts: Counts, runs_folder: Path, runs: list[tuple[Run, Plan]]) -> Forecast:
    """Steps, memory, disk, duration and what changed. Looks at the disk and the devices: for a thread."""
    lines = [(stage.upper(), stage_words(plan, stage, counts.get(stage)), "") for stage in plan.training_stages]
    warnings = []
    source = found_source(plan)
    memory, enough = memory_words(plan, counts, source)
    lines.append(("Memory", memory, "" if enough else "$text-warning"))
    if not enough:
        warnings.append("It needs more memory than is free: lower max_length or lora.r, or take a smaller model.")
    if source:
        disk, room = disk_words(plan, source, counts, runs_folder)
        lines.append(("Disk", disk, "" if room else "$text-warning"))
        if not room:
            warnings.insert(0, "The disk is too small for what the run will write: free some space first.")
    other, idle = in_use(device_of(plan)), None
    if other and plan.wait_gpu:
        lines.append(("Start", clean(f"when {other}, which trains on this device now, has ended", 160), ""))
    elif other:
        idle = idle_gpu(plan)
        choice = "Enter starts it now all the same, w when that one has ended"
        choice += f", o on GPU {idle.index} ({idle.name or 'unnamed'})" if idle else ""
        warnings.append(
            clean(f"{other} trains on this device now: both would be slower and share its memory. {choice}.", 300)
        )
    unknown = "not known before a run of this model has trained on this device"
    lines.append(("Duration", duration_words(plan, counts, runs) or unknown, ""))
    lines.append(("Changed", changed_words(plan, runs), ""))
    return Forecast(lines, warnings, bool(other) and not plan.wait_gpu, idle.index if idle else None)


def idle_gpu(plan: Plan) -> gpu.GpuSample | None:
    """The GPU with most free memory on which no run of ours trains; None where the plan's is the only one."""
    if plan.device != "cuda":
        return None
    cards = [card for card in gpu.gpus() if f"gpu-{card.index}" != device_of(plan) and not in_use(f"gpu-{card.index}")]
    return max(cards, key=lambda card: card.memory_free_bytes or 0, default=None)


def changed_words(plan: Plan, runs: list[tuple[Run, Plan]]) -> str:
    """What differs from the newest run, in a few words."""
    if not runs:
        return "nothing to compare with: this is the first run here"
    run, before = runs[0]
    found = differences(before, plan)
    if not found:
        return f"nothing since {run.name}"
    shown = "; ".join(f"{path} {old} → {new}" for path, old, new in found[:6])
    return f"since {run.name}: {shown}{f'; {len(found) - 6} more' if len(found) > 6 else ''}"
