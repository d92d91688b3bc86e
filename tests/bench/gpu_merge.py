"""Is what is merged on a GPU machine the model that was trained? A 7B of random weights will do.

usage: python tests/bench/gpu_merge.py MODEL_DIR WORK_DIR [--steps 3] [--backend trl] [--less GIB]

Needs an NVIDIA GPU with bitsandbytes, and a model folder in 16 bit (safetensors, tokenizer with a chat template).
Through the product: a few steps of SFT in 4 bit on rows made here; `merged_16bit` and `merged_4bit` by its own stages.
Then, each in a process of its own, so that memory is really given back:

  equal    merged_16bit, read back with transformers, against the 16-bit base with PEFT's adapter on it: logits, greedy
  apart    the 4-bit base with the adapter, as it was trained, against merged_16bit: by how much they differ, and by how
           much the base alone does (in a model of random weights that is a lot)
  four     merged_4bit is read back and answers
  exact    merged weights are the exact sum rounded once, for tensors drawn at random

With `--less` the merge may take no more than so much GPU memory: it must be made all the same, without the comparison.
Prints what it saw, then one line for each check, OK or FAILED; the exit code is the number of failed checks.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])

from core import runner  # noqa: E402
from core.artefacts import checked_request, read_report  # noqa: E402
from core.backend import gpu_present, settle  # noqa: E402
from core.commands_export import begin  # noqa: E402
from core.config import resolve  # noqa: E402
from core.events import EventTail  # noqa: E402
from core.runs import Run, create_run, is_alive  # noqa: E402

PROMPTS = ("Set a timer for 5 minutes", "What is 12345 + 678?", "Find a route to Pine Valley by train", "Good morning")
failures: list[str] = []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--backend", choices=("auto", "unsloth", "trl"), default="auto")
    parser.add_argument("--less", type=float, help="GiB of GPU memory that the merge may take")
    options = parser.parse_args()
    assert gpu_present(), "this bench needs a GPU"
    options.work.mkdir(parents=True, exist_ok=True)
    os.environ["FINETUI_RUNS"] = str(options.work.absolute() / "runs")
    run = train(options)
    check("train: done in 4 bit", run.trained("sft"), run.state().end_status)
    if run.trained("sft"):
        merge(run, options)
        for what in ("equal", "apart", "four", "exact"):
            inside(options, what, run)
    print(f"{len(failures)} failed: {'; '.join(failures)}" if failures else "all checks passed")
    return len(failures)


def check(what: str, right: bool, seen: object = "") -> None:
    """Print and remember one check."""
    print(f"{'OK' if right else 'FAILED':<7} {what}{f': {seen}' if seen != '' else ''}", flush=True)
    if not right:
        failures.append(what)


def train(options: argparse.Namespace) -> Run:
    """A few steps at a high rate, so that the adapter is far from zero."""
    rows = options.work / "rows.jsonl"
    calls = [
        (f"Set a timer for {n} minutes", f'tool_call: set_timer\narguments: {{"minutes": {n}}}') for n in range(1, 60)
    ]
    messages = [[{"role": "user", "content": asked}, {"role": "assistant", "content": said}] for asked, said in calls]
    rows.write_text("".join(json.dumps({"messages": one}) + "\n" for one in messages))
    settings: dict[str, Any] = {
        "name": f"merge-{int(time.time())}", "model.name": str(options.model.absolute()), "model.load_in_4bit": True,
        "backend": options.backend, "lora.r": 32, "lora.alpha": 64, "sft.data.file": str(rows.absolute()),
        "sft.max_steps": options.steps, "sft.save_steps": options.steps, "sft.batch_size": 4, "sft.learning_rate": 1e-3,
        "sft.gradient_accumulation_steps": 1, "sft.logging_steps": 1, "export.check_prompts": 4,
        "export.check_tokens": 16,
    }  # fmt: skip
    values = {key: (value, "bench") for key, value in settings.items()}
    run = create_run(options.work / "runs", settle(resolve("sft", None, values, gpu_present=True)))
    runner.start(run)
    wait(run)
    return run


def wait(run: Run) -> None:
    while is_alive(run):
        time.sleep(0.3)


LESS_MEMORY = """
import os, sys, threading, time

