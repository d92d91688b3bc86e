"""The machine's clock is set while a run lives, waits or rests: what is told of the run goes by a clock of its own."""

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeNamed, plan

from core import clock, runner
from core.clock import CLOCK_ENV, boot_id
from core.data_cache import building, data_cache, entry, tidy
from core.events import RunState
from core.machine_use import use_of
from core.runs import Run, create_run, find_run, list_runs, start_clock, summary, take_lock
from tui.follow import Follower
from tui.report import now_words

HOUR, DAY = 3600.0, 86_400.0
JUMPS = {"an hour back": -HOUR, "a day back": -DAY, "a day on": DAY}


class Machine:
    """The two clocks of a machine: one runs, the other can be set too."""

    def __init__(self) -> None:
        self.wall, self.up = 1_800_000_000.0, 5_000.0

    def work(self, seconds: float) -> None:
        self.wall, self.up = self.wall + seconds, self.up + seconds

    def set(self, seconds: float) -> None:
        self.wall += seconds


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine()
    monkeypatch.setattr("core.clock.time.time", lambda: found.wall)
    monkeypatch.setattr("core.clock.time.monotonic", lambda: found.up)
    return found


def begin(run: Run) -> dict[str, Any]:
    """A runner that starts; what it hands its trainer."""
    again = Run(run.path)
    paused = start_clock(again)
    here = {"host": platform.node(), "boot": boot_id(), "clock": again.events.zero}
    again.events.append("run_start", paused_s=paused, pid=1, **here)
    again.events.append("stage_start", name="sft", index=0, base="", pid=2)
    again.events.append("totals", stage="sft", steps=100)
    return {CLOCK_ENV: str(again.events.zero)}


def trained(run: Run, machine: Machine, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], steps: range) -> None:
    """A trainer that logs a step each ten seconds."""
    with monkeypatch.context() as inside:
        inside.setenv(CLOCK_ENV, given[CLOCK_ENV])
        trainer = Run(run.path)
        for step in steps:
            machine.work(10)
            trainer.events.append("log", stage="sft", step=step, loss=1.0)
            trainer.events.append("gpu", cpu_s=10.0 * step, rss_bytes=1 << 30)


