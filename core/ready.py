"""A trainer that has imported everything before its run is known: it gets ready while a person reads the review.

Two processes, as a run needs them: a runner in a session of its own and its trainer, which imports what its backend
needs and waits. The run and its open files reach them over sockets (`SCM_RIGHTS`), so not on Windows. Whoever made them
ready goes away or changes its mind: so do they. Without them, or where they fail, a run starts as it always does.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

from core.children import LOCK_ENV, child_environment, runner_environment, stage_environment
from core.plan import Plan
from core.stages import TRAINING_STAGES
from core.turns import device_of, in_use

WORTH_BYTES = 4 << 30
"""Free memory from which on a trainer in waiting (0.6 GB of imports) is worth its place."""


def worth_it(plan: Plan) -> bool:
    """Whether a run of this plan would begin with a trainer that can be made ready here, disturbing no other run."""
    trains = bool(plan.stages) and plan.stages[0] in TRAINING_STAGES and not in_use(device_of(plan))
    there = hasattr(socket, "send_fds") and psutil.virtual_memory().available > WORTH_BYTES
    return trains and there


class Standby:
    """Who waits for the plan at hand: nobody, or one runner with its trainer. Any thread may call."""

    def __init__(self) -> None:
        self._one_at_a_time = threading.Lock()
        self._ready: Ready | None = None
        self._closed = False

    def prepare(self, plan: Plan) -> None:
        """Have somebody wait for this plan; who waits for another kind of plan is let go."""
        with self._one_at_a_time:
            environment = stage_environment(plan)
            if self._ready and self._ready.fits(environment):
                return
            self._let_go()
            if not self._closed and worth_it(plan):
                with contextlib.suppress(OSError):
                    self._ready = Ready(environment)

    def take(self) -> "Ready | None":
        with self._one_at_a_time:
            ready, self._ready = self._ready, None
            return ready

    def close(self) -> None:
        with self._one_at_a_time:
            self._closed = True
            self._let_go()

    def _let_go(self) -> None:
        if self._ready:
            self._ready.close()
            self._ready = None


class Ready:
    """A runner and a trainer in waiting, as the one sees them who had them started. `environment` is the trainer's."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = dict(environment)
        self.socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "core.runner", "--ready"], stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tempfile.gettempdir(), start_new_session=True,
                env={**child_environment(), **environment},
            )  # fmt: skip

    def fits(self, environment: Mapping[str, str]) -> bool:
        """Whether they are there, with a trainer that was started in this environment."""
        return dict(environment) == self.environment and self.process.poll() is None

    def start(self, run: str, environment: Mapping[str, str], files: Sequence[int]) -> bool:
        """Hand over a run's path with its lock and its log; False where it has to be started as ever."""
        if not self.fits(environment):
            self.close()
            return False
        with self.socket:
            return _send(self.socket, {"run": run, "environment": runner_environment()}, files)

    def close(self) -> None:
        """Let them go; they end by themselves."""
        self.socket.close()


class ReadyTrainer:
    """The trainer in waiting, as its runner sees it."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "core.train", "--ready"], stdin=theirs.fileno(), stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def take(
        self, arguments: Sequence[str], folder: str, files: Sequence[int], environment: Mapping[str, str]
    ) -> subprocess.Popen[Any] | None:
        """Give it a stage's arguments, folder, log and locks, and more for its environment; None where it is gone."""
        message = {"arguments": list(arguments), "folder": folder, "environment": dict(environment)}
        if self.process.poll() is None and _send(self.socket, message, files):
            return self.process
        return None

    def took(self) -> bool:
        """Whether it has begun with what it was given, rather than died at an import."""
        self.socket.setblocking(False)
        with contextlib.suppress(OSError):
            return self.socket.recv(1) == b"!"
        return False

    def end(self) -> None:
        """End it where it was not needed."""
        self.socket.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def await_stage() -> bool:
    """In the trainer: wait until a stage is given, and become its process. False where none will be."""
    message, files = _receive(socket.socket(fileno=os.dup(0)), acknowledge=True)
    if message is None:
        return False
    sys.argv[1:] = message["arguments"]
    os.environ.update(message["environment"])
    os.chdir(message["folder"])
    _write_to(files[0])
    return True


def await_run() -> bool:
    """In the runner: wait until a run is given, and become its process. False where none will be."""
    message, files = _receive(socket.socket(fileno=os.dup(0)))
    if message is None:
        return False
    os.environ.update(message["environment"])
    lock, log = files
    _write_to(log)
    sys.argv[1:] = [message["run"]]
    os.environ[LOCK_ENV] = str(lock)
    return True


def _write_to(log: int) -> None:
    """Make an open file this process's output, and nothing its input."""
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


def _send(to: socket.socket, message: dict[str, Any], files: Sequence[int]) -> bool:
    data = json.dumps(message).encode()
    try:
        to.sendall(len(data).to_bytes(4, "big"))
        socket.send_fds(to, [data[:1]], list(files))
        to.sendall(data[1:])
    except OSError:
        return False
    return True


def _receive(source: socket.socket, *, acknowledge: bool = False) -> tuple[dict[str, Any] | None, list[int]]:
    """One message and its open files; None at the end of the line."""
    with source, contextlib.suppress(OSError):
        if len(head := source.recv(4, socket.MSG_WAITALL)) == 4:
            first, files, *_ = socket.recv_fds(source, 1, 8)
            rest = source.recv(int.from_bytes(head, "big") - 1, socket.MSG_WAITALL)
            for file in files:
                os.set_inheritable(file, False)
            if acknowledge:
                source.sendall(b"!")
            return json.loads(first + rest), files
    return None, []
