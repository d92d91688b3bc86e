"""What should worry a person about a run, with advice, computed from what its log says. Pure: no clock, no disk."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from core.events import StageState
from core.stages import TRAINING_STAGES
from core.text import clean, number
from tui.follow import GIB, Snapshot

HOT_C = 87
LOW_DISK_BYTES = 10 * GIB
NO_DISK_BYTES = 2 * GIB
DIVERGED = 2.0
STILL_LOGS = 10
THROTTLES = ("hardware slowdown", "temperature", "temperature (hardware)", "power brake")


@dataclass(frozen=True, order=True)
class Alert:
    """`weight` 3 spoils the run, 2 may spoil it, 1 is worth knowing."""

    weight: int
    text: str
    advice: str


def alerts(snapshot: Snapshot) -> list[Alert]:
    """Everything that should worry a person now, weightiest first. Machine alerts are for living runs only."""
    found: list[Alert] = []
    for stage in snapshot.state.stages:
        if stage.name in TRAINING_STAGES:
            found += _of_stage(stage)
    if snapshot.live:
        found += _of_machine(snapshot)
    return sorted(found, key=lambda alert: -alert.weight)


def _of_stage(stage: StageState) -> list[Alert]:
    loss = stage.series.get("loss", [])
    if not loss:
        return []
    name = clean(stage.name.upper(), 12)
    alarm = _not_finite(stage, name) or _diverged(stage, name)
    found = [alarm] if alarm else []
    if not alarm and stage.step >= 0.3 * stage.total_steps:  # a warm-up moves nothing yet
        found += _still(stage, name)
    return found


def _not_finite(stage: StageState, name: str) -> Alert | None:
    loss = stage.series["loss"]
    gaps = [step for step, value in loss if value is None]
    if not gaps:
        return None
    if loss[-1][1] is not None:
        advice = f"It recovered; lower {stage.name}.learning_rate or {stage.name}.max_grad_norm if it comes back."
        return Alert(2, f"{name}: the loss was not finite {len(gaps)} times, last at step {gaps[-1]}.", advice)
    finite = [step for step, value in loss if value is not None]
    since = min((step for step in gaps if not finite or step > finite[-1]), default=gaps[0])
    saved = [step for step in stage.checkpoints if step < since]
    back = f" The checkpoint of step {saved[-1]} is from before." if saved else ""
    advice = f"Abort it and train again with a lower {stage.name}.learning_rate.{back}"
    return Alert(3, f"{name}: the loss is not finite since step {since}: nothing is learned any more.", advice)


def _diverged(stage: StageState, name: str) -> Alert | None:
    values = [value for _, value in stage.series["loss"] if value is not None]
    if len(values) < 6:
        return None
    best, recent = min(values[:-3]), values[-3:]
    if best <= 0 or min(recent) <= DIVERGED * best or min(recent) - best < 0.2:
        return None
    text = f"{name}: the loss is at {number(min(recent), 3)} and was at {number(best, 3)}: it diverges."
    return Alert(3, text, f"Stop it and lower {stage.name}.learning_rate by three or more.")


def _still(stage: StageState, name: str) -> list[Alert]:
    """What should have moved by now and has not."""
    found = []
    rate = f"{stage.name}.learning_rate"
    losses = [value for _, value in stage.series["loss"] if value is not None]
    margins = [value for _, value in stage.series.get("rewards/margins", []) if value is not None]
    kl = [value for _, value in stage.series.get("kl", []) if value is not None]
    if stage.name != "kto" and len(losses) >= STILL_LOGS:
        third = len(losses) // 3
        early, late = _mean(losses[:third]), _mean(losses[-third:])
        if early and abs(late - early) < 0.01 * abs(early):
            advice = f"Raise {rate}; see in the preview that the answers are trained."
            found.append(Alert(2, f"{name}: the loss has not moved from {number(late, 3)}.", advice))
    if len(margins) >= STILL_LOGS and max(abs(value) for value in margins) < 0.01:
        advice = f"Raise {rate}: at 2e-7 a LoRA hardly moves. Until then KTO changes nothing."
        found.append(Alert(2, f"{name}: the margin has not moved from 0 in {stage.step} steps.", advice))
    elif len(kl) >= STILL_LOGS and not any(kl):
        advice = "TRL never lets it be negative: it is 0 while answers to other prompts grow less likely."
        found.append(Alert(1, f"{name}: the KL estimate is 0 in every log, the margin moves.", advice))
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _of_machine(snapshot: Snapshot) -> list[Alert]:
    found = []
    cards: Any = snapshot.state.gpu[-1].get("gpus") if snapshot.state.gpu else None
    for card in cards if isinstance(cards, list) else []:
        if isinstance(card, dict):
            found += _of_card(card)
    free = snapshot.disk_free
    if free is not None and free < LOW_DISK_BYTES:
        weight = 3 if free < NO_DISK_BYTES else 2
        advice = "Free some space: a checkpoint that does not fit ends the run. Old runs can be deleted at home (x)."
        found.append(Alert(weight, f"Only {free / GIB:.1f} GiB are free where the runs lie.", advice))
    return found


def _of_card(card: dict[str, Any]) -> list[Alert]:
    name = f"GPU {clean(card.get('index', 0), 3)}"
    degrees, reasons = card.get("temperature_c"), card.get("throttle")
    slowed = [word for word in reasons if word in THROTTLES] if isinstance(reasons, list) else []
    advice = "Better airflow, or a lower power limit (nvidia-smi -pl): it costs little speed."
    if isinstance(degrees, int | float) and degrees >= HOT_C:
        return [Alert(2, f"{name} is at {degrees:.0f} °C.", advice)]
    if slowed:
        return [Alert(2, f"{name} is slowed down: {', '.join(slowed)}.", advice)]
    return []
