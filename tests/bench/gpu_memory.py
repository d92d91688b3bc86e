"""What plans take of a GPU's memory: measured before the first step, in the first steps, and estimated.

usage: python tests/bench/gpu_memory.py make TOKENIZER_DIR MODELS_DIR [--sizes SIZE ...]
       python tests/bench/gpu_memory.py run MODELS_DIR SFT.jsonl KTO.jsonl [--runs DIR] [--limit GIB]
              [--parallel N] [--only NAME ...]

`make` writes models of the presets' shapes with random weights (memory does not depend on the weights): 47 GB on disk.
`run` trains each plan of CONFIGURATIONS a few steps under an allocator limit, and prints a table and a JSON line each.
Needs an NVIDIA GPU with bitsandbytes and Unsloth.
"""

import argparse
import json
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

GIB = 1 << 30
SHAPES: dict[str, dict[str, Any]] = {
    "135m": {"kind": "Llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
             "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    "3b": {"kind": "Qwen2", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008,
           "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "7b": {"kind": "Mistral", "vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336,
           "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
           "tie_word_embeddings": False, "sliding_window": None},
    "13b": {"kind": "Llama", "vocab_size": 32768, "hidden_size": 5120, "intermediate_size": 13824,
            "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40,
            "tie_word_embeddings": False},
}  # fmt: skip
# name: (size, stage, settings); the first of each size and stage is the preset's own.
CONFIGURATIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "13b-kto": ("13b", "kto", {}),
    "13b-sft": ("13b", "sft", {}),
    "7b-kto": ("7b", "kto", {}),
    "7b-sft-open": ("7b", "sft", {"gradient_checkpointing": "off"}),
    "7b-kto-small": ("7b", "kto", {"batch_size": 4, "gradient_accumulation_steps": 2}),
    "7b-sft": ("7b", "sft", {}),
    "7b-sft-wide": ("7b", "sft", {"batch_size": 24, "gradient_accumulation_steps": 1}),
    "7b-sft-trl": ("7b", "sft", {"backend": "trl"}),
    "3b-kto": ("3b", "kto", {}),
    "3b-sft": ("3b", "sft", {}),
    "3b-sft-16bit": ("3b", "sft", {"model.load_in_4bit": False}),
    "135m-sft": ("135m", "sft", {"batch_size": 8}),
    "135m-kto": ("135m", "kto", {"batch_size": 8}),
}


def make(tokenizer: Path, folder: Path, sizes: list[str]) -> None:
    import torch
    import transformers

    for size, shape in SHAPES.items():
        if size not in sizes:
            continue
        values = {**shape, "max_position_embeddings": 32768, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        kind = values.pop("kind")
        config = getattr(transformers, f"{kind}Config")(**values)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"):
            model = getattr(transformers, f"{kind}ForCausalLM")(config)
        model.save_pretrained(folder / size, max_shard_size="8GB")
        del model
        torch.cuda.empty_cache()
        for file in tokenizer.iterdir():
            shutil.copy(file, folder / size)
        print(size, "written", flush=True)


def plan_of(options: argparse.Namespace, name: str) -> Any:
    from core.backend import settle
    from core.config import resolve
    from core.runs import create_run

    size, stage, settings = CONFIGURATIONS[name]
    values: dict[str, Any] = {
        "model.size": size, "model.name": str((options.models / size).absolute()), "name": name,
        "model.load_in_4bit": size != "135m", "memory_limit": options.limit, f"{stage}.max_steps": 3,
        f"{stage}.logging_steps": 1, f"{stage}.save_steps": 100, f"{stage}.data.holdout": 0.02,
        f"{stage}.data.file": str((options.sft if stage == "sft" else options.kto).absolute()),
    }  # fmt: skip
    for key, value in settings.items():
        values[key if "." in key or key == "backend" else f"{stage}.{key}"] = value
    found = resolve(stage, None, {key: (value, "bench") for key, value in values.items()}, gpu_present=True)
    return create_run(options.runs, settle(found))


def one(options: argparse.Namespace, name: str) -> dict[str, Any]:
    from core import runner
    from core.runs import is_alive

    begun = time.monotonic()
    run = plan_of(options, name)
    runner.start(run)
    while is_alive(run):
        time.sleep(0.5)
    events = [json.loads(line) for line in run.events_path.read_text().splitlines()]
    looks = [event for event in events if event["kind"] == "preflight"]
    logs = [event for event in events if event["kind"] == "log"]
    totals = [event for event in events if event["kind"] == "totals"]
    errors = [event for event in events if event["kind"] == "error"]
    found = {
        "name": name, "status": run.state().end_status, "seconds": round(time.monotonic() - begun),
        "preflights": [
            {key: event[key] for key in ("batch_size", "loaded_bytes", "allocated_bytes", "reserved_bytes", "seconds")}
            for event in looks
        ],
        "tried": [event["detail"] for event in events if "rows at once" in event.get("detail", "")],
        "trained_peak_bytes": max((event.get("vram_peak_bytes", 0) for event in logs), default=0),
        "longest": totals[-1]["longest"] if totals else None,
        "trainable": totals[-1]["trainable"] if totals else None,
        "error": errors[-1]["message"][:300] if errors else "",
    }  # fmt: skip
    print(json.dumps(found), flush=True)
    return found


def run(options: argparse.Namespace) -> None:
    os.environ["FINETUI_RUNS"] = str(options.runs.absolute())
    with ThreadPoolExecutor(options.parallel) as pool:
        rows = list(pool.map(lambda name: one(options, name), options.only or CONFIGURATIONS))
    print(f"{'plan':<14} {'ended':<7} {'rows':>5} {'before step 1':>14} {'in training':>12} {'look':>6}")
    for row in rows:
        looks = row["preflights"]
        rows_fit = str(looks[-1]["batch_size"]) if looks else "-"
        before = f"{looks[-1]['reserved_bytes'] / GIB:.1f} GiB" if looks else "-"
        trained = f"{row['trained_peak_bytes'] / GIB:.1f} GiB"
        seconds = f"{sum(look['seconds'] for look in looks):.0f} s"
        print(f"{row['name']:<14} {row['status'] or '-':<7} {rows_fit:>5} {before:>14} {trained:>12} {seconds:>6}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    maker = commands.add_parser("make")
    maker.add_argument("tokenizer", type=Path)
    maker.add_argument("models", type=Path)
    maker.add_argument("--sizes", nargs="+", choices=SHAPES, default=list(SHAPES))
    maker.set_defaults(act=lambda options: make(options.tokenizer, options.models, options.sizes))
    trainer = commands.add_parser("run")
    trainer.add_argument("models", type=Path)
    trainer.add_argument("sft", type=Path)
    trainer.add_argument("kto", type=Path)
    trainer.add_argument("--runs", type=Path, default=Path("runs-memory"))
    trainer.add_argument("--limit", type=float, default=23.0, help="GiB a run may take; 23 is a 24 GB card")
    trainer.add_argument("--parallel", type=int, default=1)
    trainer.add_argument("--only", nargs="+", choices=CONFIGURATIONS)
    trainer.set_defaults(act=run)
    options = parser.parse_args()
    options.act(options)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()
