"""The alarms of a stage while it trains: told as notices, and where the plan says so the stage is ended for them."""

import math
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from core.alarms import Alert, Watchman
from core.best import History, best_step, held_out_losses
from core.checkpoints import complete_checkpoints, damage, step_of
from core.errors import FinetuiError
from core.plan import StagePlan
from core.reporter import Reporter
from core.train_model import load_adapter_weights

LOOKED_AT = {"loss", "eval_loss"}
LEVELS = {3: "error", 2: "warning", 1: "info"}


def figures_of(logs: dict[str, Any]) -> dict[str, float | None]:
    """The figures of a log; None where one is not finite."""
    numbers = {key: value for key, value in logs.items() if isinstance(value, int | float)}
    return {key: float(value) if math.isfinite(value) else None for key, value in numbers.items()}


class AlarmCallback(TrainerCallback):
    """Looks at each logged step; `stopped_for` is what the stage was ended for."""

    def __init__(self, stage: StagePlan, reporter: Reporter) -> None:
        self.stage, self.reporter = stage, reporter
        self.watchman = Watchman(reporter.stage)
        self.stopped_for: Alert | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for entry in state.log_history:  # a resumed stage knows what came before
            if LOOKED_AT & entry.keys():
                self.watchman.look(int(entry["step"]), state.max_steps, figures_of(entry))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        logs: dict[str, Any] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        if not LOOKED_AT & (logs or {}).keys():
            return
        for alert in self.watchman.look(state.global_step, state.max_steps, figures_of(logs or {})):
            self.reporter.event(
                "notice", level=LEVELS[alert.weight], text=alert.text, advice=alert.advice, alarm=alert.kind
            )
        if self.stage.on_alarm == "stop" and (spoilt := self.watchman.spoilt):
            self.stopped_for = spoilt
            control.should_training_stop, control.should_save = True, False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.watchman.stage.checkpoints.append(state.global_step)


def is_finite(model: Any) -> bool:
    """Whether every trained weight is a number."""
    return all(bool(torch.isfinite(weight).all()) for weight in model.parameters() if weight.requires_grad)


def take_sound(model: Any, alert: Alert, history: History, checkpoints: Path, reporter: Reporter) -> None:
    """Put the best checkpoint from before the alarm into the model: by held-out loss, else the newest.

    Raises FinetuiError where there is none.
    """
    sound = [path for path in complete_checkpoints(checkpoints) if step_of(path) <= alert.since and not damage(path)]
    judged = [entry for entry in history if int(entry.get("step", 0)) <= alert.since]
    best = best_step(judged)
    chosen = next((path for path in sound if step_of(path) == best), next(iter(sound), None))
    if chosen is None:
        raise FinetuiError(f"Ended for an alarm. {alert.text} There is no checkpoint from before.", alert.advice)
    load_adapter_weights(model, chosen)
    loss = dict(held_out_losses(judged)).get(step_of(chosen))
    judged_by = f", held-out loss {loss:.4g}" if loss is not None else ", the newest from before"
    reporter.notice(
        f"Ended for an alarm. {alert.text} The final model is that of step {step_of(chosen)}{judged_by}.",
        "warning", alert.advice,
    )  # fmt: skip


def refuse_not_finite(model: Any, name: str) -> None:
    """Raises FinetuiError for a model that has learned numbers that are none."""
    if not is_finite(model):
        raise FinetuiError(
            "The trained weights are not finite (NaN or infinity): such a model answers nothing.",
            f"Lower {name}.learning_rate and resume: it goes on from the newest checkpoint that is sound.",
        )
