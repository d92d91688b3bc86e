"""Storage that fails: damaged checkpoints, torn logs, changed plans and rows, folders that vanish, full disks."""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeNamed, MakeRun, finish, losses, wait_until
from hypothesis import given
from hypothesis import strategies as st

from core import runner
from core.checkpoints import MANIFEST, damage, is_complete, sound_checkpoint, write_manifest
from core.cli import main
from core.clock import boot_id
from core.errors import FinetuiError
from core.events import EventTail
from core.machine_use import changed_software, code, versions
from core.plan import KTOPlan, SFTPlan
from core.postmortem import post_mortem
from core.reporter import Reporter
from core.runs import Run, create_run, is_alive, process_lives, status, summary, take_lock
from core.train_resume import compare_with_start, resume_point, settings_of, sound_base

HERE = Path(__file__).resolve().parent


def checkpoint(run: Run, step: int, stage: str = "sft") -> Path:
    folder = run.stage_path(stage) / "checkpoints" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in ("adapter_model.safetensors", "optimizer.pt", "trainer_state.json"):
        (folder / name).write_bytes(os.urandom(4000))
    write_manifest(folder)
    return folder


def flip(file: Path) -> None:
    """One bit of the middle is another."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (lambda folder: flip(folder / "optimizer.pt"), "optimizer.pt is not as it was saved"),
    "a file cut short": (lambda folder: os.truncate(folder / "optimizer.pt", 10), "has 10 bytes instead of 4000"),
    "a missing file": (lambda folder: (folder / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "it was never finished"),
    "a torn manifest": (lambda folder: os.truncate(folder / MANIFEST, 20), "its manifest cannot be read"),
    "a folder for a file": (
        lambda folder: ((folder / "optimizer.pt").unlink(), (folder / "optimizer.pt").mkdir()),
        "optimizer.pt is no file",
    ),
    "a way out of the folder": (
        lambda folder: (folder / MANIFEST).write_text('{"files": {"../../../../etc/passwd": 1}}'),
        "manifest cannot be read",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_newest_sound_checkpoint_is_taken_and_the_damaged_one_is_named(kind: str, named: MakeNamed) -> None:
    run = named()
    good, bad = checkpoint(run, 10), checkpoint(run, 20)
    assert resume_point(run, "sft", Reporter(run, "sft")) == bad
    DAMAGE[kind][0](bad)
    assert sound_checkpoint(bad.parent)[0] == good and DAMAGE[kind][1] in damage(bad)
    assert resume_point(run, "sft", Reporter(run, "sft")) == good
    [notice] = run.state().notices
    assert notice["text"].startswith("SFT goes on from checkpoint-10: checkpoint-20 is left out: ")
    assert DAMAGE[kind][1] in notice["text"] and "\n" not in notice["text"]
    assert not bad.exists(), "it would stand in the way of the next one"


def test_without_any_sound_checkpoint_the_stage_begins_again_and_says_so(named: MakeNamed) -> None:
    run = named()
    flip(checkpoint(run, 10) / "optimizer.pt")
    assert resume_point(run, "sft", Reporter(run, "sft")) is None
    assert "SFT begins at its first step: checkpoint-10 is left out" in run.state().notices[0]["text"]
    assert resume_point(named("fresh"), "sft", Reporter(named("other"), "sft")) is None


@given(st.binary(max_size=200))
def test_no_manifest_breaks_the_look_at_a_checkpoint(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / MANIFEST).write_bytes(raw)
    assert not is_complete(folder) and damage(folder)


def test_a_damaged_model_of_the_stage_before_is_not_trained_on(named: MakeNamed) -> None:
    run = named()
    folder = run.final_model("sft")
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(os.urandom(100))
    write_manifest(folder)
    assert sound_base(run, "sft") == folder
    flip(folder / "adapter_model.safetensors")
    with pytest.raises(FinetuiError, match="that SFT left is damaged: adapter_model.safetensors is not") as caught:
        sound_base(run, "sft")
    assert str(folder) in caught.value.advice


# --- what a run was begun with ---


def begun(run: Run, stage: SFTPlan, hashes: dict[str, str]) -> Path:
    file = run.path / "data.json"
    file.write_text(json.dumps({"sha256": hashes, "settings": settings_of(stage)}))
    return file


def test_other_rows_than_the_run_was_begun_with_are_refused(named: MakeNamed) -> None:
    run, stage = named(), SFTPlan()
    file, reporter = begun(run, stage, {"rows.jsonl": "a"}), Reporter(run, "sft")
    compare_with_start(file, stage, "sft", {"elsewhere.jsonl": "a"}, reporter)
    with pytest.raises(FinetuiError, match="rows.jsonl is not what it was when this run was begun"):
        compare_with_start(file, stage, "sft", {"rows.jsonl": "b"}, reporter)
    assert run.state().notices == []


@pytest.mark.parametrize("change", [{"max_length": 64}, {"seed": 1}, {"batch_size": 3}, {"data": {"max_rows": 5}}])
def test_a_setting_that_would_change_the_rows_is_refused_by_name(named: MakeNamed, change: dict[str, object]) -> None:
    run = named()
    file = begun(run, SFTPlan(), {})
    with pytest.raises(FinetuiError, match=r"sft\.\S+ was \S+ when this run was begun and is") as caught:
        compare_with_start(file, SFTPlan(**change), "sft", {}, Reporter(run, "sft"))
    assert "plan.yaml" in caught.value.advice


def test_other_changes_are_taken_and_told(named: MakeNamed) -> None:
    run = named()
    file = begun(run, SFTPlan(batch_size=4), {})
    again = SFTPlan(batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-5)
    compare_with_start(file, again, "sft", {}, Reporter(run, "sft"))
    [notice] = run.state().notices
    assert notice["text"] == "Changed in the plan since this stage was begun: sft.learning_rate 0.0002 → 1e-05."


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"sha256": 3, "settings": 4}', '{"settings": {"seed": {}}, "sha256": [[]]}']
)
def test_a_broken_record_of_the_start_stops_nobody(named: MakeNamed, text: str) -> None:
    run = named()
    (run.path / "data.json").write_text(text)
    try:
        compare_with_start(run.path / "data.json", KTOPlan(), "kto", {"a": "b"}, Reporter(run, "kto"))
    except FinetuiError as error:
        assert "seed" in error.message


def test_a_real_run_goes_on_from_the_last_sound_checkpoint_with_a_lower_rate(make_run: MakeRun) -> None:
    """A kill, a flipped bit in the newest checkpoint, a torn log, a rate lowered by hand: all in one resume."""
    run = make_run(
        "sft", sft__max_steps=400, sft__save_steps=5, sft__lr_scheduler_type="constant", sft__warmup_ratio=0.0
    )
    runner.start(run)
    wait_until(lambda: len(run.state().stage("sft").checkpoints) >= 2)
    os.kill(run.state().stage("sft").pid or 0, 9)
    assert finish(run) == "failed"
    newest, before = sorted(
        run.stage_path("sft").glob("checkpoints/checkpoint-*"), key=lambda path: -int(path.name[11:])
    )[:2]
    if not is_complete(newest):
        shutil.rmtree(newest)
        newest, before = before, run.stage_path("sft") / "checkpoints" / f"checkpoint-{int(before.name[11:]) - 5}"
    flip(newest / "optimizer.pt")
    with run.events_path.open("ab") as log:
        log.write(b'\x00\xff{"t": 1, "kind": "lo')
    steps = int(before.name[11:]) + 4
    text = run.plan_path.read_text().replace("learning_rate: 0.01 ", "learning_rate: 0.001 ").replace(
        "max_steps: 400", f"max_steps: {steps}")  # fmt: skip
    run.plan_path.write_text(text)
    runner.resume(run)
    assert finish(run) == "done"
    state = run.state()
    told = [notice["text"] for notice in state.notices]
    assert any(f"goes on from {before.name}: {newest.name} is left out" in text for text in told)
    assert any("sft.learning_rate 0.01 → 0.001" in text for text in told)
    assert list(losses(run, "sft")) == list(range(1, steps + 1))
    rates = dict(state.stage("sft").series["learning_rate"])
    assert rates[steps] == pytest.approx(1e-3) and rates[steps - 4] == pytest.approx(1e-2)


# --- other software ---


def test_what_was_upgraded_between_stop_and_resume_is_told(named: MakeNamed) -> None:
    run = named()
    folder = run.final_model("sft")
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(os.urandom(100))
    write_manifest(folder)
    older = {**versions(), "torch": "1.0", "bitsandbytes": "0.1"}
    run.events.append("run_start", version="0.0", python=platform.python_version(), versions=older, code="abc")
    run.events.append("log", stage="sft", step=1, loss=1.0)
    run.events.append("run_end", status="stopped")
    runner.start(run)
    assert finish(run) == "done"
    [notice] = run.state().notices
    assert f"torch 1.0 → {versions()['torch']}" in notice["text"] and "finetui 0.0 → " in notice["text"]
    assert "bitsandbytes 0.1 → none" in notice["text"] and "transformers" not in notice["text"]
    assert "Python" not in notice["text"] and run.state().start["boot"] == boot_id()
    runner.start(run)
    assert finish(run) == "done" and len(run.state().notices) == 1, "nothing was changed since"


def test_a_changed_checkout_is_told_before_the_stage_that_runs_with_it(
    named: MakeNamed, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = named()
    walker = runner.Runner(run, run.plan(), -1)
    walker.software = {"version": "0.1.0", "code": code(), "versions": versions()}
    walker.look_again()
    assert run.state().notices == []
    monkeypatch.setattr(runner, "code", lambda: "pulled")
    walker.look_again()
    walker.look_again()
    [notice] = run.state().notices
    assert notice["text"] == "Changed since this run was last started: finetui's own code."


@pytest.mark.parametrize("before", [{}, {"versions": 3, "python": None}, {"versions": {"torch": []}, "code": 1}])
def test_a_start_that_says_little_of_its_software_is_no_error(before: dict[str, Any]) -> None:
    now = {"versions": versions(), "python": "3.12", "code": "x", "version": "1"}
    assert isinstance(changed_software(before, now), list) and changed_software({}, now) == []


def test_a_plan_of_another_version_is_read_and_what_it_has_too_much_is_named(named: MakeNamed) -> None:
    run = named()
    lines = run.plan_path.read_text().splitlines(keepends=True)
    run.plan_path.write_text("".join(line for line in lines if "save_total_limit" not in line))
    assert run.plan().sft.save_total_limit == SFTPlan().save_total_limit, "an older one did not have it yet"
    run.plan_path.write_text("".join([*lines, "tomorrows_key: 3\n"]))
    with pytest.raises(FinetuiError, match="there is no option 'tomorrows_key'") as caught:
        runner.resume(run)
    assert "another version of finetui" in caught.value.advice and f"line {len(lines) + 1}" in caught.value.message


def test_a_log_that_was_cut_off_at_its_beginning_is_followed_and_shown(
    named: MakeNamed, capsys: pytest.CaptureFixture[str]
) -> None:
    """As logrotate's copytruncate does under a living run."""
    run = named()
    run.events.append("stage_start", name="sft")
    tail, before = EventTail(run.events_path), EventTail(run.events_path)
    assert [event["kind"] for event in tail.read()] == ["created", "stage_start"]
    os.truncate(run.events_path, 0)
    assert tail.read() == []
    run.events.append("log", stage="sft", step=7, loss=1.5)
    assert [event["kind"] for event in tail.read()] == [event["kind"] for event in before.read()] == ["log"]
    assert main(["show", run.name, "--runs-dir", str(run.path.parent)]) == 0
    shown = capsys.readouterr().out
    assert "the beginning of its log is gone" in shown and "step 7  loss 1.5" in shown


