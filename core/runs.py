"""The run directory: made, listed, found, locked, stopped, deleted; its status is computed and never stored.

A run is alive while somebody holds the operating system's lock on ``RUN/lock``. The starter takes it, the runner and
the trainer inherit it, so there is no moment between them at which a living run looks dead. Viewers probe with a shared
lock. Where there is no ``flock`` (Windows) the process id and start time written into the file decide.
"""

import contextlib
import json
import mmap
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import psutil

from core import clock
from core.checkpoints import complete_checkpoints, is_complete
from core.errors import FinetuiError
from core.event_log import NO_LINK, EventLog
from core.events import RunState, bytes_before, parse_line, state_of
from core.notes import Note, read_note
from core.paths import open_regular, writing_whole
from core.secrets import redact
from core.trust import remember_trust

if TYPE_CHECKING:  # a viewer of a thousand runs reads no plan: pydantic is a third of its start
    from core.config import Resolved
    from core.plan import Plan

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

HEAD_BYTES, TAIL_BYTES = 8192, 65_536
KEPT_POINTS = 64
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Run:
    """One run directory."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def events_path(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def log_path(self) -> Path:
        return self.path / "train.log"

    @property
    def plan_path(self) -> Path:
        return self.path / "plan.yaml"

    @property
    def lock_path(self) -> Path:
        return self.path / "lock"

    @property
    def stop_path(self) -> Path:
        """Exists while a stop with checkpoint is asked for."""
        return self.path / "stop"

    @property
    def abort_path(self) -> Path:
        """Exists while an abort is asked for."""
        return self.path / "abort"

    @cached_property
    def events(self) -> EventLog:
        return EventLog(self.events_path, clock.inherited())

    def plan(self) -> "Plan":
        """The resolved plan this run was made with, and what was asked of it later. Raises FinetuiError."""
        from core.config import load_plan, with_request

        return with_request(load_plan(self.plan_path), self.path)

    def state(self) -> RunState:
        """The run as its events tell it."""
        return state_of(self.events_path)

    def stage_path(self, stage: str) -> Path:
        return self.path / (stage if NAME.fullmatch(stage) else "no-such-stage")  # a stranger's log may say anything

    def final_model(self, stage: str) -> Path:
        return self.stage_path(stage) / "final_model"

    def trained(self, stage: str) -> bool:
        """Whether the model of a training stage is there, whole."""
        return is_complete(self.final_model(stage))

    def newest_checkpoint(self, stage: str) -> Path | None:
        """The complete checkpoint with the highest step, or None."""
        return next(iter(complete_checkpoints(self.stage_path(stage) / "checkpoints")), None)


def create_run(folder: Path, resolved: "Resolved") -> Run:
    """Make the run's directory under `folder` with its plan and its first event.

    Raises FinetuiError when the name is taken or not a plain name, or the folder cannot be written.
    """
    from core.config import save_plan

    plan = resolved.plan
    plan.note = redact(plan.note)
    if plan.name is not None and (not NAME.fullmatch(plan.name) or plan.name == "last"):
        raise FinetuiError(
            f"{plan.name[:60]!r} cannot name a run.", "Use letters, digits, '.', '_' and '-', a letter or digit first."
        )
    stamp = time.strftime("%Y%m%d-%H%M%S")
    automatic = f"{stamp}-{plan.method}-{plan.model.size or _slug(plan.model.name)}"
    path = folder / (plan.name or automatic)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for attempt in range(2, 100):
            try:
                path.mkdir(mode=0o700)
                break
            except FileExistsError:
                if plan.name:
                    raise FinetuiError(
                        f"There is a run named {plan.name} already.", "Choose another --name, or delete that run."
                    ) from None
                path = folder / f"{automatic}-{attempt}"
    except OSError as error:
        raise FinetuiError(
            f"No run can be made in {folder}: {error.strerror or error}.", "Choose another folder with --runs-dir."
        ) from error
    run = Run(path)
    try:
        save_plan(resolved, run.plan_path)
        _stand_first(run, folder)
        remember_trust(path, plan)
        run.events.append(
            "created", v=1, name=run.name, method=plan.method, model=plan.model.size or plan.model.name,
            note=plan.note, stages=plan.stages, plan=resolved.fingerprint,
        )  # fmt: skip
    except (FinetuiError, OSError) as error:
        shutil.rmtree(path, ignore_errors=True)
        if isinstance(error, OSError):
            raise FinetuiError(f"No run can be made in {folder}: {error.strerror}.", "Free some space.") from error
        raise
    return run


def _stand_first(run: Run, folder: Path) -> None:
    """Have a new run be the newest where the clock was set back since the one before: `last` means it."""
    with contextlib.suppress(OSError):  # the other may be deleted at this moment
        others = [other.plan_path.stat().st_mtime_ns for other in list_runs(folder)[:2] if other != run]
        if others and run.plan_path.stat().st_mtime_ns <= others[0]:
            os.utime(run.plan_path, ns=(others[0] + 1_000_000,) * 2)


def _slug(name: str) -> str:
    """The last part of a model's name in letters that a run name may hold."""
    last = name.rstrip("/").rsplit("/", 1)[-1]
    return re.sub(r"[^A-Za-z0-9.-]+", "-", last).strip("-.")[:40].lower() or "model"


