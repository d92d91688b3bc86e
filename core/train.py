"""One training stage in a process of its own: ``python -P -m core.train RUN STAGE [BASE_STAGE]``.

Load, prepare, train, save: straight lines. SFT and KTO share what is the same. Run by core.runner, never by hand.
"""

import gc
import json
import logging
import os
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    gc.disable()  # nothing that is imported is garbage, and looking for some takes a fifth of the time
if os.environ.get("FINETUI_BACKEND") == "unsloth":
    from core.train_attention import import_unsloth

    import_unsloth()
import torch
from trl import KTOConfig, SFTConfig

from core.best import history_of, patience_is_over
from core.checkpoints import step_of, write_manifest
from core.data_ledger import LEDGER
from core.errors import FinetuiError
from core.fit import Arrangement, keep_arrangement, kept_arrangement, planned_arrangement, smaller_batches
from core.gpu import in_wsl
from core.lineage import file_hashes
from core.plan import KTOPlan, Plan, SFTPlan, StagePlan
from core.prepare import StageData, kto_weights, planned_steps, prepare
from core.ready import await_stage
from core.runner import EXIT_REFIT, EXIT_STOPPED
from core.runs import Run
from core.secrets import guard_output
from core.sources import ModelSource, model_source
from core.train_alarms import AlarmCallback, refuse_not_finite, take_sound
from core.train_arrange import PADDING_FREE_TOKENS, UNSLOTH_PADS, Fitting
from core.train_best import BestCallback, take_best
from core.train_data import kto_dataset, sft_dataset
from core.train_events import EventCallback, Reporter, Stopped
from core.train_fit import FitCallback, Refit, cap_memory, out_of_memory
from core.train_kto import kto_trainer_class, sft_trainer_class
from core.train_model import Loaded, adapter_kept, load_adapter_weights, load_model
from core.train_resume import compare_with_start, resume_point, settings_of, sound_base
from core.train_samples import sample_callback
from core.train_tokenizer import load_tokenizer

OWNED = {
    "output_dir", "per_device_train_batch_size", "max_length", "packing", "padding_free", "report_to", "save_strategy",
    "save_steps", "push_to_hub", "remove_unused_columns", "dataset_kwargs", "bf16", "fp16", "use_cpu", "beta",
    "train_sampling_strategy", "resume_from_checkpoint", "hub_token", "load_best_model_at_end", "metric_for_best_model",
}  # fmt: skip


def main() -> int:
    """Returns 0 when the stage is done, 1 when it failed, EXIT_STOPPED after a stop with checkpoint."""
    gc.freeze()  # what was imported stays, and is not looked through again
    gc.enable()
    if sys.argv[1:] == ["--ready"] and not await_stage():
        return 0
    guard_output()
    run, stage, base = Run(Path(sys.argv[1])), sys.argv[2], (sys.argv[3] if len(sys.argv) > 3 else "")
    reporter = Reporter(run, stage)
    try:
        return EXIT_STOPPED if train_stage(run, run.plan(), stage, base, reporter) else 0
    except Stopped:
        return EXIT_STOPPED
    except BaseException as error:
        if (isinstance(error, Refit) or out_of_memory(error)) and refitted(run, stage, error, reporter):
            return EXIT_REFIT
        reporter.failure(error)
        logging.getLogger(__name__).exception("the stage failed")
        return 1