def test_what_is_made_under_an_open_umask_can_be_written_by_nobody_else(tmp_path: Path) -> None:
    rows, cache = tmp_path / "rows.jsonl", tmp_path / "cache"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "FINETUI_CACHE": str(cache)}
    words = [sys.executable, "-P", "-m", "core.cli", "check", str(rows), "--method", "sft"]
    subprocess.run(words, umask=0, env=environment, capture_output=True, check=True)
    assert len(made := [cache, *cache.rglob("*")]) >= 3
    assert [path.name for path in made if path.stat().st_mode & 0o002] == []


# --- folders ---


def test_a_folder_deleted_while_it_trains_ends_the_run_and_does_not_come_back(make_run: MakeRun) -> None:
    run = make_run("sft", sft__max_steps=4000, sft__save_steps=5)
    runner.start(run)
    wait_until(lambda: run.state().stage("sft").checkpoints)
    start, stage = run.state().start, run.state().stage("sft")
    pids = [(start["pid"], start["pid_started"]), (stage.pid, stage.pid_started)]
    away = run.path.with_name("away")
    run.path.rename(away)  # at once, as a file manager moves it to the bin
    try:
        wait_until(lambda: not is_alive(Run(away)), 60)
        assert not run.path.exists() or not (run.path / "plan.yaml").exists()
        wait_until(lambda: not any(process_lives(pid, started) for pid, started in pids), 60)
        card = post_mortem(Run(away), "crashed")
        assert card and card.cause.kind == "moved" and "under the name that it has now" in card.cause.advice
    finally:
        shutil.rmtree(run.path, ignore_errors=True)


