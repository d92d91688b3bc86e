"""What watching costs: start-up of the command and of a trainer, the history of a thousand runs, an event a step.

usage: python tests/bench/core_costs.py        prints one line a figure; needs no GPU and no model
"""

import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from core.event_log import EventLog
from core.events import EventTail, RunState

REPEATS = 7


def command_s(*words: str) -> float:
    """Median seconds of a whole `finetui` process."""
    taken = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-P", "-m", "core.cli", *words], check=True, stdout=subprocess.DEVNULL)
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def trainer_s() -> float:
    """Median seconds of a trainer that imports everything and is then not wanted."""
    taken = []
    for _ in range(REPEATS):
        ours, theirs = socket.socketpair()
        begun = time.perf_counter()
        with theirs:
            trainer = subprocess.Popen([sys.executable, "-P", "-m", "core.train", "--ready"], stdin=theirs)
        ours.close()
        trainer.wait()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def make_history(folder: Path, runs: int, steps: int) -> None:
    """`runs` run directories, each with the events of `steps` logged steps."""
    for number in range(runs):
        run = folder / f"20261123-{number:06}-sft-135m"
        run.mkdir()
        (run / "plan.yaml").write_text("method: sft\n")
        log = EventLog(run / "events.jsonl")
        log.append("created", v=1, name=run.name, method="sft", model="135m", stages=["sft"])
        log.append("run_start", pid=1)
        log.append("stage_start", name="sft")
        for step in range(steps):
            log.append("log", stage="sft", step=step, loss=1 / (step + 1), learning_rate=2e-4, grad_norm=1.0)
        log.append("stage_end", name="sft", status="done")
        log.append("run_end", status="done")


def main() -> None:
    print(f"finetui --help                 {command_s('--help') * 1000:8.0f} ms")
    print(f"a trainer, imports and its end {trainer_s() * 1000:8.0f} ms")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_history(folder, 1000, 20)
        print(f"finetui runs, 1,000 runs       {command_s('runs', '--runs-dir', name) * 1000:8.0f} ms")
        log = EventLog(folder / "many.jsonl")
        begun = time.perf_counter()
        for step in range(20_000):
            log.append("log", stage="sft", step=step, loss=0.5, learning_rate=2e-4, grad_norm=1.0, tokens_per_s=9000.0)
        print(f"one event written              {(time.perf_counter() - begun) / 20_000 * 1e6:8.1f} µs")
        begun = time.perf_counter()
        tail, state = EventTail(log.path), RunState()
        while events := tail.read():
            for event in events:
                state.fold(event)
        print(f"one event read and folded      {(time.perf_counter() - begun) / 20_000 * 1e6:8.1f} µs")


if __name__ == "__main__":
    main()