def lower():
    while not hasattr(sys.modules.get("core.export_model"), "out_of_memory"):
        time.sleep(0.02)
    import torch
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(float(os.environ["BENCH_LESS_GIB"]) * 2**30 / total)

if "core.export" in sys.orig_argv:
    threading.Thread(target=lower, daemon=True).start()
"""


def merge(run: Run, options: argparse.Namespace) -> None:
    """Both forms by the run's own stage; what it took and what its own check said."""
    if options.less:
        site = options.work.absolute() / ".site"
        site.mkdir(exist_ok=True)
        (site / "sitecustomize.py").write_text(LESS_MEMORY)
        os.environ["PYTHONPATH"] = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
        os.environ["BENCH_LESS_GIB"] = str(options.less)
    begin(run, checked_request(run, {"save_method": "merged_4bit"}))
    wait(run)
    events = EventTail(run.events_path).read()
    for event in events:
        if event["kind"] == "phase" and event.get("stage") == "merge" and "seconds" in event:
            print(f"SEEN merge: {event['name']} {event.get('detail', '')} {event['seconds']} s")
        if event["kind"] in ("error", "notice") and event.get("stage") == "merge":
            print(f"SEEN merge: {event.get('text') or event.get('message')} {event.get('advice', '')}")
    peak = max((event.get("rss_bytes") or 0 for event in events if event["kind"] == "gpu"), default=0)
    forms = read_report(run, "merge").get("forms", {})
    print(f"SEEN merge: {json.dumps(forms)}, largest resident memory {peak / 2**30:.1f} GiB")
    check(
        "merge: done", run.state().end_status == "done" and set(forms) == {"merged_16bit", "merged_4bit"}, list(forms)
    )
    agreement = forms.get("merged_16bit", {}).get("token_agreement")
    if options.less:
        told = json.dumps(forms.get("merged_16bit", {}))
        check("merge: with too little memory it says that the comparison was left out", "memory" in told, told)
    else:
        check("merge: its own check was made", agreement is not None, agreement)


def inside(options: argparse.Namespace, what: str, run: Run) -> None:
    """Run one of the functions below in a fresh interpreter and take over its checks."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import gpu_merge; "
        f"gpu_merge.{what}({str(run.path)!r}, {str(options.model.absolute())!r})"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=options.work, env=environment, capture_output=True, text=True
    )
    (options.work / f"{what}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    for line in done.stdout.splitlines():
        if line.startswith(("OK ", "FAILED ", "SEEN ")):
            print(line, flush=True)
            if line.startswith("FAILED"):
                failures.append(line[7:])
    check(f"{what}: ran to its end", done.returncode == 0, "" if done.returncode == 0 else done.stderr[-1500:])


# Inside: one model after another on the GPU ---------------------------------------------------------------------------


def asked(folder: Path) -> list[list[int]]:
    """The prompts as token ids, by the merged model's own tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [[{"role": "user", "content": text}] for text in PROMPTS]
    texts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def logits_of(model: Any, prompts: list[list[int]]) -> list[Any]:
    import torch

    with torch.no_grad():
        return [model(input_ids=torch.tensor([ids], device="cuda")).logits[0].float().cpu() for ids in prompts]


def greedy_of(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    from core.export_answers import greedy

    return [greedy(model, ids, 16, {model.config.eos_token_id or 2}) for ids in prompts]


def base_model(model: str, *, four_bit: bool) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    arguments: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": 0}, "use_safetensors": True}
    if four_bit:
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(model, **arguments)


def differ(one: list[Any], other: list[Any]) -> tuple[float, float, float]:
    """Largest difference of a logit, relative distance, share of positions with the same likeliest token."""
    largest = max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))
    distance = sum(float((a - b).norm() / b.norm()) for a, b in zip(one, other, strict=True)) / len(one)
    same = sum(int((a.argmax(1) == b.argmax(1)).sum()) for a, b in zip(one, other, strict=True))
    return largest, distance, same / sum(len(a) for a in one)


def with_adapter(path: str, model: str, *, four_bit: bool) -> tuple[Any, Any]:
    """The base, and PEFT's model with the run's adapter on it."""
    from peft import PeftModel

    base = base_model(model, four_bit=four_bit)
    return base, PeftModel.from_pretrained(base, str(Run(Path(path)).final_model("sft"))).eval()


