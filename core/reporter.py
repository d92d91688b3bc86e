"""What the child of a stage says while it works, and how it hears that it should stop. No torch."""

import contextlib
import signal
import time
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Any

from core.errors import FinetuiError
from core.event_log import FULL, LAST_WORDS
from core.runs import Run
from core.stages import TRAINING_STAGES

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
        self.lost = 0
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
        """Write an event. On a full disk all but the last words are lost, counted, and told of once there is room."""
        try:
            self.run.events.append(kind, stage=self.stage, **fields)
        except OSError as error:
            if error.errno not in FULL or kind in LAST_WORDS:
                raise
            self.lost += 1
            return
        if self.lost:
            lost, self.lost = self.lost, 0
            self.notice(f"The disk was full: {lost} lines of this log are missing.", "warning", "Free some space.")

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
        elif type(error).__name__ == "OutOfMemoryError":
            advice = "Free GPU memory (`nvidia-smi` names who holds it), then `finetui resume`."
            if self.stage in TRAINING_STAGES:
                advice = f"Lower {self.stage}.max_length or lora.r, or turn on gradient checkpointing."
        elif isinstance(error, OSError) and error.errno == 28:
            advice = "The disk is full: free some space, then `finetui resume`."
        self.event(
            "error", type=type(error).__name__, message=message[:4000], advice=advice,
            traceback="".join(traceback.format_exception(error))[-8000:],
        )  # fmt: skip
