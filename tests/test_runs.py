"""The run directory: made whole or not at all, found and summarised; its checkpoints, complete or absent."""

import errno
import io
import json
import os
import pickle
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeNamed, plan
from hypothesis import HealthCheck, given, settings
from rich.console import Console
from test_events import wild_events

from core.artefacts import stage_done
from core.checkpoints import MANIFEST, complete_checkpoints, is_complete, write_manifest
from core.errors import FinetuiError
from core.paths import runs_dir, writing_whole
from core.runs import Digest, Run, create_run, find_run, list_runs, summary, take_lock
from core.watch import line_of, runs_table, show_run
from tui.follow import Follower

# --- making ---


def test_a_new_run_holds_its_plan_and_its_first_event(named: MakeNamed) -> None:
    run = named("one", note="first")
    assert run.plan().note == "first"
    event = json.loads(run.events_path.read_text())
    assert (event["v"], event["kind"], event["name"], event["stages"]) == (1, "created", "one", ["sft"])
    assert sorted(file.name for file in run.path.iterdir()) == ["events.jsonl", "plan.yaml"]
    assert run.path.stat().st_mode & 0o077 == 0, "other users can read the run"


def test_a_run_without_a_name_is_called_after_date_method_and_model(folder: Path) -> None:
    first, second = create_run(folder, plan()), create_run(folder, plan())
    assert re.fullmatch(r"\d{8}-\d{6}-sft-135m", first.name)
    assert first.name != second.name
    custom = create_run(folder, plan(model__name="Some One/My Model!"))
    assert custom.name.endswith("-sft-my-model")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../x", "a b", "-x", ".x", "x" * 101, "a\nb", "ü", "a\0b", "last", "\x1b[31m"]
)
def test_a_name_that_is_no_plain_word_is_refused_and_nothing_is_written(
    named: MakeNamed, folder: Path, name: str
) -> None:
    with pytest.raises(FinetuiError, match="cannot name a run"):
        named(name)
    assert not folder.exists()


@pytest.mark.parametrize("name", ["a", "7b.v2_final-3", "x" * 100])
def test_plain_words_name_a_run(named: MakeNamed, name: str) -> None:
    assert named(name).name == name


def test_two_runs_on_one_name_are_refused_and_the_first_stays(named: MakeNamed) -> None:
    first = named("one", note="first")
    with pytest.raises(FinetuiError, match="There is a run named one already"):
        named("one", note="second")
    assert first.plan().note == "first"


def test_a_file_in_place_of_the_folder_is_one_sentence(tmp_path: Path) -> None:
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        (tmp_path / "file").write_text("x")
        with pytest.raises(FinetuiError, match="No run can be made in .*/file"):
            create_run(folder, plan())
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("call", ["fsync", "write"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing_behind(
    folder: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(FinetuiError, match="No space left on device") as caught:
        create_run(folder, plan())
    assert "\n" not in str(caught.value) and list(folder.iterdir()) == []


def test_a_file_is_written_whole_or_keeps_its_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "file"
    with writing_whole(path) as stream:
        stream.write("old ü")
    with pytest.raises(ZeroDivisionError), writing_whole(path) as stream:
        stream.write("new")
        raise ZeroDivisionError
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(FinetuiError, match="cannot be written: No space left"), writing_whole(path) as stream:
        stream.write("new")
    assert path.read_text() == "old ü" and list(path.parent.iterdir()) == [path]


def test_the_folder_of_runs_is_the_flag_then_the_environment_then_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FINETUI_RUNS", str(tmp_path / "env"))
    assert runs_dir("flag") == tmp_path / "flag"
    assert runs_dir() == tmp_path / "env"
    monkeypatch.delenv("FINETUI_RUNS")
    assert runs_dir() == tmp_path / "runs"


# --- finding ---


def test_a_run_is_found_by_name_by_unique_prefix_and_as_the_last(named: MakeNamed, folder: Path) -> None:
    for number, name in enumerate(["alpha-1", "alpha-10", "beta"]):
        os.utime(named(name).plan_path, (1000 + number, 1000 + number))
    assert find_run(folder, "alpha-10").name == "alpha-10"
    assert find_run(folder, "alpha-1").name == "alpha-1", "a whole name wins over a longer one"
    assert find_run(folder, "b").name == "beta"
    assert find_run(folder, "last").name == "beta"
    assert [run.name for run in list_runs(folder)] == ["beta", "alpha-10", "alpha-1"]
    with pytest.raises(FinetuiError, match="fits 2 runs: "):
        find_run(folder, "alpha")
    for reference in ("gamma", "alpha-1/", "../runs/beta", "*"):
        with pytest.raises(FinetuiError, match="There is no run"):
            find_run(folder, reference)


def test_an_empty_reference_is_no_run_even_where_there_is_only_one(named: MakeNamed, folder: Path) -> None:
    named("only")
    with pytest.raises(FinetuiError, match="must be named"):
        find_run(folder, "")


def test_what_is_no_run_is_not_listed(named: MakeNamed, folder: Path, tmp_path: Path) -> None:
    named("one")
    (folder / "empty").mkdir()
    (folder / "file").write_text("x")
    (folder / "link").symlink_to(folder / "one")
    assert [run.name for run in list_runs(folder)] == ["one"]
    assert list_runs(tmp_path / "none") == []
    with pytest.raises(FinetuiError, match="There are no runs in"):
        find_run(tmp_path / "none", "last")


# --- complete or absent ---


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints" / "checkpoint-5"
    (folder / "deep").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"x" * 1000)
    (folder / "deep" / "state.json").write_text("{}")
    write_manifest(folder)
    return folder


def test_a_checkpoint_counts_when_every_file_of_its_manifest_is_whole(checkpoint: Path) -> None:
    assert is_complete(checkpoint)
    assert set(json.loads((checkpoint / MANIFEST).read_text())["files"]) == {"model.safetensors", "deep/state.json"}
    (checkpoint / "more").write_text("a file that came later does no harm")
    assert is_complete(checkpoint)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / MANIFEST).unlink(),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 999),
        lambda folder: (folder / "deep" / "state.json").write_text(""),
        lambda folder: (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:-5]),
        lambda folder: (folder / MANIFEST).write_text('{"files": {}}'),
        lambda folder: (folder / MANIFEST).write_text("[]"),
        lambda folder: (folder / MANIFEST).write_text('{"files": ["model.safetensors"]}'),
        lambda folder: (folder / MANIFEST).write_bytes(b"\xff"),
    ],
)
def test_a_checkpoint_that_is_cut_off_anywhere_does_not_count(checkpoint: Path, damage: Callable[[Path], Any]) -> None:
    damage(checkpoint)
    assert not is_complete(checkpoint)
    assert complete_checkpoints(checkpoint.parent) == []


