"""Does training work on this GPU? Every path through the product, and what a batch, a mask and a reference really are.

usage: python tests/bench/gpu_smoke.py MODEL_DIR SFT.jsonl KTO.jsonl [--runs DIR] [--parts NAME ...] [--parallel N]

Needs an NVIDIA GPU with bitsandbytes and Unsloth, a model folder (a random 7B will do: losses mean nothing then, speed
and memory do) and a few hundred rows for SFT and for KTO. Parts, each a process or a run of its own:

  chain    SFT then KTO with Unsloth in 4 bit, stopped and resumed inside each stage
  trl      the same with plain TRL and PEFT, three steps a stage, not stopped
  sign     two steps of KTO-S with Unsloth
  batches  a trainer's batches against what the data room's lens shows; whether rows laid end to end see each other
  speed    one Unsloth run alone, longer: examples a second, seconds of each phase, peak memory; then the final model is
           read back with transformers and PEFT

Prints what it saw, then one line for each check, OK or FAILED; the exit code is the number of failed checks.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from core import runner
from core.backend import gpu_present, settle
from core.checkpoints import complete_checkpoints
from core.config import resolve
from core.runs import Run, create_run, is_alive, request_stop

REPOSITORY = Path(__file__).resolve().parents[2]
SHAPE = {"model.load_in_4bit": True, "lora.r": 32, "lora.alpha": 64}
failures: list[str] = []


def main() -> int:
    parts: dict[str, Callable[[argparse.Namespace], None]] = {
        "chain": chain, "trl": plain_trl, "sign": sign, "batches": batches, "speed": speed,
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("sft", type=Path)
    parser.add_argument("kto", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs-gpu"))
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--parallel", type=int, default=1, help="parts at once; speed is measured alone, last")
    options = parser.parse_args()
    os.environ["FINETUI_RUNS"] = str(options.runs.absolute())
    with ThreadPoolExecutor(options.parallel) as pool:
        together = [pool.submit(parts[name], options) for name in options.parts if name != "speed"]
    for future in together:
        future.result()
    if "speed" in options.parts:
        speed(options)
    print(f"{len(failures)} failed: {'; '.join(failures)}" if failures else "all checks passed")
    return len(failures)


def check(what: str, right: bool, seen: object = "") -> None:
    """Print and remember one check."""
    print(f"{'OK' if right else 'FAILED':<7} {what}{f': {seen}' if seen != '' else ''}", flush=True)
    if not right:
        failures.append(what)


# Runs ----------------------------------------------------------------------------------------------------------------


def make(options: argparse.Namespace, name: str, method: str, **more: Any) -> Run:
    """A run of a few steps on the given model and rows; `more` with double underscores for dots."""
    settings: dict[str, Any] = {
        **SHAPE, "name": name, "model.name": str(options.model.absolute()),
        "sft.data.file": str(options.sft.absolute()), "kto.data.file": str(options.kto.absolute()),
        "kto.max_length": 2048, "kto.max_prompt_length": 1536, "kto.learning_rate": 5e-6,
    }  # fmt: skip
    for stage in ("sft", "kto"):
        settings |= {f"{stage}.batch_size": 4, f"{stage}.gradient_accumulation_steps": 2, f"{stage}.max_steps": 6}
        settings |= {f"{stage}.save_steps": 3, f"{stage}.logging_steps": 1}
    settings |= {key.replace("__", "."): value for key, value in more.items()}
    resolved = resolve(method, None, {key: (value, "bench") for key, value in settings.items()}, gpu_present=True)
    assert gpu_present(), "this bench needs a GPU"
    return create_run(options.runs, settle(resolved))


def events(run: Run, kind: str, stage: str = "") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in run.events_path.read_text(encoding="utf-8").splitlines()]
    return [event for event in lines if event["kind"] == kind and stage in ("", event.get("stage"), event.get("name"))]


def finish(run: Run) -> str:
    """Wait for the end of the run and say how it ended."""
    while is_alive(run):
        time.sleep(0.3)
    return run.state().end_status or "crashed"


def stop_in(run: Run, stage: str, step: int) -> str:
    """Ask for a stop once `stage` has logged `step`; says how the run ended."""
    while is_alive(run) and not any(event["step"] >= step for event in events(run, "log", stage)):
        time.sleep(0.1)
    if is_alive(run):
        request_stop(run)
    return finish(run)


def describe(run: Run, stage: str) -> None:
    """Print a stage's losses, phases, pace and memory."""
    logs = events(run, "log", stage)
    seconds: dict[str, float] = {}
    for event in events(run, "phase", stage):
        if "seconds" in event:
            seconds[event["name"]] = seconds.get(event["name"], 0) + event["seconds"]
    batch = run.plan().stage(stage).effective_batch
    times = [event["t"] for event in logs]
    pace = f"{batch * (len(times) - 4) / (times[-1] - times[3]):.2f}" if len(times) > 5 else "-"
    peak = max((event.get("vram_peak_bytes", 0) for event in logs), default=0) / 2**30
    start = next((event["t"] for event in events(run, "stage_start", stage)), 0)
    first = f"{times[0] - start:.0f} s to the first step" if times else "no step"
    losses = [round(event["loss"], 3) if event.get("loss") is not None else None for event in logs]
    print(
        f"{run.name} {stage}: {first}, {pace} examples/s, peak {peak:.1f} GiB, {seconds}\n   losses {losses}",
        flush=True,
    )
    for event in events(run, "error", stage):
        print(f"   ERROR {event['type']}: {event['message'][:400]}\n{event.get('traceback', '')[-1500:]}")
    for event in events(run, "notice", stage):
        print(f"   notice: {event['text']}")


