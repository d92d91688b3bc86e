"""The lock of a run: who holds it is alive, one start of many succeeds, and no living run is deleted."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import MakeNamed

from core import runs
from core.errors import FinetuiError
from core.paths import TORN, remove_torn, writing_whole
from core.runs import (
    Run,
    delete_run,
    is_alive,
    process_lives,
    request_stop,
    started_at,
    status,
    take_lock,
    write_holder,
)

HOLD = """
import sys
from pathlib import Path
from core.runs import Run, take_lock, write_holder
handle = take_lock(Run(Path(sys.argv[1])))
write_holder(handle)
print("held", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def holder() -> Any:
    """Starts a child that holds a run's lock until told to end; all are ended at the test's end."""
    children: list[subprocess.Popen[str]] = []

    def hold(run: Run) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        children.append(child)
        assert child.stdout and child.stdout.readline() == "held\n"
        return child

    yield hold
    for child in children:
        child.kill()
        child.communicate()


def released(child: subprocess.Popen[str]) -> None:
    child.communicate("\n")


def test_a_run_is_alive_while_a_process_holds_its_lock_and_no_longer(named: MakeNamed, holder: Any) -> None:
    run = named()
    assert not is_alive(run) and status(run, None) == "crashed"
    child = holder(run)
    assert is_alive(run) and status(run, "failed") == "running"
    child.kill()
    child.wait()
    assert not is_alive(run) and status(run, None) == "crashed" and status(run, "done") == "done"


@pytest.mark.skipif(os.name == "nt", reason="needs SIGSTOP")
def test_a_run_that_is_suspended_runs_and_is_not_crashed(named: MakeNamed, holder: Any) -> None:
    """As a laptop's lid or a debugger suspends it: nobody may resume it meanwhile."""
    run = named()
    child = holder(run)
    child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
    assert is_alive(run) and status(run, None) == "running"
    with pytest.raises(FinetuiError, match="is running already"):
        take_lock(run, patience_s=0.05)
    child.send_signal(signal.SIGCONT)
    released(child)
    assert status(run, None) == "crashed"


def test_a_stop_is_shown_until_the_run_has_ended(named: MakeNamed, holder: Any) -> None:
    run = named()
    with pytest.raises(FinetuiError, match="is not running"):
        request_stop(run)
    assert not run.stop_path.exists()
    child = holder(run)
    request_stop(run)
    assert run.stop_path.exists() and status(run, None) == "stopping"
    released(child)
    assert status(run, "stopped") == "stopped"


def test_a_lock_that_a_child_inherits_lives_as_long_as_the_child(named: MakeNamed) -> None:
    run = named()
    handle = take_lock(run)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(handle,))
    os.close(handle)
    assert is_alive(run)
    child.communicate(b"\n")
    assert not is_alive(run)


def test_of_many_starts_at_once_exactly_one_succeeds(named: MakeNamed) -> None:
    run = named()
    barrier, outcomes = threading.Barrier(6), []

    def start() -> None:
        barrier.wait()
        try:
            outcomes.append(take_lock(run, patience_s=0.2))
        except FinetuiError as error:
            outcomes.append(error.message)

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handles = [outcome for outcome in outcomes if isinstance(outcome, int)]
    assert len(handles) == 1 and outcomes.count("one is running already.") == 5
    os.close(handles[0])


def test_viewers_neither_hinder_a_start_nor_take_each_other_for_the_runner(named: MakeNamed) -> None:
    run = named()
    os.close(take_lock(run))
    ended, seen = threading.Event(), []

    def view() -> None:
        while not ended.is_set():
            seen.append(is_alive(run))

    viewers = [threading.Thread(target=view) for _ in range(3)]
    for viewer in viewers:
        viewer.start()
    try:
        while len(seen) < 2000:
            ended.wait(0.001)
        assert not any(seen)
        for _ in range(20):
            os.close(take_lock(run, patience_s=10))
    finally:
        ended.set()
        for viewer in viewers:
            viewer.join()


def test_a_process_id_that_was_given_again_is_another_process() -> None:
    me = os.getpid()
    assert process_lives(me, started_at(me))
    assert not process_lives(me, started_at(me) - 60)
    of_day = psutil.Process(me).create_time()  # told by runs that an earlier version started
    assert process_lives(me, of_day) and not process_lives(me, of_day - 60)
    assert not process_lives(me, None) and not process_lives(None, 1.0)
    child = subprocess.Popen([sys.executable, "-c", ""])
    started = started_at(child.pid)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not process_lives(child.pid, started), "a zombie does not live"
    child.wait()
    assert not process_lives(child.pid, started)


@pytest.mark.skipif(not psutil.LINUX, reason="only there the machine's start is reckoned from its clock")
def test_a_process_is_the_same_one_after_the_clock_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    me, before, boot = os.getpid(), psutil.Process().create_time(), psutil.boot_time()
    started = started_at(me)
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: boot - 3600)
    assert psutil.Process().create_time() == pytest.approx(before - 3600), "so psutil tells it another time"
    assert process_lives(me, started)


def test_without_flock_process_id_and_start_time_decide(named: MakeNamed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "fcntl", None)
    run = named()
    assert not is_alive(run)
    handle = take_lock(run)
    write_holder(handle)
    os.close(handle)
    assert is_alive(run)
    with pytest.raises(FinetuiError, match="is running already"):
        take_lock(run)
    run.lock_path.write_text(json.dumps({"pid": os.getpid(), "started": 5.0}))
    assert not is_alive(run)
    for text in ("", "[]", "{", '{"pid": 1}', '{"pid": "x", "started": "y"}'):
        run.lock_path.write_text(text)
        assert not is_alive(run)


def test_a_living_run_is_not_deleted_and_an_ended_one_is(named: MakeNamed, holder: Any) -> None:
    run = named()
    child = holder(run)
    with pytest.raises(FinetuiError, match="one is running already"):
        delete_run(run)
    assert run.plan_path.exists()
    released(child)
    delete_run(run)
    assert not run.path.exists()
    with pytest.raises(FinetuiError, match="cannot be opened"):
        delete_run(run)


def test_what_a_killed_writer_left_goes_and_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    code = "import os, sys, pathlib; from core.paths import writing_whole; target = pathlib.Path(sys.argv[1])"
    killed = f"{code}\nwith writing_whole(target) as stream: os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", killed, str(tmp_path / "deep" / "plan.yaml")], check=False)
    assert len(list(tmp_path.rglob(f".*{TORN}"))) == 1
    (tmp_path / f".a stranger's file{TORN}").touch()
    with writing_whole(tmp_path / "plan.yaml") as stream:
        remove_torn(tmp_path.rglob(f".*{TORN}"))
        stream.write("whole")
    assert (tmp_path / "plan.yaml").read_text() == "whole"
    assert [path.name for path in tmp_path.rglob(f".*{TORN}")] == [f".a stranger's file{TORN}"]
