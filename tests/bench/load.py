"""The app under load: a line a figure, with its goal. ``python tests/bench/load.py [PART …]``, on a quiet machine.

Parts: million (a log of a million steps), writers (50 runs written at once), flood (10,000 events a second), lines
(lines of 10 MB), growth (what a new event costs after a thousand steps and after a million).
"""

import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from app_costs import Pauses, figure, log_event, make_run, painted, pauses

from core.runs import Run, take_lock
from tui.app import FinetuiApp
from tui.dashboard import DashboardScreen
from tui.follow import Follower

PAUSE_MS, MEMORY_MB = 100, 150
SECONDS = 12.0


def line(step: int) -> bytes:
    return json.dumps(log_event(time.time(), step), separators=(",", ":")).encode() + b"\n"


def report(words: str, seen: Pauses, before_mb: float) -> None:
    figure(f"{words}: longest pause", 1000 * seen.longest, "ms", PAUSE_MS)
    figure(f"{words}: memory (RSS)", rss_mb(), "MB", MEMORY_MB)
    print(f"    {rss_mb() - before_mb:+.0f} MB")


def rss_mb() -> float:
    return psutil.Process().memory_info().rss / 1e6


@contextmanager
def living(*runs: Run) -> Iterator[None]:
    """The runs are alive: somebody holds their locks."""
    locks = [take_lock(run) for run in runs]
    try:
        yield
    finally:
        for lock in locks:
            os.close(lock)


@contextmanager
def child(code: str, *words: str) -> Iterator[None]:
    """A process that writes meanwhile, so that its work is not the app's."""
    import subprocess

    writer = subprocess.Popen([sys.executable, "-c", code, *words])
    try:
        yield
    finally:
        writer.kill()
        writer.wait()


def million_log(folder: Path) -> Run:
    """A run of a million logged steps, 30 days at one every 2.6 s; written in a child to keep this process small."""
    run = make_run(folder, "million", 1, ended=False)
    code = (
        "import sys; sys.path[:0] = sys.argv[2:4]\n"
        "from load import line\n"
        "with open(sys.argv[1], 'ab') as out:\n"
        "    for step in range(2, 1_000_001): out.write(line(step))\n"
    )
    import subprocess

    here = Path(__file__).resolve()
    subprocess.run(
        [sys.executable, "-c", code, str(run.events_path), str(here.parent), str(here.parents[2])], check=True
    )
    run.events.append("run_end", status="done")
    return run


async def shown(screen: DashboardScreen) -> None:
    while not screen.snapshot or screen.snapshot.partial:
        await asyncio.sleep(0.01)
    await painted(screen)


async def million(folder: Path) -> None:
    run = million_log(folder)
    app, before = FinetuiApp(folder / "empty"), rss_mb()
    async with app.run_test(size=(120, 40)):
        with pauses() as seen:
            begun = time.perf_counter()
            screen = DashboardScreen(run)
            await app.push_screen(screen)
            while not screen.snapshot:
                await asyncio.sleep(0.005)
            await painted(screen)
            first = time.perf_counter() - begun
            await shown(screen)
    size = run.events_path.stat().st_size / 1e6
    print(
        f"a log of 1,000,000 steps, {size:.0f} MB: first curve {first:.1f} s, whole {time.perf_counter() - begun:.1f} s"
    )
    report("a million steps", seen, before)


async def writers(folder: Path) -> None:
    runs = [make_run(folder / "fifty", f"run-{index:02}", 200, ended=False) for index in range(50)]
    code = (
        "import sys, time; sys.path[:0] = sys.argv[2:4]\n"
        "from pathlib import Path; from load import line\n"
        "files = [open(p, 'ab', buffering=0) for p in Path(sys.argv[1]).glob('*/events.jsonl')]\n"
        "step = 200\n"
        "while True:\n"
        "    step += 1\n"
        "    for f in files: f.write(line(step))\n"
        "    time.sleep(0.2)\n"
    )
    here, before = Path(__file__).resolve(), rss_mb()
    with living(*runs), child(code, str(folder / "fifty"), str(here.parent), str(here.parents[2])):
        app = FinetuiApp(folder / "fifty")
        async with app.run_test(size=(120, 40)):
            with pauses() as seen:
                await asyncio.sleep(SECONDS)
    report("home while 50 runs are written", seen, before)


