"""Several runs, one device: who waits trains next, whatever happens to the one before."""

import os
import signal
from pathlib import Path

import pytest
from conftest import MakeRun, finish, wait_until

from core import runner
from core.backend import settle
from core.config import resolve
from core.gpu import GpuSample
from core.plan import Plan
from core.runs import Run, is_alive, request_abort, request_stop
from core.turns import device_of, holder, in_use, take_turn
from tui.follow import Follower
from tui.forecast import forecast
from tui.report import now_words

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs flock")


@pytest.fixture(autouse=True)
def own_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUI_CACHE", str(tmp_path / "cache"))


def long_and_waiting(make_run: MakeRun) -> tuple[Run, Run]:
    """A run that trains for long, and one that waits for it."""
    first, second = make_run("sft", sft__max_steps=100_000), make_run("sft", wait_gpu=True)
    runner.start(first)
    wait_until(lambda: first.state().stages and first.state().stage("sft").step > 2)
    runner.start(second)
    wait_until(lambda: second.state().waiting_for)
    return first, second


def test_a_run_that_waits_starts_when_the_other_has_ended(make_run: MakeRun) -> None:
    first, second = long_and_waiting(make_run)
    assert second.state().waiting_for == ("cpu", first.name) and is_alive(second)
    shown = Follower(second).read()
    assert shown and f"waits for cpu: {first.name} trains there" in now_words(shown, 80).plain
    request_stop(first)
    assert finish(first) == "stopped"
    assert finish(second) == "done"
    begun, ended = second.state().stage("sft").started, first.state().stage("sft").ended
    assert begun and ended and begun >= ended
    assert second.state().waiting_for is None


def test_a_run_that_waits_can_be_stopped_aborted_and_resumed(make_run: MakeRun) -> None:
    first, second = long_and_waiting(make_run)
    request_stop(second)
    assert finish(second) == "stopped"
    runner.resume(second)
    wait_until(lambda: second.state().waiting_for)
    request_abort(second)
    assert finish(second) == "aborted"
    assert is_alive(first)


def test_a_trainer_whose_runner_was_killed_still_has_its_turn(make_run: MakeRun) -> None:
    first, second = long_and_waiting(make_run)
    os.kill(int(first.state().start["pid"]), signal.SIGKILL)
    trainer = first.state().stage("sft").pid
    assert trainer and second.state().stages[0].state == "waiting" and is_alive(first)
    os.kill(trainer, signal.SIGKILL)
    assert finish(second) == "done"


def test_without_the_wish_to_wait_runs_train_beside_each_other(make_run: MakeRun) -> None:
    first, _ = long_and_waiting(make_run)
    beside = make_run("sft")
    runner.start(beside)
    assert finish(beside) == "done" and is_alive(first)


def test_the_review_says_who_trains_on_the_device(tmp_path: Path) -> None:
    plan = settle(resolve("sft", None, {"sft.data.demo": (True, "test")}, gpu_present=False)).plan
    handle = take_turn("cpu", "run\x1b[31m-one")
    assert handle is not None
    warned = forecast(plan, {}, tmp_path, [])
    waits = forecast(plan.model_copy(update={"wait_gpu": True}), {}, tmp_path, [])
    os.close(handle)
    assert any("run␛[31m-one trains on this device now" in warning for warning in warned.warnings)
    assert not any("trains on" in warning for warning in waits.warnings)
    assert any(name == "Start" and "run␛[31m-one" in words for name, words, _ in waits.lines)
    assert not any("trains on" in warning for warning in forecast(plan, {}, tmp_path, []).warnings)


def test_a_turn_is_one_runs_alone_and_tells_whose(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = take_turn("gpu-0", "mine")
    assert handle is not None and take_turn("gpu-0", "yours") is None and holder("gpu-0") == "mine"
    assert (in_use("gpu-0"), in_use("gpu-1")) == ("mine", "")
    other = take_turn("gpu-1", "yours")
    assert other is not None
    os.close(handle)
    again = take_turn("gpu-0", "yours")
    assert again is not None and holder("gpu-0") == "yours"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "../2,3")
    assert device_of(Plan(device="cuda")) == "gpu-2" and device_of(Plan(device="cpu")) == "cpu"
    for one in (again, other):
        os.close(one)


def test_the_review_offers_to_wait_or_the_other_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cards = [GpuSample(index, f"Card {index}", memory_total_bytes=24 << 30, memory_free_bytes=(20 + index) << 30)
             for index in range(3)]  # fmt: skip
    monkeypatch.setattr("core.gpu.gpus", lambda pids=(): cards)
    monkeypatch.setattr("core.backend.installed", lambda package: True)
    plan = settle(resolve("sft", None, {"model.size": ("7b", "test")}, gpu_present=True)).plan
    assert device_of(plan) == "gpu-0"
    held = [take_turn("gpu-0", "one"), take_turn("gpu-2", "two")]
    found = forecast(plan, {}, tmp_path, [])
    assert found.busy and found.other_gpu == 1 and "o on GPU 1 (Card 1)" in " ".join(found.warnings)
    there = forecast(plan.model_copy(update={"gpu": 1}), {}, tmp_path, [])
    assert not there.busy and there.other_gpu is None
    for handle in held:
        assert handle is not None
        os.close(handle)
    assert not forecast(plan, {}, tmp_path, []).busy
