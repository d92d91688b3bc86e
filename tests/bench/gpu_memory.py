"""What plans take of a GPU's memory: estimated beforehand, measured before the first step, and in training.

usage: python tests/bench/gpu_memory.py MODELS_DIR SFT.jsonl KTO.jsonl [--runs DIR] [--limit GIB] [--budget GIB]
              [--seconds S] [--only NAME ...]

MODELS_DIR holds models of tests/bench/random_models.py (3b also as 3b-16bit). Each plan of CONFIGURATIONS goes through
the product as a run of its own, a few steps a stage, under an allocator limit of a 24 GB card; side by side as far as
their shares fit `--budget`. The chains are stopped with a checkpoint and resumed inside every stage; runs `oom…` are
given less memory in the middle, for a step or an evaluation. Prints a table (and a JSON line each), then the cost of a
look at the card. `--seconds`: when it stops waiting. Needs an NVIDIA GPU with bitsandbytes and Unsloth.
"""

import argparse
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
GIB = 1 << 30
# name: (model, method, settings, GiB to reserve for it, whether it is stopped and resumed in each stage)
CONFIGURATIONS: dict[str, tuple[str, str, dict[str, Any], int, bool]] = {
    "20b-sft": ("20b", "sft", {}, 18, True),
    "20b-kto": ("20b", "kto", {"kto.max_length": 2048, "kto.max_prompt_length": 1536, "kto.max_steps": 2}, 20, False),
    "13b": ("13b", "sft-kto", {}, 23, True),
    "7b": ("7b", "sft-kto", {}, 23, True),
    "3b": ("3b", "sft-kto", {"memory_limit": 12}, 13, True),
    "oom": ("3b", "sft", {"sft.save_steps": 2, "sft.gradient_checkpointing": "on", "memory_limit": 12}, 13, False),
    "oom-evaluation": ("3b", "sft", {"sft.eval_steps": 3, "sft.save_steps": 2, "sft.gradient_checkpointing": "on",
                                     "memory_limit": 12}, 13, False),
    "oom-kto": ("3b", "kto", {"kto.save_steps": 2, "kto.gradient_checkpointing": "on", "memory_limit": 14}, 15, False),
    "7b-sft-6x4": ("7b", "sft", {"sft.batch_size": 6, "sft.gradient_checkpointing": "on"}, 10, False),
    "7b-sft-open": ("7b", "sft", {"sft.batch_size": 2, "sft.gradient_checkpointing": "off"}, 16, False),
    "7b-kto-4x2": ("7b", "kto", {"kto.batch_size": 4, "kto.gradient_accumulation_steps": 2}, 10, False),
    "7b-sft-padded": ("7b", "sft", {"sft.batch_size": 6, "sft.padding_free": "off"}, 23, False),
    "7b-sft-r128": ("7b", "sft", {"lora.r": 128, "sft.batch_size": 12, "sft.gradient_checkpointing": "on"}, 14, False),
    "7b-sft-trl": ("7b", "sft", {"backend": "trl", "sft.batch_size": 6, "sft.gradient_checkpointing": "on"}, 16, False),
    "7b-kto-trl": ("7b", "kto", {"backend": "trl", "kto.batch_size": 4, "kto.gradient_checkpointing": "on"}, 16, False),
    "3b-sft-16bit": ("3b-16bit", "sft", {"sft.batch_size": 12, "sft.gradient_checkpointing": "on"}, 10, False),
    "135m-sft": ("135m", "sft", {"sft.batch_size": 8, "sft.gradient_checkpointing": "on"}, 3, False),
    "135m-kto": ("135m", "kto", {"kto.batch_size": 8, "kto.gradient_checkpointing": "on"}, 4, False),
}  # fmt: skip
# Loaded by every interpreter; in the trainer of a run `oom…` PyTorch may take hardly more than it has, once, after step
# 3: what comes next is another step, or an evaluation.
LESS_MEMORY = """
import pathlib, sys, threading, time

def lower():
    while not hasattr(sys.modules.get("core.train_events"), "EventCallback"):
        time.sleep(0.05)
    callback = sys.modules["core.train_events"].EventCallback
    plain = callback.on_step_end

    def on_step_end(self, args, state, control, **more):
        told = self.reporter.run.path / "lowered"
        if state.global_step == 3 and not told.exists():
            told.touch()
            import torch
            torch.cuda.empty_cache()
            total = torch.cuda.get_device_properties(0).total_memory
            room = 20e6 if control.should_evaluate else 300e6
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + room) / total)
        return plain(self, args, state, control, **more)

    callback.on_step_end = on_step_end

if "core.train" in sys.orig_argv and any(pathlib.Path(word).name.startswith("oom") for word in sys.orig_argv):
    threading.Thread(target=lower, daemon=True).start()
"""


