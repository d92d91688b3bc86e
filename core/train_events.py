"""What a trainer says while it works: logs, checkpoints; and how it hears that it should stop."""

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from core.best import best_step
from core.checkpoints import complete_checkpoints, write_manifest
from core.errors import FinetuiError
from core.reporter import RESUME_ADVICE, Reporter, Stopped
from core.train_alarms import is_finite

__all__ = ["RESUME_ADVICE", "EventCallback", "Reporter", "Stopped"]

TELL_S = 5.0
"""Steps between two logs are told this often: on a slow machine a log is minutes from the next."""


class EventCallback(TrainerCallback):
    """Turns logs and saves into events; stops the trainer when asked; keeps the newest checkpoints and the best."""

    def __init__(self, reporter: Reporter, keep: int) -> None:
        self.reporter, self.keep = reporter, keep
        self.last_time = self.last_told = time.monotonic()
        self.last_tokens: float | None = None
        self.cost_s = 0.0
        self.spoilt = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.last_time = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            control.should_log = True  # else a stage that is done would be shown at the last step that was logged
        if not self.reporter.run.plan_path.exists():  # else a checkpoint would make it anew, without its plan
            raise FinetuiError("The run's folder was deleted while it trained.", "Start it again.")
        if self.reporter.stop_asked:
            control.should_training_stop = True
            control.should_save = True
        if not control.should_log and time.monotonic() - self.last_told >= TELL_S:
            self.reporter.event("step", step=state.global_step)
            self.last_told = time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        begun = time.perf_counter()
        numbers = {key: value for key, value in (logs or {}).items() if not isinstance(value, str)}
        if "train_runtime" in numbers:
            return
        fields: dict[str, Any] = {"step": state.global_step, "epoch": round(state.epoch or 0, 4)}
        if any(key.startswith("eval_") for key in numbers):
            self.reporter.event("eval", **fields, **{k: v for k, v in numbers.items() if k != "epoch"})
        elif "loss" in numbers:
            fields |= {key: value for key, value in numbers.items() if key != "epoch"}
            fields |= self._pace(numbers.get("num_tokens"))
            if torch.cuda.is_available():
                fields["vram_peak_bytes"] = torch.cuda.max_memory_reserved()
            self.reporter.event("log", **fields)
            self.last_told = time.monotonic()
        self.cost_s += time.perf_counter() - begun

    def _pace(self, tokens: float | None) -> dict[str, float]:
        now = time.monotonic()
        pace = {}
        if tokens is not None:
            if self.last_tokens is not None and now > self.last_time:
                pace["tokens_per_s"] = round((tokens - self.last_tokens) / (now - self.last_time), 1)
            self.last_tokens = tokens
        self.last_time = now
        return pace

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(args.output_dir or "") / f"checkpoint-{state.global_step}"
        if not is_finite(kwargs["model"]):
            shutil.rmtree(folder, ignore_errors=True)
            if self.spoilt:
                return
            self.spoilt = True
            text = f"No checkpoint at step {state.global_step} or later: the weights are not finite (NaN or infinity)."
            self.reporter.notice(text, "error", f"Stop it and lower {self.reporter.stage}.learning_rate.")
            return
        write_manifest(folder)
        self.reporter.event("checkpoint", step=state.global_step, path=str(folder.relative_to(self.reporter.run.path)))
        complete, best = complete_checkpoints(folder.parent), best_step(state.log_history)
        kept = [*complete[: self.keep], *(path for path in complete if path.name == f"checkpoint-{best}")]
        for other in folder.parent.glob("checkpoint-*"):
            if other not in kept:
                shutil.rmtree(other, ignore_errors=True)
