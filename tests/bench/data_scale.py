"""What looking at large files costs: time, speed, memory, growth. Needs no GPU; tokens need the demo's tokenizer.

usage: python tests/bench/data_scale.py [--rows 1000 10000 100000 1000000] [--folder DIR] [--tokens-up-to ROWS]

For each size a file is made and looked at in processes of their own with an empty cache, then again with a full one:

  first     seconds until the first findings are on the screen, process start included
  check     seconds and MB/s of the structural check alone, and the memory (RSS of all its processes together, at most)
  near      seconds of the search for near duplicates
  again     seconds of a second look at the same file
  cancel    milliseconds from the kill of a look until its last process is gone
  tokens    seconds and rows/s of tokenising with the demo's tokenizer in children, then from the cache

Says the machine and its load before and after: figures taken under load are lower ones.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent))

from make_rows import write

ROOT = Path(__file__).resolve().parents[2]


class Look:
    """A look at a file in a process of its own, its messages with the time at which each came."""

    def __init__(self, path: Path, cache: Path, *, near: bool) -> None:
        self.begun = time.monotonic()
        self.child = subprocess.Popen(
            [sys.executable, "-P", "-m", "core.data_look"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "FINETUI_CACHE": str(cache)},
        )  # fmt: skip
        assert self.child.stdin
        request = {"stage": "kto", "data": {"file": str(path)}, "near": near}
        self.child.stdin.write(json.dumps(request).encode() + b"\n")
        self.child.stdin.close()
        self.most = 0
        threading.Thread(target=self._weigh, daemon=True).start()

    def _weigh(self) -> None:
        while self.child.poll() is None:
            try:
                one = psutil.Process(self.child.pid)
                family = [one, *one.children(recursive=True)]
                self.most = max(self.most, sum(process.memory_info().rss for process in family))
            except psutil.Error:
                pass
            time.sleep(0.05)

    def messages(self) -> list[tuple[float, dict[str, Any]]]:
        assert self.child.stdout
        found = [(time.monotonic() - self.begun, json.loads(line)) for line in self.child.stdout]
        assert self.child.wait() == 0
        return found


def measured(path: Path, cache: Path) -> dict[str, Any]:
    """The figures of one file."""
    size = path.stat().st_size
    check = Look(path, cache, near=False)
    said = check.messages()
    report = said[-1][1]["report"]
    found = {
        "rows": report["totals"]["rows"], "mb": size / 1e6, "first": said[0][0], "check": said[-1][0],
        "speed": size / 1e6 / said[-1][0], "memory": check.most / 2**20, "findings": len(report["findings"]),
    }  # fmt: skip
    near = Look(path, cache, near=True)
    said = near.messages()
    reports = [at for at, message in said if "report" in message]
    again = Look(path, cache, near=True)
    found |= {"near": reports[-1] - reports[0], "near_memory": near.most / 2**20, "again": again.messages()[-1][0]}
    return found


def cancelled(path: Path, cache: Path) -> float:
    """Milliseconds from the kill of a look until its last process is gone."""
    look = Look(path, cache, near=False)
    family: list[psutil.Process] = []
    while look.child.poll() is None and len(family) < 2:
        family = psutil.Process(look.child.pid).children(recursive=True)
        time.sleep(0.02)
    time.sleep(0.5)
    begun = time.monotonic()
    look.child.kill()
    while any(alive(process) for process in family):
        time.sleep(0.002)
    return (time.monotonic() - begun) * 1000


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


TOKENS = """
import sys, time
from pathlib import Path
from core.plan import DataPlan
from core.prepare import open_ledger
from core.data_tokens import tokenize
from core.paths import cache_dir
from core.chat import Template
from transformers import AutoTokenizer
template = Template.of(AutoTokenizer.from_pretrained(sys.argv[2]))
begun = time.monotonic()
ledger = open_ledger(DataPlan(file=sys.argv[1]), "kto", 42, print)
tokens = tokenize(ledger, template)
print(time.monotonic() - begun, len(tokens.which), int(tokens.length.sum()))
"""


def tokenised(path: Path, cache: Path, model: Path) -> tuple[float, int, int]:
    """(seconds, rows, tokens) of making a file's tokens, or of finding them."""
    words = [sys.executable, "-P", "-c", TOKENS, str(path), str(model)]
    environment = {**os.environ, "FINETUI_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=True)
    seconds, rows, tokens = done.stdout.split()[-3:]
    return float(seconds), int(rows), int(tokens)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, help="where the files are made and kept (default: a temporary one)")
    parser.add_argument("--tokens-up-to", type=int, default=100_000)
    options = parser.parse_args()
    from core.paths import cache_dir
    from core.smollm import demo_model

    model = demo_model(cache_dir(), print)
    print(f"{os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB; load before {os.getloadavg()}")
    print("rows          MB  first s  check s   MB/s   MiB   near s   MiB  again s cancel ms  tokens s (rate)  again s")
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        for rows in options.rows:
            path = folder / f"rows-{rows}.jsonl"
            if not path.is_file():
                write(path, rows)
            path.read_bytes() if rows <= 100_000 else None
            cache = Path(tempfile.mkdtemp(dir=name))
            found = measured(path, cache)
            stop = f"{cancelled(path, Path(tempfile.mkdtemp(dir=name))):.0f}" if rows >= 100_000 else "-"
            words = "-"
            if rows <= options.tokens_up_to:
                first, count, _ = tokenised(path, cache, model)
                words = f"{first:8.1f} ({count / first:,.0f})   {tokenised(path, cache, model)[0]:8.2f}"
            print(
                f"{found['rows']:<9,} {found['mb']:6.1f} {found['first']:8.2f} {found['check']:8.2f} "
                f"{found['speed']:6.0f} {found['memory']:5.0f} {found['near']:8.2f} {found['near_memory']:5.0f} "
                f"{found['again']:8.2f} {stop:>9}  {words}", flush=True,
            )  # fmt: skip
    print(f"load after {os.getloadavg()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
