"""Runs followed by the app: snapshots, the history, the log's tail, and curves thinned."""

import os
import shutil
from pathlib import Path

import pytest
from pilots import recorded

from core.runs import Digest, Run, take_lock
from tui.dashboard import now_words, side_words
from tui.follow import Follower, LogTail, thinned
from tui.history import History
from tui.home import cells

pytestmark = pytest.mark.usefixtures("own_cache_and_no_gpu", "folder_made")


def test_a_long_series_is_thinned_without_losing_spikes_or_gaps() -> None:
    points: list[tuple[int, float | None]] = [(step, 1.0) for step in range(100_000)]
    points[70_000], points[80_000] = (70_000, 50.0), (80_000, None)
    thin = thinned(points)
    assert len(thin) <= 600 and thin[-1] == points[-1]
    assert (70_000, 50.0) in thin and (80_000, None) in thin
    assert [step for step, _ in thin] == sorted(step for step, _ in thin)


def test_a_snapshot_is_not_changed_by_later_events(folder: Path) -> None:
    run = recorded(folder, "stopped")
    follower = Follower(run)
    first = follower.read()
    assert first and follower.read() is None
    run.events.append("log", stage="sft", step=70, loss=0.1)
    second = follower.read()
    assert second and (first.state.stages[0].step, second.state.stages[0].step) == (65, 70)
    assert len(second.state.stages[0].series["loss"]) == len(first.state.stages[0].series["loss"]) + 1


def test_the_history_reads_again_only_what_changed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        recorded(folder, "stopped", name)
    read: list[str] = []

    def counted(run: Run) -> Digest:
        read.append(run.name)
        return Digest(run)

    monkeypatch.setattr("tui.history.Digest", counted)
    history = History(folder)
    assert {row["status"] for row in history.read()} == {"stopped"}
    Run(folder / "b").events.append("run_end", status="done")
    history.read()
    assert sorted(read) == ["a", "b", "b"]


def test_the_history_reads_of_a_living_run_what_is_new(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = recorded(folder, "stopped")
    run.events.append("run_start")
    lock, history = take_lock(run), History(folder)
    try:
        assert history.read()[0]["status"] == "running"
        monkeypatch.setattr("tui.history.Digest", None)
        run.events.append("log", stage="sft", step=71, loss=0.1)
        row = history.read()[0]
        assert (row["step"], row["loss"]) == (71, 0.1)
        run.events.append("run_end", status="done")
    finally:
        os.close(lock)
    assert history.read()[0]["status"] == "done"


def test_a_run_that_was_deleted_and_made_anew_under_its_name_is_told_as_it_is_now(folder: Path) -> None:
    run = recorded(folder, "done")
    run.events.append("run_start")
    lock, history, follower = take_lock(run), History(folder), Follower(run)
    assert history.read()[0]["status"] == "running" and follower.read()
    os.close(lock)
    shutil.rmtree(run.path)
    run = recorded(folder, "nan", name="done")
    with run.events_path.open("a") as log:  # longer than the one before
        log.writelines('{"t":5,"kind":"notice","text":"%s"}\n' % ("x" * 900) for _ in range(60))
    lock = take_lock(run)
    row, fresh, shown = history.read()[0], History(folder).read()[0], follower.read()
    os.close(lock)
    assert row | {"duration_s": 0} == fresh | {"duration_s": 0}
    whole = run.state()
    assert shown and [stage.step for stage in shown.state.stages] == [stage.step for stage in whole.stages]
    assert shown.state.started == whole.started


def test_a_log_is_followed_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "train.log"
    tail = LogTail(path)
    assert tail.read() == []
    path.write_bytes(b"one\n10%\r20%\rdone\nhalf")
    assert tail.read() == ["one", "done"]
    with path.open("ab") as stream:
        stream.write(b" line\n\xff\n")
    assert tail.read() == ["half line", "\ufffd"]
    path.write_bytes(b"another log\n" + b"that is longer\n" * 20)
    assert tail.read() == ["another log", *["that is longer"] * 20]
    path.write_bytes(b"cut\n")
    assert tail.read() == ["cut"] and tail.read() == []


def test_impossible_figures_in_a_log_are_passed_over(folder: Path) -> None:
    run = Run(folder / "figures")
    run.path.mkdir()
    run.plan_path.write_text("method: sft\n")
    run.events_path.write_text(
        '{"t":1e999,"kind":"created","stages":["sft"]}\n{"t":NaN,"kind":"run_start"}\n'
        '{"t":-5,"kind":"stage_start","name":"sft"}\n{"t":1,"kind":"phase","stage":"sft","name":"load","seconds":Infinity}\n'
        '{"t":2,"kind":"log","stage":"sft","step":1,"loss":NaN}\n{"t":3,"kind":"log","stage":"sft","step":2,"loss":1e999}\n'
        f'{{"t":4,"kind":"log","stage":"sft","step":3,"loss":{"9" * 400}}}\n'
        '{"t":5,"kind":"gpu","gpus":[{"memory_used_bytes":"x","memory_total_bytes":0}, 3]}\n'
        '{"t":6,"kind":"run_end","status":"done"}\n'
    )
    row = History(folder).read()[0]
    assert row["loss"] is None and cells(row, {})
    snapshot = Follower(run).read()
    assert snapshot and snapshot.status == "done" and snapshot.memory == "GPU 0: no figures"
    assert [value for _, value in snapshot.state.stages[0].series["loss"]] == [None, None, None]
    assert now_words(snapshot, 80) and side_words(snapshot)