def make_run(options: argparse.Namespace, name: str) -> Any:
    from core.backend import settle
    from core.config import resolve
    from core.runs import create_run

    model, method, settings, _, _ = CONFIGURATIONS[name]
    size = model.removesuffix("-16bit")
    values: dict[str, Any] = {
        "model.size": size, "model.name": str((options.models / model).absolute()), "name": name,
        "model.load_in_4bit": model == size != "135m", "memory_limit": options.limit,
    }  # fmt: skip
    for stage in method.split("-"):
        rows = options.sft if stage == "sft" else options.kto
        values |= {f"{stage}.max_steps": 4, f"{stage}.logging_steps": 1, f"{stage}.save_steps": 100,
                   f"{stage}.data.holdout": 0.02, f"{stage}.data.file": str(rows.absolute())}  # fmt: skip
    values |= settings
    # as a preset's: a batch that the configuration names is kept, every other may be regrouped
    sources = {key: "bench" if key in settings else "preset bench" for key in values}
    found = resolve(method, None, {key: (value, sources[key]) for key, value in values.items()}, gpu_present=True)
    return create_run(options.runs, settle(found))


def events(run: Any, kind: str, stage: str = "") -> list[dict[str, Any]]:
    found = []
    for line in run.events_path.read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event["kind"] == kind and stage in ("", event.get("stage"), event.get("name")):
            found.append(event)
    return found


def follow(options: argparse.Namespace, run: Any, stop_in: str = "") -> None:
    """Wait for the run's end; with `stop_in` ask for a stop once that stage has logged two steps."""
    from core.runs import is_alive, request_stop

    asked = False
    while is_alive(run) and time.monotonic() < options.deadline:
        if stop_in and not asked and any(event["step"] >= 2 for event in events(run, "log", stop_in)):
            asked = True
            request_stop(run)
        time.sleep(0.3)


