"""What the product is measured against: SFT or KTO as one writes it by hand with Unsloth. Prints one line RESULT {…}.

usage: python tests/bench/by_hand.py MODEL_DIR ROWS.jsonl [key=value ...]
keys:  method=sft|kto batch=6 accumulation=4 steps=14 rank=32 packing=0|1 checkpointing=unsloth|0 profile=0|1

Rows are {"conversations": [...]} whose first turn is the user's; KTO takes every second one for good. An example is a
row of the file also where rows are packed.
"""

import json
import os
import sys
import tempfile
import time
from typing import Any

BEGUN = time.time()
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_DISABLED": "true"}


def options_of(words: list[str]) -> dict[str, str]:
    usual = {"method": "sft", "batch": "6", "accumulation": "4", "steps": "14", "rank": "32", "packing": "0",
             "checkpointing": "unsloth", "profile": "0"}  # fmt: skip
    return usual | dict(word.split("=", 1) for word in words)


def main() -> None:
    model_dir, rows_file, *words = sys.argv[1:]
    options = options_of(words)
    from unsloth import FastLanguageModel  # isort: skip
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

    imported = time.time() - BEGUN
    rank, packing = int(options["rank"]), options["packing"] == "1"
    model, tokenizer = FastLanguageModel.from_pretrained(model_dir, max_seq_length=2048, load_in_4bit=True)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    checkpointing: Any = False if options["checkpointing"] == "0" else "unsloth"
    model = FastLanguageModel.get_peft_model(
        model, r=rank, lora_alpha=2 * rank, target_modules=targets, use_gradient_checkpointing=checkpointing
    )
    loaded = time.time() - BEGUN
    with open(rows_file, encoding="utf-8") as stream:
        rows = [json.loads(line)["conversations"] for line in stream if line.strip()]
    stamps: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            torch.cuda.synchronize()
            stamps.append(time.time())

    shared: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "per_device_train_batch_size": int(options["batch"]),
        "gradient_accumulation_steps": int(options["accumulation"]), "max_steps": int(options["steps"]),
        "optim": "adamw_8bit", "bf16": True, "warmup_steps": 2, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "gradient_checkpointing": False, "max_length": 2048,
    }  # fmt: skip
    if options["method"] == "sft":
        texts = [{"text": tokenizer.apply_chat_template(row, tokenize=False)} for row in rows]
        padding = {} if packing else {"padding_free": False}
        config = SFTConfig(packing=packing, learning_rate=2e-4, **padding, **shared)
        trainer = SFTTrainer(model=model, processing_class=tokenizer, args=config, callbacks=[Clock()],
                             train_dataset=Dataset.from_list(texts))  # fmt: skip
    else:
        labelled = [{"prompt": row[:-1], "completion": row[-1:], "label": number % 2 == 0}
                    for number, row in enumerate(rows)]  # fmt: skip
        trainer = KTOTrainer(model=model, processing_class=tokenizer, args=KTOConfig(learning_rate=1e-6, **shared),
                             callbacks=[Clock()], train_dataset=Dataset.from_list(labelled))  # fmt: skip
    torch.cuda.reset_peak_memory_stats()
    if options["profile"] == "1":
        from gpu_speed import profiled

        profiled(trainer)
    else:
        trainer.train()
    paces = [after - before for before, after in zip(stamps[3:], stamps[4:], strict=False)]
    per_row = len(rows) / len(trainer.train_dataset) if packing else 1
    examples = int(options["batch"]) * int(options["accumulation"]) * per_row
    print("RESULT", json.dumps({
        "imports_s": round(imported, 1), "load_s": round(loaded - imported, 1),
        "first_step_s": round(stamps[0] - BEGUN, 1), "examples_per_s": round(examples * len(paces) / sum(paces), 2),
        "examples_a_step": round(examples, 1),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
    }), flush=True)  # fmt: skip


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    main()
