"""Where a training step's GPU memory goes: peaks of real steps at many batch shapes, from which core.memory is fitted.

usage: python tests/bench/gpu_probe.py MODELS_DIR OUT.jsonl [--only NAME ...] [--budget GIB]

Each probe is a process: it makes the product's own trainer for a model of tests/bench/random_models.py on rows of
chosen lengths, and measures steps and evaluations of growing batches without training on. Probes run side by side as
far as their shares fit into `--budget`. Needs an NVIDIA GPU with bitsandbytes, and Unsloth for most.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
GIB = 1 << 30
# (rows, tokens a row); KTO's rows are half prompt, half completion
SFT_POINTS = [(1, 512), (2, 512), (4, 512), (1, 1024), (6, 512), (2, 2048), (12, 512), (6, 1664), (24, 1024)]
KTO_POINTS = [(2, 512), (4, 512), (2, 1664), (8, 512), (4, 1664), (16, 512), (8, 1664), (16, 1664), (8, 4096)]
CPU_POINTS = [(2, 32), (2, 64), (4, 64), (2, 128), (4, 128), (8, 128), (4, 256), (2, 512), (8, 256), (4, 512)]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# name: (model, stage, settings, share of the budget in GiB)
PROBES: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "20b-sft-attention": ("20b", "sft", {"lora.target_modules": ATTENTION, "lora.r": 128}, 24),
    "20b-sft-r8": ("20b", "sft", {"lora.r": 8}, 24),
    "20b-kto-r8": ("20b", "kto", {"lora.r": 8}, 24),
    "13b-sft": ("13b", "sft", {}, 18),
    "13b-kto": ("13b", "kto", {}, 22),
    "7b-sft": ("7b", "sft", {}, 12),
    "7b-kto": ("7b", "kto", {}, 20),
    "7b-sft-open": ("7b", "sft", {"gradient_checkpointing": "off"}, 32),
    "7b-kto-open": ("7b", "kto", {"gradient_checkpointing": "off"}, 32),
    "7b-sft-trl": ("7b", "sft", {"backend": "trl"}, 24),
    "7b-kto-trl": ("7b", "kto", {"backend": "trl"}, 24),
    "3b-sft": ("3b", "sft", {}, 10),
    "3b-kto": ("3b", "kto", {}, 16),
    "3b-sft-16bit": ("3b-16bit", "sft", {}, 14),
    "3b-sft-open": ("3b", "sft", {"gradient_checkpointing": "off"}, 24),
    "135m-sft": ("135m", "sft", {}, 4),
    "135m-kto": ("135m", "kto", {}, 6),
}  # fmt: skip


def plan_of(models: Path, name: str, limit: float, device: str | None) -> Any:
    from core.backend import settle
    from core.config import resolve

    model, stage, settings, _ = PROBES[name]
    size = model.removesuffix("-16bit")
    values: dict[str, Any] = {
        "model.size": size, "model.name": str((models / model).absolute()), f"{stage}.data.file": "unused",
        "model.load_in_4bit": model == size != "135m", f"{stage}.max_length": 4096, "memory_limit": limit,
    }  # fmt: skip
    if device:
        values |= {"device": device, "model.load_in_4bit": False}
    for key, value in settings.items():
        values[key if "." in key or key == "backend" else f"{stage}.{key}"] = value
    found = resolve(stage, None, {key: (value, "probe") for key, value in values.items()}, gpu_present=device != "cpu")
    return settle(found).plan


def rows_of(points: list[tuple[int, int]], stage: str) -> Any:
    """A ledger of synthetic examples, enough of each length."""
    import random

    from core.chat import Example, Tokenised, TokenLedger
    from core.data import Conversation

    chance, ledger = random.Random(0), TokenLedger()
    for length in sorted({length for _, length in points}):
        for number in range(max(rows for rows, each in points if each == length)):
            ids = [chance.randrange(10, 30000) for _ in range(length)]
            row = Conversation("probe", number, [{"role": "user", "content": f"{length} {number}"},
                                                 {"role": "assistant", "content": "."}], number % 2 == 0)  # fmt: skip
            ledger.examples.append(Example(row, Tokenised(ids, [at >= length // 2 for at in range(length)])))
    return ledger


def resident_peak() -> int:
    """Bytes this process had in memory at its highest since it was last told to forget (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


class Stop(Exception):
    pass


def probe(models: Path, name: str, limit: float, device: str | None) -> None:
    """One process: prints a JSON line for the load and one a point."""
    import tempfile

    if os.environ.get("FINETUI_BACKEND") == "unsloth":
        from core.train_attention import import_unsloth

        import_unsloth()
    import torch
    from transformers import TrainerCallback

    from core import train
    from core.fit import planned_arrangement
    from core.gpu import Sampler
    from core.prepare import StageData
    from core.runs import Run
    from core.sources import model_source
    from core.train_events import Reporter
    from core.train_fit import as_it_was, cap_memory, optimiser_state, out_of_memory

    cuda = torch.cuda
    stage_name = PROBES[name][1]
    plan = plan_of(models, name, limit, device)
    stage = plan.stage(stage_name)
    run = Run(Path(tempfile.mkdtemp(prefix="probe-")))
    reporter = Reporter(run, stage_name)
    cap_memory(plan, reporter)

    def peaks() -> dict[str, int]:
        if not cuda.is_available():
            return {"rss": resident_peak()}
        cuda.synchronize()
        return {"allocated": cuda.max_memory_allocated(), "reserved": cuda.max_memory_reserved()}

    def say(**fields: Any) -> None:
        print("POINT", json.dumps({"probe": name, "stage": stage_name, **fields}), flush=True)

    begun = time.monotonic()
    source = model_source(plan.model, print)
    tokenizer, template, _ = train.load_tokenizer(plan, source)
    stage = planned_arrangement(stage).applied(stage)
    loaded = train.Loaded(train.load_model(plan, source, stage), tokenizer, template)
    parameters = [p for p in loaded.model.parameters() if p.requires_grad]
    say(what="load", seconds=round(time.monotonic() - begun, 1), now=cuda.memory_allocated(), **peaks(),
        trainable=sum(p.numel() for p in parameters), backend=plan.backend, r=plan.lora.r, optim=stage.optim,
        kinds=sorted({str(p.dtype) for p in parameters}), checkpointing=stage.gradient_checkpointing)  # fmt: skip
    points = SFT_POINTS if stage_name == "sft" else KTO_POINTS
    points = CPU_POINTS if device == "cpu" else points
    ledger = rows_of(points, stage_name)
    data = StageData([], ledger, ledger, [])
    build: Any = train.kto_trainer if stage_name == "kto" else train.sft_trainer
    with train.adapter_kept(loaded.model):
        trainer = build(plan, stage, loaded, data, run.stage_path(stage_name), reporter)

    class Measure(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            model = trainer.model
            own = Sampler().sample([os.getpid()])
            used = own[0].own_memory_bytes if own else None
            say(what="ready", now=cuda.memory_allocated(), reserved=cuda.memory_reserved(), process=used,
                padding_free=bool(getattr(trainer.args, "padding_free", False)))  # fmt: skip
            loader, dataset = trainer.get_train_dataloader(), trainer.train_dataset
            names = [key for key in ("input_ids", "prompt_ids", "completion_ids") if key in dataset.column_names]
            lengths = [sum(map(len, row)) for row in zip(*(dataset[key] for key in names), strict=True)]
            state = optimiser_state(model, stage)
            for rows, length in [points[0], *points]:
                chosen = [index for index, each in enumerate(lengths) if each == length][:rows]
                for what in ("step", "eval"):
                    cuda.empty_cache()
                    before = cuda.memory_allocated()
                    if cuda.is_available():
                        cuda.reset_peak_memory_stats()
                    else:
                        Path("/proc/self/clear_refs").write_text("5")  # forget the highest resident size
                    start = time.monotonic()
                    try:
                        with as_it_was(trainer):
                            trainer.current_gradient_accumulation_steps = 4
                            batch = loader.collate_fn([dataset[index] for index in chosen])
                            if what == "step":
                                trainer.training_step(model, batch)
                            else:
                                model.eval()
                                trainer.prediction_step(model, batch, prediction_loss_only=True)
                            found = peaks()
                    except Exception as error:
                        if not out_of_memory(error):
                            raise
                        found = {"allocated": -1}
                        error.__traceback__ = None
                    say(what=what, rows=rows, length=length, before=before, **found,
                        seconds=round(time.monotonic() - start, 2))  # fmt: skip
            own = Sampler().sample([os.getpid()])
            say(what="end", reserved=cuda.memory_reserved(), process=own[0].own_memory_bytes if own else None)
            del state
            raise Stop

    trainer.add_callback(Measure())
    try:
        trainer.train()
    except Stop:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=PROBES)
    parser.add_argument("--budget", type=int, default=72, help="GiB for all probes that run at once")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--device", help="cpu: only to try this script")
    parser.add_argument("--timeout", type=int, default=240, help="seconds a probe")
    options = parser.parse_args()
    if options.child:
        probe(options.models, options.child, PROBES[options.child][3], options.device)
        return
    free, change = [options.budget], threading.Condition()

    def one(name: str) -> None:
        share = PROBES[name][3]
        with change:
            change.wait_for(lambda: free[0] >= share)
            free[0] -= share
        backend = PROBES[name][2].get("backend", "trl" if options.device == "cpu" else "unsloth")
        environment = {**os.environ, "FINETUI_BACKEND": backend, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
                       "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}  # fmt: skip
        work = options.out.absolute().parent / "probes" / name
        work.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-P", str(Path(__file__).absolute()), str(options.models.absolute()),
                   str(options.out.absolute()), "--child", name]  # fmt: skip
        command += ["--device", options.device] if options.device else []
        begun = time.monotonic()
        try:
            done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True,
                                  timeout=options.timeout)  # fmt: skip
            said, errors, code = done.stdout, done.stderr, done.returncode
        except subprocess.TimeoutExpired as late:
            said, errors, code = (str(part or b"", "utf-8", "replace") if isinstance(part, bytes) else part or ""
                                  for part in (late.stdout, late.stderr, "timeout"))  # fmt: skip
        (work / "output.log").write_text(f"{said}\n{errors}")
        found = list(lines_of(said))
        with change:
            free[0] += share
            change.notify_all()
            with options.out.open("a") as stream:
                stream.writelines(json.dumps(line) + "\n" for line in found)
            words = f"{name}: {len(found)} lines, exit {code}, {time.monotonic() - begun:.0f} s"
            print(words if code == 0 else f"{words}\n{errors[-1500:]}", flush=True)

    names = options.only or list(PROBES)
    with ThreadPoolExecutor(len(names)) as pool:
        for future in [pool.submit(one, name) for name in names]:
            future.result()


def lines_of(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        if line.startswith("POINT "):
            yield json.loads(line[6:])


if __name__ == "__main__":
    main()