def equal(path: str, model: str) -> None:
    """At equal base precision: merged against base + adapter, and against PEFT's own merge, which rounds as we do."""
    from transformers import AutoModelForCausalLM

    from core.export_answers import forget

    folder = Path(path) / "merge" / "merged_16bit"
    prompts = asked(folder)
    base, tuned = with_adapter(path, model, four_bit=False)
    separate, answers = logits_of(tuned, prompts), greedy_of(tuned, prompts)
    with tuned.disable_adapter():
        plain = logits_of(tuned, prompts)
    rounded = logits_of(tuned.merge_and_unload(), prompts)
    del base, tuned
    forget()
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map={"": 0}).eval()
    check("equal: it is stored in 16 bit", merged.dtype.itemsize == 2, merged.dtype)
    ours, own = logits_of(merged, prompts), greedy_of(merged, prompts)
    moved, apart, peft = differ(separate, plain), differ(ours, separate), differ(ours, rounded)
    rounding = differ(rounded, separate)
    print(f"SEEN equal: the adapter moves logits by {moved}")
    print(f"SEEN equal: merged differs from base + adapter by {apart}, PEFT's merge by {rounding}, both by {peft}")
    check("equal: the adapter moves the logits", moved[1] > 0.01, moved)
    near = apart[1] < 1.05 * rounding[1] and apart[1] < moved[1] / 3
    check("equal: merged is base + adapter up to the rounding to bf16 that PEFT's merge has too", near, apart)
    check("equal: merged is PEFT's own merge", peft[1] < 1e-3, peft)
    same = sum(one == other for one, other in zip(own, answers, strict=True))
    print(f"SEEN equal: {same} of {len(own)} greedy answers of 16 tokens are the same (random weights have near ties)")


def apart(path: str, model: str) -> None:
    """What 4-bit training and a 16-bit merge differ by."""
    from transformers import AutoModelForCausalLM

    from core.export_answers import forget

    folder = Path(path) / "merge" / "merged_16bit"
    prompts = asked(folder)
    base, tuned = with_adapter(path, model, four_bit=True)
    trained = logits_of(tuned, prompts)
    with tuned.disable_adapter():
        packed = logits_of(tuned, prompts)
    del base, tuned
    forget()
    base = base_model(model, four_bit=False).eval()
    bases = differ(logits_of(base, prompts), packed)
    del base
    forget()
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map={"": 0}).eval()
    found = differ(logits_of(merged, prompts), trained)
    same = f"same token {100 * found[2]:.1f} %"
    print(f"SEEN apart: largest logit difference {found[0]:.3f}, relative {found[1]:.4f}, {same}")
    print(f"SEEN apart: the base in 16 bit differs from itself in 4 bit by {bases}")
    check("apart: the difference is that of the base's own 4-bit weights", found[1] < 1.25 * bases[1], found)


def four(path: str, model: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = Path(path) / "merge" / "merged_4bit"
    merged = AutoModelForCausalLM.from_pretrained(folder, device_map={"": 0}).eval()
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**30
    answers = greedy_of(merged, asked(folder))
    check("four: merged_4bit is read back and answers", all(answers), f"{size:.1f} GiB")


def exact(path: str, model: str) -> None:
    """Tensors drawn at random: the sum in float32, rounded once."""
    import random

    import torch

    from core.export_merge import Adapter
    from core.export_weights import BaseWeights

    base, merged = BaseWeights(Path(model)), BaseWeights(Path(path) / "merge" / "merged_16bit")
    adapter = Adapter(Run(Path(path)).final_model("sft"))
    wrong = []
    for module, (a, b, _) in random.Random(0).sample(sorted(adapter.pairs().items()), 6):
        one, other = adapter.tensor(a), adapter.tensor(b)
        right = base.read(f"{module}.weight").float() + adapter.scale(module, one.shape[0]) * (other @ one)
        found = merged.read(f"{module}.weight")
        off = (found.float() - right).abs() / right.abs().clamp(min=1e-3)
        if float(off.max()) > 2**-8 * 1.01 or torch.equal(found.float(), base.read(f"{module}.weight").float()):
            wrong.append((module, float(off.max())))
    check("exact: merged weights are the sum rounded once", not wrong, wrong)


if __name__ == "__main__":
    sys.exit(main())
