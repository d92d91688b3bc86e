"""The detached supervisor of one run: walks its stages, samples the GPU, records how each child ended.

It runs in a session of its own, so that no terminal's end reaches it; each stage is a fresh interpreter, so that GPU
memory is really freed in between. It imports no torch. Start one with `start`; the module itself is the process.
"""

import contextlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any

import psutil

from core import __version__, clock, gpu
from core.artefacts import output_of, stage_done
from core.children import LOCK_ENV, ON_END_ENV, child_environment, runner_environment, stage_environment
from core.errors import FinetuiError
from core.machine_use import changed_software, code, oom_kills, system, versions
from core.paths import TORN, last_lines, remove_torn
from core.runs import (
    Run,
    create_run,
    find_run,
    is_alive,
    last_start,
    process_lives,
    start_clock,
    started_at,
    take_lock,
    write_holder,
)
from core.secrets import guard_output
from core.stages import EXPORT_STAGES, TRAINING_STAGES
from core.trust import refuse_strangers
from core.turns import device_of, holder, take_turn

if TYPE_CHECKING:
    from core.plan import Plan
    from core.ready import Ready, ReadyTrainer

EXIT_STOPPED = 75
EXIT_REFIT = 76
"""The trainer found that fewer rows fit at once, kept that with the run, and wants to be started again."""
MODULES = {"evaluate": "core.evaluate", **dict.fromkeys(EXPORT_STAGES, "core.export")}
POLL_S = 0.2
LAST_WORDS_BYTES = 1 << 20
"""Of free disk, below which no samples are written: what is left is for how the run ends."""
SAMPLE_S = 5.0
ABORT_GRACE_S = 15.0
_started: list[subprocess.Popen[bytes]] = []

__all__ = ["abort", "create_run", "find_run", "resume", "start"]


def start(run: Run, *task: str, ready: "Ready | None" = None) -> int:
    """Start the runner of `run` in a session of its own and return its process id.

    With `task`, ``"evaluate", NAME``, it does that alone, to a run that has ended, and leaves the run's end as it was.
    The lock is taken here and inherited. A runner that is `ready` becomes this run's if it can.
    Raises FinetuiError when the run is alive already.
    """
    refuse_strangers(run.path, run.plan)
    handle = take_lock(run)
    try:
        for request in (run.stop_path, run.abort_path):
            request.unlink(missing_ok=True)
        with run.log_path.open("ab") as log:
            if ready and ready.start(str(run.path), stage_environment(run.plan()), [handle, log.fileno()]):
                process = ready.process
            else:
                command = [sys.executable, "-P", "-m", "core.runner", str(run.path), *task]
                process = _spawn(command, run.path, log, handle, runner_environment())
    except OSError as error:
        raise FinetuiError(f"The runner of {run.name} cannot be started: {error}.", "Check disk and memory.") from error
    finally:
        os.close(handle)
    _started[:] = [one for one in _started if one.poll() is None] + [process]
    return process.pid


def resume(run: Run) -> int:
    """Start a run again that is not alive and not done. Raises FinetuiError."""
    if is_alive(run):
        stopping = run.stop_path.exists() or run.abort_path.exists()
        words = "is stopping: it can be resumed once it has ended" if stopping else "is running already"
        raise FinetuiError(f"{run.name} {words}.", f"Watch it with `finetui watch {run.name}`.")
    plan = run.plan()
    # A runner that was killed after its last stage has left all but the word that it is done.
    if run.state().end_status == "done" and all(stage_done(run, stage) for stage in plan.stages):
        raise FinetuiError(f"{run.name} is done: nothing is left to resume.", f"See `finetui show {run.name}`.")
    return start(run)


def abort(run: Run) -> None:
    """End a run now. Where the runner itself is gone, its trainer's process group is ended from here."""
    from core.runs import request_abort

    request_abort(run)
    state = run.state()
    if not process_lives(state.start.get("pid"), state.start.get("pid_started")):
        stage = state.current
        if stage and process_lives(stage.pid, stage.pid_started) and stage.pid:
            _end_group(stage.pid)
        kind, run.events.zero = "task_end" if state.task else "run_end", clock.zero_told(state.start)
        run.events.append(kind, status="aborted", text="the runner was gone; its trainer was ended")


def _spawn(
    command: Sequence[str], folder: Path, log: IO[bytes], handle: int, environment: dict[str, str],
    turn: int | None = None,
) -> subprocess.Popen[bytes]:  # fmt: skip
    environment = {**environment, LOCK_ENV: str(handle)}
    folder.mkdir(parents=True, exist_ok=True)
    if os.name == "nt":
        flags = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0) | getattr(subprocess, "CREATE_NO_WINDOW", 0)
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, creationflags=flags
        )
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        start_new_session=True, pass_fds=(handle,) if turn is None else (handle, turn),
    )  # fmt: skip


