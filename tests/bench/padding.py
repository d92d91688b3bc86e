"""Whether rows laid end to end and padded rows teach the same: held-out loss of both after the same examples.

usage: python tests/bench/padding.py [--rows FILE] [--steps N] [--batch N]

SmolLM2-135M on this machine's CPU, on the demo's rows or on FILE. Padding changes no row, no order and no weight of a
token, so the losses should differ by rounding alone.
"""

import argparse
import os
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, help="conversations to train on; default: the demo's")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    settings = {"sft.max_steps": options.steps, "sft.batch_size": options.batch, "sft.gradient_accumulation_steps": 1,
                "sft.data.holdout": 0.1, "sft.logging_steps": options.steps, "device": "cpu"}  # fmt: skip
    if options.rows:
        settings |= {"sft.data.demo": False, "sft.data.file": str(options.rows.absolute())}
    found: dict[str, float] = {}
    print(f"{'':<12}{'held-out before':>16}{'after':>9}{'training loss':>15}{'seconds':>9}")
    for name, free in (("end to end", "on"), ("padded", "off")):
        values = {key: (value, "bench") for key, value in {**settings, "sft.padding_free": free}.items()}
        with tempfile.TemporaryDirectory() as folder:
            plan = settle(resolve("sft", configs_dir() / "demo.yaml", values, gpu_present=False))
            stage = Stage(create_run(Path(folder), plan), "sft")
            before, begun = stage.trainer.evaluate()["eval_loss"], time.monotonic()
            trained = stage.trainer.train().training_loss
            seconds = time.monotonic() - begun
            found[name] = stage.trainer.evaluate()["eval_loss"]
        print(f"{name:<12}{before:>16.5f}{found[name]:>9.5f}{trained:>15.5f}{seconds:>9.0f}", flush=True)
    one, other = found.values()
    rows = options.steps * options.batch
    print(f"after {rows} rows the held-out losses differ by {100 * abs(one - other) / other:.3f} %")


if __name__ == "__main__":
    main()