AS_NOBODY = """
import os, sys
from pathlib import Path
from core.errors import FinetuiError
from core.notes import Note, write_note
from core.runs import Run, list_runs, summary, take_lock
os.setgid(65534); os.setuid(65534)
run = Run(Path(sys.argv[1]))
print(summary(run)["status"], len(list_runs(run.path.parent)))
for deed in (lambda: take_lock(run), lambda: write_note(run.path, Note("x"))):
    try:
        deed()
    except FinetuiError as error:
        print(error.message)
"""


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root can become another user")
def test_another_user_may_look_at_a_read_only_run_and_is_refused_in_a_sentence() -> None:
    from conftest import plan

    with tempfile.TemporaryDirectory(prefix="finetui-faults-") as place:
        run = create_run(Path(place) / "runs", plan(name="shared"))
        run.events.append("run_end", status="done")
        os.close(take_lock(run))
        for path in [Path(place), run.path.parent, run.path, *run.path.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        told = subprocess.run(
            [sys.executable, "-P", "-c", AS_NOBODY, str(run.path)], capture_output=True, text=True, check=False
        )
        for path in [Path(place), run.path.parent, run.path]:
            path.chmod(0o755)
    lines = told.stdout.splitlines()
    assert lines[0] == "done 1", told.stderr
    assert "lock cannot be opened: Permission denied" in lines[1] and "cannot be written" in lines[2]


def test_a_folder_that_cannot_hold_runs_is_one_sentence() -> None:
    from conftest import plan

    with pytest.raises(FinetuiError, match="No run can be made in /proc/runs"):
        create_run(Path("/proc/runs"), plan())


def can_mount() -> bool:
    if not shutil.which("unshare"):
        return False
    words = ["unshare", "-Urm", "mount", "-t", "tmpfs", "-o", "size=64k", "none", "/mnt"]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="no small disk can be mounted in a user namespace here")