def _end_group(pid: int, reap: Callable[[], object] = bool) -> None:
    """End a trainer's process group: ask, wait, kill. `reap` is called while waiting, by the trainer's parent."""
    if os.name == "nt":
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(pid).children(recursive=True)
            for process in [*children, psutil.Process(pid)]:
                process.kill()
        return
    for number, patience in ((signal.SIGTERM, ABORT_GRACE_S), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, number)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            reap()
            try:
                os.killpg(pid, 0)
            except (ProcessLookupError, PermissionError):
                return
            time.sleep(0.05)


class Runner:
    """Walks the stages of one run; `walk` returns when the run has ended."""

    def __init__(
        self, run: Run, plan: "Plan", lock: int, task: Sequence[str] = (), ready: "ReadyTrainer | None" = None
    ) -> None:
        self.run, self.plan, self.lock, self.task, self.ready = run, plan, lock, task, ready
        self.sampler = gpu.Sampler()
        self.next_sample = 0.0
        self.turn: int | None = None
        self.software: dict[str, Any] = {}
        self.paused: dict[str, float] = {}

    def stop_asked(self, *_: object) -> bool:
        return self.run.stop_path.exists()

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """SIGTERM (a shutdown, `docker stop`) is a wish to stop with a checkpoint."""
        with contextlib.suppress(OSError):
            self.run.stop_path.touch()

    def walk(self) -> int:
        """Run every stage that is not done yet. Returns the exit code of the run: 0 done or stopped, 1 failed."""
        if self.task:
            return self._do_task()
        self.run.events.keep_reserve()
        self.paused = {"paused_s": start_clock(self.run)}
        fresh = not any(self.run.stage_path(stage).exists() for stage in self.plan.stages)
        before = {} if fresh else last_start(self.run) or {}
        self.software = {
            "version": __version__, "python": sys.version.split()[0], "versions": versions(), "code": code()
        }  # fmt: skip
        self.run.events.append(
            "run_start", **self.software, **self._started_with(), **self.paused, resumed=not fresh,
            system=system(),
        )  # fmt: skip
        self._tell_changes(before)
        if self._needs_device() and (ended := self._take_turn()):
            return self._end(ended)
        self._foretell()
        while stage := next((stage for stage in self.plan.stages if not stage_done(self.run, stage)), ""):
            if self.run.abort_path.exists():
                return self._end("aborted")
            if self.stop_asked():
                return self._end("stopped")
            self.look_again()
            index = self.plan.stages.index(stage)
            trained = [name for name in self.plan.stages[:index] if name in TRAINING_STAGES]
            outcome = self._stage(index, stage, trained[-1] if trained else "")
            if outcome != "done":
                return self._end(outcome)
            self._look_for_wishes()
        return self._end("done")

    def _started_with(self) -> dict[str, Any]:
        """What tells this process and the run's clock from those of other starts."""
        return {
            "host": platform.node(), "pid": os.getpid(), "pid_started": started_at(os.getpid()),
            "boot": clock.boot_id(), "clock": self.run.events.zero,
        }  # fmt: skip

    def _tell_changes(self, before: dict[str, Any]) -> None:
        """Say what of the software is not what it was when this run was last started."""
        if changed := changed_software(before, self.software):
            text = f"Changed since this run was last started: {', '.join(changed)}."
            advice = "Losses may differ a little from an unbroken run's."
            self.run.events.append("notice", stage="", level="warning", text=text, advice=advice)

    def look_again(self) -> None:
        """A stage is a process of its own: what was upgraded meanwhile is what the next one trains with."""
        before, self.software = self.software, {**self.software, "versions": versions(), "code": code()}
        self._tell_changes(before)

    def _look_for_wishes(self) -> None:
        """What was asked of the run since it started joins the stages that are still ahead."""
        with contextlib.suppress(FinetuiError, OSError):
            self.plan.export = self.run.plan().export

    def _foretell(self) -> None:
        """Say how long the stages ahead will take, as far as earlier runs and sizes tell it."""
        from core.outlook import expected_examples, expected_seconds

        with contextlib.suppress(FinetuiError, OSError, ValueError):
            expected = expected_seconds(self.run, self.plan)
            examples = expected_examples(self.run, self.plan, known=expected)
            if expected or examples:
                self.run.events.append("expected", seconds=expected, examples=examples)

    def _needs_device(self) -> bool:
        """Whether a stage is ahead that fills the device: what is made of a result can share it."""
        return any(stage not in EXPORT_STAGES and not stage_done(self.run, stage) for stage in self.plan.stages)

    def _do_task(self) -> int:
        """Do one thing to a run that has ended, then what was asked of its result meanwhile. Returns as `walk`."""
        name, *rest = self.task
        start_clock(self.run)
        self.run.events.append("task_start", name=name, of=rest, **self._started_with())
        before = self.plan.export
        outcome = self._take_turn() or self._stage(len(self.plan.stages), name, "", rest)
        code = self._end(outcome, "task_end")
        self._look_for_wishes()
        trained = all(stage_done(self.run, stage) for stage in self.plan.training_stages)
        if outcome in ("stopped", "aborted") or not trained or self.plan.export == before:
            return code
        self.task = ()
        return max(code, self.walk())

    def _take_turn(self) -> str:
        """Take the device, waiting for it where the plan says so; the status where the run was ended meanwhile."""
        device, told = device_of(self.plan), None
        while (turn := self._ask_turn(device)) is None:
            other = holder(device)
            if not self.plan.wait_gpu:
                if device != "cpu":
                    text = f"{other or 'Another run'} trains on this GPU too: both are slower, and share its memory."
                    self.run.events.append("notice", stage="", level="warning", text=text, advice="See --wait-gpu.")
                return ""
            if other != told:
                self.run.events.append("waiting", device=device, holder=other)
                told = other
            if self.run.abort_path.exists():
                return "aborted"
            if self.stop_asked():
                return "stopped"
            time.sleep(POLL_S)
        self.turn = turn if turn >= 0 else None
        return ""

    def _ask_turn(self, device: str) -> int | None:
        """As `take_turn`; -1 where no lock can be made, for that shall keep nobody from training."""
        try:
            return take_turn(device, self.run.name)
        except OSError:
            return -1

    def _end(self, status: str, kind: str = "run_end") -> int:
        self.run.events.append(kind, status=status, **self.paused)
        for request in (self.run.stop_path, self.run.abort_path):
            request.unlink(missing_ok=True)
        return 1 if status == "failed" else 0

    def _stage(self, index: int, stage: str, base: str, of: Sequence[str] = ()) -> str:
        module = "core.train" if stage in TRAINING_STAGES else MODULES[stage]
        more = of if stage == "evaluate" else [base] if base and stage in TRAINING_STAGES else []
        command = [sys.executable, "-P", "-m", module, str(self.run.path), stage, *more]
        position = self.run.log_path.stat().st_size if self.run.log_path.exists() else 0
        child, ready = self._child(command, self.run.stage_path(stage))
        begun = {"pid": child.pid, "pid_started": _created(child.pid)}
        try:
            self.run.events.append("stage_start", index=index, name=stage, base=base, **begun)
        except OSError:
            _end_group(child.pid, child.poll)
            raise
        kills = oom_kills()
        aborted = self._follow(child)
        code = child.returncode
        if ready and not aborted and not ready.took():  # it died of something at an import: now the log will tell
            return self._stage(index, stage, base, of)
        if code == EXIT_REFIT and not aborted:
            self.run.events.append("stage_end", index=index, name=stage, status="refit", exit=_exit_words(code))
            return "stopped" if self.stop_asked() else self._stage(index, stage, base)
        ended = code in (EXIT_STOPPED, -signal.SIGTERM)  # before the trainer hears it, SIGTERM means the same
        status = "aborted" if aborted else "stopped" if ended else "failed"
        if code == 0 and not aborted:
            status = "done" if of or stage_done(self.run, stage) else "failed"
        output = output_of(self.run, stage)
        self.run.events.append(
            "stage_end", index=index, name=stage, status=status, exit=_exit_words(code), exit_code=code,
            output=str(output.relative_to(self.run.path)) if status == "done" else None,
            log_tail=self._log_tail(position) if status == "failed" else None,
            oom_kills=oom_kills() - kills if status == "failed" else None,
        )  # fmt: skip
        if status == "failed" and code < 0:
            self._explain_signal(stage, -code)
        return status

    def _child(self, command: Sequence[str], folder: Path) -> tuple[subprocess.Popen[bytes], "ReadyTrainer | None"]:
        """A stage's process: the trainer in waiting, told beside it, or a new one."""
        ready, self.ready = self.ready, None
        with self.run.log_path.open("ab") as log:
            files = [log.fileno(), self.lock, *([] if self.turn is None else [self.turn])]
            time_kept = {clock.CLOCK_ENV: str(self.run.events.zero)}
            if ready and "core.train" in command:
                folder.mkdir(parents=True, exist_ok=True)
                if child := ready.take(command[4:], str(folder), files, time_kept):
                    return child, ready
            environment = {**child_environment(), **stage_environment(self.plan), **time_kept}
            return _spawn(command, folder, log, self.lock, environment, self.turn), None

    def _follow(self, child: subprocess.Popen[bytes]) -> bool:
        """Wait for the child, sampling; True when it was ended on request."""
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(POLL_S)
                return False
            if self.run.abort_path.exists():
                _end_group(child.pid, child.poll)
                child.wait()
                return True
            if time.monotonic() >= self.next_sample:
                self.next_sample = time.monotonic() + SAMPLE_S
                self._sample(child.pid)

    def _sample(self, pid: int) -> None:
        samples = self.sampler.sample([pid], gpu.visible_card(self.plan.gpu))
        fields = gpu.sample_as_event(samples, [pid]) if samples else {}
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            fields |= {"rss_bytes": process.memory_info().rss, "cpu_s": round(sum(process.cpu_times()[:2]), 1)}
        fields["ram_available_bytes"] = psutil.virtual_memory().available
        with contextlib.suppress(OSError):  # a full disk, a folder that was deleted: the trainer's end tells of it
            if shutil.disk_usage(self.run.path).free > LAST_WORDS_BYTES:
                self.run.events.append("gpu", **fields, **self.paused)

    def _explain_signal(self, stage: str, number: int) -> None:
        advice = f"`finetui resume {self.run.name}` goes on from the newest checkpoint."
        if number == getattr(signal, "SIGKILL", 9):
            if stage not in EXPORT_STAGES:
                length = "" if stage == "evaluate" else f" or {stage}.max_length"
                advice = f"If memory ran out, lower {stage}.batch_size{length}. {advice}"
        if self.task:
            advice = "What it had done is kept: start it again and it goes on."
        self.run.events.append(
            "error", stage=stage, type="Killed", advice=advice,
            message=f"The trainer was ended by {_exit_words(-number)}.",
        )  # fmt: skip

    def _log_tail(self, position: int, lines: int = 20) -> str:
        """The last lines this stage wrote to the log."""
        try:
            return "\n".join(deque(last_lines(self.run.log_path, 20_000, position).splitlines(), lines))
        except OSError:
            return ""


