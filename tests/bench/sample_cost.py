"""What samples while training cost: seconds of a look against seconds of a step, SmolLM2-135M on the demo's rows.

usage: python tests/bench/sample_cost.py [--steps N] [--prompts N] [--tokens N]
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the product's trainers
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from test_training import Stage

from core.backend import settle
from core.config import resolve
from core.paths import configs_dir
from core.runs import create_run
from core.train_events import Reporter
from core.train_samples import SampleCallback, samples_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    settings = {"samples.count": options.prompts, "samples.max_new_tokens": options.tokens, "sft.logging_steps": 1}
    settings |= {"sft.max_steps": options.steps, "device": "cpu"}
    values = {key: (value, "bench") for key, value in settings.items()}
    with tempfile.TemporaryDirectory() as folder:
        plan = settle(resolve("sft-kto", configs_dir() / "demo.yaml", values, gpu_present=False))
        run = create_run(Path(folder), plan)
        stage = Stage(run, "sft")
        samples = samples_of(plan.plan.samples, stage.loaded, stage.data)
        callback = SampleCallback(plan.plan.samples, 1, stage.loaded, samples, Reporter(run, "sft"))
        begun = time.monotonic()
        stage.trainer.train()
        step_s = (time.monotonic() - begun) / options.steps
        looks = []
        for number in range(3):
            begun = time.monotonic()
            callback.look(number)
            looks.append(time.monotonic() - begun)
    look_s = statistics.median(looks)
    print(f"a step {step_s:.2f} s, a look at {options.prompts} prompts of up to {options.tokens} tokens {look_s:.2f} s")
    for every in (10, 25, 50):
        print(f"every {every} steps: {100 * look_s / (every * step_s + look_s):.1f} % of the time")


if __name__ == "__main__":
    main()
