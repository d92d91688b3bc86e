"""The event log of a run as its readers see it, any number of viewers: `core.event_log` writes it.

One JSON object a line, ``{"t": unix seconds, "kind": …}``; the first line carries ``"v": 1``. Readers accept unknown
kinds and fields, a torn last line, and a log that another process is still writing.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from core import clock
from core.paths import open_regular
from core.stages import EXPORT_STAGES, TRAINING_STAGES

VERSION = 1
MAX_LINE = 1_000_000
"""Bytes; no event that is written here is longer."""
MAX_ARTEFACTS = 50
COUNTS = ("steps", "batch", "rows", "examples", "held_out", "left_out", "tokens", "trained_tokens", "trainable")
STARTED_WITH = ("pid", "pid_started", "host", "boot", "clock")
KNOWN_BYTES = 128
NO_LIFE = ("created", "stages", "notice")
"""Kinds of events that others write into the log of a run that does not live."""
NO_METRICS = frozenset(("t", "step", "epoch", "nonfinite"))
NOT_NUMBERS = (str, list, dict, bool)
NUMBERS = (int, float, type(None))
Event = dict[str, Any]


def bytes_before(stream: IO[bytes], offset: int) -> bytes:
    """What a log says just before `offset`: by it a reader that comes back there knows whether it is the same log.

    Inode numbers are given again at once, and a log may be cut and grow.
    """
    start = max(0, offset - KNOWN_BYTES)
    stream.seek(start)
    return stream.read(offset - start)


class EventTail:
    """Reads the events that were added since the last call; a line still being written waits for the next call.

    Where the log is not the one that was read, another or one that was cut, it is read from its beginning: `restarts`
    counts how often, for who keeps what it told.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = self.restarts = 0
        self._known = b""
        self.broken_lines = 0
        self._skipping = False

    def read(self, limit_bytes: int = 8_000_000) -> list[Event]:
        """The new whole events, at most about `limit_bytes` of them. A log that does not exist yet has none.

        A line that is longer than any event is passed over without being kept.
        """
        try:
            with open_regular(self.path) as stream:
                if bytes_before(stream, self.offset) != self._known:
                    self.offset, self._skipping, self.restarts = 0, False, self.restarts + 1
                stream.seek(self.offset)
                chunk = self._next(stream, limit_bytes)
                start = chunk.find(b"\n") + 1 if self._skipping else 0
                end = chunk.rfind(b"\n") + 1
                self._skipping = self._skipping and not end
                self.offset += end
                self._known = bytes_before(stream, self.offset)
        except OSError:
            return []
        return list(self._parse(chunk[start:end]))

    def _next(self, stream: IO[bytes], limit_bytes: int) -> bytes:
        """What comes next, with a line's end in it; what is too long for an event is left behind."""
        while True:
            chunk = stream.read(limit_bytes)
            if len(chunk) == limit_bytes and b"\n" not in chunk and not self._skipping:
                chunk += stream.readline(MAX_LINE)
            if b"\n" in chunk or not (self._skipping or len(chunk) > MAX_LINE):
                return chunk
            self.broken_lines += not self._skipping
            self._skipping = True
            self.offset += len(chunk)
            if len(chunk) < limit_bytes:
                return b""

    def _parse(self, chunk: bytes) -> Iterator[Event]:
        for line in chunk.splitlines():
            event = parse_line(line) if len(line) <= MAX_LINE else None
            if event is not None:
                yield event
            elif line.strip():
                self.broken_lines += 1


