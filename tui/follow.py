"""Following runs from a thread: what changed on disk becomes a snapshot that no one changes any more. No widgets."""

import contextlib
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core.events import Event, EventTail, RunState, StageState
from core.gpu import GpuSample, gpu_report
from core.runs import Run, is_alive, list_runs, status, summary
from core.text import clean

MAX_POINTS = 600
LIVE = ("running", "stopping")
GIB = 1 << 30
Point = tuple[int, float | None]


@dataclass(frozen=True)
class Snapshot:
    """One run at one moment. `state` is a copy that the follower never touches again; its series are thinned."""

    run: Run
    status: str
    state: RunState
    phase_started: float | None
    taken: float

    @property
    def live(self) -> bool:
        return self.status in LIVE

    @property
    def until(self) -> float:
        """The moment up to which clocks run: now while the run lives, else its last sign of life."""
        if self.live:
            return self.taken
        ends = [stage.ended or 0 for stage in self.state.stages] + [self.state.ended or 0]
        return max(ends) or self.phase_started or self.taken

    @property
    def took_s(self) -> float | None:
        """Seconds since the first start."""
        begun = self.state.started or self.state.created
        return max(0.0, self.until - begun) if begun else None

    @property
    def memory(self) -> str:
        """The newest sample of memory in words, empty when there is none."""
        return memory_words(self.state.gpu[-1]) if self.state.gpu else ""