def check_stage(run: Run, stage: str, steps: int) -> None:
    """Losses, checkpoints and the final model of a finished stage; for KTO its first step too."""
    describe(run, stage)
    logs, name = events(run, "log", stage), f"{run.name} {stage}"
    finite = all(event.get("loss") is not None and math.isfinite(event["loss"]) for event in logs)
    check(
        f"{name}: every step has a finite loss",
        finite and [event["step"] for event in logs] == list(range(1, steps + 1)),
    )
    kept = [int(path.name.split("-")[1]) for path in complete_checkpoints(run.stage_path(stage) / "checkpoints")]
    check(f"{name}: complete checkpoints", bool(kept) and kept[0] == steps, kept)
    check(f"{name}: final model is whole", run.trained(stage))
    if stage == "kto" and logs:
        shown = {key: logs[0].get(key) for key in ("loss", "rewards/chosen", "rewards/rejected", "kl")}
        # zero up to the rounding of bf16 logits over some hundred tokens
        near = all(abs(shown[key] or 0) < 0.02 for key in ("rewards/chosen", "rewards/rejected"))
        check(f"{name}: at the first step policy and reference are one", near and (shown["kl"] or 0) < 0.2, shown)


def chain(options: argparse.Namespace) -> None:
    run = make(options, "chain", "sft-kto", sft__learning_rate=1e-3)
    check("chain: auto takes Unsloth", run.plan().backend == "unsloth", run.plan().backend)
    runner.start(run)
    for stage in ("sft", "kto"):
        ended = stop_in(run, stage, 2)
        check(
            f"chain {stage}: stops with a checkpoint",
            ended == "stopped" and run.newest_checkpoint(stage) is not None,
            ended,
        )
        if ended != "stopped":
            describe(run, stage)
            return
        runner.resume(run)
    check("chain: done", finish(run) == "done")
    for stage in ("sft", "kto"):
        check_stage(run, stage, 6)
        resumed = [event["resumed_step"] for event in events(run, "totals", stage)]
        check(f"chain {stage}: resumed from its checkpoint", len(resumed) == 2 and resumed[1] >= 2, resumed)


def plain_trl(options: argparse.Namespace) -> None:
    three = {"sft__max_steps": 3, "kto__max_steps": 3, "sft__learning_rate": 1e-3}
    run = make(options, "trl", "sft-kto", backend="trl", **three)
    runner.start(run)
    check("trl: done", finish(run) == "done")
    for stage in ("sft", "kto"):
        check_stage(run, stage, 3)


def sign(options: argparse.Namespace) -> None:
    run = make(options, "sign", "kto", kto__sign_correction=True, kto__max_steps=2)
    runner.start(run)
    check("sign: done", finish(run) == "done")
    check_stage(run, "kto", 2)


def batches(options: argparse.Namespace) -> None:
    inside(options, "look-sft", make(options, "batches-sft", "sft"))
    inside(options, "look-kto", make(options, "batches-kto", "kto"))


def speed(options: argparse.Namespace) -> None:
    sizes = {"sft__batch_size": 6, "sft__gradient_accumulation_steps": 4}
    for stage in ("sft", "kto"):
        sizes |= {f"{stage}__max_steps": 14, f"{stage}__save_steps": 14}
    run = make(options, "speed", "sft-kto", **sizes)
    runner.start(run)
    check("speed: done", finish(run) == "done")
    for stage in ("sft", "kto"):
        check_stage(run, stage, 14)
    inside(options, "reload", run)


