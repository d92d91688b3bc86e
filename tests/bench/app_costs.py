"""What the app costs: a line a figure, with its goal. ``python tests/bench/app_costs.py [PART …]``, on a quiet machine.

Parts: attach history training watching paint.
"""

import asyncio
import json
import os
import pty
import re
import select
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from textual.screen import Screen

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("FINETUI_CACHE", tempfile.mkdtemp(prefix="finetui-bench-"))

from core.runs import Run, take_lock  # noqa: E402
from tui.app import FinetuiApp  # noqa: E402
from tui.charts import Chart  # noqa: E402
from tui.dashboard import DashboardScreen  # noqa: E402

WATCH_S = 15.0
BARE = """
from textual.app import App
from textual.containers import Horizontal, Vertical
from textual.widgets import DataTable, Footer, Input, Static
class Bare(App):
    BINDINGS = [("n", "new", "New"), ("q", "quit", "Quit")]
    def compose(self):
        for word in ("banner", "machine", "folder", "draft"):
            yield Static(word)
        yield Input()
        with Horizontal():
            yield Static("Welcome")
            yield DataTable()
            with Vertical():
                yield Static("head"); yield Static("chart"); yield Static("facts")
        yield Static("brief")
        yield Footer()
    def on_mount(self):
        self.query_one(DataTable).add_columns(*"abcdefgh")
Bare().run()
"""


def figure(words: str, value: float, unit: str, goal: float) -> None:
    print(f"{words:<58} {value:>9.2f} {unit:<6} goal {goal:g}  {'ok' if value <= goal else 'MISSED'}", flush=True)


class Terminal:
    """A process in a pty of 120 by 40 cells; what it writes is read and counted."""

    def __init__(self, *command: str, **environment: str) -> None:
        import fcntl
        import termios

        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        self.begun = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, *command], stdin=slave, stdout=slave, stderr=slave, cwd=ROOT, start_new_session=True,
            env={**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT), **environment},
        )  # fmt: skip
        os.close(slave)
        self.seen = b""

    def read(self, until: float) -> None:
        """Take in what comes until this moment."""
        while (left := until - time.perf_counter()) > 0:
            if select.select([self.master], [], [], left)[0]:
                try:
                    self.seen += os.read(self.master, 65536)
                except OSError:
                    return

    def wait_for(self, pattern: bytes, limit_s: float = 30) -> float:
        """Seconds from the start until `pattern` was written."""
        while not re.search(pattern, self.seen):
            if time.perf_counter() - self.begun > limit_s:
                raise SystemExit(f"{pattern!r} was not shown:\n{self.seen[-2000:]!r}")
            self.read(time.perf_counter() + 0.005)
        return time.perf_counter() - self.begun

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


def make_run(folder: Path, name: str, logs: int, *, ended: bool = True) -> Run:
    """A run with `logs` logged steps of SFT and a sample of its memory for each ten."""
    run = Run(folder / name)
    run.path.mkdir(parents=True)
    run.plan_path.write_text("method: sft\n")
    t = time.time() - logs
    lines: list[dict[str, Any]] = [
        {"t": t, "kind": "created", "v": 1, "name": name, "method": "sft", "model": "135m", "stages": ["sft"]},
        {"t": t, "kind": "run_start", "host": "bench"},
        {"t": t, "kind": "stage_start", "name": "sft", "index": 0},
        {"t": t, "kind": "totals", "stage": "sft", "steps": max(logs, 1) * 2, "examples": 40},
        {"t": t, "kind": "phase", "stage": "sft", "name": "train", "detail": ""},
    ]
    for step in range(1, logs + 1):
        lines.append(log_event(t + step, step))
        if step % 10 == 0:
            lines.append({"t": t + step, "kind": "gpu", "rss_bytes": 2 << 30, "cpu_s": step})
    if ended:
        lines.append({"t": t + logs, "kind": "run_end", "status": "done"})
    run.events_path.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
    return run


