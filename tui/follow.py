"""Following runs from a thread: what changed on disk becomes a snapshot that no one changes any more. No widgets."""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from core.events import MAX_LINE, Event, EventTail, RunState, StageState, bytes_before, parse_line
from core.gpu import GpuSample, gpu_report
from core.notes import Note, note_mark, read_note
from core.paths import expanded, open_regular
from core.runs import Run, status
from core.text import clean

if TYPE_CHECKING:
    from core.postmortem import PostMortem

MAX_POINTS = 600
KEPT_POINTS = 4000
MAX_SAMPLES = 240
LIVE, FAILED = ("running", "stopping"), ("failed", "crashed")
GIB = 1 << 30
BREATH_LINES, BREATH_S = 1000, 0.001
BATCH_BYTES = 1_500_000
FIGURE_TYPES = (int, float)
DISK_EVERY_S = 15.0
LONG_LOG_BYTES = 500_000
Point = tuple[float, float | None]
At = TypeVar("At", bound=float)
SensorLines = dict[str, list[tuple[str, list[Point]]]]


@dataclass(frozen=True)
class Recording(Run):
    """A log without a run directory: it can be looked at and nothing else."""

    file: Path = Path()

    @property
    def name(self) -> str:
        return self.file.stem

    @property
    def events_path(self) -> Path:
        return self.file


def recording(file: Path) -> Run:
    """What lies at `file`: a run's own log is its run, any other is a recording."""
    file = expanded(file).absolute()
    if file.is_dir():
        file = file / "events.jsonl"
    if file.name == "events.jsonl" and (file.parent / "plan.yaml").is_file():
        return Run(file.parent)
    return Recording(file.parent, file)


@dataclass(frozen=True)
class Snapshot:
    """One run at one moment. `state` is a copy that the follower never touches again; its series are thinned."""

    run: Run
    status: str
    state: RunState
    phase_started: float | None
    taken: float
    """By the run's clock while it lives."""
    note: Note = Note()
    sensors: SensorLines = field(default_factory=dict)
    """By what is measured: (device, points over seconds since the start)."""
    clocks: dict[str, list[tuple[float, float | None]]] = field(default_factory=dict)
    """By stage: (step, seconds of training up to it)."""
    energy_j: float | None = None
    disk_free: int | None = None
    card: "PostMortem | None" = None
    partial: bool = False
    """A first look at a long log; the whole follows."""

    @property
    def live(self) -> bool:
        return self.status in LIVE

    @property
    def until(self) -> float:
        """The moment up to which clocks run: now while the run lives, else its last sign of life."""
        if self.live:
            return self.taken
        return self.state.ended or self.state.seen or self.taken

    @property
    def took_s(self) -> float | None:
        """Seconds since the first start, pauses left out; what is done to a run that has ended counts on its own."""
        if self.live and self.state.task_started:
            return max(0.0, self.until - self.state.task_started)
        begun = self.state.started or self.state.created
        return max(0.0, self.until - begun - self.state.paused_s) if begun else None

    @property
    def memory(self) -> str:
        """The newest sample of memory in words, empty when there is none."""
        return memory_words(self.state.gpu[-1]) if self.state.gpu else ""


