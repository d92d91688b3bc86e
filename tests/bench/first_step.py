"""How long it takes from the start of a run to its first step, with a trainer that waited for it and without.

usage: python tests/bench/first_step.py [--config PLAN.yaml] [--times N]

The plan's stage is cut to two steps; without --config it is the demo's SFT. The first pair of runs fills caches and is
told apart.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])

from core import ready, runner  # noqa: E402
from core.backend import make_plan  # noqa: E402
from core.paths import configs_dir  # noqa: E402
from core.runs import Run, create_run, is_alive  # noqa: E402


def measured(folder: Path, config: Path, waits: bool) -> dict[str, float]:
    """Seconds after the start at which the trainer's own work began, and at which its first step was done."""
    short: dict[str, tuple[Any, str]] = {f"sft.{key}": (value, "bench") for key, value in
                                         {"max_steps": 2, "logging_steps": 1, "save_steps": 1000}.items()}  # fmt: skip
    found = make_plan("sft", config, short)
    standby = ready.Standby()
    if waits:
        standby.prepare(found.plan)
        time.sleep(60)  # somebody reads the review
    run = create_run(folder, found)
    begun = time.time()
    runner.start(run, ready=standby.take())
    while is_alive(run):
        time.sleep(0.2)
    return told(run, begun)


def told(run: Run, begun: float) -> dict[str, float]:
    events = [json.loads(line) for line in run.events_path.read_text(encoding="utf-8").splitlines()]
    at = {kind: next((event["t"] - begun for event in events if event["kind"] == kind), float("nan"))
          for kind in ("phase", "log")}  # fmt: skip
    return {"trainer at work": at["phase"], "first step": at["log"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=configs_dir() / "demo.yaml")
    parser.add_argument("--times", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.times + 1):
            for waits in (False, True):
                found = measured(Path(folder), options.config, waits)
                words = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in found.items())
                print(number or "first", "it waited" if waits else "as ever", words, sep="\t", flush=True)


if __name__ == "__main__":
    main()
