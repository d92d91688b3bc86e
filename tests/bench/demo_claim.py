"""Is KTO better than SFT where it aims? Train the demo with several seeds and compare on held-out prompts.

usage: python tests/bench/demo_claim.py [--seeds 1 2 3] [--prompts heldout|tuning] [--parallel N] [--runs DIR]
                                        [--kto-grid 'key=value key=value' ...] [--set key=value ...]

Every run goes through the product: plan, detached runner, evaluation. Settings are chosen with `--prompts tuning`; the
claim is made once with `--prompts heldout`. With `--kto-grid` each entry is a KTO run of its own from the same SFT run.
Prints a table per seed and, over all seeds, the paired comparison of KTO with SFT (exact McNemar test).
"""

import argparse
import os
import time
from pathlib import Path

from core import runner
from core.backend import gpu_present, settle
from core.config import parse_setting, resolve
from core.evaluation import HELD_OUT, evaluation_path, read_cases
from core.paths import configs_dir
from core.runs import Run, create_run, is_alive
from core.scores import mcnemar
from core.sources import demo_files

MARKS = ("format", "alone", "tool", "arguments", "exact")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--prompts", choices=["heldout", "tuning"], default="heldout")
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs-claim"))
    parser.add_argument("--kto-grid", nargs="+", default=[])
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    os.environ["FINETUI_RUNS"] = str(options.runs.absolute())
    file = demo_files()["evaluate" if options.prompts == "heldout" else "tuning"]
    common = ["evaluate.max_prompts=160", f"evaluate.file={file}", "evaluate.batch_size=80", *options.set]

    first_method = "sft" if options.kto_grid else "sft-kto"
    wanted = [(f"{first_method}-seed{seed}", first_method, seed, common) for seed in options.seeds]
    finished = walk(options.runs, wanted, options.parallel)
    for entry in options.kto_grid:
        print(f"== KTO {entry}")
    wanted = [
        (f"kto-{number}-seed{seed}", "kto", seed, [*common, f"model.name=run:sft-seed{seed}", *entry.split()])
        for number, entry in enumerate(options.kto_grid)
        for seed in options.seeds
    ]
    finished |= walk(options.runs, wanted, options.parallel)
    groups: dict[str, list[str]] = {}
    for name in finished:
        groups.setdefault(name.rsplit("-", 1)[0], []).append(name)
    for group, names in groups.items():
        number = group.split("-")[1] if group.startswith("kto-") else ""
        print(f"\n{group}: {options.kto_grid[int(number)] if number else ' '.join(options.set)}")
        report(group, [finished[name] for name in sorted(names)])


def walk(folder: Path, wanted: list[tuple[str, str, int, list[str]]], parallel: int) -> dict[str, Run]:
    """Run everything in `wanted`, at most `parallel` at once."""
    waiting, alive, finished = list(wanted), [], {}
    while waiting or alive:
        while waiting and len(alive) < parallel:
            name, method, seed, pairs = waiting.pop(0)
            if (folder / name).exists():
                run = Run(folder / name)
            else:
                seeds = [f"sft.seed={seed}", f"kto.seed={seed}", f"lora.seed={seed}"]
                settings = {k: (v, "bench") for k, v in map(parse_setting, [*seeds, *pairs, f"name={name}"])}
                config = configs_dir() / "demo.yaml"
                run = create_run(folder, settle(resolve(method, config, settings, gpu_present=gpu_present())))
                runner.start(run)
            alive.append(run)
        time.sleep(0.5)
        for run in [run for run in alive if not is_alive(run)]:
            alive.remove(run)
            finished[run.name] = run
            state = run.state()
            seconds = {stage.name: round((stage.ended or 0) - (stage.started or 0)) for stage in state.stages}
            print(run.name, state.end_status, seconds, flush=True)
    return finished


def answers(run: Run, variant: str) -> list[dict]:
    """The marks of every answer of a model."""
    return [case["answers"][variant]["marks"] for case in read_cases(evaluation_path(run, HELD_OUT))]


def report(group: str, runs: list[Run]) -> None:
    variants = ["base", "sft", "kto"] if not group.startswith("kto-") else ["start", "kto"]
    total: dict[str, list[dict]] = {variant: [] for variant in variants}
    for run in runs:
        for variant in variants:
            found = answers(run, variant)
            total[variant] += found
            if found:
                print(f"  {run.name:<18} {variant:<6} {marks(found)}")
    for variant in variants:
        if total[variant]:
            print(f"  {'all seeds':<18} {variant:<6} {marks(total[variant])}")
    before, after = total["sft" if "sft" in total else "start"], total.get("kto", [])
    if before and after:
        for mark in MARKS:
            better = sum(b[mark] < a[mark] for b, a in zip(before, after, strict=True))
            worse = sum(b[mark] > a[mark] for b, a in zip(before, after, strict=True))
            p = mcnemar(better, worse)
            print(f"  KTO against SFT, {mark:<10} {better:>3} mended, {worse:>3} broken, p = {p:.4f}")


def marks(entries: list[dict]) -> str:
    return "  ".join(f"{mark} {sum(entry[mark] for entry in entries):>3}/{len(entries)}" for mark in MARKS)


if __name__ == "__main__":
    main()
