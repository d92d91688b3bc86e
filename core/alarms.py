"""What is wrong with the figures of a stage, and what to do about it: computed from its log alone. No torch, no disk.

The trainer asks after every logged step and writes each new alarm into the event log, so that it is told with nobody
watching; the dashboard asks about what it shows. Every alarm comes within five logged steps of what it is about.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from core.events import StageState
from core.text import clean, number

SOON = 5
"""Logged steps after which what stands still is told."""
STILL_LOGS = 10
DIVERGED = 2.0
SURE = 3
"""Logged steps for which what spoils a run must have stood before the run is stopped for it."""
MARGIN_MOVED = 0.01
LOSS_MOVED = 1e-6
LEARNED = 0.05
BY_HEART = 1.1
"""Times the lowest held-out loss; from there on rows are learned by heart."""
TOLD_APART = 0.01
"""A loss of KTO at which good and bad answers are told apart as far as its sigmoid goes."""
FORGOTTEN = 2000
Points = Sequence[tuple[int, float | None]]


@dataclass(frozen=True, order=True)
class Alert:
    """`weight` 3 spoils the run, 2 may spoil it, 1 is worth knowing."""

    weight: int
    text: str
    advice: str
    kind: str = ""
    since: int = 0
    """The last step at which all was well still."""
    sure: bool = False
    """It has stood long enough to stop the run for it."""


def stage_alerts(stage: StageState) -> list[Alert]:
    """Everything that the figures of a training stage should worry a person with."""
    loss = stage.series.get("loss", [])
    if not loss:
        return []
    name = clean(stage.name.upper(), 12)
    if alarm := _not_finite(stage, name) or _gradients(stage, name) or _diverged(stage, name):
        return [alarm]
    return [*_still(stage, name), *filter(None, (_by_heart(stage, name), _told_apart(stage, name)))]


def _not_finite(stage: StageState, name: str) -> Alert | None:
    loss = stage.series["loss"]
    gaps = [step for step, value in loss if value is None]
    if not gaps:
        return None
    if loss[-1][1] is not None:
        advice = f"It recovered; lower {stage.name}.learning_rate or {stage.name}.max_grad_norm if it comes back."
        text = f"{name}: the loss was not finite {len(gaps)} times, last at step {gaps[-1]}."
        return Alert(2, text, advice, "recovered")
    run = _tail_length(loss, lambda value: value is None)
    since, last_good = loss[-run][0], loss[-run - 1][0] if run < len(loss) else 0
    if run == len(loss):
        advice = f"It never was: try model.dtype fp32, `finetui check` the rows, lower {stage.name}.learning_rate."
    else:
        saved = [step for step in stage.checkpoints if step < since]
        back = f" The checkpoint of step {saved[-1]} is from before." if saved else ""
        advice = f"Abort it and train again with a lower {stage.name}.learning_rate.{back}"
    text = f"{name}: the loss is not finite since step {since}: nothing is learned any more."
    return Alert(3, text, advice, "nan", last_good, run >= SURE)


def _gradients(stage: StageState, name: str) -> Alert | None:
    """Gradients that are not finite while the loss is, or that are 0 all the time."""
    norms = stage.series.get("grad_norm", [])
    if not norms:
        return None
    rate = f"{stage.name}.learning_rate"
    if norms[-1][1] is None:
        run = _tail_length(norms, lambda value: value is None)
        good = [step for step, value in norms if value is not None]
        text = f"{name}: the gradients are not finite at step {norms[-1][0]}, the loss still is."
        advice = f"If more follow, the loss goes the same way: lower {rate}, or take bf16 instead of fp16."
        return Alert(3 if run >= SURE else 2, text, advice, "gradients", good[-1] if good else 0, run >= SURE)
    if len(norms) >= SOON and not any(value for _, value in norms[-SOON:]):
        text = f"{name}: the gradients are 0 in the last {SOON} logs: nothing is trained."
        advice = "See in the data room that answers are trained, and whether lora.target_modules are the model's."
        return Alert(3, text, advice, "no-gradient", norms[-SOON][0])
    return None


def _diverged(stage: StageState, name: str) -> Alert | None:
    points = [(step, value) for step, value in stage.series["loss"] if value is not None]
    if len(points) < 6:
        return None
    values = [value for _, value in points]
    best, recent = min(values[:-SURE]), values[-SURE:]
    if best <= 0 or min(recent) <= DIVERGED * best or min(recent) - best < 0.2:
        return None
    high = _tail_length(points, lambda value: value is not None and value > DIVERGED * best)
    since = points[-high - 1][0] if high < len(points) else 0
    text = f"{name}: the loss is at {number(min(recent), 3)} and was at {number(best, 3)}: it diverges."
    return Alert(3, text, f"Stop it and lower {stage.name}.learning_rate by three or more.", "diverged", since, True)


def _still(stage: StageState, name: str) -> list[Alert]:
    """What should have moved by now and has not; a warm-up moves nothing yet."""
    losses = [value for _, value in stage.series["loss"] if value is not None]
    rate = f"{stage.name}.learning_rate"
    if stage.name != "kto" and len(losses) >= SOON and _frozen(losses):
        text = f"{name}: the loss has not moved from {number(losses[-1])} in {SOON} logs: it is frozen."
        advice = f"The weights do not change: {rate} is too low, no token counts, or the rows are all the same."
        return [Alert(2, text, advice, "frozen")]
    warm = since_warm_up(stage)
    if stage.name == "kto":
        return _still_kto(stage, name, warm)
    if len(losses) < STILL_LOGS or stage.step < 0.3 * stage.total_steps:
        return []
    third = len(losses) // 3
    early, late = _mean(losses[:third]), _mean(losses[-third:])
    if not early or abs(late - early) >= 0.01 * abs(early):
        return []
    advice = f"Raise {rate}; see in the preview that the answers are trained."
    return [Alert(2, f"{name}: the loss has not moved from {number(late, 3)}.", advice, "still")]


def _frozen(losses: Sequence[float]) -> bool:
    """The same figure five times over. A trainer rounds it to four places: one near 0 may be the same for long."""
    same = max(losses[-SOON:]) - min(losses[-SOON:]) <= LOSS_MOVED * abs(losses[-1])
    return same and (losses[-1] >= LEARNED or not any(losses))


def _by_heart(stage: StageState, name: str) -> Alert | None:
    """Held-out rows get worse, twice in a row, while the trained ones get better."""
    held = [(step, value) for step, value in stage.series.get("eval_loss", []) if value is not None]
    if len(held) < 3:
        return None
    best_at, best = min(held, key=lambda point: point[1])
    newest = held[-1][1]
    if best <= 0 or held[-2][0] <= best_at or min(held[-2][1], newest) < BY_HEART * best:
        return None
    losses = [(step, value) for step, value in stage.series["loss"] if value is not None]
    then, now = [value for step, value in losses if step <= best_at][-SOON:], [value for _, value in losses[-SOON:]]
    if not then or _mean(now) >= _mean(then):
        return None
    rose = f"{name}: the held-out loss is at {number(newest, 3)} and was at {number(best, 3)} at step {best_at}"
    advice = (
        f"Take fewer epochs or more rows. {stage.name}.early_stopping_patience ends a stage in time, "
        f"{stage.name}.load_best_model_at_end keeps the best checkpoint."
    )
    return Alert(2, f"{rose}, while the loss falls: the rows are learned by heart.", advice, "by-heart")


def _told_apart(stage: StageState, name: str) -> Alert | None:
    """KTO goes on pushing answers apart that are as far apart as its loss can see."""
    losses = [value for _, value in stage.series["loss"] if value is not None]
    if stage.name != "kto" or len(losses) < SOON or max(losses[-SOON:]) >= TOLD_APART:
        return None
    text = f"{name}: the loss is at {number(losses[-1], 3)}: good and bad answers are told apart, more only does harm."
    advice = f"Lower {stage.name}.learning_rate or its epochs, and compare its answers with SFT's (`finetui eval`)."
    return Alert(2, text, advice, "told-apart")


def _still_kto(stage: StageState, name: str, warm: int) -> list[Alert]:
    margins = [(step, value) for step, value in stage.series.get("rewards/margins", []) if value is not None]
    kl = [(step, value) for step, value in stage.series.get("kl", []) if value is not None]
    told = sum(step > warm for step, _ in margins)
    if told >= SOON and max(abs(value) for _, value in margins) < MARGIN_MOVED:
        text = f"{name}: the margin has not moved from 0 in {stage.step} steps."
        advice = f"Raise {stage.name}.learning_rate: at 2e-7 a LoRA hardly moves. Until then KTO changes nothing."
        return [Alert(2, text, advice, "margin")]
    if sum(step > warm for step, _ in kl) >= SOON and not any(value for _, value in kl):
        moves = "the margin moves" if margins else "and no batch has shown a margin"
        advice = "TRL never lets it be negative: it is 0 while answers to other prompts grow less likely."
        return [Alert(1, f"{name}: the KL estimate is 0 in every log, {moves}.", advice, "kl")]
    return []


def since_warm_up(stage: StageState) -> int:
    """The last logged step of the warm-up; the newest while it lasts. Where no rate is logged it is a third."""
    rates = [(step, value) for step, value in stage.series.get("learning_rate", []) if value is not None]
    for (step, value), (_, later) in zip(rates, rates[1:], strict=False):
        if later <= value and value > 0:
            return step
    return rates[-1][0] if rates else 0 if stage.step >= 0.3 * stage.total_steps else stage.step


def _tail_length(points: Points, bad: Callable[[float | None], bool]) -> int:
    """How many of the newest points are `bad` without a break."""
    count = 0
    for _, value in reversed(points):
        if not bad(value):
            break
        count += 1
    return count


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


class Watchman:
    """Folds a stage's own logs as they are written, and says of each new alarm once. Its cost does not grow."""

    def __init__(self, stage: str) -> None:
        self.stage = StageState(stage)
        self.told: dict[str, int] = {}

    def look(self, step: int, total: int, figures: dict[str, float | None]) -> list[Alert]:
        """The alarms that are new, or heavier than they were, after these figures of `step`."""
        self.stage.step, self.stage.total_steps = step, total
        for key, value in figures.items():
            points = self.stage.series.setdefault(key, [])
            points.append((step, value))
            if len(points) > FORGOTTEN:
                del points[: FORGOTTEN // 2]
        found = stage_alerts(self.stage)
        fresh = [alert for alert in found if self.told.get(alert.kind, 0) < alert.weight]
        now = {alert.kind: alert.weight for alert in found}
        self.told = {kind: weight for kind, weight in self.told.items() if weight < 3 or kind in now} | {
            kind: max(weight, self.told.get(kind, 0)) for kind, weight in now.items()
        }
        return fresh

    @property
    def spoilt(self) -> Alert | None:
        """What spoils the run for sure by now."""
        return next((alert for alert in stage_alerts(self.stage) if alert.sure and alert.weight == 3), None)
