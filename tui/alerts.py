"""What should worry a person about a run, with advice, computed from what its log says. Pure: no clock, no disk."""

from typing import Any

from core.alarms import Alert, stage_alerts
from core.stages import TRAINING_STAGES
from core.text import clean
from tui.follow import GIB, Snapshot

HOT_C = 87
LOW_DISK_BYTES = 10 * GIB
NO_DISK_BYTES = 2 * GIB
THROTTLES = ("hardware slowdown", "temperature", "temperature (hardware)", "power brake")

__all__ = ["Alert", "alerts"]


def alerts(snapshot: Snapshot) -> list[Alert]:
    """Everything that should worry a person now, weightiest first. Machine alerts are for living runs only."""
    found: list[Alert] = []
    for stage in snapshot.state.stages:
        if stage.name in TRAINING_STAGES:
            found += stage_alerts(stage)
    if snapshot.live:
        found += _of_machine(snapshot)
    return sorted(found, key=lambda alert: -alert.weight)


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