# Inside a trainer: processes of their own, so that Unsloth is imported first and memory is given back ----------------


def inside(options: argparse.Namespace, what: str, run: Run) -> None:
    """Run one of the functions below in a fresh interpreter and take over its checks."""
    folder = options.runs.absolute() / f"{what}-{run.name}.work"
    folder.mkdir(parents=True, exist_ok=True)
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import gpu_smoke; "
        f"gpu_smoke.{what.replace('-', '_')}({str(run.path)!r})"
    )
    environment = {**os.environ, "FINETUI_BACKEND": "unsloth" if what.startswith("look") else "trl"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    (folder / "output.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    for line in done.stdout.splitlines():
        if line.startswith(("OK ", "FAILED ", "SEEN ")):
            print(line, flush=True)
            if line.startswith("FAILED"):
                failures.append(line[7:])
    check(f"{what}: ran to its end", done.returncode == 0, "" if done.returncode == 0 else done.stderr[-1500:])


def build(path: str, stage: str) -> tuple[Any, Any]:
    """A trainer of the run's stage, as core.train makes it, and its tokenised rows."""
    from core import train
    from core.fit import planned_arrangement
    from core.prepare import prepare
    from core.sources import model_source
    from core.train_events import Reporter

    run = Run(Path(path))
    plan, settings = run.plan(), run.plan().stage(stage)
    run.stage_path(stage).mkdir(exist_ok=True)
    source = model_source(plan.model, print)
    tokenizer, template, _ = train.load_tokenizer(plan, source)
    settings = planned_arrangement(settings).applied(settings)
    loaded = train.Loaded(train.load_model(plan, source, settings), tokenizer, template)
    data = prepare(settings, stage, template, print)
    make_trainer: Any = train.kto_trainer if stage == "kto" else train.sft_trainer
    with train.adapter_kept(loaded.model):
        trainer = make_trainer(plan, settings, loaded, data, run.stage_path(stage), Reporter(run, stage))
    kinds = {str(p.dtype) for p in loaded.model.parameters() if p.requires_grad}
    check(f"{stage}: the adapter is trained in float32", kinds == {"torch.float32"}, kinds)
    return trainer, data


def lens_replies(path: str, stage: str) -> list[dict[str, Any]]:
    """What the lens shows for every row of the run's stage that is trained, ids and labels included."""
    from core.train_lens import Desk

    desk, plan = Desk(), Run(Path(path)).plan().model_dump(mode="json")
    request = {"do": "show", "plan": plan, "stage": stage, "ids": True}
    count = desk.reply({**request, "at": 0})["of"]
    replies = [desk.reply({**request, "at": at}) for at in range(count)]
    return [reply for reply in replies if not reply["left_out"]]


def look_sft(path: str) -> None:
    """Real batches against the preview, and rows laid end to end against rows alone."""
    import torch

    trainer, _ = build(path, "sft")
    check("sft: batches carry no padding", bool(trainer.args.padding_free), trainer.args.padding_free)
    preview = {tuple(reply["input_ids"]): reply["labels"] for reply in lens_replies(path, "sft")}
    seen = matching = 0
    for batch, _ in zip(trainer.get_train_dataloader(), range(4), strict=False):
        starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist() if "position_ids" in batch else []
        for first, end in zip(starts, [*starts[1:], batch["input_ids"].shape[1]], strict=True):
            ids, labels = batch["input_ids"][0, first:end].tolist(), batch["labels"][0, first:end].tolist()
            seen, matching = seen + 1, matching + (preview.get(tuple(ids)) == labels)
    print("SEEN sft batch", {key: tuple(value.shape) for key, value in batch.items()})
    check("sft: labels of real batches are the preview's", seen == matching > 0, f"{matching} of {seen} rows")

    rows = [trainer.train_dataset[number] for number in (0, 1)]
    lengths = [len(row["input_ids"]) for row in rows]
    model = trainer.model.train()

    def logits(*given: dict[str, Any]) -> Any:
        batch = trainer.data_collator([dict(row) for row in given])
        inputs = {key: value.to(trainer.accelerator.device) for key, value in batch.items()}
        with torch.no_grad(), trainer.compute_loss_context_manager():
            loss = float(model(**inputs).loss)
            del inputs["labels"]
            return model(**inputs).logits[0].float(), loss

    (first, first_loss), (second, second_loss), (both, both_loss) = logits(rows[0]), logits(rows[1]), logits(*rows)
    joined, _ = logits({key: rows[0][key] + rows[1][key] for key in ("input_ids", "labels")})

    def distance(one: Any, other: Any) -> float:
        return float((one - other).norm() / other.norm())

    apart = [distance(both[: lengths[0]], first), distance(both[lengths[0] :], second)]
    mixed = distance(joined[lengths[0] :], second)
    check("sft: rows end to end do not see each other", max(apart) < mixed / 4, f"{apart}, as one row {mixed:.4f}")
    counts = [sum(label != -100 for label in row["labels"]) for row in rows]
    expected = (first_loss * counts[0] + second_loss * counts[1]) / sum(counts)
    check(
        "sft: the loss of two rows is their weighted mean", abs(both_loss - expected) < 5e-3, f"{both_loss}, {expected}"
    )


def look_kto(path: str) -> None:
    """A real batch against the preview, its KL pairs, and whether Unsloth's memory-saving path is taken."""
    import torch

    trainer, _ = build(path, "kto")
    replies = lens_replies(path, "kto")
    preview = {tuple(reply["input_ids"]): len(reply["input_ids"]) - reply["trained"] for reply in replies}
    named = {(tuple(reply["input_ids"]), (reply["partner"] or {}).get("text")) for reply in replies}
    batch = next(iter(trainer.get_train_dataloader()))
    right = paired = told = 0
    answers = []
    for ids, mask, trained in zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True):
        whole = tuple(ids[mask.bool()].tolist())
        prompt = preview.get(whole, -1)
        right += trained[mask.bool()].tolist() == [0] * prompt + [1] * (len(whole) - prompt)
        answers.append((whole[:prompt], whole[prompt:]))
    for number, (ids, mask) in enumerate(zip(batch["KL_input_ids"], batch["KL_attention_mask"], strict=True)):
        paired += tuple(ids[mask.bool()].tolist()) == answers[number][0] + answers[number - 1][1]
        words = trainer.processing_class.decode(answers[number - 1][1], clean_up_tokenization_spaces=False)
        told += (answers[number][0] + answers[number][1], words[:4000]) in named
    check("kto: completions of a real batch are the preview's", right == len(answers), f"{right} of {len(answers)}")
    check("kto: each KL partner is the neighbour's completion", paired == len(answers), f"{paired} of {len(answers)}")
    check("kto: the lens names that partner", told == len(answers), f"{told} of {len(answers)}")
    check("kto: a batch has both labels", 0 < int(batch["label"].sum()) < len(answers), batch["label"].tolist())
    trainer.model.train()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, batch)
        ours = trainer._sign_corrected_loss(trainer.model, batch)
    near = abs(float(loss) - float(ours)) < 1e-3
    check("kto: Unsloth's loss is the one written out in core.train_kto", near, f"{float(loss)}, {float(ours)}")
    fallbacks = trainer.__dict__.get("_unsloth_dpo_chunked_fallbacks", {})
    check("kto: Unsloth's memory-saving path is taken", not fallbacks, fallbacks)


def reload(path: str) -> None:
    """The final model, read back with transformers and PEFT alone."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file

    from core.evaluate import generate
    from core.sources import ModelSource, model_source
    from core.train_model import load_base
    from core.train_tokenizer import load_tokenizer

    run = Run(Path(path))
    plan, final = run.plan(), run.final_model("kto")
    weights, before = (load_file(run.final_model(stage) / "adapter_model.safetensors") for stage in ("kto", "sft"))
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
    check("reload: weights are finite, and no reference adapter", finite and not any("ref" in name for name in weights))
    moved = max(float((weights[name].float() - before[name].float()).abs().max()) for name in weights)
    check(
        "reload: KTO moved the adapter away from SFT's",
        0 < moved < 1,
        f"{moved:.2e}, {next(iter(weights.values())).dtype}",
    )
    source = ModelSource(model_source(plan.model, print).base, final)
    tokenizer, template, _ = load_tokenizer(plan, source)
    model = PeftModel.from_pretrained(load_base(plan, source), str(final)).eval()
    answer = generate(model, tokenizer, [template.render([{"role": "user", "content": "Hello"}])], 4)
    check("reload: PEFT answers with it", len(answer) == 1)


if __name__ == "__main__":
    sys.exit(main())