async def flood(folder: Path) -> None:
    run = make_run(folder, "flood", 1, ended=False)
    code = (
        "import sys, time; sys.path[:0] = sys.argv[2:4]\n"
        "from load import line\n"
        "out, step, begun = open(sys.argv[1], 'ab', buffering=0), 1, time.monotonic()\n"
        "while True:\n"
        "    out.write(b''.join(line(step + n) for n in range(500)))\n"
        "    step += 500\n"
        "    time.sleep(max(0, begun + step / 10_000 - time.monotonic()))\n"
    )
    here, before = Path(__file__).resolve(), rss_mb()
    with living(run), child(code, str(run.events_path), str(here.parent), str(here.parents[2])):
        app = FinetuiApp(folder / "empty")
        async with app.run_test(size=(120, 40)):
            screen = DashboardScreen(run)
            await app.push_screen(screen)
            with pauses() as seen:
                begun, first = time.perf_counter(), screen.snapshot
                await asyncio.sleep(SECONDS)
            steps = screen.snapshot.state.stages[0].step if screen.snapshot else 0
    print(f"10,000 events a second: {steps:,} steps shown after {time.perf_counter() - begun:.0f} s ({first is None})")
    report("10,000 events a second", seen, before)


async def lines(folder: Path) -> None:
    run = make_run(folder, "lines", 50, ended=False)
    with run.log_path.open("wb") as log:
        for _ in range(20):
            log.write(b"x" * 10_000_000 + b"\n")
    with run.events_path.open("ab") as events:
        for _ in range(5):
            events.write(json.dumps({"t": 1, "kind": "notice", "text": "y" * 10_000_000}).encode() + b"\n")
            events.write(b"z" * 10_000_000 + b"\n")
    before = rss_mb()
    with living(run):
        app = FinetuiApp(folder / "empty")
        async with app.run_test(size=(120, 40)) as pilot:
            with pauses() as seen:
                screen = DashboardScreen(run)
                await app.push_screen(screen)
                await shown(screen)
                await pilot.press("l")
                await asyncio.sleep(3)
    report("lines of 10 MB in both logs", seen, before)


async def growth(folder: Path) -> None:
    costs = {}
    for name, run in (
        ("a thousand", make_run(folder, "short", 1000, ended=False)),
        ("a million", million_log(folder / "g")),
    ):
        follower = Follower(run)
        while follower.read() is None:
            continue
        taken = []
        for step in range(2_000_000, 2_000_050):
            with run.events_path.open("ab") as out:
                out.write(line(step))
            begun = time.perf_counter()
            follower.read()
            taken.append(time.perf_counter() - begun)
        costs[name] = statistics.median(taken)
    print(", ".join(f"a new event after {name} steps: {1000 * cost:.2f} ms" for name, cost in costs.items()))
    figure("cost of a new event, long run against short", costs["a million"] / costs["a thousand"], "times", 8)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="finetui-load-") as name:
        parts: dict[str, Callable[[Path], object]] = {
            "growth": growth, "million": million, "writers": writers, "flood": flood, "lines": lines,
        }  # fmt: skip
        chosen = sys.argv[1:] or list(parts)
        if len(chosen) == 1:
            asyncio.run(parts[chosen[0]](Path(name)))  # type: ignore[arg-type]
            return
        for part in chosen:  # a process each: memory is what one part takes
            import subprocess

            subprocess.run([sys.executable, __file__, part], check=False)


if __name__ == "__main__":
    main()