class Sensors:
    """What cards and trainer used over time, folded from `gpu` events; seconds count from the first start."""

    def __init__(self) -> None:
        self.energy_j: float | None = None
        self._series: dict[tuple[str, str], list[Point]] = {}
        self._begun: float | None = None
        self._counters: dict[str, float] = {}
        self._cpu: tuple[float, float] | None = None

    def restart(self, t: float) -> None:
        """A start or resume: what the cards used in between is not this run's."""
        self._begun = self._begun or t
        self._counters, self._cpu = {}, None

    def fold(self, event: Event) -> None:
        at = max(0.0, event["t"] - (self._begun or event["t"]))
        for card in event.get("gpus") or []:
            if isinstance(card, dict):
                self._fold_card(card, at)
        if isinstance(rss := event.get("rss_bytes"), int | float):
            self._add("memory", "trainer", at, rss / GIB)
        cpu = event.get("cpu_s")
        if isinstance(cpu, int | float):
            if self._cpu and at > self._cpu[0] and cpu >= self._cpu[1]:
                self._add("utilisation", "CPU", at, 100 * (cpu - self._cpu[1]) / (at - self._cpu[0]))
            self._cpu = (at, cpu)

    def _fold_card(self, card: dict[str, Any], at: float) -> None:
        name = f"GPU {clean(card.get('index', 0), 3)}"
        for key, what, unit in CARD_SERIES:
            if isinstance(value := tame(card.get(key)), int | float):
                self._add(what, name, at, value / unit)
        counter = tame(card.get("energy_j"))
        if isinstance(counter, int | float):
            used = counter - self._counters.get(name, counter)
            self.energy_j = (self.energy_j or 0.0) + max(0.0, used)
            self._counters[name] = counter

    def _add(self, what: str, device: str, at: float, value: float) -> None:
        points = self._series.setdefault((what, device), [])
        points.append((max(at, points[-1][0]) if points else at, float(value)))
        if len(points) > KEPT_POINTS:
            self._series[what, device] = thinned(points)

    def lines(self) -> SensorLines:
        """A copy, thinned."""
        found: SensorLines = {}
        for (what, device), points in self._series.items():
            found.setdefault(what, []).append((device, thinned(points)))
        return found


CARD_SERIES = (
    ("memory_used_bytes", "memory", GIB),
    ("utilisation_percent", "utilisation", 1),
    ("temperature_c", "temperature", 1),
    ("power_w", "power", 1),
)


class Clock:
    """Seconds of training by step, the pauses between attempts left out."""

    def __init__(self) -> None:
        self._points: dict[str, list[Point]] = {}
        self._seen: float | None = None
        self._spent: dict[str, float] = {}

    def fold(self, event: Event) -> None:
        if event["kind"] == "stage_start":
            self._seen = event["t"]
        elif event["kind"] == "log" and isinstance(step := event.get("step"), int):
            stage = str(event.get("stage", ""))
            points = self._points.setdefault(stage, [])
            while points and points[-1][0] >= step:
                points.pop()  # a resumed stage logs it again
            spent = self._spent.get(stage, 0.0) + max(0.0, event["t"] - (self._seen or event["t"]))
            self._spent[stage], self._seen = spent, event["t"]
            points.append((step, spent))
            if len(points) > KEPT_POINTS:
                self._points[stage] = points[::2]

    def points(self) -> dict[str, list[Point]]:
        """A copy."""
        return {stage: list(points) for stage, points in self._points.items()}


