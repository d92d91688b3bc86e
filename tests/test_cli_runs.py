"""The commands on runs: which places and names they refuse, how a run is listed, shown, watched and deleted."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Refused, WriteRows, plan

from core.checkpoints import write_manifest
from core.runs import Run, create_run, list_runs, take_lock

pytestmark = pytest.mark.usefixtures("no_gpu")


def test_two_runs_on_one_name_are_refused(refused: Refused, folder: Path, rows_file: WriteRows) -> None:
    run = create_run(folder, plan(name="mine"))
    assert "There is a run named mine already" in refused(
        "sft", "--local-file", rows_file(), "--name", "mine", "--detach"
    )
    output = folder / "mine"
    assert "There is a run named mine already" in refused("sft", "--output-dir", output, "--detach")
    assert not run.log_path.exists()


def test_a_folder_of_runs_that_cannot_be_made_is_refused(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "No run can be made in" in refused("sft", "--runs-dir", place, "--detach")
    assert "No run can be made in" in refused("sft", "--output-dir", tmp_path / "file" / "run", "--detach")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that takes no folders")
def test_a_read_only_place_is_refused(refused: Refused) -> None:
    assert "No run can be made in /proc/none" in refused("sft", "--runs-dir", "/proc/none", "--detach")


def test_a_run_that_does_not_exist_or_is_not_unique_is_refused_by_every_command(refused: Refused, folder: Path) -> None:
    create_run(folder, plan(name="one-1"))
    create_run(folder, plan(name="one-2"))
    for command in ("show", "watch", "stop", "abort", "resume", "delete"):
        assert "There is no run 'two'" in refused(command, "two")
        assert "fits 2 runs" in refused(command, "one")
    for command in ("stop", "abort"):
        assert "is not running" in refused(command, "one-1")
    assert "needs a yes" in refused("delete", "one-1")


def test_an_empty_history_says_where_it_looked(said: Callable[..., str], folder: Path) -> None:
    assert f"No runs in {folder}" in said("runs").replace("\n", "")
    assert json.loads(said("runs", "--json")) == []
    assert not folder.exists()


@pytest.fixture
def ended(folder: Path) -> Run:
    """A run whose log tells a whole SFT; its last event is left to the test."""
    run = create_run(folder, plan(name="ended", note="\x1b[31mred"))
    append = run.events.append
    append("run_start", pid=1)
    append("stage_start", name="sft", base="base \x1b]0;title\x07")
    append("totals", stage="sft", steps=2, examples=8, rows=9, left_out=1, tokens=1000, trained_tokens=10, batch=4,
           left_out_reasons={"no assistant turn": 1})  # fmt: skip
    append("log", stage="sft", step=1, loss=float("nan"), epoch=0.5)
    append("log", stage="sft", step=2, loss=1.25, epoch=1.0, tokens_per_s=150.0)
    append("checkpoint", stage="sft", step=2)
    append("notice", stage="sft", level="warning", text="[/x] [INST] \u202e")
    append("stage_end", name="sft", status="done", output="sft/final_model")
    append(
        "result",
        stage="evaluate",
        prompts=4,
        table={"base": {"format": {"hits": 1, "total": 4, "low": 0.0, "high": 0.7}}},
    )
    return run


@pytest.mark.parametrize(
    ("status", "code"), [("done", 0), ("stopped", 0), ("failed", 1), ("aborted", 1), ("crashed", 1)]
)
def test_a_run_is_listed_shown_and_watched_to_its_end(
    said: Callable[..., str], ended: Run, status: str, code: int
) -> None:
    if status != "crashed":
        ended.events.append("run_end", status=status)
    row = json.loads(said("runs", "--json"))[0]
    assert (row["name"], row["status"], row["loss"], row["step"]) == ("ended", status, 1.25, 2)
    found = json.loads(said("show", "last", "--json"))
    assert (found["status"], found["stages"][0]["checkpoints"], found["nonfinite"]) == (status, [2], 1)
    assert found["path"] == str(ended.path) and found["result"]["prompts"] == 4
    events = [json.loads(line) for line in said("watch", "ended", "--json", code=code).splitlines()]
    assert events == [json.loads(line) for line in ended.events_path.read_text().splitlines()]
    for command, expected in (("runs", 0), ("show", 0), ("watch", code)):
        shown = said(*([command] if command == "runs" else [command, "end"]), code=expected)
        assert status in shown and not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", shown), command
    assert "[/x] [INST]" in said("show", "end")
    assert "25 % [" in said("show", "end")
    assert said("show", "end").count(f"ended: {status}") == 1


@pytest.mark.parametrize("flags", [(), ("--json",)], ids=["plain", "json"])
@pytest.mark.parametrize("how", ["replaced", "cut"])
def test_a_run_whose_log_is_replaced_or_cut_is_watched_from_its_beginning(
    said: Callable[..., str], ended: Run, monkeypatch: pytest.MonkeyPatch, how: str, flags: tuple[str, ...]
) -> None:
    steps = range(60 if how == "replaced" else 1)
    new = [
        {"t": 9, "kind": "run_start"}, {"t": 10, "kind": "stage_start", "name": "kto", "base": "another log"},
        *({"t": 11, "kind": "log", "stage": "kto", "step": step, "loss": 0.5} for step in steps),
        {"t": 12, "kind": "run_end", "status": "stopped"},
    ]  # fmt: skip
    looks: list[Run] = []

    def alive(run: Run) -> bool:
        """It lives for one look, and then its log is another."""
        looks.append(run)
        if len(looks) == 2:
            before = run.events_path.stat().st_size
            run.events_path.write_text("".join(json.dumps(event) + "\n" for event in new))
            assert (run.events_path.stat().st_size > before) == (how == "replaced")
        return len(looks) == 1

    monkeypatch.setattr("core.watch.is_alive", alive)
    monkeypatch.setattr("core.watch.POLL_S", 0)
    told = said("watch", "ended", *flags)
    if flags:
        events = [json.loads(line) for line in told.splitlines()]
        at = next(n for n, event in enumerate(events) if "replaced or cut" in event.get("text", ""))
        assert events[at + 1 :] == new
    else:
        before, _, after = told.partition("The event log was replaced or cut; it is told from its beginning.\n")
        assert "SFT: started" in before and after.startswith("KTO: started from another log\n")
        assert "ended: stopped" in after and "SFT result" not in after, "nothing is kept of the log before"


def test_a_done_run_is_not_resumed(refused: Refused, ended: Run) -> None:
    ended.final_model("sft").mkdir(parents=True)
    (ended.final_model("sft") / "adapter").write_text("x")
    write_manifest(ended.final_model("sft"))
    ended.events.append("run_end", status="done")
    assert "nothing is left to resume" in refused("resume", "ended")


def test_a_resume_tells_what_is_new(said: Callable[..., str], ended: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def resume(run: Run) -> int:
        run.events.append("run_start", pid=2)
        run.events.append("stage_start", name="kto", base="sft/final_model")
        run.events.append("log", stage="kto", step=7, loss=0.5)
        run.events.append("run_end", status="done")
        return 2

    ended.events.append("run_end", status="stopped")
    monkeypatch.setattr("core.commands.runner.resume", resume)
    told = said("resume", "ended")
    assert "Run ended started again" in told and "SFT was done before" in told
    assert "KTO: started" in told and "KTO: step 7" in told
    assert "SFT: started" not in told and "SFT: step" not in told and "rows left out" not in told
    assert [json.loads(line)["kind"] for line in said("resume", "ended", "--json").splitlines()][0] == "run_start"


def test_a_run_is_deleted_on_yes_and_never_while_it_lives(
    refused: Refused, said: Callable[..., str], ended: Run, folder: Path
) -> None:
    handle = take_lock(ended)
    assert "is running already" in refused("delete", "ended", "--yes")
    assert "is running already" in refused("resume", "ended")
    os.close(handle)
    assert said("delete", "ended", "--yes") == "ended is deleted.\n"
    assert list_runs(folder) == []


def test_a_run_with_a_damaged_plan_is_shown_and_not_resumed(
    refused: Refused, said: Callable[..., str], ended: Run
) -> None:
    ended.plan_path.write_text("sft: [\n")
    assert "ended" in said("show", "ended")
    assert "is not valid YAML" in refused("resume", "ended")