def test_a_full_disk_ends_a_run_with_a_card_and_what_was_saved_is_whole(tiny_model: Path) -> None:
    work = f'exec "{sys.executable}" -P "{HERE / "full_disk.py"}" "{tiny_model}"'
    words = ["unshare", "-Urm", "sh", "-c", f"mount -t tmpfs -o size=6m none /mnt && {work}"]
    told = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert told.returncode == 0, told.stderr[-3000:]
    found = json.loads(told.stdout.strip().splitlines()[-1])
    assert "cannot be written: No space left on device" in found["started"]["said"] and found["started"]["left"] == []
    assert found["draft"]["said"] == "No space left on device" and found["draft"]["kept"] == 1
    assert not [name for name in found["draft"]["left"] if name.startswith(".draft")]
    trained = found["trained"]
    assert (trained["status"], trained["kind"], trained["checkpoint"]) == ("failed", "disk-full", True), trained
    assert (trained["after"], trained["steps"], trained["sorted"]) == ("done", 120, True)


# --- clocks and process ids ---


def test_a_reboot_with_a_clock_that_was_set_back_and_ids_given_again_leaves_a_run_that_can_be_resumed(
    named: MakeNamed,
) -> None:
    run = named()
    run.events.append("run_start", pid=os.getpid(), pid_started=1.0, boot="another start of the machine")
    run.events.append("stage_start", name="sft", pid=os.getpid(), pid_started=1.0)
    ahead = json.dumps({"t": 3e9, "kind": "log", "stage": "sft", "step": 3, "loss": 1.0})
    with run.events_path.open("a") as log:
        log.write(ahead + "\n")
    run.lock_path.write_text(json.dumps({"pid": os.getpid(), "started": 1.0}))
    assert status(run, run.state().end_status) == "crashed", "this process has the id, and is another"
    card = post_mortem(run, "crashed")
    assert card and card.cause.kind == ("restarted" if boot_id() else "vanished")
    run.events.append("run_start", pid=1)
    assert (summary(run)["duration_s"] or 0) >= 0
    os.close(take_lock(run, 0.1))