class Follower:
    """Folds the events of one run; to be used from one thread."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._tail = EventTail(run.events_path)
        self._state = RunState(name=run.name)
        self._phase: tuple[str, str] = ("", "")
        self._phase_started: float | None = None
        self._shown = ""

    def read(self) -> Snapshot | None:
        """What the run is now, or None where nothing has happened since the last call and nothing lives."""
        changed = self._catch_up()
        now = self._status()
        if now == "crashed" and self._catch_up():  # it ended between the two looks
            now, changed = self._status(), True
        if not changed and now == self._shown and now not in LIVE:
            return None
        self._shown = now
        return Snapshot(self.run, now, _copied(self._state), self._phase_started, time.time())

    def _status(self) -> str:
        if not self.run.path.is_dir():
            return "deleted"
        return status(self.run, self._state.end_status)

    def _catch_up(self) -> bool:
        seen = False
        while events := self._tail.read():
            seen = True
            for event in events:
                tamed(event)
                self._state.fold(event)
                self._note_phase(event)
        return seen

    def _note_phase(self, event: Event) -> None:
        kind = event["kind"]
        if kind == "stage_start":
            self._phase, self._phase_started = (str(event.get("name")), "start"), event["t"]
        elif kind == "phase" and (phase := (str(event.get("stage")), str(event.get("name")))) != self._phase:
            self._phase, self._phase_started = phase, event["t"]


def tame(value: Any) -> Any:
    """A number that can be shown and computed with, else None; anything but a number as it is."""
    if isinstance(value, int | float) and not -1e15 < value < 1e15:  # NaN compares false
        return None
    return value


def tamed(event: Event) -> None:
    """Make the figures of an event from a broken or hostile log harmless; its moment becomes 0 where it is none."""
    for key, value in event.items():
        event[key] = tame(value)
    if not isinstance(event["t"], int | float) or not 0 <= event["t"] < 1e11:
        event["t"] = 0.0


def _copied(state: RunState) -> RunState:
    """A copy that the fold of later events does not reach, no bigger than a screen can show."""
    return replace(
        state,
        stages=[_copied_stage(stage) for stage in state.stages],
        gpu=state.gpu[-1:],
        notices=state.notices[-50:],
        errors=state.errors[-5:],
        samples=[],
    )


def _copied_stage(stage: StageState) -> StageState:
    return replace(
        stage,
        series={name: thinned(points) for name, points in stage.series.items()},
        pace=stage.pace[-12:],
        phase_seconds=dict(stage.phase_seconds),
        checkpoints=stage.checkpoints[-20:],
        totals=dict(stage.totals),
    )


def thinned(points: list[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` points: of each stretch its smallest, its largest or a gap, so that no spike and no NaN is lost.

    The newest point is always kept.
    """
    if len(points) <= limit:
        return list(points)
    kept: list[Point] = []
    width = -(-len(points) * 2 // (limit - 1))
    for start in range(0, len(points) - 1, width):
        stretch = points[start : min(start + width, len(points) - 1)]
        gap = next((point for point in stretch if point[1] is None), None)
        low = min(stretch, key=lambda point: point[1] if point[1] is not None else 0)
        high = max(stretch, key=lambda point: point[1] if point[1] is not None else 0)
        kept += [gap] if gap else sorted({low, high}, key=lambda point: point[0])
    return [*kept, points[-1]]


def memory_words(event: Event) -> str:
    """Memory of a `gpu` event: each card's, else the trainer's own."""
    parts = []
    for card in event.get("gpus") or []:
        if not isinstance(card, dict):
            continue
        used, total = card.get("memory_used_bytes"), card.get("memory_total_bytes")
        words = []
        if isinstance(used, int) and isinstance(total, int):
            words.append(f"{used / GIB:.1f} of {total / GIB:.1f} GiB")
        words += [f"{card[key]:.0f} {unit}" for key, unit in SENSORS if isinstance(card.get(key), int | float)]
        parts.append(f"GPU {card.get('index', 0)}: {', '.join(words) or 'no figures'}")
    if isinstance(rss := event.get("rss_bytes"), int | float):
        parts.append(f"trainer {rss / GIB:.2f} GiB")
    if isinstance(free := event.get("ram_available_bytes"), int | float):
        parts.append(f"{free / GIB:.1f} GiB RAM free")
    return clean(", ".join(parts), 200)


SENSORS = (("utilisation_percent", "%"), ("temperature_c", "°C"), ("power_w", "W"))


def machine_words() -> str:
    """What this machine trains with, for the strip on top."""
    report = gpu_report()
    if not report.samples:
        return "No NVIDIA GPU: training runs on the CPU with the 135m model"
    return clean("   ".join(_card_words(sample) for sample in report.samples), 300)


def _card_words(sample: GpuSample) -> str:
    name = (sample.name or "GPU").removeprefix("NVIDIA ").removeprefix("GeForce ")
    words = []
    if sample.memory_used_bytes is not None and sample.memory_total_bytes:
        words.append(f"{sample.memory_used_bytes / GIB:.1f} of {sample.memory_total_bytes / GIB:.0f} GiB")
    words += [f"{value:.0f} {unit}" for key, unit in SENSORS if (value := getattr(sample, key)) is not None]
    return f"GPU {sample.index} {name}: {', '.join(words) or 'no figures'}"


class History:
    """The runs of a folder; what has not changed is not read again. To be used from one thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {}

    def read(self) -> list[dict[str, Any]]:
        """A summary of each run, newest first."""
        known, self._known = self._known, {}
        found = []
        for run in list_runs(self.folder):
            mark = _mark(run.events_path)
            before = known.get(run.name)
            if before and before[0] == mark and before[1]["status"] not in LIVE and not is_alive(run):
                row = before[1]
            else:
                row = {key: tame(value) for key, value in summary(run).items()}
                row["started"] = row["started"] if row["started"] and 0 < row["started"] < 1e11 else None
            self._known[run.name] = (mark, row)
            found.append(row)
        return found


def _mark(path: Path) -> tuple[int, int]:
    with contextlib.suppress(OSError):
        found = path.stat()
        return found.st_mtime_ns, found.st_size
    return 0, 0


class LogTail:
    """The lines of a log as they come, harmless to show. Starts `backlog_bytes` before the end."""

    def __init__(self, path: Path, backlog_bytes: int = 65_536) -> None:
        self.path = path
        self.backlog_bytes = backlog_bytes
        self._offset: int | None = None

    def read(self, limit_bytes: int = 262_144) -> list[str]:
        """New whole lines. Of a line that rewrote itself (a progress bar) only the last state is kept."""
        try:
            with self.path.open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                if self._offset is None or size < self._offset:
                    self._offset = max(0, size - self.backlog_bytes)
                stream.seek(self._offset)
                chunk = stream.read(limit_bytes)
        except OSError:
            return []
        end = chunk.rfind(b"\n") + 1 or (len(chunk) if len(chunk) == limit_bytes else 0)
        self._offset += end
        lines = chunk[:end].decode("utf-8", "replace").split("\n")
        return [clean(line.rstrip("\r").rsplit("\r", 1)[-1], 2000) for line in lines if line.strip()]
