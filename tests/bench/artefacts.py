"""What merging, GGUF and their checks cost, and how far the files agree with the model: SmolLM2-135M on this CPU.

usage: python tests/bench/artefacts.py [--runs DIR] [--prompts 24] [--four-bit]

Trains the demo's SFT for a few steps (or takes the finished run `bench` in DIR), then merges and makes F16, Q8_0,
Q5_K_M and Q4_K_M through the product, each stage a child of the run's own runner. Prints seconds of each phase, the
largest resident memory of each stage's process as the runner sampled it, sizes, and the agreement of every file. With
--four-bit the model is trained on 4-bit weights for 40 steps (bitsandbytes must be installed), merged into 16 bit and
packed as merged_4bit. With --merge MODEL_DIR a merge alone is timed in this process, and its peak memory taken: a
random adapter on that model.
"""

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from core import runner
from core.artefacts import checked_request, read_report
from core.backend import make_plan
from core.commands_export import begin
from core.events import EventTail
from core.paths import configs_dir
from core.runs import Run, create_run, is_alive

QUANTISATIONS = ["F16", "Q8_0", "Q5_K_M", "Q4_K_M"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs-bench"))
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--four-bit", action="store_true", help="what four bits cost, instead of GGUF")
    parser.add_argument("--merge", type=Path, metavar="MODEL_DIR", help="time a merge alone, in this process")
    options = parser.parse_args()
    if options.merge:
        merge_alone(options.merge)
        return 0
    os.environ["FINETUI_RUNS"] = str(options.runs.absolute())
    run = trained(options.runs.absolute(), four_bit=options.four_bit)
    for folder in ("merge", "gguf"):
        shutil.rmtree(run.path / folder, ignore_errors=True)
    (run.path / "export.json").unlink(missing_ok=True)
    begun = len(EventTail(run.events_path).read())
    wanted: dict[str, Any] = {"save_method": "merged_4bit"} if options.four_bit else {"gguf": QUANTISATIONS}
    begin(run, checked_request(run, {**wanted, "check_prompts": options.prompts}))
    wait(run)
    report(run, EventTail(run.events_path).read()[begun:])
    return 0 if run.state().end_status == "done" else 1


def trained(folder: Path, *, four_bit: bool) -> Run:
    """The finished run `bench` or `bench-4bit`, made where it is missing."""
    run = Run(folder / ("bench-4bit" if four_bit else "bench"))
    if not (run.plan_path.exists() and run.trained("sft")):
        shutil.rmtree(run.path, ignore_errors=True)
        settings = {"name": run.name, "sft.max_steps": 40 if four_bit else 56, "evaluate.enabled": False,
                    "sft.data.demo": True, "sft.max_length": 512, "sft.warmup_ratio": 0.05, "export.check_tokens": 48,
                    "model.load_in_4bit": four_bit, "device": "cpu" if four_bit else "auto"}  # fmt: skip
        values = {key: (value, "bench") for key, value in settings.items()}
        run = create_run(folder, make_plan("sft", configs_dir() / "sft.yaml", values))
        runner.start(run)
        wait(run)
    return run


def wait(run: Run) -> None:
    while is_alive(run):
        time.sleep(0.3)


def report(run: Run, events: list[dict[str, Any]]) -> None:
    stage, peaks = "", dict.fromkeys(("merge", "gguf"), 0)
    for event in events:
        if event["kind"] == "stage_start":
            stage = event["name"]
        elif event["kind"] == "gpu" and stage in peaks:
            peaks[stage] = max(peaks[stage], event.get("rss_bytes") or 0)
        elif event["kind"] == "phase" and "seconds" in event:
            print(f"{event['stage']:<6} {event['name']:<9} {event.get('detail', ''):<40.40} {event['seconds']:7.1f} s")
    for name, peak in peaks.items():
        print(f"{name:<6} largest resident memory seen, every 5 s: {peak / 2**30:.2f} GiB")
    for form, entry in read_report(run, "merge")["forms"].items():
        print(f"{form} {entry['bytes'] / 2**20:.0f} MiB, against {entry['reference']}: {words(entry)}")
    for quantisation, entry in read_report(run, "gguf").get("files", {}).items():
        calls = f", calls valid {entry['valid']}/{entry['calls']}, right {entry['right']}" if "calls" in entry else ""
        print(f"{quantisation:<12} {entry['bytes'] / 2**20:.0f} MiB: {words(entry)}{calls}")


def words(check: dict[str, Any]) -> str:
    return (
        f"{100 * check['token_agreement']:.2f} % of {check['tokens']} tokens, "
        f"{check['same_answers']}/{check['prompts']} answers, largest logit difference "
        f"{check['max_logit_difference']:.3g}, mean KL {check['mean_kl']:.2g}"
    )


def merge_alone(base: Path) -> None:
    """Merge a random adapter of rank 16 on all projections, in this process."""
    import torch
    from safetensors.torch import save_file

    from core.export_merge import Adapter, plan_merge, write_merged
    from core.export_weights import BaseWeights
    from core.sources import read_json

    weights = BaseWeights(base)
    with tempfile.TemporaryDirectory(prefix="finetui-merge-", dir=".") as name:
        adapter, target = Path(name) / "adapter", Path(name) / "merged"
        adapter.mkdir()
        target.mkdir()
        tensors = {}
        for tensor in weights.names:
            if tensor.endswith("_proj.weight"):
                out, inside = weights.shape(tensor)
                key = f"base_model.model.{tensor.removesuffix('.weight')}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(16, inside) * 0.01
                tensors[f"{key}.lora_B.weight"] = torch.randn(out, 16) * 0.01
        save_file(tensors, adapter / "adapter_model.safetensors")
        del tensors
        config = {"peft_type": "LORA", "r": 16, "lora_alpha": 32}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begun = time.perf_counter()
        low_rank = Adapter(adapter)
        plan = plan_merge(weights, low_rank, read_json(base / "config.json"), torch.bfloat16)
        write_merged(weights, low_rank, plan, torch.bfloat16, target, lambda done, every: None)
        seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"merged {plan.bytes / 2**30:.2f} GiB in {len(plan.shards)} shards, {len(plan.updates)} tensors changed: "
        f"{seconds:.1f} s, {plan.bytes / seconds / 2**20:.0f} MiB/s, peak resident memory {peak / 2**20:.2f} GiB "
        f"(before: {before / 2**20:.2f})"
    )


if __name__ == "__main__":
    sys.exit(main())