@pytest.mark.parametrize("jump", JUMPS.values(), ids=JUMPS)
def test_a_clock_that_is_set_while_a_run_trains_changes_no_time_that_is_told(
    named: MakeNamed, machine: Machine, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    run = named()
    holder = take_lock(run)
    given = begin(run)
    watching = Follower(run)
    watching.read()
    trained(run, machine, monkeypatch, given, range(1, 21))
    machine.set(jump)
    trained(run, machine, monkeypatch, given, range(21, 31))
    for shown in (watching.read(), Follower(run).read()):
        assert shown and shown.live and shown.took_s == pytest.approx(300)
        assert shown.clocks["sft"][-1] == (30, pytest.approx(300))
        assert [at for at, _ in shown.sensors["memory"][0][1]][-1] == pytest.approx(300)
        told = now_words(shown, 120).plain
        assert "11 min 40 s left" in told and "5 min 00 s" in told
    head = summary(run)
    assert (head["status"], head["duration_s"], head["left_s"]) == ("running", 300, 700)
    busy = [share for _, share in use_of(run.state().gpu).curves["utilisation"]["CPU"]]
    assert busy and all(share == pytest.approx(100) for share in busy if share is not None)
    os.close(holder)


@pytest.mark.parametrize("jump", JUMPS.values(), ids=JUMPS)
@pytest.mark.parametrize("end", ["stopped", "killed"])
def test_a_clock_that_is_set_between_stop_and_resume_leaves_the_time_that_was_worked(
    named: MakeNamed, machine: Machine, monkeypatch: pytest.MonkeyPatch, jump: float, end: str
) -> None:
    run = named()
    trained(run, machine, monkeypatch, begin(run), range(1, 11))
    assert summary(run)["duration_s"] == 100, "it goes on until its last sign of life"
    if end == "stopped":
        run.events.append("run_end", status="stopped")
    machine.work(50)
    machine.set(jump)
    assert summary(run)["duration_s"] == 100
    shown = Follower(run).read()
    assert shown and shown.took_s == pytest.approx(100)
    holder = take_lock(run)
    given = begin(run)
    trained(run, machine, monkeypatch, given, range(11, 21))
    assert summary(run)["duration_s"] == pytest.approx(200)
    assert summary(run)["left_s"] == pytest.approx(800)
    moments = [json.loads(line)["t"] for line in run.events_path.read_text().splitlines()]
    assert moments[-1] == max(moments)
    if end == "killed":  # after a stop the log's last word was by the machine's clock, as an outsider's is
        assert moments == sorted(moments)
    os.close(holder)


def test_a_run_that_starts_again_is_in_no_phase_yet(named: MakeNamed, machine: Machine) -> None:
    run = named()
    begin(run)
    run.events.append("phase", stage="sft", name="train")
    following = Follower(run)
    assert (shown := following.read()) and shown.phase_started is not None
    machine.set(HOUR)
    holder = take_lock(run)
    start_clock(run)
    run.events.append("run_start", pid=1)
    assert (shown := following.read()) and shown.live and shown.phase_started is None
    os.close(holder)


def test_the_zero_of_another_machine_or_of_an_earlier_start_of_this_one_is_not_counted_from(
    named: MakeNamed, machine: Machine
) -> None:
    run, now = named(), machine.wall
    for told in (
        {"host": "elsewhere", "boot": boot_id(), "clock": 5.0}, {"host": platform.node(), "boot": "x", "clock": 5.0},
        {"host": platform.node(), "boot": boot_id(), "clock": 1e300},
        {"host": platform.node(), "boot": boot_id(), "clock": "soon"}, {},
    ):  # fmt: skip
        state = RunState()
        state.fold({"t": now - 7, "kind": "run_start", **told})
        assert state.now() == now
    state.fold({"t": now + 9, "kind": "gpu"})
    assert state.now() == now + 9, "the machine's clock stands before the last event"
    assert clock.started(3.99e9) + machine.up == now, "no clock of a run goes where no date is"
    begin(run)
    assert run.state().now() == now


def test_an_abort_of_a_run_whose_runner_is_gone_is_told_by_the_clock_of_the_run(
    named: MakeNamed, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = named()
    trained(run, machine, monkeypatch, begin(run), range(1, 11))
    machine.set(-DAY)
    holder = take_lock(run)
    runner.abort(run)
    os.close(holder)
    assert summary(run)["status"] == "aborted" and summary(run)["duration_s"] == 100


@pytest.mark.skipif(os.name == "nt", reason="needs flock")
def test_what_is_still_being_built_in_the_cache_outlives_a_clock_that_was_set_on() -> None:
    with building("0" * 32) as folder:
        (folder / "piece").write_bytes(b"x" * 100)
        os.utime(folder, (time.time() - 2 * DAY,) * 2)
        with building("1" * 32) as newer:
            (newer / "piece").write_bytes(b"x")
        tidy(limit=1)
        assert (folder / "piece").exists()
    assert entry("0" * 32) and not list(data_cache().glob(".*"))


def test_the_run_made_last_is_the_last_one_after_the_clock_was_set_back(folder: Path) -> None:
    first = create_run(folder, plan(name="first"))
    ahead = time.time_ns() + int(DAY * 1e9)
    os.utime(first.plan_path, ns=(ahead, ahead))
    names = [create_run(folder, plan(name=name)).name for name in ("second", "third")]
    assert [run.name for run in list_runs(folder)] == [*reversed(names), "first"]
    assert find_run(folder, "last").name == "third"


def test_a_run_is_made_while_another_is_deleted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_run(folder, plan(name="first"))
    monkeypatch.setattr("core.runs.list_runs", lambda where: [Run(where / "gone"), *list_runs(where)])
    assert create_run(folder, plan(name="second")).name == "second"
