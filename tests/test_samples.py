"""Samples while a stage trains, stopping early, and the best checkpoint; with real trainers on the tiny model."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import MakeRun, WriteRows, finish, good, losses
from safetensors.torch import load_file
from test_training import Stage

from core import runner, train
from core.best import best_step, history_of, patience_is_over, waited
from core.errors import FinetuiError
from core.evaluate_model import Answerer
from core.events import RunState
from core.plan import SFTPlan
from core.runs import Run
from core.train_best import BestCallback, take_best
from core.train_events import Reporter
from core.train_samples import SampleCallback, sample_callback, samples_of, undisturbed

SAMPLES = {"samples__every": 2, "samples__max_new_tokens": 6}


def events(run: Run, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in run.events_path.read_text().splitlines()]
    return [event for event in lines if event["kind"] == kind]


def sampling(stage: Stage) -> SampleCallback:
    """The stage's trainer, with samples."""
    settings = stage.plan.samples
    found = sample_callback(
        settings, settings.every or 1, stage.loaded, stage.data, stage.trainer, Reporter(stage.run, "sft")
    )
    stage.trainer.add_callback(found)
    return found


@pytest.mark.parametrize("name", ["sft", "kto"])
@pytest.mark.parametrize("checkpointing", ["on", "off"])
def test_samples_change_nothing_that_is_trained_or_logged(make_run: MakeRun, name: str, checkpointing: str) -> None:
    settings: dict[str, Any] = {
        "lora__dropout": 0.1, f"{name}__data__holdout": 0.2, f"{name}__gradient_checkpointing": checkpointing,
        **SAMPLES,
    }  # fmt: skip
    plain, sampled = (Stage(make_run(name, **settings), name) for _ in range(2))
    torch.manual_seed(3)
    plain.trainer.train()
    sampling(sampled)
    torch.manual_seed(3)
    sampled.trainer.train()
    timed = ("runtime", "per_second")
    histories = [stage.trainer.state.log_history for stage in (plain, sampled)]
    logs = [[{k: v for k, v in entry.items() if not k.endswith(timed)} for entry in history] for history in histories]
    assert logs[0] == logs[1]
    weights = [dict(stage.trainer.model.named_parameters()) for stage in (plain, sampled)]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    assert sorted({event["step"] for event in events(sampled.run, "sample")}) == [0, 2, 4, 6]


def test_a_sample_tells_prompt_expected_answer_and_what_it_cost(make_run: MakeRun) -> None:
    stage = Stage(make_run("sft", sft__data__holdout=0.3, sft__max_steps=3, **SAMPLES), "sft")
    sampling(stage)
    stage.trainer.train()
    found = events(stage.run, "sample")
    assert [(event["step"], event["number"]) for event in found] == [(s, n) for s in (0, 2, 3) for n in range(3)]
    held = {example.row.prompt[-1]["content"] for example in stage.data.held_out.examples}  # type: ignore[union-attr]
    assert {event["prompt"] for event in found} <= held
    assert all(event["expected"].startswith("tool_call: ") and event["seconds"] > 0 for event in found)
    assert len({(event["number"], event["prompt"]) for event in found}) == 3, "the same prompts every time"


@pytest.mark.parametrize("holdout", [0.0, 0.3])
def test_rows_without_labels_give_prompts_too_and_rows_labelled_bad_give_none(
    make_run: MakeRun, rows_file: WriteRows, holdout: float
) -> None:
    plain = rows_file([good(f"Say {number}") for number in range(20)], "plain.jsonl")
    rows = [good(f"Say {number}", label=number % 2 == 0, answer=str(number)) for number in range(20)]
    mixed = rows_file(rows, "mixed.jsonl")
    settings = {"sft__data__holdout": holdout, **SAMPLES}
    stage = Stage(make_run("sft", sft__data__file=str(plain), **settings), "sft")
    assert len(samples_of(stage.plan.samples, stage.loaded, stage.data)) == 3
    both = Stage(make_run("sft", sft__data__file=str(mixed), sft__data__include_undesirable=True, **settings), "sft")
    assert all(int(found.expected) % 2 == 0 for found in samples_of(both.plan.samples, both.loaded, both.data))