def parse_line(line: bytes) -> Event | None:
    """One line as an event, or None where it is torn or no event."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or not isinstance(event.get("kind"), str):
        return None
    t = event.get("t")
    if isinstance(t, bool) or not isinstance(t, int | float) or not 0 <= t < clock.MAX_T:
        event["t"] = 0.0
    return event


@dataclass
class StageState:
    """What is known of one stage."""

    name: str
    state: str = "waiting"
    base: str = ""
    phase: str = ""
    detail: str = ""
    phase_seconds: dict[str, float] = field(default_factory=dict)
    started: float | None = None
    ended: float | None = None
    step: int = 0
    total_steps: int = 0
    epoch: float = 0.0
    totals: Event = field(default_factory=dict)
    series: dict[str, list[tuple[int, float | None]]] = field(default_factory=dict)
    pace: list[tuple[float, int]] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)
    output: str = ""
    pid: int | None = None
    pid_started: float | None = None
    exit: str = ""
    paused_s: float = 0.0
    """Seconds that its run had paused when it ended."""
    expected_s: float | None = None
    """About how long it will take, told before it began."""
    expected_examples: int | None = None
    """Of a training stage nothing is known of but this: the examples that it will train on."""

    def last(self, metric: str) -> float | None:
        """The newest finite value of a metric."""
        return next((value for _, value in reversed(self.series.get(metric, [])) if value is not None), None)

    @property
    def steps_per_second(self) -> float | None:
        """Pace over the last logs of this attempt."""
        recent = self.pace[-12:]
        if len(recent) < 2 or recent[-1][0] <= recent[0][0]:
            return None
        return (recent[-1][1] - recent[0][1]) / (recent[-1][0] - recent[0][0])

    @property
    def eta_s(self) -> float | None:
        """Seconds until the last step of this stage, at the recent pace."""
        pace = self.steps_per_second
        return (self.total_steps - self.step) / pace if pace and self.total_steps else None

    def rewind(self, step: int) -> None:
        """Forget what was logged after `step`: a resumed stage logs it again."""
        for name, points in self.series.items():
            self.series[name] = [point for point in points if point[0] <= step]
        self.checkpoints = [saved for saved in self.checkpoints if saved <= step]
        self.step = min(self.step, step)
        self.pace = []


@dataclass
class RunState:
    """A run as its events tell it; fold events in order. Whether it is alive is not in the log: see `runs.status`."""

    name: str = ""
    method: str = ""
    model: str = ""
    note: str = ""
    created: float | None = None
    started: float | None = None
    ended: float | None = None
    seen: float | None = None
    """The last sign of life of its runner and trainers."""
    end_status: str | None = None
    stages: list[StageState] = field(default_factory=list)
    start: Event = field(default_factory=dict)
    gpu: list[Event] = field(default_factory=list)
    notices: list[Event] = field(default_factory=list)
    errors: list[Event] = field(default_factory=list)
    samples: list[Event] = field(default_factory=list)
    result: Event = field(default_factory=dict)
    artefacts: dict[str, Event] = field(default_factory=dict)
    """What was made of the result, by what it is: ``merged_16bit``, ``Q4_K_M``, ``upload``."""
    paused_s: float = 0.0
    """Seconds between the ends of this run, or its last signs of life, and its resumptions."""
    task: str = ""
    """What is done to a run that has ended, `evaluate`, while it is; the run's own end stays what it was."""
    task_started: float | None = None
    nonfinite: int = 0
    waiting_for: tuple[str, str] | None = None
    """The device, and the run that trains there, while this one waits for its turn."""

    def start_over(self) -> None:
        """Forget all but the name: the log is another one, or is read from its beginning."""
        self.__init__(name=self.name)  # type: ignore[misc]

    def stage(self, name: str) -> StageState:
        """The stage called `name`, made on first mention."""
        found = next((stage for stage in self.stages if stage.name == name), None)
        if found is None:
            found = StageState(name)
            self.stages.append(found)
        return found

    @property
    def current(self) -> StageState | None:
        """The stage that runs, else the last that did."""
        begun = [stage for stage in self.stages if stage.state != "waiting"]
        running = [stage for stage in begun if stage.state == "running"]
        return (running or begun)[-1] if begun else None

    @property
    def trained_s(self) -> float | None:
        """Seconds from the first start to the last that training told, pauses left out; None where there was none."""
        found = [stage for stage in self.stages if stage.name in TRAINING_STAGES and stage.started]
        if self.started is None or not found:
            return None
        last = found[-1]
        told = last.pace[-1][0] if last.pace else last.started or 0.0
        paused = last.paused_s if last.ended else self.paused_s
        return max(0.0, (last.ended or told) - self.started - paused)

    def now(self) -> float:
        """Now on the clock of this run, while it lives; while it is about to start again that stands still."""
        if self.ended and not self.task_started:
            return self.ended
        return max(clock.moment(clock.zero_told(self.start)), self.seen or 0.0)

    def last(self, metric: str) -> float | None:
        """The newest finite value of a metric in any stage, of a later stage first."""
        found = (stage.last(metric) for stage in reversed(self.stages))
        return next((value for value in found if value is not None), None)

    def forget(self, points: int) -> None:
        """Keep of all that grows with a run its newest `points`, or a few more: for who shows no more of it."""
        told: list[list[Any]] = [self.gpu, self.notices, self.errors, self.samples]
        for stage in self.stages:
            told += [stage.pace, stage.checkpoints, *stage.series.values()]
        for growing in told:
            if len(growing) > 2 * points:
                del growing[:-points]

    def fold(self, event: Event) -> None:
        """Take one event in. Unknown kinds and missing fields are passed over."""
        handler = getattr(self, f"_on_{event['kind']}", None)
        if handler is not None:
            try:
                self.nonfinite += _count(event.get("nonfinite"))
                handler(event)
                self.seen = self.seen if event["kind"] in NO_LIFE else event["t"] or self.seen
            except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError):
                self.notices.append({"level": "warning", "text": f"an event of kind {event['kind'][:40]} is malformed"})

    def _on_created(self, event: Event) -> None:
        self.name = str(event.get("name", ""))
        self.method = str(event.get("method", ""))
        self.model = str(event.get("model", ""))
        self.note = str(event.get("note", ""))
        self.created = event["t"]
        for name in event.get("stages", []):
            self.stage(str(name))

    def paused_until(self, t: float) -> float:
        """What `paused_s` is once it starts again at `t`."""
        until = (self.ended or self.seen) if self.started else None  # one that was killed told no end
        return self.paused_s + (max(0.0, t - until) if until else 0.0)

    def _on_run_start(self, event: Event) -> None:
        self.paused_s = self.paused_until(event["t"])
        self._told_pauses(event)
        self.started = self.started or event["t"]
        self.ended, self.end_status = None, None
        self.errors = []
        self.start, self.waiting_for, self.task = event, None, ""
        for stage in self.stages:
            if stage.state in ("running", "failed", "stopped", "aborted"):
                stage.state = "waiting"

    def _told_pauses(self, event: Event) -> None:
        """The run's own sum of its pauses, for who passes over the middle of a long log."""
        if "paused_s" in event:
            self.paused_s = max(0.0, _finite(event["paused_s"]))

    def _on_stages(self, event: Event) -> None:
        """More was asked of the run than its plan had."""
        names = [str(name) for name in event.get("stages", [])]
        named = [self.stage(name) for name in names]
        for name in event.get("ahead", []):
            if self.stage(str(name)).state != "running":
                self.stage(str(name)).state = "waiting"
        self.stages = [*named, *(stage for stage in self.stages if stage.name not in names)]

    def _on_expected(self, event: Event) -> None:
        for name, seconds in _mapping(event.get("seconds")).items():
            self.stage(str(name)).expected_s = _finite(seconds) or None
        for name, examples in _mapping(event.get("examples")).items():
            self.stage(str(name)).expected_examples = _count(examples) or None

    def _on_task_start(self, event: Event) -> None:
        self.task, self.task_started = str(event.get("name", "")), event["t"]
        self.start = self.start | {key: event[key] for key in STARTED_WITH if key in event}
        self.errors, self.waiting_for = [], None

    def _on_task_end(self, event: Event) -> None:
        self.task, self.task_started = "", None

    def _on_waiting(self, event: Event) -> None:
        self.waiting_for = str(event.get("device", "")), str(event.get("holder", ""))

    def _on_stage_start(self, event: Event) -> None:
        self.waiting_for = None
        stage = self.stage(str(event.get("name", "")))
        stage.state, stage.started, stage.ended, stage.exit, stage.pace = "running", event["t"], None, "", []
        if stage.name in EXPORT_STAGES:  # made anew, where trainers go on
            stage.step, stage.total_steps, stage.phase_seconds = 0, 0, {}
        stage.base = str(event.get("base", ""))
        stage.pid, stage.pid_started = _count(event.get("pid")) or None, _finite(event.get("pid_started")) or None
        stage.phase, stage.detail = "start", ""
        if stage.name == "evaluate":  # another one begins at its beginning
            stage.step, stage.total_steps, stage.phase_seconds = 0, 0, {}
        if "resumed_step" in event:
            stage.rewind(_count(event["resumed_step"]))

    def _on_phase(self, event: Event) -> None:
        stage = self.stage(str(event.get("stage", "")))
        stage.phase, stage.detail = str(event.get("name", "")), str(event.get("detail", ""))
        if isinstance(event.get("seconds"), int | float):
            stage.phase_seconds[stage.phase] = stage.phase_seconds.get(stage.phase, 0.0) + _finite(event["seconds"])

    def _on_totals(self, event: Event) -> None:
        stage = self.stage(str(event.get("stage", "")))
        if "resumed_step" in event:  # what came after is answered again
            step = _count(event["resumed_step"])
            self.samples = [s for s in self.samples if s.get("stage") != stage.name or s["step"] <= step]
        for key in COUNTS:
            _count(event.get(key))
        _mapping(event.get("left_out_reasons"))
        stage.totals |= {key: value for key, value in event.items() if value is not None}
        stage.total_steps = _count(event.get("steps")) or stage.total_steps
        if "resumed_step" in event:
            stage.rewind(_count(event["resumed_step"]))

    def _on_log(self, event: Event) -> None:
        self._on_step(event)
        stage = self.stage(str(event.get("stage", "")))
        stage.epoch = _finite(event.get("epoch")) or stage.epoch
        self._series(stage, _count(event.get("step")), event)

    def _on_step(self, event: Event) -> None:
        """How far a stage is: with every log, and between two of them."""
        stage = self.stage(str(event.get("stage", "")))
        step = _count(event.get("step"))
        if stage.state == "waiting":  # the history reads a long log's two ends, and the start stands between them
            stage.state = "running"
        stage.step = max(stage.step, step)
        stage.pace.append((event["t"], step))

    def _on_eval(self, event: Event) -> None:
        self._series(self.stage(str(event.get("stage", ""))), _count(event.get("step")), event)

    @staticmethod
    def _series(stage: StageState, step: int, event: Event) -> None:
        series = stage.series
        for key, value in event.items():
            if key in NO_METRICS or isinstance(value, NOT_NUMBERS):
                continue
            point = (step, float(value) if value is not None and math.isfinite(value) else None)
            if key in series:
                series[key].append(point)
            else:
                series[key] = [point]

    def _on_checkpoint(self, event: Event) -> None:
        self.stage(str(event.get("stage", ""))).checkpoints.append(_count(event["step"]))

    def _on_artefact(self, event: Event) -> None:
        _count(event.get("bytes"))
        _finite(_mapping(event.get("check")).get("token_agreement"))
        if len(self.artefacts) < MAX_ARTEFACTS:
            self.artefacts[str(event.get("what", ""))] = event

    def _on_gpu(self, event: Event) -> None:
        self._told_pauses(event)
        self.gpu.append(event)

    def _on_notice(self, event: Event) -> None:
        self.notices.append(event)

    def _on_error(self, event: Event) -> None:
        self.errors.append(event)

    def _on_sample(self, event: Event) -> None:
        _count(event["step"]), _count(event.get("number")), _finite(event.get("seconds"))
        self.samples.append(event)

    def _on_result(self, event: Event) -> None:
        _count(event.get("prompts"))
        rates = [entry for marks in _mapping(event.get("table")).values() for entry in _mapping(marks).values()]
        for entry in [*rates, *_mapping(event.get("losses")).values()]:
            for key in ("hits", "total", "low", "high", "mean"):
                _finite(_mapping(entry).get(key))
        self.result = event

    def _on_stage_end(self, event: Event) -> None:
        stage = self.stage(str(event.get("name", "")))
        status = str(event.get("status", ""))  # `refit`: it starts again with a smaller micro-batch
        stage.state, stage.ended = "waiting" if status == "refit" else status, event["t"]
        stage.paused_s = self.paused_s
        stage.output = str(event.get("output") or "")
        stage.exit = str(event.get("exit") or "")

    def _on_run_end(self, event: Event) -> None:
        self.end_status, self.ended = str(event.get("status", "")), event["t"]
        self._told_pauses(event)


def _count(value: Any) -> int:
    """A whole number of a log; 0 for none. Raises TypeError for what a count cannot be."""
    if not isinstance(value, NUMBERS) or not abs(value or 0) <= 2**53:
        raise TypeError("not a count")
    return int(value or 0)


def _finite(value: Any) -> float:
    """A number of a log; 0 for none. Raises TypeError for what no number is."""
    if not isinstance(value, NUMBERS) or not math.isfinite(value or 0):
        raise TypeError("not a number")
    return float(value or 0)


def _mapping(value: Any) -> dict[str, Any]:
    """A mapping of a log; empty for none. Raises TypeError for anything else."""
    if not isinstance(value, dict | None):
        raise TypeError("not a mapping")
    return value or {}


def state_of(path: Path) -> RunState:
    """Everything the log at `path` tells, read once."""
    tail, state = EventTail(path), RunState()
    while events := tail.read():
        for event in events:
            state.fold(event)
    return state