def test_the_newest_complete_checkpoint_is_the_one_with_the_highest_step(named: MakeNamed) -> None:
    run = named()
    assert run.newest_checkpoint("sft") is None
    for step in (9, 10, 100, 200):
        folder = run.stage_path("sft") / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "state").write_text(str(step))
        if step != 200:
            write_manifest(folder)
    (run.stage_path("sft") / "checkpoints" / "checkpoint-x").mkdir()
    found = complete_checkpoints(run.stage_path("sft") / "checkpoints")
    assert [path.name for path in found] == ["checkpoint-100", "checkpoint-10", "checkpoint-9"]
    assert run.newest_checkpoint("sft") == found[0]


def test_a_stage_is_done_when_its_model_is_whole(named: MakeNamed) -> None:
    run = named()
    run.final_model("sft").mkdir(parents=True)
    (run.final_model("sft") / "adapter").write_text("x")
    assert not run.trained("sft") and not stage_done(run, "evaluate")
    write_manifest(run.final_model("sft"))
    assert run.trained("sft")


# --- the history ---


def long_log(run: Run, logs: int) -> None:
    """The events of an SFT that ended and a KTO that is in its last steps, `logs` each."""
    events: list[dict[str, Any]] = [{"kind": "run_start", "pid": 1}]
    for stage in ("sft", "kto"):
        events.append({"kind": "stage_start", "name": stage, "base": "x"})
        events += [
            {"kind": "log", "stage": stage, "step": step, "loss": 5 / step, "learning_rate": 1e-4, "grad_norm": 0.5,
             "rewards/margins": step / 9 if stage == "kto" else None}
            for step in range(1, logs + 1)
        ]  # fmt: skip
        if stage == "sft":
            events.append({"kind": "stage_end", "name": "sft", "status": "done", "output": "sft/final_model"})
    with run.events_path.open("a") as stream:
        stream.writelines(json.dumps({"t": time.time(), **event}) + "\n" for event in events)


def test_the_history_reads_the_ends_of_a_log_of_a_hundred_thousand_events_and_tells_the_same(named: MakeNamed) -> None:
    run = named("one", note="long")
    long_log(run, 50_000)
    begun = time.perf_counter()
    whole = run.state()
    read_whole = time.perf_counter() - begun
    begun = time.perf_counter()
    found = summary(run)
    assert time.perf_counter() - begun < read_whole / 10
    current = whole.current
    assert current is not None
    assert (found["stage"], found["step"]) == (current.name, current.step) == ("kto", 50_000)
    assert found["loss"] == whole.stage("kto").last("loss")
    assert found["margin"] == whole.stage("kto").last("rewards/margins") == pytest.approx(50_000 / 9)
    assert (found["started"], found["created"], found["note"]) == (whole.started, whole.created, "long")
    assert found["status"] == "crashed" and found["duration_s"] >= 0