def at(run: Run, t: float, kind: str, **fields: Any) -> None:
    """An event of that time."""
    with run.events_path.open("a") as log:
        log.write(json.dumps({"t": t, "kind": kind, **fields}) + "\n")


def test_a_clock_that_was_set_back_makes_no_time_negative(named: MakeNamed) -> None:
    run, ahead = named(), time.time() + 3600
    at(run, ahead, "run_start", pid=1)
    at(run, ahead, "stage_start", name="sft")
    at(run, ahead, "totals", stage="sft", steps=100)
    assert summary(run)["duration_s"] == 0, "it began in an hour"
    for step in range(1, 6):
        at(run, ahead + 10 * step if step < 3 else ahead - 3600 + step, "log", stage="sft", step=step, loss=1.0)
    stage = run.state().stage("sft")
    assert stage.eta_s is None and stage.steps_per_second is None, "over the jump no pace is known"
    for step in range(6, 20):
        at(run, ahead - 3600 + step, "log", stage="sft", step=step, loss=1.0)
    assert run.state().stage("sft").eta_s == pytest.approx(81), "and after it, it is"
    at(run, ahead, "run_end", status="stopped")
    at(run, ahead - 3600, "run_start", pid=1)
    assert run.state().paused_s == 0


@pytest.mark.skipif(os.name == "nt", reason="needs process groups")
def test_an_abort_ends_no_stranger_that_was_given_the_ids_of_runner_and_trainer(named: MakeNamed) -> None:
    run = named()
    stranger = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
    lock = take_lock(run)
    try:
        run.events.append("run_start", pid=stranger.pid, pid_started=1.0)
        run.events.append("stage_start", name="sft", pid=stranger.pid, pid_started=1.0)
        runner.abort(run)
        assert stranger.poll() is None and run.abort_path.exists()
        assert run.state().end_status == "aborted", "nobody else is there to say so"
        stranger.communicate(b"\n")
        assert stranger.returncode == 0
    finally:
        stranger.kill()
        stranger.communicate()
        os.close(lock)
