"""The app in a real terminal: it is killed while a real training runs, the training goes on, the next app finds it."""

import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conftest import finish, wait_until

from core.runs import Run, is_alive, list_runs, request_stop
from tui.draft import Draft, RowsDraft, load_draft, save_draft

try:
    import fcntl
    import termios
except ImportError:  # Windows
    fcntl = termios = None  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parents[1]
needs_tmux = pytest.mark.skipif(not shutil.which("tmux"), reason="tmux is not installed")


class Terminal:
    """A tmux server of its own with one window, driven by keys and read as text."""

    def __init__(self, name: str, environment: dict[str, str]) -> None:
        self.name = name
        self.environment = environment

    def tmux(self, *words: str) -> str:
        command = ["tmux", "-L", self.name, "-f", "/dev/null", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout

    def open(self, width: int = 120, height: int = 40) -> None:
        setting = [f"{key}={value}" for key, value in self.environment.items()]
        command = ["env", "-u", "COLUMNS", "-u", "LINES", *setting, sys.executable, "-P", "-m", "tui"]
        self.tmux("new-session", "-d", "-x", str(width), "-y", str(height), "-c", str(ROOT), *command)

    def press(self, *keys: str) -> None:
        self.tmux("send-keys", *keys)

    def type(self, text: str) -> None:
        self.tmux("send-keys", "-l", text)

    @property
    def text(self) -> str:
        return self.tmux("capture-pane", "-p")

    def shows(self, *words: str, limit_s: float = 60) -> str:
        try:
            return str(wait_until(lambda: all(word in (text := self.text) for word in words) and text, limit_s))
        except AssertionError:
            raise AssertionError(f"{words} did not appear:\n{self.text}") from None

    def pid(self, what: str) -> int:
        return int(self.tmux("display-message", "-p", f"#{{{what}}}"))


@pytest.fixture
def terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    cache = tmp_path / "cache"
    monkeypatch.setenv("FINETUI_CACHE", str(cache))
    environment = {"FINETUI_CACHE": str(cache), "FINETUI_RUNS": str(tmp_path / "runs"), "PYTHONPATH": str(ROOT)}
    found = Terminal(f"finetui-test-{os.getpid()}", environment)
    yield found
    found.tmux("kill-server")


@needs_tmux
def test_killing_the_app_and_its_terminal_leaves_the_training_going(
    terminal: Terminal,
    tiny_model: Path,
    rows_file: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draft = Draft(
        step=4,
        method="sft",
        model=str(tiny_model),
        data={"sft": RowsDraft(kind="file", file=str(rows_file())), "kto": RowsDraft()},
        values={"sft.max_steps": "300", "lora.r": "8", "sft.logging_steps": "2", "device": "cpu"},
    )
    path = tmp_path / "cache" / "draft.json"
    save_draft(draft, path)
    terminal.open()
    terminal.shows("your draft is kept at Review")
    terminal.press("n")
    terminal.shows("✔ ready", "finetui sft --model-name")
    terminal.press("Enter")
    terminal.shows("● running", "tokens/s", "/300", limit_s=120)
    assert load_draft(path) is None
    [run] = list_runs(tmp_path / "runs")
    app, server = terminal.pid("pane_pid"), terminal.pid("pid")
    os.kill(app, signal.SIGKILL)
    os.kill(server, signal.SIGKILL)
    assert is_alive(run)
    assert finish(run) == "done"
    terminal.open(80, 24)
    terminal.shows("✔ done", run.name[:20])
    terminal.press("Enter")
    terminal.shows("✔ done after", "300/300", "model after SFT")
    terminal.press("q")
    wait_until(lambda: not terminal.text)


@needs_tmux
def test_by_keys_alone_from_the_wizard_through_death_and_stop_to_the_end(
    terminal: Terminal, tiny_model: Path, rows_file: Callable[..., Path], tmp_path: Path
) -> None:
    """Wizard → a real training → the app is killed → opened again → stopped → resumed → done."""
    terminal.open()
    terminal.shows("Welcome")
    terminal.press("n")
    terminal.shows("What shall the model learn from?")
    terminal.press("Home", "Enter")
    terminal.shows("Which model?")
    terminal.press("Tab")
    terminal.type(str(tiny_model))
    terminal.shows(f"✔ {tiny_model}"[:60])
    terminal.press("Enter")
    terminal.shows("the demo's rows", "a Hub data set")
    terminal.press("Right")
    terminal.shows("Type the path of a file.")
    terminal.press("Tab")
    terminal.type(str(rows_file()))
    terminal.shows("✔ 40 rows: 20 ", "trained")
    terminal.press("Enter")
    terminal.shows("num_train_epochs", "5 steps an epoch")
    terminal.press(*["Tab"] * 6)
    terminal.type("240")
    terminal.shows("1,200 steps in all")
    terminal.press("Enter")
    terminal.shows("✔ ready", "1,200 steps of 4", "finetui sft --model-name")
    terminal.press("Enter")
    terminal.shows("● running", "tokens/s", "/1,200", limit_s=120)
    [run] = list_runs(tmp_path / "runs")
    os.kill(terminal.pid("pane_pid"), signal.SIGKILL)
    wait_until(lambda: not terminal.text)
    assert is_alive(run)
    terminal.open(80, 24)
    terminal.shows("● running")
    terminal.press("s")
    terminal.shows("It saves a checkpoint")
    terminal.press("y")
    terminal.shows("■ stopped")
    stopped_at = run.state().stage("sft").step
    assert 0 < stopped_at < 1200 and run.newest_checkpoint("sft")
    terminal.press("r")
    terminal.shows("● running")
    terminal.press("Enter")
    terminal.shows("✔ done after", "1,200/1,200", limit_s=180)
    resumed = run.state().stage("sft").series["loss"]
    assert [step for step, _ in resumed] == sorted({step for step, _ in resumed}) and resumed[-1][0] == 1200
    terminal.press("q")
    wait_until(lambda: not terminal.text)


def in_pty(command: list[str], environment: dict[str, str], width: int, height: int) -> tuple[subprocess.Popen, int]:
    """A command in a terminal of its own, and our end of it."""
    import pty

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
    child = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env=environment, cwd=ROOT, start_new_session=True
    )
    os.close(slave)
    return child, master


def read_until(master: int, words: str) -> None:
    seen = b""
    while words.encode() not in seen:
        assert select.select([master], [], [], 60)[0], seen[-2000:]
        seen += os.read(master, 65536)


@pytest.mark.skipif(not shutil.which("screen"), reason="GNU screen is not installed")
def test_screen_is_detached_attached_elsewhere_and_ended_and_the_run_goes_on(
    tiny_model: Path, rows_file: Callable[..., Path], tmp_path: Path
) -> None:
    run = Run(tmp_path / "runs" / "own")
    start = (
        f"-m core.cli sft --detach --name own --model-name {tiny_model} --local-file {rows_file()} --max-steps 30000 "
        f"--set device=cpu --set lora.r=8 --runs-dir {run.path.parent}"
    )
    python, pid_file = f"{sys.executable} -P", tmp_path / "pid"
    work = f"{python} {start} && echo $$ > {pid_file} && exec {python} -m tui --watch {run.path}"
    with tempfile.TemporaryDirectory(prefix="screen-") as sockets:  # a socket's path must be short
        environment = {**os.environ, "SCREENDIR": sockets, "LANG": "C.UTF-8", "TERM": "xterm", "PYTHONPATH": str(ROOT)}
        for name in ("LC_ALL", "STY", "TMUX", "COLUMNS", "LINES"):
            environment.pop(name, None)
        screen = ["screen", "-c", "/dev/null", "-S", "finetui"]
        masters = []
        try:
            first, master = in_pty([*screen, "sh", "-c", work], environment, 80, 24)
            masters.append(master)
            read_until(master, "● running")
            subprocess.run([*screen, "-d"], env=environment, capture_output=True, check=False)
            assert first.wait(30) is not None and is_alive(run)
            second, master = in_pty([*screen, "-r"], environment, 120, 40)
            masters.append(master)
            read_until(master, "● running")
            app = psutil.Process(int(pid_file.read_text()))
        finally:
            subprocess.run([*screen, "-X", "quit"], env=environment, capture_output=True, check=False)
        second.wait(30)
        app.wait(30)
        step = run.state().stage("sft").step
        wait_until(lambda: run.state().stage("sft").step > step)
        request_stop(run)
        assert finish(run) == "stopped" and run.newest_checkpoint("sft")
        for master in masters:
            os.close(master)


@needs_tmux
def test_foreign_text_reaches_no_control_of_the_terminal(terminal: Terminal, tmp_path: Path) -> None:
    run = Run(tmp_path / "runs" / "evil")
    run.path.mkdir(parents=True)
    run.plan_path.write_text("method: sft\n")
    evil = "\x1b]2;TAKEN\x07\x1b[31m\x1b[2J[/x]"
    run.events.append("created", name="evil", method=evil, model=evil, stages=["sft"], note=evil)
    run.events.append("notice", level="warning", text=evil, advice=evil)
    run.events.append("run_end", status="failed")
    run.log_path.write_text(evil + "\n")
    terminal.open()
    terminal.shows("evil", "✘ failed")
    terminal.press("Enter")
    terminal.shows("[/x]", "f begins the stage again")
    terminal.press("l")
    terminal.shows("log of evil", "␛]2;TAKEN")
    assert terminal.tmux("display-message", "-p", "#{pane_title}").strip() != "TAKEN"


STUCK = """
import pathlib, sys, threading
from tui import app
from tui.app import FinetuiApp

app.LEAVE_S = 0.5
mark, mounted = pathlib.Path(sys.argv[1]), FinetuiApp.on_mount

def wait_for_ever():
    mark.touch()
    threading.Event().wait()

def on_mount(app):
    mounted(app)
    app.set_timer(0.5, wait_for_ever)

FinetuiApp.on_mount = on_mount
FinetuiApp(mark.parent).run()
"""
"""As the driver waits to write into a terminal that takes nothing more."""


@pytest.mark.skipif(os.name == "nt", reason="needs a pty")
@pytest.mark.parametrize("stuck", [False, True])
def test_a_terminal_lost_without_a_signal_ends_the_app(tmp_path: Path, stuck: bool) -> None:
    import pty

    master, slave = pty.openpty()
    app = subprocess.Popen(
        [sys.executable, "-P", *(["-c", STUCK, str(tmp_path / "stuck")] if stuck else ["-m", "tui"])],
        stdin=slave, stdout=slave, stderr=slave, cwd=ROOT, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "FINETUI_RUNS": str(tmp_path), "TERM": "xterm-256color"},
    )  # fmt: skip
    os.close(slave)
    try:
        seen = b""
        while b"Welcome" not in seen:
            seen += os.read(master, 65536)
        if stuck:
            wait_until((tmp_path / "stuck").exists)
        os.close(master)
        assert app.wait(15) != 0
    finally:
        if app.poll() is None:
            app.kill()
            app.wait()
