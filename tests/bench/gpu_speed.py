"""How fast the product trains on this GPU against scripts written by hand, on the same rows, model and rank.

usage: python tests/bench/gpu_speed.py MODEL_DIR ROWS.jsonl [--rank R] [--only NAME ...]
       python tests/bench/gpu_speed.py MODEL_DIR ROWS.jsonl --profile sft|kto [--variant NAME ...]

Contests run one after the other, each alone on the GPU: the product as a detached run with everything on, the rival as
tests/bench/by_hand.py. ROWS.jsonl holds conversations of a user's and an assistant's turn. `--profile` builds the
product's trainer and prints where two of its steps spend their time, for each variant in a process of its own; each
changes one thing, to find what costs: usual, segments (attention row by row, as Unsloth has it with PyTorch 2.11),
cudnn (attention by cuDNN where torch prefers it), bf16 (the adapter in bf16, as TRL rounds it), quiet (no checkpointing
asked of transformers, for Unsloth has put it on), padded, bare (without the environment that the runner gives), looked
(after the look at the longest rows), plain (TRL's trainer as it is, our rows), hand (the rival itself).
Needs an NVIDIA GPU with bitsandbytes and Unsloth.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
VARIANTS = ("usual", "segments", "cudnn", "bf16", "quiet", "padded", "bare", "looked", "plain", "hand")
PACKED = "batch=3 accumulation=1 packing=1"
KTO = "method=kto batch=4 accumulation=2"
# name: (by hand, the product's settings; a limit of 1.5 is that of the script by hand)
CONTESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft-packed": (PACKED, {"sft.gradient_checkpointing": "on"}),
    "sft-24gb": (PACKED, {"memory_limit": 22.0}),
    "sft-free": (PACKED, {}),
    "sft-padded": ("batch=6 accumulation=4", {"memory_limit": 22.0}),
    "sft-large": (
        "batch=6 accumulation=4 packing=1 steps=8",
        {"sft.batch_size": 48, "sft.gradient_accumulation_steps": 4, "memory_limit": 22.0},
    ),
    "kto": (KTO, {"memory_limit": 1.5}),
    "kto-24gb": (KTO, {"memory_limit": 22.0}),
    "kto-free": ("method=kto batch=8 accumulation=1 checkpointing=0", {}),
}  # fmt: skip


def make_plan(options: argparse.Namespace, method: str, settings: dict[str, Any]) -> Any:
    from core.backend import settle
    from core.config import resolve

    values: dict[str, Any] = {
        "model.size": "7b", "model.name": str(options.model.absolute()), "model.load_in_4bit": True,
        "lora.r": options.rank, "lora.alpha": 2 * options.rank, f"{method}.data.file": str(labelled(options)),
        f"{method}.max_steps": options.steps, f"{method}.logging_steps": 1, f"{method}.save_steps": 1000,
        f"{method}.max_length": 2048, **settings,
    }  # fmt: skip
    if method == "kto":
        values["kto.max_prompt_length"] = 1536
    # as a preset's: a batch that a contest names is kept, every other may be regrouped
    named = {key: "bench" if key in settings else "preset bench" for key in values}
    found = resolve(method, None, {key: (value, named[key]) for key, value in values.items()}, gpu_present=True)
    return settle(found)


def labelled(options: argparse.Namespace) -> Path:
    """The rows with every second one labelled good, as the rival labels them."""
    target = options.runs.absolute() / "rows.jsonl"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with options.rows.open(encoding="utf-8") as stream:
            rows = [json.loads(line) for line in stream if line.strip()]
        lines = (json.dumps({**row, "label": number % 2 == 0}) for number, row in enumerate(rows))
        target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def product(options: argparse.Namespace, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """A detached run; its pace from the fourth step on."""
    from core import runner
    from core.runs import create_run, is_alive

    method = name.split("-")[0]
    extra = {"sft.data.include_undesirable": True} if method == "sft" else {}
    run = create_run(options.runs, make_plan(options, method, {**settings, **extra}))
    begun = time.time()
    runner.start(run)
    while is_alive(run):
        time.sleep(0.3)
    events = [json.loads(line) for line in run.events_path.read_text(encoding="utf-8").splitlines()]
    logs = [event for event in events if event["kind"] == "log"]
    if len(logs) < 6:
        errors = [event["message"][:200] for event in events if event["kind"] == "error"]
        return {"error": errors[-1:] or "too few steps"}
    batch = run.plan().stage(method).effective_batch
    paces = [after["t"] - before["t"] for before, after in zip(logs[3:], logs[4:], strict=False)]
    tokens = [event.get("tokens_per_s") for event in logs[4:] if event.get("tokens_per_s")]
    told = [event for event in events if event["kind"] == "arrangement"]
    phases = {event["name"]: event["seconds"] for event in events if event["kind"] == "phase" and "seconds" in event}
    return {
        "examples_per_s": round(batch * len(paces) / sum(paces), 2), "examples_a_step": batch,
        "tokens_per_s": round(statistics.median(tokens)) if tokens else None,
        "reserved_gib": round(max(event.get("vram_peak_bytes", 0) for event in logs) / 2**30, 2),
        "first_step_s": round(logs[0]["t"] - begun, 1), "phases": phases,
        "arrangement": told[-1] if told else None,
    }  # fmt: skip


def by_hand(options: argparse.Namespace, words: str) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "by_hand.py"), str(options.model.absolute()), str(options.rows.absolute())]
    command += [f"steps={options.steps}", f"rank={options.rank}", *words.split()]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    return json.loads(line[7:]) if line else {"error": done.stderr[-400:]}


def profiled(trainer: Any) -> None:
    """Train a dozen steps and print where two of them spend their time."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback

    watch = profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU])
    stamps: list[float] = []

    class Window(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            torch.cuda.synchronize()
            stamps.append(time.time())
            if len(stamps) == 9:
                watch.start()
            if len(stamps) == 11:
                watch.stop()

    trainer.add_callback(Window())
    trainer.train()
    print("seconds a step:", [round(b - a, 3) for a, b in zip(stamps, stamps[1:], strict=False)])
    found = watch.key_averages()
    busy = sum(entry.self_device_time_total for entry in found) / 1e6
    print(f"two steps: {stamps[10] - stamps[8]:.3f} s, the GPU busy {busy:.3f} s")
    for entry in sorted(found, key=lambda entry: -entry.self_device_time_total)[:24]:
        print(f"  GPU {entry.self_device_time_total / 1e3:9.1f} ms {entry.count:6d} × {entry.key[:90]}")
    for entry in sorted(found, key=lambda entry: -entry.self_cpu_time_total)[:14]:
        print(f"  CPU {entry.self_cpu_time_total / 1e3:9.1f} ms {entry.count:6d} × {entry.key[:70]}")


def compare_variants(options: argparse.Namespace) -> None:
    """Each variant in a process of its own, with what the runner gives a trainer in its environment."""
    from core.children import CHILD_ENV

    for name in options.variant:
        print(f"\n=== {options.profile}, {name}", flush=True)
        if name == "hand":
            batch = PACKED if options.profile == "sft" else KTO
            command = [str(HERE / "by_hand.py"), str(options.model.absolute()), str(options.rows.absolute())]
            command += [f"steps={options.steps}", f"rank={options.rank}", "profile=1", *batch.split()]
        else:
            command = [str(HERE / "gpu_speed.py"), str(options.model), str(options.rows), "--runs", str(options.runs)]
            command += ["--rank", str(options.rank), "--profile", options.profile, "--variant", name, "--inside"]
        given = {} if name in ("bare", "hand") else {**CHILD_ENV, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        done = subprocess.run([sys.executable, *command], env={**os.environ, **given}, capture_output=True, text=True)
        shown = [
            line for line in done.stdout.splitlines() if line.startswith(("seconds a", "two steps", "  ", "RESULT"))
        ]
        print("\n".join(shown) if done.returncode == 0 else done.stderr[-1500:], flush=True)


def look_inside(options: argparse.Namespace) -> None:
    from core.train_attention import import_unsloth

    if options.variant != ["segments"]:
        import_unsloth()
    import unsloth  # noqa: F401, I001 - it patches the libraries after it
    import torch

    from core import train
    from core.fit import planned_arrangement
    from core.prepare import prepare
    from core.runs import create_run
    from core.sources import model_source
    from core.train_events import Reporter

    method, variant = options.profile, options.variant[0]
    settings: dict[str, Any] = {f"{method}.gradient_checkpointing": "on"}
    settings |= {"sft.batch_size": 24, "sft.gradient_accumulation_steps": 1} if method == "sft" else {}
    if variant == "padded":
        settings["sft.padding_free"] = "off"
    found = make_plan(options, method, settings)
    plan = found.plan
    plan.sft.data.include_undesirable = True
    stage = planned_arrangement(plan.stage(method)).applied(plan.stage(method))
    source = model_source(plan.model, print)
    tokenizer, template, _ = train.load_tokenizer(plan, source)
    loaded = train.Loaded(train.load_model(plan, source, stage), tokenizer, template)
    data = prepare(stage, method, template, print)
    if variant == "quiet":
        stage = stage.model_copy(update={"gradient_checkpointing": "off"})
    if variant == "cudnn":
        torch.backends.cuda.enable_cudnn_sdp(True)
    run = create_run(options.runs, found)
    run.stage_path(method).mkdir(exist_ok=True)
    build: Any = train.kto_trainer if method == "kto" else train.sft_trainer
    if variant == "plain" and method == "sft":
        from trl import SFTTrainer

        train.sft_trainer_class = lambda: SFTTrainer
    with train.adapter_kept(loaded.model):
        trainer = build(plan, stage, loaded, data, run.stage_path(method), Reporter(run, method))
    if variant == "bf16":
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    if variant == "looked":
        from core.train_fit import preflight

        free, _ = torch.cuda.mem_get_info()
        trainer.add_callback(looking(lambda: preflight(trainer, stage, free, Reporter(run, method))))
    profiled(trainer)


def looking(look: Any) -> Any:
    from transformers import TrainerCallback

    class Look(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            look()

    return Look()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs-speed"))
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--only", nargs="+", choices=CONTESTS, default=list(CONTESTS))
    parser.add_argument("--profile", choices=("sft", "kto"))
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=["usual"])
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    os.environ["FINETUI_RUNS"] = str(options.runs.absolute())
    if options.profile:
        look_inside(options) if options.inside else compare_variants(options)
        return
    print(f"{'contest':<12}{'by hand':>9}{'finetui':>9}{'ratio':>7}  examples/s   GiB by hand, finetui   first step")
    rivals: dict[str, dict[str, Any]] = {}
    for name in options.only:
        words, settings = CONTESTS[name]
        other = rivals[words] = rivals.get(words) or by_hand(options, words)
        if settings.get("memory_limit") == 1.5:
            settings = {"memory_limit": round(1.5 * other.get("reserved_gib", 7), 1)}
        ours = product(options, name, settings)
        if "error" in other or "error" in ours:
            print(f"{name:<12}", other, ours, flush=True)
            continue
        ratio = ours["examples_per_s"] / other["examples_per_s"]
        print(
            f"{name:<12}{other['examples_per_s']:>9.2f}{ours['examples_per_s']:>9.2f}{ratio:>7.2f}"
            f"{'':13}{other['reserved_gib']:>8.2f}{ours['reserved_gib']:>9.2f}"
            f"{'':8}{other['first_step_s']:>6.0f} s, {ours['first_step_s']:.0f} s", flush=True,
        )  # fmt: skip
        print("   ", json.dumps({"by hand": other, "finetui": ours}), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    main()
