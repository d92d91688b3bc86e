"""Viewers of a run in terminals of their own, as people have them: read or not, controlling their process or not."""

import contextlib
import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
from dataclasses import dataclass, field
from random import Random

from core.runs import Run


@dataclass
class Viewer:
    """The app or the command `watch`. Where a terminal is `read`, `seen` is what it was sent; else it fills up."""

    program: str
    process: "subprocess.Popen[bytes]"
    master: int
    read: bool
    controlling: bool
    seen: bytearray = field(default_factory=bytearray)

    @property
    def terminal(self) -> str:
        """The kind of its terminal in words."""
        return f"{'read' if self.read else 'full'}, {'controlling' if self.controlling else 'no signal'}"

    def hang_up(self) -> None:
        """Close the terminal; where it controls the process, the kernel sends SIGHUP."""
        master, self.master = self.master, -1
        if master >= 0:
            os.close(master)

    def end(self, how: str, patience_s: float = 20) -> str:
        """Let it die so; returns what was wrong, empty if nothing was."""
        if how == "closed pty":
            self.hang_up()
        elif self.process.poll() is None:
            self.process.send_signal(signal.Signals[how])
        if how == "SIGSTOP":
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
            self.process.kill()
        wrong = ""
        try:
            self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            wrong = "the viewer did not end"
            self.process.kill()
            self.process.wait()
        self.hang_up()
        return wrong


class Viewers:
    """Starts viewers and reads the terminals of those that are read, in one thread; as a context it ends them all."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.living: list[Viewer] = []
        self._over = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> "Viewers":
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._reader.join()
        for viewer in self.living:
            viewer.end("SIGKILL")

    def start(self, run: Run, program: str, *, read: bool, controlling: bool) -> Viewer:
        master, slave = pty.openpty()
        termios.tcsetwinsize(slave, self.random.choice([(24, 80), (40, 120), (50, 200)]))
        words = [sys.executable, "-P", "-m"]
        words += ["tui", "--watch", str(run.path)] if program == "app" else [
            "core.cli", "watch", run.name, "--runs-dir", str(run.path.parent)]  # fmt: skip
        process = subprocess.Popen(
            words, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=_take_terminal if controlling else None, env={**os.environ, "TERM": "xterm-256color"},
        )  # fmt: skip
        os.close(slave)
        os.set_blocking(master, False)
        self.living.append(Viewer(program, process, master, read, controlling))
        return self.living[-1]

    def any(self, run: Run) -> Viewer:
        """The app or the command in one of four kinds of terminals."""
        program = "app" if self.random.random() < 0.4 else "watch"
        return self.start(run, program, read=self.random.random() < 0.6, controlling=self.random.random() < 0.5)

    def take(self) -> Viewer:
        """One of the living, which is no longer read."""
        return self.living.pop(self.random.randrange(len(self.living)))

    def _read(self) -> None:
        while not self._over.is_set():
            by_master = {viewer.master: viewer for viewer in list(self.living) if viewer.read and viewer.master >= 0}
            try:
                ready = select.select(list(by_master), [], [], 0.05)[0]
            except (OSError, ValueError):  # one was closed meanwhile
                continue
            for master in ready:
                try:
                    by_master[master].seen += os.read(master, 1 << 16)
                except OSError:
                    by_master[master].read = False


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
