"""Does SFT help on real tool-calling data, and does KTO after it? SmolLM2-135M on a CPU, the five sets of shared/data.

usage: python tests/bench/real_data.py [--data DIR] [--runs DIR] [--only SET ...] [--prompts N] [--table]

Every run goes through the product: plan, detached runner, `finetui eval` on rows that no stage has trained on. SFT
where the set has no bad rows; SFT, then KTO from its adapter with each of KTO's settings below, where it has. Runs and
answers that are there already are not made again, so it can be stopped and started. `--table` only prints.

The tools' schemas are made from the good rows of the whole set: an argument is required when every call of the tool has
it. The argument `context` (session ids and free text about the user) is not compared.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from core import runner
from core.backend import settle
from core.config import parse_setting, resolve
from core.data import read_rows
from core.evaluation import HELD_OUT, evaluation_path, read_cases, read_report
from core.evaluation_report import share_words
from core.runs import Run, create_run, is_alive
from core.scores import MARKS, changes
from core.toolcalls import read_calls, structured_calls

SETS: dict[str, dict[str, Any]] = {
    "labelled": {"file": "tool_calls_labelled.jsonl", "holdout": 0.1, "sft": 75, "kto": 36},
    "behaviour": {"file": "behaviour_kto.jsonl", "holdout": 0.06, "sft": 70, "kto": 36},
    "ask-first": {"file": "ask_first_pairs.jsonl", "holdout": 0.4, "sft": 24, "kto": 24},
    "sft": {"file": "tool_calls_sft.jsonl", "holdout": 0.03, "sft": 90},
    "vault": {"file": "vault_manager_tool_calls.jsonl", "holdout": 0.06, "sft": 60},
}
KTO_SETTINGS = {
    "preset": {},  # 135m: rate 1.5e-4, beta 2, chosen on the demo's short calls
    "gentle": {"learning_rate": 2e-5, "beta": 0.1},
    "firm": {"learning_rate": 1e-4, "beta": 0.1},
}
COMMON = {"model.size": "135m", "lora.seed": 1}
STAGE = {"seed": 1, "max_length": 640, "save_steps": 1000, "logging_steps": 2, "data.demo": False}
# Nothing is learned from the held-out loss here, and KTO's takes as long as half its training.
STAGE |= {"extra.eval_delay": 100_000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[3] / "shared" / "data")
    parser.add_argument("--runs", type=Path, default=Path("runs-real"))
    parser.add_argument("--only", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--settings", nargs="+", choices=list(KTO_SETTINGS), default=list(KTO_SETTINGS))
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=320)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    folder = options.runs.absolute()
    os.environ["FINETUI_RUNS"] = str(folder)
    for name in options.only:
        entry = SETS[name]
        path = options.data / entry["file"]
        runs = {"": Run(folder / name)}
        if entry.get("kto"):
            runs = {setting: Run(folder / f"{name}-{setting}") for setting in options.settings}
        if not options.table:
            tools = write_tools(path, folder / f"{name}-tools.json")
            train(folder, name, entry, path, "")
            for setting, run in runs.items():
                if setting:
                    train(folder, name, entry, path, setting)
                share_answers(runs, run)
                evaluate(run, tools, options.prompts, options.tokens)
        report(name, runs)


def train(folder: Path, name: str, entry: dict[str, Any], path: Path, setting: str) -> None:
    """The SFT run of a set, or with a setting the KTO run from its adapter; waits for its end."""
    run = Run(folder / (f"{name}-{setting}" if setting else name))
    stage = "kto" if setting else "sft"
    values = {**COMMON, "name": run.name, **{f"{stage}.{key}": value for key, value in STAGE.items()}}
    values |= {
        f"{stage}.data.file": str(path),
        f"{stage}.data.holdout": entry["holdout"],
        f"{stage}.max_steps": entry[stage],
    }
    if setting:
        values |= {"model.name": f"run:{name}", "kto.max_prompt_length": 512}
        values |= {f"kto.{key}": value for key, value in KTO_SETTINGS[setting].items()}
    if not run.path.exists():
        settings = dict(parse_setting(f"{key}={value}") for key, value in values.items())
        plan = resolve(stage, None, {key: (value, "bench") for key, value in settings.items()}, gpu_present=False)
        runner.start(create_run(folder, settle(plan)))
    elif not is_alive(run) and not run.trained(stage):
        runner.resume(run)
    while is_alive(run):
        time.sleep(1)
    state = run.state()
    seconds = {one.name: round((one.ended or 0) - (one.started or 0)) for one in state.stages}
    print(f"{run.name}: {state.end_status} {seconds}", flush=True)


def write_tools(path: Path, target: Path) -> Path:
    """Schemas of the tools that the good rows of a set call; where they call none, of those that any row calls."""
    keys: dict[str, Counter[str]] = defaultdict(Counter)
    calls: Counter[str] = Counter()
    rows = read_rows(path, "sft", include_undesirable=True).used
    good = [row for row in rows if row.label is not False]
    turns = [message for row in good for message in row.messages if message["role"] == "assistant"]
    called = any(turn.get("tool_calls") or read_calls(str(turn["content"])).calls for turn in turns)
    for row in good if called else rows:
        for message in row.messages:
            if message["role"] != "assistant":
                continue
            found = structured_calls(message.get("tool_calls")) or read_calls(str(message["content"])).calls
            for call in found:
                if call.well_formed:
                    calls[call.name] += 1
                    keys[call.name].update(list(call.arguments or {}))
    tools = [
        {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {key: {} for key in keys[name]},
                "required": sorted(key for key, count in keys[name].items() if count == times),
                "additionalProperties": False,
            },
        }
        for name, times in calls.items()
    ]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(tools, indent=1))
    return target


def share_answers(runs: dict[str, Run], run: Run) -> None:
    """What base and SFT model have answered for one setting of KTO need not be answered for the next."""
    target = evaluation_path(run, HELD_OUT)
    for other in runs.values():
        for name in ("answers-base.jsonl", "answers-start.jsonl"):
            source = evaluation_path(other, HELD_OUT) / name
            if source.is_file() and not (target / name).exists():
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target / name)


def evaluate(run: Run, tools: Path, prompts: int, tokens: int) -> None:
    """`finetui eval`, in a process of its own."""
    words = ["eval", run.name, "--tools", str(tools), "--ignore-argument", "context", "--loss", "on"]
    words += ["--max-prompts", str(prompts), "--max-new-tokens", str(tokens), "--batch-size", "20", "--json"]
    done = subprocess.run([sys.executable, "-P", "-m", "core.cli", *words], stdout=subprocess.DEVNULL)
    print(f"{run.name}: evaluated, exit {done.returncode}", flush=True)


def report(name: str, runs: dict[str, Run]) -> None:
    """A table of the set: base, SFT, and KTO with each setting, over the prompts that all of them answered."""
    print(f"\n## {name} ({SETS[name]['file']})")
    for setting, run in runs.items():
        found = read_report(evaluation_path(run, HELD_OUT))
        if found is None:
            print(f"{run.name}: not evaluated")
            continue
        print(f"\n{run.name}: {found['prompts']} prompts; {'; '.join(found['notes'])}")
        for variant in found["variants"]:
            marks = found["table"][variant]
            shown = "  ".join(f"{MARKS[mark][0]} {share_words(rate)}" for mark, rate in marks.items())
            loss = found["losses"].get(variant)
            print(f"  {variant:<6} {shown}  loss {loss['mean'] if loss else '–'}  cut {found['cut'][variant]}")
        cases = read_cases(evaluation_path(run, HELD_OUT))
        if setting:
            names = [name for name in ("start", "sft", "kto") if name in found["variants"]]
            before, after = ([case["answers"][name]["marks"] for case in cases] for name in names)
            for mark, change in changes(before, after).items():
                if change["mended"] or change["broken"]:
                    told = f"{change['mended']} mended, {change['broken']} broken, p {change['p']}"
                    print(f"  KTO against SFT, {mark}: {told}")


if __name__ == "__main__":
    main()