@pytest.mark.parametrize("logs", [0, 1, 3, 20, 60, 200])
def test_the_history_tells_what_the_whole_log_tells_wherever_it_is_cut(named: MakeNamed, logs: int) -> None:
    run = named()
    long_log(run, logs)
    run.events.append("run_end", status="stopped")
    whole, found = run.state(), summary(run, tail_bytes=2000)
    assert whole.current is not None
    assert (found["stage"], found["step"], found["status"]) == (whole.current.name, whole.current.step, "stopped")
    assert found["loss"] == (5 / logs if logs else None)


@pytest.mark.parametrize("seed", range(4))
def test_a_digest_that_is_kept_up_tells_what_one_read_anew_tells(named: MakeNamed, seed: int) -> None:
    run, chance = named(), random.Random(seed)
    created = run.events_path.read_bytes()
    long_log(run, 150)
    run.events.append("run_end", status="stopped")
    run.events.append("run_start", resumed=True)
    log = run.events_path.read_bytes()
    digest, at = Digest(run, tail_bytes=4000), len(created)
    while at < len(log):
        at += int(chance.choice([1, 40, 400, 1500]) * chance.random()) + 1  # also in the middle of a line
        run.events_path.write_bytes(log[:at])
        told, whole = digest.read(), run.state()
        current = whole.current
        assert (told["stage"], told["step"]) == ((current.name, current.step) if current else (None, 0))
        assert (told["loss"], told["margin"]) == (whole.last("loss"), whole.last("rewards/margins"))
        assert told["total_steps"] == (current.total_steps if current else 0)
        assert told["status"] == (whole.end_status or "crashed")
        assert told["duration_s"] == pytest.approx(summary(run)["duration_s"], abs=1)
    run.events_path.write_bytes(created)
    assert digest.read() | {"duration_s": 0} == summary(run) | {"duration_s": 0}, "a log that was cut is read anew"


@pytest.mark.parametrize("seed", range(6))
def test_a_digest_of_a_log_that_others_cut_and_replace_between_two_looks_is_that_of_the_log_as_it_is(
    named: MakeNamed, seed: int
) -> None:
    run, other, chance = named("one", note="first"), named("another", note="second"), random.Random(seed)
    long_log(run, 12)
    long_log(other, 20)
    other.events.append("run_end", status="failed")
    logs = [run.events_path.read_bytes(), other.events_path.read_bytes()]
    digest, follower, content, shown = Digest(run), Follower(run), logs[0], None
    for _ in range(40):
        lines = content.splitlines(keepends=True)
        end = b'{"t":5,"kind":"run_end","status":"%d"}\n' % chance.getrandbits(600)
        ways = {
            "grows": content + chance.choice(logs[0].splitlines(keepends=True)[1:]),
            "is cut": content[: chance.randrange(len(content))],
            "is cut and grows": b"".join([*lines[:-3], end]),
            "is another": chance.choice(logs),
        }
        run.events_path.unlink()  # where inode numbers are given again, the new file has that of the old one
        run.events_path.write_bytes(content := ways[chance.choice(list(ways))] or logs[0])
        assert digest.read() == summary(run)
        shown, state = follower.read() or shown, run.state()
        assert shown and [stage.series for stage in shown.state.stages] == [stage.series for stage in state.stages]
        assert (shown.state.note, shown.status) == (state.note, state.end_status or "crashed")


def test_a_digest_passes_over_a_strangers_line_without_an_end_and_goes_on_behind_it(named: MakeNamed) -> None:
    run = named()
    long_log(run, 5)
    digest = Digest(run, tail_bytes=4000)
    digest.read()
    for piece in (b'{"kind":"log","loss":[', b"9," * 50_000, b"9," * 1_000, b"9]}\n"):
        with run.events_path.open("ab") as log:
            log.write(piece)
        assert digest.read()["status"] == "crashed"
    run.events.append("log", stage="kto", step=6, loss=0.25)
    run.events.append("run_end", status="done")
    assert (digest.read()["loss"], digest.read()["status"]) == (0.25, "done")
    assert len(pickle.dumps(digest._state)) < 20_000


def test_a_digest_kept_through_what_is_done_to_a_run_after_its_end_tells_the_end_again(named: MakeNamed) -> None:
    run = named()
    long_log(run, 60)
    run.events.append("run_end", status="done")
    took = summary(run)["duration_s"]
    digest = Digest(run, tail_bytes=2000)
    digest.read()
    lock = take_lock(run)
    run.events.append("task_start", name="evaluate", of=["held-out"], pid=1)
    run.events.append("stage_start", name="evaluate", index=2, base="")
    for answer in range(1, 60):
        run.events.append("step", stage="evaluate", step=answer)
    for one in (digest, Digest(run, tail_bytes=2000)):
        assert (one.read()["status"], one.read()["stage"], one.read()["step"]) == ("running", "evaluate", 59)
    run.events.append("stage_end", name="evaluate", status="failed", exit="SIGKILL")
    run.events.append("task_end", status="failed")
    os.close(lock)
    assert digest.read()["status"] == "done"
    assert digest.read()["duration_s"] == took


