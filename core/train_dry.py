"""What a plan would do, without a run: ``python -P -m core.train_dry FOLDER data|load``.

FOLDER holds plan.yaml. Prints one JSON line: ``text`` (lines for people) and figures, or ``error`` and ``advice``.
"""

import contextlib
import gc
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

if os.environ.get("FINETUI_BACKEND") == "unsloth" and sys.argv[2:] == ["load"]:
    from core.train_attention import import_unsloth

    import_unsloth()

from core.config import load_plan
from core.errors import FinetuiError
from core.hub import hub_token
from core.memory import KEPT_LENGTHS
from core.plan import KTOPlan, Plan
from core.prepare import Part, kto_weights, planned_steps, prepare
from core.sources import ModelSource, model_source


def main() -> int:
    gc.disable()  # neither imports nor rows make garbage, and looking for some takes a fifth of the time
    plan, load = load_plan(Path(sys.argv[1]) / "plan.yaml"), sys.argv[2] == "load"
    if not load and not any(plan.stage(name).extra for name in plan.training_stages):
        sys.modules["torch"] = None  # type: ignore[assignment]  # tokenizers need none, and it is most of the wait
    words = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        try:
            report = dry_run(plan, load=load)
        except FinetuiError as error:
            report = {"error": error.message, "advice": error.advice, "exit_code": error.exit_code}
        except Exception as error:
            logging.getLogger(__name__).exception("the dry run failed")
            report = {"error": f"{type(error).__name__}: {error}"[:500], "advice": "", "exit_code": 1}
    print(json.dumps(report, ensure_ascii=False), file=words)
    return 0


def dry_run(plan: Plan, *, load: bool) -> dict[str, Any]:
    """Tokenise every stage's rows and count; with `load` also load the model with its adapter."""
    from core.train_tokenizer import load_tokenizer

    notes: list[str] = []
    source = model_source(plan.model, notes.append)
    text = [f"{plan.method} of {plan.model.name} with {plan.backend} on {plan.device}, {plan.model.dtype}"]
    text.append(f"model: {download(source)}")
    _, template, origin = load_tokenizer(plan, source)
    text.append(f"chat template: {origin}")
    stages = {}
    for name in plan.training_stages:
        stage = plan.stage(name)
        if stage.extra:
            from core.train import checked_extra

            checked_extra(stage)
        data = prepare(stage, name, template, notes.append)
        report = data.report()
        steps = planned_steps(stage, name, report["examples"])
        per_epoch = steps / stage.num_train_epochs if stage.max_steps < 0 else None
        per_epoch = per_epoch or -(-report["examples"] // stage.effective_batch)
        stages[name] = report | {
            "steps": steps, "steps_per_epoch": per_epoch, "effective_batch": stage.effective_batch,
            "longest_rows": _longest(data.training), "longest_held_out": _longest(data.held_out),
        }  # fmt: skip
        text.append(
            f"{name.upper()}: {report['examples']:,} examples, {report['tokens']:,} tokens an epoch "
            f"({report['trained_tokens']:,} trained), the longest row {report['longest']:,}; {per_epoch:,.0f} steps of "
            f"{stage.effective_batch} examples an epoch, {steps:,} in all"
        )
        text += [f"  {notice}" for notice in data.notices]
        text += [f"  left out: {count:,} × {reason}" for reason, count in report["left_out_reasons"].items()]
        if report["held_out"]:
            text.append(f"  {report['held_out']:,} rows held out for evaluation")
        if isinstance(stage, KTOPlan):
            desirable, undesirable = kto_weights(stage, data.labels)
            text.append(f"  weights: desirable {desirable:g}, undesirable {undesirable:g}")
    if load:
        from core.train_model import load_model

        model = load_model(plan, source, plan.stage(plan.training_stages[0]))
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        every = sum(p.numel() for p in model.parameters())
        text.append(f"loaded: {every:,} parameters, {trainable:,} trained")
        stages["loaded"] = {"parameters": every, "trainable": trainable}
    return {"text": text, "stages": stages}


def _longest(part: Part | None) -> list[int]:
    """Tokens of the longest rows, longest first."""
    lengths = part.examples.lengths.tolist() if part else []
    return sorted(lengths, reverse=True)[:KEPT_LENGTHS]


def download(source: ModelSource) -> str:
    """Where the model comes from and what would have to be fetched."""
    if source.local:
        return f"{source.base}, nothing to download"
    import huggingface_hub

    with contextlib.suppress(Exception):
        info = huggingface_hub.model_info(source.base, files_metadata=True, token=hub_token())
        wanted = [f for f in info.siblings or [] if f.rfilename.endswith((".safetensors", ".json", ".model"))]
        missing = [
            f for f in wanted
            if not isinstance(huggingface_hub.try_to_load_from_cache(source.base, f.rfilename), str)
        ]  # fmt: skip
        size = sum(f.size or 0 for f in missing)
        return f"{source.base}, {len(missing)} of {len(wanted)} files to download, {size / 2**30:.1f} GiB"
    return f"{source.base}, from the Hub or its cache"


if __name__ == "__main__":
    sys.exit(main())
