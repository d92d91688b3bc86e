"""A run that has finished its training, made in a moment: a random adapter where a trainer would have left one."""

import json
import shutil
from pathlib import Path
from typing import Any

from core.backend import settle
from core.checkpoints import write_manifest
from core.config import resolve
from core.runs import Run, create_run


def save_adapter(base: Path, folder: Path, seed: int = 0, **lora: Any) -> None:
    """An adapter with random weights for the model in `base`, with its tokenizer, as a trainer saves it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    config = LoraConfig(
        **{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]} | lora
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    write_manifest(folder)


def finished_run(folder: Path, base: Path, adapter: Path, rows: Path, name: str = "one", **settings: Any) -> Run:
    """A run of SFT on `rows` that ended with `adapter`; `settings` as in the plan, double underscores for dots."""
    values: dict[str, Any] = {
        "name": name, "model.name": str(base), "device": "cpu", "sft.data.file": str(rows), "sft.data.demo": False,
        "export.check_prompts": 2, "export.check_tokens": 6,
    }  # fmt: skip
    values |= {key.replace("__", "."): value for key, value in settings.items()}
    plan = settle(resolve("sft", None, {key: (value, "test") for key, value in values.items()}, gpu_present=False))
    run = create_run(folder, plan)
    run.events.append("run_start")
    run.events.append("stage_start", name="sft")
    run.events.append("totals", stage="sft", steps=6, batch=4, examples=18, rows=20, left_out=2)
    run.events.append("phase", stage="sft", name="train", seconds=61.0)
    run.events.append("stage_end", name="sft", status="done", output="sft/final_model")
    run.events.append("run_end", status="done")
    shutil.copytree(adapter, run.final_model("sft"))
    report = {
        "rows": 20, "examples": 18, "left_out": 2, "left_out_reasons": {"no assistant turn": 2}, "tokens": 900,
        "trained_tokens": 300, "held_out": 0, "labels": {"none": 18}, "sha256": {"rows.jsonl": "ab" * 32},
    }  # fmt: skip
    (run.stage_path("sft") / "data.json").write_text(json.dumps(report))
    return run
