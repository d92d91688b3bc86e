"""A trainer in waiting: it becomes the run's own, and never stays behind."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import MakeRun, finish, losses, wait_until

from core import runner
from core.ready import Ready, worth_it
from core.runs import request_stop
from core.stages import TRAINING_STAGES

pytestmark = pytest.mark.skipif(os.name == "nt", reason="open files cannot be handed over on Windows")
TRL = {"FINETUI_BACKEND": "trl"}


@pytest.fixture
def ready() -> Iterator[Ready]:
    made = Ready(TRL)
    yield made
    made.close()
    wait_until(lambda: made.process.poll() is not None)


def trainer_of(ready: Ready) -> psutil.Process:
    me = psutil.Process(ready.process.pid)
    wait_until(lambda: bool(me.children()))
    return me.children()[0]


def gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_chain_is_trained_by_the_processes_that_waited_and_as_any_other(make_run: MakeRun, ready: Ready) -> None:
    waiting, plain = trainer_of(ready), make_run(sft__max_steps=3)
    runner.start(plain)
    assert finish(plain) == "done"
    run = make_run("sft-kto", sft__max_steps=3, kto__max_steps=2)
    assert runner.start(run, ready=ready) == ready.process.pid
    assert finish(run) == "done"
    state = run.state()
    assert state.start["pid"] == ready.process.pid
    assert state.stage("sft").pid == waiting.pid != state.stage("kto").pid
    assert losses(run, "sft") == losses(plain, "sft") != {}
    assert gone(waiting) and "Traceback" not in run.log_path.read_text()


def test_a_run_that_waited_is_stopped_and_resumed_like_any_other(make_run: MakeRun, ready: Ready) -> None:
    run = make_run(sft__max_steps=100_000)
    runner.start(run, ready=ready)
    wait_until(lambda: run.state().stages and run.state().stage("sft").step > 2)
    with pytest.raises(Exception, match="running already"):
        runner.resume(run)
    request_stop(run)
    assert finish(run) == "stopped" and run.newest_checkpoint("sft")


def test_who_is_not_wanted_any_more_ends(ready: Ready) -> None:
    trainer = trainer_of(ready)
    ready.close()
    wait_until(lambda: ready.process.poll() == 0 and gone(trainer))


def test_they_end_with_the_app_however_it_dies() -> None:
    words = "import sys, time; from core.ready import Ready; ready = Ready({'FINETUI_BACKEND': 'trl'});"
    words += "print(ready.process.pid, flush=True); sys.stdin.read()"
    app = subprocess.Popen([sys.executable, "-c", words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert app.stdout
    waiting = psutil.Process(int(app.stdout.readline()))
    wait_until(lambda: bool(waiting.children()))
    (trainer,) = waiting.children()
    app.kill()
    app.communicate()
    wait_until(lambda: gone(waiting) and gone(trainer))


@pytest.mark.parametrize("who", ["runner", "trainer", "neither, but the plan has changed"])
def test_where_they_are_not_there_the_run_starts_as_ever(who: str, make_run: MakeRun, ready: Ready) -> None:
    trainer, run = trainer_of(ready), make_run(sft__max_steps=2)
    if who == "runner":
        ready.process.kill()
        ready.process.wait()
        wait_until(lambda: gone(trainer))
    elif who == "trainer":
        trainer.kill()
        wait_until(lambda: gone(trainer))
    else:
        ready.environment["CUDA_VISIBLE_DEVICES"] = "3"
    pid = runner.start(run, ready=ready)
    assert finish(run) == "done" and run.state().stage("sft").pid != trainer.pid
    assert (pid == ready.process.pid) == (who == "trainer")


def test_a_trainer_that_fails_at_an_import_is_started_again_with_its_words_in_the_log(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken" / "trl"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('trl is broken here')\n")
    monkeypatch.setenv("PYTHONPATH", str(broken.parent))
    ready = Ready(TRL)
    run = make_run(sft__max_steps=2)
    runner.start(run, ready=ready)
    assert finish(run) == "failed"
    assert "trl is broken here" in run.log_path.read_text()


def test_waiting_is_worth_it_with_memory_to_spare(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUI_CACHE", str(tmp_path / "cache"))  # where no other test holds the device
    plan = make_run().plan()
    monkeypatch.setattr("core.ready.WORTH_BYTES", 0)
    assert worth_it(plan) and plan.stages[0] in TRAINING_STAGES
    monkeypatch.setattr("core.ready.WORTH_BYTES", 1 << 60)
    assert not worth_it(plan)