def log_event(t: float, step: int) -> dict[str, Any]:
    loss = 2 / (1 + step / 50) + step % 7 / 50
    return {
        "t": t, "kind": "log", "stage": "sft", "step": step, "epoch": step / 100, "loss": loss, "grad_norm": 0.7,
        "learning_rate": 2e-4, "tokens_per_s": 149.3, "num_tokens": step * 300, "entropy": 0.5,
        "mean_token_accuracy": 0.8,
    }  # fmt: skip


def first_paint(folder: Path) -> None:
    def once(pattern: bytes, *command: str) -> float:
        terminal = Terminal(*command, FINETUI_RUNS=str(folder / "none"))
        taken = terminal.wait_for(pattern)
        terminal.close()
        return taken

    bare, ours = [], []
    for _ in range(5):
        bare.append(once(b"Welcome", "-c", BARE))
        ours.append(once(b"Welcome", "-P", "-m", "tui"))
    one, other = statistics.median(ours), statistics.median(bare)
    print(f"first paint: {one * 1000:.0f} ms, a bare Textual app with the same widgets {other * 1000:.0f} ms")
    figure("first paint against the bare app", one / other, "times", 2)


def watching(folder: Path) -> None:
    """A living run that logs every second."""
    run = make_run(folder, "living", 600, ended=False)
    lock = take_lock(run)
    over = threading.Event()

    def train() -> None:
        step = 600
        while not over.wait(1.0):
            step += 1
            run.events.append("log", **{k: v for k, v in log_event(0, step).items() if k not in ("t", "kind")})
            if step % 5 == 0:
                run.events.append("gpu", rss_bytes=2 << 30, cpu_s=step, ram_available_bytes=1 << 33)

    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    terminal = Terminal("-P", "-m", "tui", "--watch", str(run.path), FINETUI_RUNS=str(folder))
    terminal.wait_for("[\u2801-\u28ff]{3}".encode())
    terminal.read(time.perf_counter() + 4)
    process = psutil.Process(terminal.process.pid)
    before, written, begun = process.cpu_times(), len(terminal.seen), time.perf_counter()
    terminal.read(begun + WATCH_S)
    after, passed = process.cpu_times(), time.perf_counter() - begun
    busy = after.user + after.system - before.user - before.system
    figure("CPU while watching a run that logs every second", 100 * busy / passed, "%", 3)
    figure("written to the terminal at 120 x 40", (len(terminal.seen) - written) / passed / 1024, "KiB/s", 10)
    figure("memory (RSS)", process.memory_info().rss / 1e6, "MB", 100)
    terminal.close()
    over.set()
    thread.join()
    os.close(lock)


class Pauses:
    """The longest time the event loop did not come to its next turn."""

    def __init__(self) -> None:
        self.longest = 0.0
        self.task: asyncio.Task[None] | None = None

    async def tick(self) -> None:
        while True:
            begun = time.perf_counter()
            await asyncio.sleep(0.005)
            self.longest = max(self.longest, time.perf_counter() - begun - 0.005)


@contextmanager
def pauses() -> Iterator[Pauses]:
    found = Pauses()
    found.task = asyncio.get_running_loop().create_task(found.tick())
    try:
        yield found
    finally:
        found.task.cancel()


async def painted(screen: Screen[Any]) -> None:
    """Wait until what the screen was told is on it."""
    done = asyncio.Event()
    screen.call_after_refresh(done.set)
    await done.wait()