def list_runs(folder: Path) -> list[Run]:
    """Every run under `folder`, newest first by the time its plan was written."""
    try:
        entries = [entry for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    found = []
    for entry in entries:
        path = Path(entry.path)
        with contextlib.suppress(OSError):
            plan = os.stat(path / "plan.yaml")
            found.append((plan.st_mtime_ns, path.name, path))
    return [Run(path) for _, _, path in sorted(found, reverse=True)]


def find_run(folder: Path, reference: str) -> Run:
    """The run with this name, unique prefix, or ``last``. Raises FinetuiError."""
    runs = list_runs(folder)
    if not runs:
        raise FinetuiError(f"There are no runs in {folder}.", "Start one with `finetui demo` or `finetui sft`.")
    if reference == "last":
        return runs[0]
    if not reference:
        raise FinetuiError("A run must be named.", "`finetui runs` lists them.")
    exact = [run for run in runs if run.name == reference]
    matches = exact or [run for run in runs if run.name.startswith(reference)]
    if not matches:
        raise FinetuiError(f"There is no run {reference[:80]!r} in {folder}.", "`finetui runs` lists them.")
    if len(matches) > 1:
        names = ", ".join(run.name for run in matches[:3]) + (", …" if len(matches) > 3 else "")
        raise FinetuiError(f"{reference!r} fits {len(matches)} runs: {names}.", "Give more of the name.")
    return matches[0]


def take_lock(run: Run, patience_s: float = 3.0) -> int:
    """Lock the run for a new runner and return the file descriptor; closing every copy of it releases the lock.

    `patience_s` outlasts viewers that probe at the same moment. Raises FinetuiError when the run is alive.
    """
    refused = FinetuiError(f"{run.name} is running already.", f"Watch it with `finetui watch {run.name}`.")
    try:
        handle = os.open(run.lock_path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | NO_LINK, 0o600)
    except OSError as error:
        raise FinetuiError(f"{run.lock_path} cannot be opened: {error.strerror}.", "Check its permissions.") from error
    if fcntl is None:
        if _holder_lives(run):
            os.close(handle)
            raise refused
        return handle
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except OSError:
            if time.monotonic() > deadline:
                os.close(handle)
                raise refused from None
            time.sleep(0.005)


def write_holder(handle: int) -> None:
    """Put this process's id and start time into the lock file, for people and for systems without ``flock``."""
    me = psutil.Process()
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
    os.write(handle, json.dumps({"pid": me.pid, "started": started_at(me.pid)}).encode())


def _holder_lives(run: Run) -> bool:
    try:
        holder = json.loads(run.lock_path.read_text())
        return process_lives(holder["pid"], holder["started"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def start_clock(run: Run) -> float:
    """Have this process, its runner, write by the run's clock: one that never stands before what was written.

    Returns the seconds that the run has paused, if it starts now.
    """
    state, newest = RunState(), 0.0
    for event in head_and_tail(run.events_path, TAIL_BYTES):
        state.fold(event)
        newest = max(newest, event["t"])
    run.events.zero = clock.started(newest)
    return round(state.paused_until(clock.moment(run.events.zero)), 3)


def started_at(pid: int) -> float:
    """When a process started, as a number that setting the clock does not change: on Linux in seconds since the machine
    did, for the time of day of that is reckoned anew from each clock. Raises psutil.Error."""
    try:
        facts = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return round(int(facts[19]) / os.sysconf("SC_CLK_TCK"), 2)
    except (OSError, ValueError, IndexError, AttributeError):
        return psutil.Process(pid).create_time()


def process_lives(pid: int | None, started: float | None) -> bool:
    """Whether the process with this id is the one that started then: process ids are used again."""
    if not pid or started is None:
        return False
    try:
        process = psutil.Process(pid)
        of_day = started > 1e9  # as earlier versions wrote it
        same = abs(process.create_time() - started) < 2 if of_day else abs(started_at(pid) - started) < 0.05
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def is_alive(run: Run) -> bool:
    """Whether a runner or trainer of this run lives; asked with a shared lock: viewers never mislead each other."""
    if fcntl is None:
        return _holder_lives(run)
    try:
        handle = os.open(run.lock_path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks, some NFS
        return _holder_lives(run)
    finally:
        os.close(handle)


def status(run: Run, end_status: str | None) -> str:
    """running, stopping, done, failed, stopped, aborted or crashed; `end_status` is what the log ends with, or None."""
    if is_alive(run):
        return "stopping" if run.stop_path.exists() or run.abort_path.exists() else "running"
    return end_status or "crashed"


def request_stop(run: Run) -> None:
    """Ask a living run to save a checkpoint at the next step and end as ``stopped``. Raises FinetuiError."""
    _request(run, run.stop_path)


def request_abort(run: Run) -> None:
    """Ask a living run to end now, without a new checkpoint. Raises FinetuiError."""
    _request(run, run.abort_path)


def _request(run: Run, path: Path) -> None:
    if not is_alive(run):
        raise FinetuiError(f"{run.name} is not running.", "`finetui runs` shows what is.")
    with writing_whole(path) as stream:
        stream.write("")


def delete_run(run: Run) -> None:
    """Remove the run's directory. Raises FinetuiError for a living run."""
    handle = take_lock(run, patience_s=0.3)
    try:
        if run.path.is_symlink():
            raise FinetuiError(f"{run.name} is a link to another place.", "Remove the link by hand.")
        shutil.rmtree(run.path)
    except OSError as error:
        raise FinetuiError(f"{run.name} cannot be deleted: {error.strerror}.", "Check its permissions.") from error
    finally:
        os.close(handle)


def summary(run: Run, tail_bytes: int = TAIL_BYTES) -> dict[str, Any]:
    """What the history shows of a run, from the head and the tail of its log: cheap for a thousand runs.

    Keys: name, status, method, model, note, pinned, created, started (unix seconds or None), duration_s, stage, step,
    total_steps (0 where the tail does not tell), left_s (of the stage that runs, or None), loss, margin.
    """
    return Digest(run, tail_bytes).read()


class Digest:
    """The summary of a run, kept up with its log: first its two ends are read, then what is new. It stays small."""

    def __init__(self, run: Run, tail_bytes: int = TAIL_BYTES) -> None:
        self.run, self.tail_bytes = run, tail_bytes
        self._state, self._offset, self._known = RunState(name=run.name), 0, b""
        self._before: dict[str, float] = {}

    def read(self) -> dict[str, Any]:
        """The run as it is now; keys as `summary` gives them."""
        self._catch_up()
        run, state = self.run, self._state
        if state.end_status is None and not is_alive(run) and (end := _last_end(run.events_path)):
            state.fold(end)
        current = state.current
        now = status(run, state.end_status)
        live = now in ("running", "stopping")
        begun = (state.task_started if live else None) or state.started or state.created
        until = state.now() if live else state.ended or state.seen
        note = read_note(run.path) or Note(state.note)
        return {
            "name": run.name,
            "status": now,
            "method": state.method,
            "model": state.model,
            "note": note.text,
            "pinned": note.pinned,
            "created": state.created,
            "started": state.started,
            "duration_s": round(max(0.0, until - begun - state.paused_s), 1) if begun and until else None,
            "stage": current.name if current else None,
            "step": current.step if current else 0,
            "total_steps": current.total_steps if current else 0,
            "left_s": round(current.eta_s, 1) if live and current and current.eta_s is not None else None,
            "loss": self._before.get("loss", state.last("loss")),
            "margin": self._before.get("rewards/margins", state.last("rewards/margins")),
        }

    def _catch_up(self) -> None:
        """Fold what the log tells since the last call; where that is much, or it is another log, its two ends anew."""
        try:
            with open_regular(self.run.events_path) as stream:
                size = os.fstat(stream.fileno()).st_size
                same = self._offset and bytes_before(stream, self._offset) == self._known
                if same and 0 <= size - self._offset <= self.tail_bytes:
                    stream.seek(self._offset)
                    new = stream.read(size - self._offset)
                else:
                    self._state, self._before = RunState(name=self.run.name), {}
                    new = _ends(stream, size, self.tail_bytes)
                whole = new.rfind(b"\n") + 1  # a line still being written waits for the next call
                self._offset = size - len(new) + whole
                self._known = bytes_before(stream, self._offset)
        except OSError:
            return
        for line in new[:whole].splitlines():
            if (event := parse_line(line)) is not None:
                self._fold(event)
        self._state.forget(KEPT_POINTS)

    def _fold(self, event: dict[str, Any]) -> None:
        """Where a run resumes further back than what is kept of it, its last figures stay until it logs again."""
        before = {key: self._state.last(key) for key in ("loss", "rewards/margins")} if "resumed_step" in event else {}
        self._state.fold(event)
        if event.get("kind") == "log":
            self._before = {}
        stage = self._state.current
        for key, value in before.items():
            if value is not None and stage and stage.last(key) is None:
                self._before[key] = value


def _last_end(path: Path) -> dict[str, Any] | None:
    """The `run_end` of a log whose tail tells only of what was done to the run later; None where it has none."""
    with contextlib.suppress(OSError, ValueError), _mapped(path) as log:
        at = log.rfind(b'"kind":"run_end"')
        if at > log.rfind(b'"kind":"run_start"'):
            return _event_at(log, at)
    return None


def last_start(run: Run) -> dict[str, Any] | None:
    """The newest `run_start` of a run, however long its log; None where there is none."""
    with contextlib.suppress(OSError, ValueError), _mapped(run.events_path) as log:
        if (at := log.rfind(b'"kind":"run_start"')) >= 0:
            return _event_at(log, at)
    return None


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    with open_regular(path) as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as log:
        yield log


def _event_at(log: mmap.mmap, at: int) -> dict[str, Any] | None:
    return parse_line(log[log.rfind(b"\n", 0, at) + 1 : log.find(b"\n", at)])


def head_and_tail(path: Path, tail_bytes: int) -> Iterator[dict[str, Any]]:
    """Events of the log's head and tail; the middle of a long log is passed over."""
    try:
        with open_regular(path) as stream:
            log = _ends(stream, os.fstat(stream.fileno()).st_size, tail_bytes)
    except OSError:
        return
    for line in log.splitlines():
        if (event := parse_line(line)) is not None:
            yield event


def _ends(stream: IO[bytes], size: int, tail_bytes: int) -> bytes:
    """The head and the tail of a log of `size` bytes, cut at the ends of lines; all of a short one."""
    stream.seek(0)
    if size <= tail_bytes + HEAD_BYTES:
        return stream.read(size)
    head = stream.read(HEAD_BYTES)
    stream.seek(size - tail_bytes)
    return head[: head.rfind(b"\n") + 1] + stream.read(tail_bytes).partition(b"\n")[2]
