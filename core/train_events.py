"""What a trainer says while it works: phases, logs, checkpoints; and how it hears that it should stop."""

import contextlib
import shutil
import signal
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from core.best import best_step
from core.errors import FinetuiError
from core.runs import Run, complete_checkpoints, write_manifest

RESUME_ADVICE = "See train.log; `finetui resume` goes on from the newest checkpoint."


class Stopped(Exception):
    """A stop was asked for outside the training loop: nothing is half-done, so there is nothing to save."""


class Reporter:
    """Writes a stage's events, and hears SIGTERM and the stop file."""

    def __init__(self, run: Run, stage: str) -> None:
        self.run, self.stage = run, stage
        self.in_training = False
        self.terminated = False
        self.phase_name = ""
        if hasattr(signal, "SIGTERM"):
            signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self.terminated = True
        if not self.in_training:
            raise Stopped

    @property
    def stop_asked(self) -> bool:
        return self.terminated or self.run.stop_path.exists()

    def event(self, kind: str, **fields: Any) -> None:
        self.run.events.append(kind, stage=self.stage, **fields)

    def notice(self, text: str, level: str = "info", advice: str = "") -> None:
        self.event("notice", level=level, text=text, advice=advice)

    @contextlib.contextmanager
    def phase(self, name: str, detail: str = "") -> Iterator[None]:
        """A named stretch of the stage: an event at its start and one with its seconds at its end."""
        if self.stop_asked:
            raise Stopped
        self.phase_name = name
        self.event("phase", name=name, detail=detail)
        begun = time.monotonic()
        yield
        self.event("phase", name=name, detail=detail, seconds=round(time.monotonic() - begun, 2))

    def detail(self, text: str) -> None:
        """What the current phase is doing."""
        self.event("phase", name=self.phase_name, detail=text)

    def failure(self, error: BaseException, advice: str = RESUME_ADVICE) -> None:
        """Write the `error` event of a stage that dies of `error`."""
        message = str(error)
        if isinstance(error, FinetuiError):
            message, advice = error.message, error.advice
        elif isinstance(error, torch.cuda.OutOfMemoryError):
            advice = f"Lower {self.stage}.max_length or lora.r, or turn on gradient checkpointing."
        elif isinstance(error, OSError) and error.errno == 28:
            advice = "The disk is full: free some space, then `finetui resume`."
        self.event(
            "error", type=type(error).__name__, message=message[:4000], advice=advice,
            traceback="".join(traceback.format_exception(error))[-8000:],
        )  # fmt: skip


class EventCallback(TrainerCallback):
    """Turns logs and saves into events; stops the trainer when asked; keeps the newest checkpoints and the best."""

    def __init__(self, reporter: Reporter, keep: int) -> None:
        self.reporter, self.keep = reporter, keep
        self.last_time = time.monotonic()
        self.last_tokens: float | None = None
        self.cost_s = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.last_time = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.reporter.stop_asked:
            control.should_training_stop = True
            control.should_save = True

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
        write_manifest(folder)
        self.reporter.event("checkpoint", step=state.global_step, path=str(folder.relative_to(self.reporter.run.path)))
        complete, best = complete_checkpoints(folder.parent), best_step(state.log_history)
        kept = [*complete[: self.keep], *(path for path in complete if path.name == f"checkpoint-{best}")]
        for other in folder.parent.glob("checkpoint-*"):
            if other not in kept:
                shutil.rmtree(other, ignore_errors=True)