class Follower:
    """Folds the events of one run; to be used from one thread."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._tail, self._restarts = EventTail(run.events_path), 0
        self._begin()
        self._shown: tuple[str, Any] = ("", None)
        self._copy: dict[str, Any] = {}
        self._disk: tuple[float, int | None] = (-DISK_EVERY_S, None)
        self._examined: tuple[tuple[str, int], PostMortem | None] = (("", -1), None)

    def _begin(self) -> None:
        self._state = RunState(name=self.run.name)
        self._sensors, self._clock = Sensors(), Clock()
        self._phase: tuple[str, str] = ("", "")
        self._phase_started: float | None = None

    def read(self) -> Snapshot | None:
        """What the run is now, or None where nothing has happened since the last call and nothing lives."""
        changed = self._catch_up()
        now = self._status()
        if now == "crashed" and self._catch_up():  # it ended between the two looks
            now, changed = self._status(), True
        marks = (now, note_mark(self.run.path))
        if not changed and marks == self._shown and now not in LIVE:
            return None
        self._shown = marks
        if changed or not self._copy:
            self._take_copy()
        return self._snapshot(now)

    def glance(self) -> Snapshot | None:
        """A quick look at a long log before it is read whole; None for one that is read as quickly."""
        quick = Follower(self.run)
        for event in sampled_events(self.run.events_path):
            tamed(event)
            quick._fold(event)
        if not quick._state.stages:
            return None
        quick._take_copy()
        return replace(quick._snapshot(quick._status()), partial=True)

    def _take_copy(self) -> None:
        self._copy = {
            "state": _copied(self._state), "sensors": self._sensors.lines(), "clocks": self._clock.points(),
            "energy_j": self._sensors.energy_j,
        }  # fmt: skip

    def _snapshot(self, now: str) -> Snapshot:
        note = read_note(self.run.path) or Note(self._state.note)
        mark = (now, self._tail.offset)
        if self._examined[0] != mark and now in FAILED:
            from core.postmortem import examined  # here, for hardly any run needs it

            self._examined = mark, examined(self.run, now)
        card = self._examined[1] if now in FAILED else None
        taken = self._state.now() if now in LIVE else time.time()
        return Snapshot(
            self.run, now, phase_started=self._phase_started, taken=taken, note=note, card=card,
            disk_free=self._disk_free() if now in LIVE else None, **self._copy,
        )  # fmt: skip

    def _disk_free(self) -> int | None:
        if time.monotonic() - self._disk[0] > DISK_EVERY_S:
            free = None
            with contextlib.suppress(OSError):
                free = shutil.disk_usage(self.run.path).free
            self._disk = (time.monotonic(), free)
        return self._disk[1]

    def _status(self) -> str:
        if not self.run.path.is_dir():
            return "deleted"
        if isinstance(self.run, Recording):
            return self._state.end_status or "crashed"
        return status(self.run, self._state.end_status)

    def _catch_up(self) -> bool:
        seen = False
        while (events := self._tail.read(BATCH_BYTES)) or self._tail.restarts != self._restarts:
            seen = True
            if self._tail.restarts != self._restarts:
                self._restarts = self._tail.restarts
                self._begin()
            for event in events:
                tamed(event)
                self._fold(event)
            _compacted(self._state)
            time.sleep(BREATH_S)
        return seen

    def _fold(self, event: Event) -> None:
        self._state.fold(event)
        kind = event["kind"]
        if kind == "log":
            self._clock.fold(event)
        elif kind == "gpu":
            self._sensors.fold(event)
            del self._state.gpu[:-1]
        elif kind == "run_start":
            self._sensors.restart(event["t"])
            self._phase, self._phase_started = ("", ""), None
        elif kind == "stage_start":
            self._clock.fold(event)
            self._phase, self._phase_started = (str(event.get("name")), "start"), event["t"]
        elif kind == "phase" and (phase := (str(event.get("stage")), str(event.get("name")))) != self._phase:
            self._phase, self._phase_started = phase, event["t"]


def sampled_events(path: Path) -> Iterator[Event]:
    """Every event of a long log but those of logged steps, of which only every so many; nothing of a short log."""
    with contextlib.suppress(OSError), open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        stride = size // LONG_LOG_BYTES
        for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE), b"") if stride > 1 else ()):
            if number % BREATH_LINES == 0:
                time.sleep(BREATH_S)  # the interpreter's lock goes to the keyboard
            if number % stride == 0 or b'"log"' not in line[:80]:
                if (event := parse_line(line)) is not None:
                    yield event


def _compacted(state: RunState) -> None:
    """Let go of what no screen can show of a long log; the newest points stay as they are."""
    del state.samples[MAX_SAMPLES // 4 : -MAX_SAMPLES * 3 // 4], state.notices[:-200], state.errors[:-20]
    for stage in state.stages:
        del stage.pace[:-50], stage.checkpoints[:-50]
        for name, points in stage.series.items():
            if len(points) > KEPT_POINTS:
                cut = len(points) - KEPT_POINTS // 4
                stage.series[name] = [*thinned(points[:cut], KEPT_POINTS // 2), *points[cut:]]


def tame(value: Any) -> Any:
    """A number that can be shown and computed with, else None; anything but a number as it is."""
    if isinstance(value, int | float) and not -1e15 < value < 1e15:  # NaN compares false
        return None
    return value


def tamed(event: Event) -> None:
    """Make the figures of an event from a broken or hostile log harmless; its moment becomes 0 where it is none."""
    for key, value in event.items():
        if value.__class__ in FIGURE_TYPES and not -1e15 < value < 1e15:
            event[key] = None
    if event["t"].__class__ not in FIGURE_TYPES or not 0 <= event["t"] < 1e11:
        event["t"] = 0.0


def _copied(state: RunState) -> RunState:
    """A copy that the fold of later events does not reach, no bigger than a screen can show."""
    return replace(
        state,
        stages=[_copied_stage(stage) for stage in state.stages],
        gpu=list(state.gpu[-1:]),
        notices=state.notices[-50:],
        errors=state.errors[-5:],
        samples=list(state.samples),
        artefacts=dict(state.artefacts),
    )


def _copied_stage(stage: StageState) -> StageState:
    return replace(
        stage,
        series={name: list(_two_fold(points)) for name, points in stage.series.items()},
        pace=stage.pace[-12:],
        phase_seconds=dict(stage.phase_seconds),
        checkpoints=stage.checkpoints[-20:],
        totals=dict(stage.totals),
    )


def _two_fold(points: list[tuple[int, float | None]]) -> Iterator[tuple[int, float | None]]:
    """The last quarter of a long series keeps as many points as all before it, for those who zoom in."""
    cut = len(points) - len(points) // 4 if len(points) > MAX_POINTS else 0
    for part in (points[:cut], points[cut:]):
        yield from thinned(part)


def thinned(points: Sequence[tuple[At, float | None]], limit: int = MAX_POINTS) -> list[tuple[At, float | None]]:
    """At most `limit` points: of each stretch its smallest, its largest or a gap, so that no spike and no NaN is lost.

    The newest point is always kept.
    """
    if len(points) <= limit:
        return list(points)
    kept: list[tuple[At, float | None]] = []
    width = -(-len(points) * 2 // (limit - 1))
    for start in range(0, len(points) - 1, width):
        stretch = points[start : min(start + width, len(points) - 1)]
        values = [value for _, value in stretch if value is not None]
        if len(values) < len(stretch):
            kept.append(next(point for point in stretch if point[1] is None))
        elif (low := values.index(min(values))) != (high := values.index(max(values))):
            kept += [stretch[min(low, high)], stretch[max(low, high)]]
        else:
            kept.append(stretch[low])
    kept.append(points[-1])
    return kept


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
    """What this machine trains with, for the strip on top: a line a card."""
    report = gpu_report()
    if not report.samples:
        return "No NVIDIA GPU: training runs on the CPU with the 135m model"
    return "\n".join(clean(_card_words(sample), 200) for sample in report.samples)


def _card_words(sample: GpuSample) -> str:
    name = (sample.name or "GPU").removeprefix("NVIDIA ").removeprefix("GeForce ")
    words = []
    if sample.memory_used_bytes is not None and sample.memory_total_bytes:
        filled = round(10 * max(0.0, min(1.0, sample.memory_used_bytes / sample.memory_total_bytes)))
        words.append("█" * filled + "░" * (10 - filled))
        words.append(f"{sample.memory_used_bytes / GIB:.1f} of {sample.memory_total_bytes / GIB:.0f} GiB")
    words += [f"{value:.0f} {unit}" for key, unit in SENSORS if (value := getattr(sample, key)) is not None]
    if sample.power_w is not None and sample.power_limit_w:
        words[-1] = f"{sample.power_w:.0f} of {sample.power_limit_w:.0f} W"
    return f"GPU {sample.index} {name}  {'  '.join(words) or 'no figures'}"


class LogTail:
    """The lines of a log as they come, harmless to show. Starts `backlog_bytes` before the end."""

    def __init__(self, path: Path, backlog_bytes: int = 65_536) -> None:
        self.path = path
        self.backlog_bytes = backlog_bytes
        self._offset: int | None = None
        self._known = b""

    def read(self, limit_bytes: int = 262_144) -> list[str]:
        """New whole lines. Of a line that rewrote itself (a progress bar) only the last state is kept."""
        try:
            with open_regular(self.path) as stream:
                size = os.fstat(stream.fileno()).st_size
                if self._offset is None or bytes_before(stream, self._offset) != self._known:
                    self._offset = max(0, size - self.backlog_bytes)
                stream.seek(self._offset)
                chunk = stream.read(limit_bytes)
                end = chunk.rfind(b"\n") + 1 or (len(chunk) if len(chunk) == limit_bytes else 0)
                self._offset += end
                self._known = bytes_before(stream, self._offset)
        except OSError:
            return []
        lines = chunk[:end].decode("utf-8", "replace").split("\n")
        return [clean(line.rstrip("\r").rsplit("\r", 1)[-1], 2000) for line in lines if line.strip()]