def test_that_no_prompt_was_found_is_said(make_run: MakeRun, rows_file: WriteRows) -> None:
    path = rows_file([{"messages": []}, good("Bye")], "own.jsonl")
    stage = Stage(make_run("sft", samples__file=str(path), **SAMPLES), "sft")
    assert sampling(stage).samples
    stage.plan.samples.count = 0
    assert not sampling(stage).samples
    assert "No samples are taken" in events(stage.run, "notice")[-1]["text"]


def test_prompts_of_ones_own_are_answered(make_run: MakeRun, rows_file: WriteRows) -> None:
    path = rows_file([{"prompt": "Hi"}, good("Bye")], "own.jsonl")
    stage = Stage(make_run("sft", samples__file=str(path), **SAMPLES), "sft")
    found = samples_of(stage.plan.samples, stage.loaded, stage.data)
    assert [(sample.prompt, sample.expected) for sample in found] == [("Hi", ""), ("Bye", "Hello!")]


def test_a_sample_that_fails_ends_the_samples_and_not_the_training(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Answerer, "answers", broken)
    stage = Stage(make_run("sft", **SAMPLES), "sft")
    sampling(stage)
    stage.trainer.train()
    assert stage.trainer.state.global_step == 6 and stage.trainer.model.training
    notices = [event["text"] for event in events(stage.run, "notice") if "samples failed" in event["text"]]
    assert len(notices) == 1 and not events(stage.run, "sample")


def test_the_pace_leaves_out_the_seconds_of_samples(make_run: MakeRun) -> None:
    stage = Stage(make_run("sft", **SAMPLES), "sft")
    callback = sampling(stage)
    assert callback.clock is not None
    before = callback.clock.last_time
    callback.look(1)
    assert callback.clock.last_time > before


def test_unsloths_own_switch_is_used_and_random_states_are_as_before() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gradient_checkpointing = "unsloth"
            self.asked: list[Any] = []

        def for_inference(self) -> None:
            self.gradient_checkpointing, self.training = False, False

        def for_training(self, use_gradient_checkpointing: Any) -> None:
            self.asked.append(use_gradient_checkpointing)

    model, tokenizer = Model(), SimpleNamespace(padding_side="right")
    states = random.getstate(), torch.get_rng_state()
    with undisturbed(model, tokenizer):
        assert not model.training
        random.random(), torch.rand(1)
        tokenizer.padding_side = "left"
    assert model.training and model.asked == ["unsloth"] and tokenizer.padding_side == "right"
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])


def test_samples_after_a_checkpoint_that_is_resumed_are_forgotten() -> None:
    state = RunState()
    for step in (0, 2, 4):
        state.fold({"t": 1.0, "kind": "sample", "stage": "sft", "step": step, "answer": "x"})
    state.fold({"t": 1.0, "kind": "totals", "stage": "sft", "resumed_step": 2})
    assert [sample["step"] for sample in state.samples] == [0, 2]
    state.fold({"t": 1.0, "kind": "sample", "step": "x"})
    assert len(state.samples) == 2 and "malformed" in state.notices[-1]["text"]


# --- the best checkpoint ---


def history(*values: float) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for number, value in enumerate(values, 1):
        found += [{"step": number * 10, "loss": 1.0}, {"step": number * 10, "eval_loss": value}]
    return found


def test_the_best_step_is_the_first_with_the_lowest_finite_loss() -> None:
    assert best_step(history(3, 1, 2, 1)) == 20
    assert best_step(history(float("nan"), 5, float("inf"))) == 20
    assert best_step([]) is best_step(history(float("nan"))) is None


def test_patience_counts_evaluations_since_the_loss_fell_enough() -> None:
    assert [waited(history(3, 2, 2, 1.99, 2.5)[: 2 * n], 0.0) for n in range(1, 6)] == [0, 0, 1, 0, 1]
    assert [waited(history(3, 2, 2, 1.99, 2.5)[: 2 * n], 0.1) for n in range(1, 6)] == [0, 0, 1, 2, 3]
    assert waited(history(float("nan"), float("nan")), 0.0) == 2
    stage = SFTPlan.model_validate({"early_stopping_patience": 2, "data": {"holdout": 0.1}})
    assert patience_is_over(history(1, 2, 2), stage) and not patience_is_over(history(1, 2), stage)
    assert not patience_is_over(history(1, 2, 2, 2, 2), SFTPlan())