def one(options: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    from core import runner

    begun, (_, method, _, _, stopped) = time.monotonic(), CONFIGURATIONS[name]
    run = make_run(options, name)
    runner.start(run)
    for stage in method.split("-") if stopped else []:
        follow(options, run, stage)
        if run.state().end_status == "stopped":
            runner.resume(run)
    follow(options, run)
    rows = [told(run, name, stage) for stage in method.split("-")]
    for row in rows:
        print(json.dumps({**row, "seconds": round(time.monotonic() - begun)}), flush=True)
    return rows


def told(run: Any, name: str, stage: str) -> dict[str, Any]:
    """What the run's events say of a stage."""
    looks, logs, totals = (events(run, kind, stage) for kind in ("preflight", "log", "totals"))
    last = looks[-1] if looks else {}
    context = last.get("context_bytes") or 0
    plan = run.plan()
    return {
        "name": name, "stage": stage, "status": run.state().stage(stage).state, "r": plan.lora.r,
        "rows": last.get("batch_size"), "tokens": last.get("tokens"), "open": last.get("open_layers"),
        "effective": plan.stage(stage).effective_batch, "estimated": last.get("estimated_bytes"),
        "items": last.get("estimated_items"), "measured": (last.get("reserved_bytes") or 0) + context,
        "allocated": last.get("allocated_bytes"), "context": context, "look_s": [look["seconds"] for look in looks],
        "trained": max((event.get("vram_peak_bytes", 0) for event in logs), default=0) + context,
        "steps": [event["step"] for event in logs],
        "step_s": [round(after["t"] - before["t"], 1) for before, after in zip(logs, logs[1:], strict=False)],
        "losses": [event.get("loss") for event in logs],
        "kl": [event.get("kl") for event in logs], "resumed": [event["resumed_step"] for event in totals],
        "arrangements": [event["why"] for event in events(run, "arrangement", stage)],
        "notices": [event["text"] for event in events(run, "notice", stage) if event["level"] == "warning"],
        "tried": [look["detail"] for look in events(run, "phase", stage) if "rows at once" in look.get("detail", "")],
        "errors": [event["message"][:300] for event in events(run, "error", stage)],
        "phases": {event["name"]: event["seconds"] for event in events(run, "phase", stage) if "seconds" in event},
    }  # fmt: skip


def table(found: list[dict[str, Any]]) -> None:
    print(f"{'plan':<15}{'stage':<6}{'rows':>5}{'tokens':>8}{'open':>5}{'estimate':>10}{'measured':>10}{'error':>8}"
          f"{'in training':>12}{'24 GB':>7}{'look':>7}  ended, resumed at")  # fmt: skip
    errors = []
    for row in found:
        if not row["measured"] or not row["estimated"]:
            print(f"{row['name']:<15}{row['stage']:<6}{row['status']} {row['errors'][-1:]}")
            continue
        error = row["estimated"] / row["measured"] - 1
        errors.append(abs(error))
        fits = "yes" if max(row["measured"], row["trained"]) <= 24e9 else "no"
        print(f"{row['name']:<15}{row['stage']:<6}{row['rows']:>5}{row['tokens']:>8,}{row['open'] or 0:>5}"
              f"{row['estimated'] / GIB:>10.2f}{row['measured'] / GIB:>10.2f}{error:>8.1%}{row['trained'] / GIB:>12.2f}"
              f"{fits:>7}{sum(row['look_s']):>6.0f}s  {row['status']} {row['resumed'][1:] or ''}")  # fmt: skip
    if errors:
        print(f"{len(errors)} stages, largest error {max(errors):.1%}, {sum(e <= 0.1 for e in errors)} within 10 %")


def look_costs() -> None:
    """Share of a core that the runner's look at the card takes, at one look in five seconds."""
    from core.gpu import Sampler

    sampler = Sampler()
    sampler.sample([os.getpid()])
    begun, cpu = time.monotonic(), time.process_time()
    for _ in range(200):
        sampler.sample([os.getpid()])
    each = (time.process_time() - cpu) / 200
    took = (time.monotonic() - begun) / 200
    print(f"a look at the card: {took * 1e3:.2f} ms, {each * 1e3:.2f} ms of CPU: {each / 5:.3%} of a core")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("sft", type=Path)
    parser.add_argument("kto", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs-memory"))
    parser.add_argument("--limit", type=float, default=22.0, help="GiB PyTorch may take; 22 leaves 2 of a 24 GiB card")
    parser.add_argument("--budget", type=int, default=23, help="GiB for all runs at once")
    parser.add_argument("--seconds", type=float, default=7200)
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS)
    options = parser.parse_args()
    options.deadline = time.monotonic() + options.seconds
    site = options.runs.absolute() / ".site"
    site.mkdir(parents=True, exist_ok=True)
    (site / "sitecustomize.py").write_text(LESS_MEMORY)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(site), str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    os.environ["FINETUI_RUNS"] = str(options.runs.absolute())
    free, change = [options.budget], threading.Condition()

    def reserved(name: str) -> list[dict[str, Any]]:
        share = CONFIGURATIONS[name][3]
        with change:
            change.wait_for(lambda: free[0] >= share)
            free[0] -= share
        try:
            return one(options, name) if time.monotonic() < options.deadline - 40 else []
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            return []
        finally:
            with change:
                free[0] += share
                change.notify_all()

    names = options.only or list(CONFIGURATIONS)
    with ThreadPoolExecutor(len(names)) as pool:
        found = [row for rows in pool.map(reserved, names) for row in rows]
    table(found)
    look_costs()


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    main()