def test_a_run_that_resumes_far_back_shows_its_last_loss_until_it_logs_again(named: MakeNamed) -> None:
    run = named()
    digest = Digest(run)
    long_log(run, 300)
    loss = digest.read()["loss"]
    assert loss is not None
    run.events.append("run_start", resumed=True)
    run.events.append("stage_start", name="kto", index=1, base="")
    run.events.append("totals", stage="kto", steps=400, resumed_step=10)
    for one in (digest, Digest(run, tail_bytes=4000)):
        assert (one.read()["loss"], one.read()["step"]) == (loss, 10)
    assert summary(run)["loss"] == 0.5, "what the run logged at step 10, where that is read"
    run.events.append("log", stage="kto", step=11, loss=0.75)
    assert digest.read()["loss"] == 0.75
    run.events.append("totals", stage="kto", steps=400, resumed_step=11)
    assert digest.read()["loss"] == 0.75


def test_a_digest_of_a_long_run_stays_small(named: MakeNamed) -> None:
    run = named()
    digest = Digest(run)
    for _ in range(20):
        long_log(run, 100)
        run.events.append("notice", text="x")
        digest.read()
    kept = pickle.dumps(digest._state)
    assert len(kept) < len(pickle.dumps(run.state())) / 5


def test_a_run_that_has_not_begun_and_one_without_a_log_are_told_too(named: MakeNamed) -> None:
    run = named()
    assert summary(run) | {"duration_s": None} == {
        "name": "one", "status": "crashed", "method": "sft", "model": "135m", "note": "", "started": None,
        "pinned": False, "stage": None, "created": summary(run)["created"], "step": 0, "total_steps": 0,
        "left_s": None, "loss": None, "margin": None, "duration_s": None,
    }  # fmt: skip
    run.events_path.unlink()
    assert summary(run)["status"] == "crashed"


@pytest.mark.parametrize(
    "event",
    [
        {"kind": "totals", "examples": 5, "tokens": None, "trained_tokens": "many"},
        {"kind": "totals", "examples": 5, "tokens": None, "left_out": None, "rows": None},
        {"kind": "totals", "examples": 5, "left_out_reasons": [["a", 1]]},
        {"kind": "totals", "examples": "five"},
        {"kind": "result", "table": [["base", {}]]},
        {"kind": "result", "table": {"base": {"format": {"hits": "x"}}}},
        {"kind": "result", "table": {"base": [["format", {}]]}},
        {"kind": "result", "table": {"base": {"format": {"hits": None, "total": None, "low": None}}}},
        {"kind": "result", "table": None, "prompts": None},
        {"kind": "result", "table": {}, "prompts": "[/x]"},
        {"kind": "error", "message": None, "advice": None},
        {"kind": "notice", "text": {"a": 1}, "advice": None},
        {"kind": "log", "step": 10**300, "loss": 1.0},
        {"kind": "run_end", "status": None},
        {"kind": "stage_start", "name": None, "base": 5},
    ],
    ids=json.dumps,
)
def test_a_malformed_event_of_a_known_kind_is_shown_without_harm(named: MakeNamed, event: dict[str, Any]) -> None:
    run = named()
    events = [{"t": 1.0, "stage": "sft", **one} for one in ({"kind": "log", "step": 1, "loss": 1.0}, event)]
    run.events_path.write_text("".join(json.dumps(one) + "\n" for one in events))
    out = Console(file=io.StringIO(), width=80)
    out.print(runs_table([summary(run)]))
    show_run(out, run)
    assert line_of(events[0], run.state()).startswith("SFT: step 1")
    assert isinstance(line_of(events[1], run.state()), str)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(events=wild_events)
def test_no_log_can_make_the_history_or_a_view_raise(named: MakeNamed, folder: Path, events: dict[str, Any]) -> None:
    run = Run(folder / "wild") if (folder / "wild").exists() else named("wild")
    good = {"kind": "log", "stage": events["stage"], "step": 1, "loss": 1.0, "t": 1.0}
    run.events_path.write_text("".join(json.dumps(event) + "\n" for event in (good, events, good)))
    out = Console(file=io.StringIO(), width=80)
    out.print(runs_table([summary(run)]))
    show_run(out, run)
    assert all(isinstance(line_of({"t": 0.0, **event}, run.state()), str) for event in (good, events))
    json.dumps(summary(run))
