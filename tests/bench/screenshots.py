"""The pictures of the README: the app on recorded runs, as SVG. ``python tests/bench/screenshots.py [FOLDER]``."""

import asyncio
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
RECORDED = ROOT / "tests" / "runs"
WIDE = (120, 40)

from textual.pilot import Pilot  # noqa: E402

from core.backend import settle  # noqa: E402
from core.config import resolve, save_plan  # noqa: E402
from core.notes import Note, write_note  # noqa: E402
from core.paths import cache_dir, configs_dir  # noqa: E402
from core.runs import Run, take_lock  # noqa: E402
from core.smollm import FOLDER_NAME, demo_model  # noqa: E402
from tui.app import FinetuiApp  # noqa: E402


def recorded(
    folder: Path, log: str, name: str, *, ended_s_ago: float = 0.0, until: Callable[[Any], bool] | None = None
) -> Run:
    """A run directory made from a recorded log, moved in time; cut off at the first event that `until` accepts."""
    events = [json.loads(line) for line in (RECORDED / f"{log}.jsonl").read_text().splitlines() if line.endswith("}")]
    if until:
        events = events[: next(number for number, event in enumerate(events) if until(event)) + 1]
    shift = time.time() - ended_s_ago - events[-1]["t"]
    run = Run(folder / name)
    run.path.mkdir(parents=True)
    for event in events:
        event["t"] += shift
        if event["kind"] == "created":
            event["name"] = name
    run.events_path.write_text("".join(json.dumps(event) + "\n" for event in events))
    method = events[0].get("method", "sft")
    config = configs_dir() / "demo.yaml" if method == "sft-kto" else None
    save_plan(settle(resolve(method, config, {}, gpu_present=False)), run.plan_path)
    os.utime(run.plan_path, (events[0]["t"], events[0]["t"]))
    return run


def own_cache(folder: Path) -> Path:
    """A cache with the demo model of the real one and none of its drafts."""
    folder.mkdir()
    (folder / FOLDER_NAME).symlink_to(demo_model(cache_dir(), print))
    return folder


def in_kto(step: int) -> Callable[[Any], bool]:
    return lambda event: event["kind"] == "log" and event.get("stage") == "kto" and event["step"] >= step


async def until(pilot: Pilot[Any], *words: str) -> None:
    """Wait until the screen shows these words."""
    for _ in range(3000):
        await pilot.pause(0.04)
        text = pilot.app.export_screenshot().replace("&#160;", " ")
        if all(word.replace("&", "&amp;") in text for word in words):
            return
    raise SystemExit(f"{words} did not appear")


async def take(folder: Path, out: Path) -> None:
    app = FinetuiApp(folder)
    async with app.run_test(size=WIDE) as pilot:

        def save(name: str) -> None:
            (out / f"{name}.svg").write_text(app.export_screenshot(title="finetui"), encoding="utf-8")
            print(out / f"{name}.svg", flush=True)

        await until(pilot, "demo-today")
        await pilot.press("down")
        await until(pilot, "KTO loss", "KTO running")
        save("home")
        await pilot.press("enter")
        await until(pilot, "KTO margin", "44/72")
        save("dashboard")
        await pilot.press("escape", "n", "enter", "enter")
        await until(pilot, "480 rows: all will be", "320 rows: all will be", "tool_call", "Tokens a row")
        save("data")
        await pilot.press("enter", "enter")
        await until(pilot, "ready", "finetui demo")
        save("review")


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "tests" / "screenshots"
    out.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="pictures-"))
    try:
        runs = folder / "runs"
        recorded(runs, "demo", "demo-first", ended_s_ago=86_400 * 2)
        recorded(runs, "stopped", "timer-calls", ended_s_ago=80_000)
        recorded(runs, "failed", "qwen-3b-long-rows", ended_s_ago=30_000)
        write_note(recorded(runs, "demo", "tools-v2", ended_s_ago=9_000).path, Note("the one to keep", pinned=True))
        living = recorded(runs, "demo", "demo-today", until=in_kto(44))
        lock = take_lock(living)
        os.environ["FINETUI_RUNS"] = str(runs)
        os.environ["FINETUI_CACHE"] = str(own_cache(folder / "cache"))
        asyncio.run(take(runs, out))
        os.close(lock)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