RISING = {
    "sft__data__holdout": 0.3, "sft__max_steps": 40, "sft__eval_steps": 1, "sft__save_steps": 1000,
    "sft__learning_rate": 0.05, "sft__lr_scheduler_type": "constant", "sft__warmup_ratio": 0.0,
    "sft__early_stopping_patience": 3, "sft__load_best_model_at_end": True, "sft__save_total_limit": 1,
}  # fmt: skip


def test_a_rising_loss_ends_the_stage_early_and_the_final_model_is_the_best(make_run: MakeRun) -> None:
    run = make_run("sft", **RISING)
    runner.start(run)
    assert finish(run) == "done"
    points = dict(run.state().stage("sft").series["eval_loss"])
    best = min(points, key=lambda step: (points[step], step))
    last = max(points)
    assert best + 3 <= last < 40
    notices = [notice["text"] for notice in run.state().notices]
    assert any(f"lowest at step {best}" in text for text in notices)
    assert any(f"final model is that of step {best}" in text for text in notices)
    checkpoints = {path.name for path in (run.stage_path("sft") / "checkpoints").glob("*-*")}
    assert checkpoints == {f"checkpoint-{best}", f"checkpoint-{last}"}
    final, kept = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (run.final_model("sft"), run.stage_path("sft") / "checkpoints" / f"checkpoint-{best}")
    )
    assert all(torch.equal(value, kept[key]) for key, value in final.items())


def test_a_stage_that_stopped_early_and_was_killed_before_it_was_saved_does_not_train_on(make_run: MakeRun) -> None:
    run = make_run("sft", **{**RISING, "sft__load_best_model_at_end": False})
    stage = Stage(run, "sft")
    stage.trainer.add_callback(BestCallback(stage.settings, Reporter(run, "sft")))
    stage.trainer.train()
    checkpoint = run.newest_checkpoint("sft")
    assert checkpoint is not None and patience_is_over(history_of(checkpoint), stage.settings)
    before = losses(run, "sft")
    assert train.train_stage(run, run.plan(), "sft", "", Reporter(run, "sft")) is False
    assert losses(run, "sft") == before and run.trained("sft")
    final, last = (load_file(f / "adapter_model.safetensors") for f in (run.final_model("sft"), checkpoint))
    assert all(torch.equal(value, last[key]) for key, value in final.items())


def test_a_stage_that_took_its_last_step_and_was_killed_before_it_was_saved_takes_none_more(make_run: MakeRun) -> None:
    run = make_run("sft", sft__max_steps=3, sft__save_steps=3)
    Stage(run, "sft").trainer.train()
    before, checkpoint = losses(run, "sft"), run.newest_checkpoint("sft")
    assert checkpoint is not None and checkpoint.name == "checkpoint-3"
    assert train.train_stage(run, run.plan(), "sft", "", Reporter(run, "sft")) is False
    assert losses(run, "sft") == before and run.state().stage("sft").step == 3 and run.trained("sft")
    final, last = (load_file(f / "adapter_model.safetensors") for f in (run.final_model("sft"), checkpoint))
    assert all(torch.equal(value, last[key]) for key, value in final.items())


def test_without_a_checkpoint_of_the_best_step_the_last_model_stays_and_that_is_said(
    make_run: MakeRun, tmp_path: Path
) -> None:
    run = make_run("sft")
    take_best(None, history(1, 2), tmp_path, Reporter(run, "sft"))
    assert "no checkpoint of the lowest" in run.state().notices[-1]["text"]


@pytest.mark.parametrize("option", [{"early_stopping_patience": 2}, {"load_best_model_at_end": True}])
def test_what_is_judged_by_held_out_rows_needs_some(make_run: MakeRun, option: dict[str, Any]) -> None:
    with pytest.raises(FinetuiError, match="holdout is 0"):
        make_run("sft", **{f"sft__{key}": value for key, value in option.items()})