async def attach(folder: Path) -> None:
    run = make_run(folder / "long", "long", 91_000)
    events = sum(1 for _ in run.events_path.open())
    app = FinetuiApp(folder / "empty")
    async with app.run_test(size=(120, 40)) as pilot:
        await pilot.pause()
        with pauses() as seen:
            begun = time.perf_counter()
            screen = DashboardScreen(run)
            await app.push_screen(screen)
            while not any(chart.panel and chart.panel.lines[0][1] for chart in screen.query(Chart)):
                await asyncio.sleep(0.005)
            await painted(screen)
            taken = time.perf_counter() - begun
            while not screen.snapshot or screen.snapshot.partial:
                await asyncio.sleep(0.005)
            whole = time.perf_counter() - begun
    figure(f"attach to {events:,} events, to the drawn curve", taken, "s", 1.5)
    figure("  longest pause of the event loop meanwhile", 1000 * seen.longest, "ms", 100)
    figure("  until the log is read whole", whole, "s", 5)
    figure("  memory (RSS) of this process afterwards", psutil.Process().memory_info().rss / 1e6, "MB", 100)


async def real_training(folder: Path) -> None:
    """The app watches the demo's SFT, on the cores that train it, from its start to its end."""
    from core import runner
    from core.backend import settle
    from core.config import resolve
    from core.paths import configs_dir
    from core.runs import create_run

    settings = {"sft.max_steps": (20, "bench"), "sft.logging_steps": (1, "bench"), "evaluate.enabled": (False, "bench")}
    plan = settle(resolve("sft", configs_dir() / "demo.yaml", settings, gpu_present=False))
    run = create_run(folder / "real", plan)
    app = FinetuiApp(folder / "real")
    async with app.run_test(size=(120, 40)) as pilot:
        await pilot.pause()
        screen = DashboardScreen(run)
        await app.push_screen(screen)
        await painted(screen)
        with pauses() as seen:
            await asyncio.to_thread(runner.start, run)
            while not screen.snapshot or screen.snapshot.live or not screen.snapshot.state.end_status:
                await asyncio.sleep(0.05)
    if screen.snapshot.status != "done":
        raise SystemExit(f"the training ended as {screen.snapshot.status}: {run.log_path}")
    figure("longest pause of the event loop during a real training", 1000 * seen.longest, "ms", 100)


async def empty_home(folder: Path) -> float:
    """Seconds from making the app to its greeting."""
    begun = time.perf_counter()
    app = FinetuiApp(folder / "nothing")
    async with app.run_test(size=(120, 40)):
        while not app.screen.query_one("#greeting").display:
            await asyncio.sleep(0.005)
        await painted(app.screen)
        return time.perf_counter() - begun


async def history(folder: Path) -> None:
    empty = await empty_home(folder)
    for index in range(1000):
        make_run(folder / "many", f"run-{index:04}", 100)
    begun = time.perf_counter()
    app = FinetuiApp(folder / "many")
    async with app.run_test(size=(120, 40)):
        with pauses() as seen:
            table = app.screen.query_one("#runs")
            while not table.row_count:  # type: ignore[attr-defined]
                await asyncio.sleep(0.005)
            await painted(app.screen)
            first = time.perf_counter() - begun
            while len(app.screen.all_rows) < 1000:  # type: ignore[attr-defined]
                await asyncio.sleep(0.005)
            await painted(app.screen)
            whole = time.perf_counter() - begun
    print(f"home: the greeting after {empty:.2f} s, the first rows of 1,000 runs after {first:.2f} s")
    figure("home with 1,000 runs, to the first rows, above an empty one", max(0.0, first - empty), "s", 0.5)
    figure("  until all of them are read", whole, "s", 3)
    figure("  longest pause of the event loop meanwhile", 1000 * seen.longest, "ms", 100)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="finetui-bench-") as name:
        folder = Path(name)
        parts: dict[str, Callable[[], None]] = {
            "attach": lambda: asyncio.run(attach(folder)),
            "history": lambda: asyncio.run(history(folder)),
            "training": lambda: asyncio.run(real_training(folder)),
            "watching": lambda: watching(folder / "watched"),
            "paint": lambda: first_paint(folder),
        }
        for part in sys.argv[1:] or parts:
            parts[part]()


if __name__ == "__main__":
    main()
