"""Figures that go wrong: the alarm comes within five logs, with nobody watching, and ends the stage where asked."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeRun
from hypothesis import given
from hypothesis import strategies as st

from core import train
from core.alarms import SOON, Alert, Watchman, stage_alerts
from core.checkpoints import complete_checkpoints
from core.errors import FinetuiError
from core.events import EventTail, RunState
from core.reporter import Reporter
from core.runs import Run
from core.watch import line_of

RECORDED = Path(__file__).resolve().parents[1] / "runs"
Figures = dict[str, float | None]


def watch(stage: str, logs: list[Figures], total: int = 1000) -> list[list[Alert]]:
    """What is told at each log."""
    watchman = Watchman(stage)
    return [watchman.look(step, total, figures) for step, figures in enumerate(logs, 1)]


def logs(count: int, **figures: Callable[[int], float | None]) -> list[Figures]:
    return [{name: figure(step) for name, figure in figures.items()} for step in range(count)]


def falling(step: int) -> float:
    return 2.0 * 0.97**step + 0.1 * math.sin(step)


def warm(step: int) -> float:
    """A rate that climbs for four logs and falls then."""
    return 1e-4 * min((step + 1) / 4, 1 - step / 1000)


FAULTS: dict[str, tuple[str, int, dict[str, Callable[[int], float | None]]]] = {
    "nan": ("sft", 20, {"loss": lambda step: None if step >= 20 else falling(step)}),
    "gradients": ("sft", 20, {"loss": falling, "grad_norm": lambda step: None if step >= 20 else 0.5}),
    "no-gradient": ("sft", 0, {"loss": falling, "grad_norm": lambda step: 0.0}),
    "diverged": ("sft", 20, {"loss": lambda step: falling(step) if step < 20 else falling(20) * 2.5 + step}),
    "frozen": ("sft", 20, {"loss": lambda step: 1.25 if step >= 20 else falling(step)}),
    "margin": ("kto", 4, {
        "loss": lambda step: 0.5 + 1e-3 * math.sin(step), "rewards/margins": lambda step: 1e-4 * step,
        "kl": lambda _: 0.0, "learning_rate": warm,
    }),
    "kl": ("kto", 4, {
        "loss": falling, "rewards/margins": lambda step: 0.05 * step, "kl": lambda _: 0.0, "learning_rate": warm,
    }),
    "by-heart": ("sft", 20, {"loss": falling, "eval_loss": lambda step: 1.0 if step < 20 else 1 + (step - 19) / 20}),
    "told-apart": ("kto", 20, {
        "loss": lambda step: falling(step) if step < 20 else 1e-6 * (step + 1), "rewards/margins": float,
    }),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAULTS)
def test_an_alarm_comes_within_five_logs_and_is_told_once(kind: str) -> None:
    stage, onset, figures = FAULTS[kind]
    told = watch(stage, logs(60, **figures))
    first = next(number for number, alerts in enumerate(told) if any(alert.kind == kind for alert in alerts))
    assert onset <= first <= onset + SOON, "not within five logs"
    weights = [alert.weight for alerts in told for alert in alerts if alert.kind == kind]
    assert weights == sorted(set(weights)), "told again although nothing is worse"
    [alert] = [alert for alert in told[first] if alert.kind == kind]
    assert alert.advice and alert.text.startswith(stage.upper())


@pytest.mark.parametrize("log", ["demo", "done", "stopped", "torn"])
def test_a_sound_run_raises_no_alarm_at_any_step(log: str) -> None:
    state, found = RunState(), []
    for event in EventTail(RECORDED / f"{log}.jsonl").read():
        state.fold(event)
        if event["kind"] == "log":
            found += [
                (alert.kind, event["step"]) for alert in stage_alerts(state.stage(event["stage"])) if alert.weight > 1
            ]
    assert state.stages and found == []


def test_a_loss_that_comes_back_is_said_to_have_recovered() -> None:
    told = watch("sft", [{"loss": 1.0}, {"loss": None}, {"loss": 0.9}, {"loss": None}])
    assert [[alert.kind for alert in alerts] for alerts in told] == [[], ["nan"], ["recovered"], ["nan"]]


def test_the_watchman_forgets_what_is_long_ago_and_costs_the_same_for_ever() -> None:
    watchman = Watchman("sft")
    for step in range(7000):
        watchman.look(step, 10**6, {"loss": 1 + math.sin(step) / 3, "grad_norm": 1.0})
    assert all(len(points) <= 2000 for points in watchman.stage.series.values())


@given(st.lists(st.fixed_dictionaries({}, optional={
    key: st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False))
    for key in ("loss", "eval_loss", "grad_norm", "kl", "rewards/margins", "learning_rate")
}), max_size=30), st.sampled_from(["sft", "kto"]))  # fmt: skip
def test_no_figures_break_the_watchman(figures: list[Figures], stage: str) -> None:
    watchman = Watchman(stage)
    for step, entry in enumerate(figures):
        for alert in watchman.look(step, 20, entry):
            assert alert.weight in (1, 2, 3) and alert.advice and "\n" not in alert.text


# --- in a real trainer ---


def poisoned(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """From step `at` on the gradients of the real trainer are NaN, as after an overflow."""
    from transformers import TrainerCallback

    class Poison(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step >= at:
                for weight in kwargs["model"].parameters():
                    if weight.grad is not None:
                        weight.grad.fill_(math.nan)

    build = train.sft_trainer

    def build_poisoned(*words: Any) -> Any:
        trainer = build(*words)
        trainer.add_callback(Poison())
        return trainer

    monkeypatch.setattr(train, "sft_trainer", build_poisoned)


def adapter_is_finite(folder: Path) -> bool:
    from safetensors.torch import load_file

    return all(bool(tensor.isfinite().all()) for tensor in load_file(folder / "adapter_model.safetensors").values())


def test_weights_that_are_no_numbers_are_never_saved_and_the_run_ends_saying_so(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, 4)
    run = make_run("sft", sft__max_steps=12, sft__save_steps=2)
    with pytest.raises(FinetuiError, match="weights are not finite") as caught:
        train.train_stage(run, run.plan(), "sft", "", Reporter(run, "sft"))
    assert "learning_rate" in caught.value.advice
    assert not run.final_model("sft").exists()
    kept = complete_checkpoints(run.stage_path("sft") / "checkpoints")
    assert [path.name for path in kept] == ["checkpoint-4", "checkpoint-2"] and all(map(adapter_is_finite, kept))
    alarms = [event for event in events(run) if event.get("alarm") == "nan"]
    assert alarms and alarms[0]["level"] == "error"
    assert "nothing is learned any more" in line_of(alarms[0], run.state()), "a headless viewer is told"
    steps = [event["step"] for event in events(run) if event["kind"] == "log" and event["loss"] is None]
    assert alarms[0]["t"] <= next(e["t"] for e in events(run) if e["kind"] == "log" and e["step"] == steps[0] + 1)


def test_a_stage_that_may_stop_itself_ends_with_the_newest_sound_model(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, 4)
    run = make_run("sft", sft__max_steps=40, sft__save_steps=2, sft__on_alarm="stop")
    assert train.train_stage(run, run.plan(), "sft", "", Reporter(run, "sft")) is False
    assert adapter_is_finite(run.final_model("sft"))
    state = run.state()
    assert state.stage("sft").step <= 4 + SOON
    assert "step 4" in state.notices[-1]["text"] and "Ended for an alarm" in state.notices[-1]["text"]


def test_without_a_checkpoint_from_before_the_stop_is_a_failure_with_advice(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, 1)
    run = make_run("sft", sft__max_steps=40, sft__save_steps=50, sft__on_alarm="stop")
    with pytest.raises(FinetuiError, match="no checkpoint from before"):
        train.train_stage(run, run.plan(), "sft", "", Reporter(run, "sft"))


def events(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.events_path.read_text().splitlines()]