def refitted(run: Run, name: str, error: BaseException, reporter: Reporter) -> bool:
    """Keep with the run what needs less memory, which answers an error of memory; False where there is nothing."""
    folder, planned = run.stage_path(name), run.plan().stage(name)
    kept = kept_arrangement(folder, planned) or planned_arrangement(planned)
    stage = kept.applied(planned)
    smaller = smaller_batches(stage)
    if isinstance(error, Refit):
        found, why = error.to, "The largest batch would not fit"
    elif kept.open_layers or (kept.checkpointing == "off" and planned.gradient_checkpointing == "auto"):
        found, why = Arrangement(stage.batch_size), "GPU memory ran out"
    elif smaller:
        size = next((size for size in smaller if size <= stage.batch_size // 2), smaller[-1])
        found, why = replace(kept, batch_size=size), "GPU memory ran out"
    else:
        return False
    keep_arrangement(folder, found)
    words = f"{found.batch_size} rows at once, {stage.effective_batch // found.batch_size} times a step"
    if (kept.open_layers, kept.checkpointing) != (found.open_layers, found.checkpointing):
        words += f", {found.open_layers or 'no'} layers keep their activations"
    reporter.notice(f"{why}: from here on {words}. The step keeps its {stage.effective_batch} rows.", "warning")
    return True


def train_stage(run: Run, plan: Plan, name: str, base: str, reporter: Reporter) -> bool:
    """Train one stage and save its model. Returns True when it was stopped before its last step."""
    folder = run.stage_path(name)
    cap = cap_memory(plan, reporter)
    with reporter.phase("tokenize"):
        source = model_source(plan.model, reporter.detail)
        if base:
            source = ModelSource(source.base, sound_base(run, base))
        tokenizer, template, _ = load_tokenizer(plan, source)
        data = prepare(plan.stage(name), name, template, reporter.detail, _progress(reporter))
        for text in data.notices:
            reporter.notice(text)
        hashes, checkpoint = file_hashes(plan.stage(name), name), resume_point(run, name, reporter)
        if checkpoint:
            compare_with_start(folder / "data.json", plan.stage(name), name, hashes, reporter)
        _store_report(folder, plan.stage(name), data, hashes)
    fitted = Fitting(plan, name, source, data)
    found = fitted.arrangement(folder, cap, reporter)
    stage = found.applied(plan.stage(name))
    with reporter.phase("load", plan.model.name):
        loaded = Loaded(load_model(plan, source, stage, found.open_layers), tokenizer, template)
    build = kto_trainer if isinstance(stage, KTOPlan) else sft_trainer
    with reporter.phase("prepare"), adapter_kept(loaded.model):
        trainer = build(plan, stage, loaded, data, folder, reporter)  # type: ignore[arg-type]
    if cap and not checkpoint:
        expected = partial(fitted.estimate, found)
        trainer.add_callback(FitCallback(trainer, stage, cap, reporter, found.open_layers, expected))
    trainer.add_callback(best := BestCallback(stage, reporter))
    trainer.add_callback(alarms := AlarmCallback(stage, reporter))
    if plan.samples.every:
        trainer.add_callback(sample_callback(plan.samples, plan.samples.every, loaded, data, trainer, reporter))
    steps = planned_steps(stage, name, len(data.training.examples))
    trainable = sum(parameter.numel() for parameter in loaded.model.parameters() if parameter.requires_grad)
    reporter.event(
        "totals", steps=steps, batch=stage.effective_batch, resumed_step=step_of(checkpoint), trainable=trainable,
        **data.report(),
    )  # fmt: skip
    history = history_of(checkpoint) if checkpoint else []
    if checkpoint and ((early := patience_is_over(history, stage)) or step_of(checkpoint) >= steps):
        load_adapter_weights(loaded.model, checkpoint)  # it was through and not saved; the trainer would take one more
        if early:
            best.tell(history)
    else:
        with reporter.phase("train", f"from step {step_of(checkpoint)}" if checkpoint else ""):
            reporter.in_training = True
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            reporter.in_training = False
        history = trainer.state.log_history
        ended_early = best.stopped_early or alarms.stopped_for
        if trainer.state.global_step < trainer.state.max_steps and not ended_early:
            return True
    with reporter.phase("save"):
        if alarms.stopped_for:
            take_sound(loaded.model, alarms.stopped_for, history, folder / "checkpoints", reporter)
        elif stage.load_best_model_at_end:
            take_best(loaded.model, history, folder / "checkpoints", reporter)
        refuse_not_finite(loaded.model, name)
        save_final(loaded, run.final_model(name))
    return False


def _progress(reporter: Reporter) -> Any:
    return lambda what, done, total: reporter.event(
        "phase", name=reporter.phase_name, detail=f"{what} {done}{f' of {total}' if total else ''} rows"
    )


def _store_report(folder: Path, stage: StagePlan, data: StageData, hashes: dict[str, str]) -> None:
    """The counts and the settings as data.json, and every row's fate as ledger.jsonl."""
    from core.paths import writing_whole

    data.ledger.save(folder / LEDGER)
    with writing_whole(folder / "data.json") as stream:
        found = {**data.report(), "sha256": hashes, "settings": settings_of(stage)}
        json.dump(found, stream, indent=1, ensure_ascii=False)


def arguments(plan: Plan, stage: StagePlan, folder: Path, run_name: str) -> dict[str, Any]:
    """What SFTConfig and KTOConfig share, from the plan."""
    return {
        "output_dir": str(folder / "checkpoints"),
        "per_device_train_batch_size": stage.batch_size,
        "per_device_eval_batch_size": max(stage.batch_size, 2),
        "gradient_accumulation_steps": stage.gradient_accumulation_steps,
        "learning_rate": stage.learning_rate,
        "num_train_epochs": stage.num_train_epochs,
        "max_steps": stage.max_steps,
        "warmup_steps": stage.warmup_ratio,
        "lr_scheduler_type": stage.lr_scheduler_type,
        "max_grad_norm": stage.max_grad_norm,
        "weight_decay": stage.weight_decay,
        "optim": stage.optim,
        "gradient_checkpointing": stage.gradient_checkpointing == "on",
        "logging_steps": stage.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": stage.save_steps,
        "save_total_limit": None,
        "eval_strategy": "steps" if stage.data.holdout > 0 else "no",
        "eval_steps": stage.eval_steps or stage.save_steps,
        "seed": stage.seed,
        "bf16": plan.device == "cuda" and plan.model.dtype == "bf16",
        "fp16": plan.device == "cuda" and plan.model.dtype == "fp16",
        "use_cpu": plan.device == "cpu",
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": plan.device == "cuda" and not in_wsl(),  # WSL2 pins little, and fails past it
        "report_to": plan.tracking.report_to or "none",
        "run_name": plan.tracking.run_name or run_name,
        "project": plan.tracking.project or "finetui",
        "disable_tqdm": True,
        # TRL would add pretraining's balance of the experts to the loss (0.9 times about 4 with gpt-oss). Routers are
        # frozen here, and with it Unsloth makes KTO's logits whole.
        "router_aux_loss_coef": 0.0,
        **checked_extra(stage),
    }


def checked_extra(stage: StagePlan) -> dict[str, Any]:
    """The plan's extra TRL arguments. Raises FinetuiError for a name TRL does not have or finetui sets itself."""
    import dataclasses
    import difflib

    config = KTOConfig if isinstance(stage, KTOPlan) else SFTConfig
    known = {field.name for field in dataclasses.fields(config)}
    for name in stage.extra:
        if name in OWNED:
            raise FinetuiError(f"extra.{name} is set by finetui itself.", "Use the plan's own option for it.")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            advice = f"Did you mean {near[0]}?" if near else "See TRL's documentation."
            raise FinetuiError(f"{config.__name__} has no argument {name!r}.", advice)
    return stage.extra


def sft_trainer(plan: Plan, stage: SFTPlan, loaded: Loaded, data: StageData, folder: Path, reporter: Reporter) -> Any:
    """TRL's SFTTrainer on our own ids and labels, without padding where attention keeps the rows apart."""
    free = _padding_free(plan, stage, loaded, data, reporter)
    config = SFTConfig(
        **arguments(plan, stage, folder, reporter.run.name),
        max_length=None,
        packing=False,
        padding_free=free,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer_class = sft_trainer_class()
    trainer_class.stage = stage  # type: ignore[attr-defined]
    return trainer_class(
        model=loaded.model,
        processing_class=loaded.tokenizer,
        args=config,
        train_dataset=sft_dataset(data.training.examples, stage.max_length),
        eval_dataset=sft_dataset(data.held_out.examples, stage.max_length) if data.held_out else None,
        callbacks=[EventCallback(reporter, stage.save_total_limit)],
    )


def _padding_free(plan: Plan, stage: SFTPlan, loaded: Loaded, data: StageData, reporter: Reporter) -> bool:
    """Whether rows may stand end to end: where attention keeps them apart, and its mask does not grow too large."""
    implementation = getattr(loaded.model.config, "_attn_implementation", "sdpa")
    widest = sum(sorted(data.training.examples.lengths.tolist())[-stage.batch_size :])
    flash = "flash" in implementation
    if stage.padding_free != "auto":
        if stage.padding_free == "on" and not (flash or implementation == "sdpa"):
            raise FinetuiError(
                f"With {implementation} attention rows laid end to end would see each other.",
                "Use sft.padding_free: auto, or another model.attention.",
            )
        return stage.padding_free == "on"
    if plan.backend == "unsloth":
        return getattr(loaded.model.config, "model_type", "") not in UNSLOTH_PADS
    if flash or (implementation == "sdpa" and widest <= PADDING_FREE_TOKENS):
        return True
    reporter.notice(f"Batches are padded: {implementation} attention over {widest} tokens end to end would cost more.")
    return False


def kto_trainer(plan: Plan, stage: KTOPlan, loaded: Loaded, data: StageData, folder: Path, reporter: Reporter) -> Any:
    """TRL's KTOTrainer on our own ids, batches and weights."""
    desirable, undesirable = kto_weights(stage, data.labels)
    reporter.notice(
        f"KTO weights: desirable {desirable:g}, undesirable {undesirable:g} "
        f"({data.labels[True]} good and {data.labels[False]} bad rows)."
    )
    config = KTOConfig(
        **arguments(plan, stage, folder, reporter.run.name),
        max_length=None,
        beta=stage.beta,
        desirable_weight=desirable,
        undesirable_weight=undesirable,
        train_sampling_strategy="sequential",
    )
    trainer_class = kto_trainer_class(sign_correction=stage.sign_correction)
    trainer_class.stage = stage  # type: ignore[attr-defined]
    return trainer_class(
        model=loaded.model,
        processing_class=loaded.tokenizer,
        args=config,
        train_dataset=kto_dataset(data.training.examples),
        eval_dataset=kto_dataset(data.held_out.examples) if data.held_out else None,
        callbacks=[EventCallback(reporter, stage.save_total_limit)],
    )


def save_final(loaded: Loaded, folder: Path) -> None:
    """The adapter ``default``, the tokenizer and its template, whole: built beside and renamed."""
    temporary = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    loaded.model.save_pretrained(str(temporary), selected_adapters=["default"], safe_serialization=True)
    loaded.tokenizer.save_pretrained(str(temporary))
    write_manifest(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


if __name__ == "__main__":
    torch.set_num_threads(max(torch.get_num_threads(), 1))
    sys.exit(main())