def _created(pid: int) -> float | None:
    with contextlib.suppress(psutil.Error):
        return started_at(pid)
    return None


def _exit_words(code: int) -> str:
    """An exit code for people: ``exit 1`` or ``SIGKILL``."""
    if code >= 0:
        return f"exit {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"


def main() -> int:
    """The runner's process: ``python -P -m core.runner RUN``, its lock inherited, or ``--ready`` to be given both."""
    ready = None
    if sys.argv[1:] == ["--ready"]:
        from core.ready import ReadyTrainer, await_run

        ready = ReadyTrainer()
        if not await_run():
            ready.end()
            return 0
    guard_output()
    run = Run(Path(sys.argv[1]))
    inherited = os.environ.pop(LOCK_ENV, None)
    on_end = os.environ.pop(ON_END_ENV, "")
    lock = int(inherited) if inherited else take_lock(run)
    write_holder(lock)
    for name in ("SIGHUP", "SIGINT"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    remove_torn(run.path.rglob(f".*{TORN}"))
    try:
        runner = Runner(run, run.plan(), lock, sys.argv[2:], ready)
        if hasattr(signal, "SIGTERM"):
            signal.signal(signal.SIGTERM, runner.on_signal)
        return runner.walk()
    except Exception as error:
        advice = error.advice if isinstance(error, FinetuiError) else "See train.log."
        with contextlib.suppress(OSError):
            run.events.append("error", stage="", type=type(error).__name__, message=str(error), advice=advice)
            run.events.append("task_end" if run.state().task else "run_end", status="failed")
        raise
    finally:
        if ready:
            ready.end()
        os.close(lock)  # what is started now finds the run ended
        if on_end:
            tell_end(run, on_end)


def tell_end(run: Run, command: str) -> None:
    """Start the person's shell command in a session of its own; what it prints goes to the run's log."""
    told = {"FINETUI_RUN": str(run.path), "FINETUI_STATUS": run.state().end_status or "failed"}
    with contextlib.suppress(OSError), run.log_path.open("ab") as log:
        subprocess.Popen(
            command, shell=True, cwd=run.path, env={**os.environ, **told}, stdin=subprocess.DEVNULL, stdout=log,
            stderr=log, start_new_session=os.name != "nt",
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
