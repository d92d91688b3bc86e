"""The app's dialog about what to make of a run, and how the dashboard tells of it."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Finished, finish
from pilots import CONTROLS, HOSTILE, recorded, shows, until
from textual.widgets import Input

from core import runner
from core.commands_export import begin
from core.events import EventTail, RunState, state_of
from core.plan import ExportPlan, Plan
from core.runs import Run, take_lock
from tui.app import FinetuiApp
from tui.export import ExportScreen, Ticks
from tui.follow import Follower
from tui.report import KTO_COST, end_words, left_words, made_words, now_words
from tui.review import after_words

pytestmark = pytest.mark.usefixtures("own_cache_and_no_gpu")


async def test_what_is_asked_for_is_looked_at_then_made_by_a_run_that_outlives_the_app(
    finished: Finished, folder: Path
) -> None:
    run = finished()
    app = FinetuiApp(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await shows(pilot, "✔ done", "one")
        await pilot.press("u")
        text = await shows(pilot, "Merge, GGUF, upload: one", "there is: sft", "Enter look at it")
        assert "◉ merged, 16-bit" in text and "[ ] Q4_K_M" in text
        await pilot.press("enter")
        await shows(pilot, "one of sft: merge", "Disk: merged model", "Enter start")
        await pilot.press("right", "left")
        await shows(pilot, "Enter look at it")  # something was touched: it is looked at again
        await pilot.press("enter")
        await shows(pilot, "Enter start")
        await pilot.press("enter")
        await shows(pilot, "SFT", "merge", "u Export")
    assert finish(run) == "done" and (run.path / "merge" / "merged_16bit" / "finetui.json").is_file()


async def test_ticks_are_told_by_signs_and_what_is_wrong_by_a_sentence(finished: Finished, folder: Path) -> None:
    run = finished()
    app = FinetuiApp(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await shows(pilot, "✔ done")
        await pilot.press("u")
        await shows(pilot, "there is: sft")
        await pilot.press("down", "space", "right", "right", "space")
        await shows(pilot, "[x] Q4_K_M", "[ ] Q5_K_M", "[x] Q8_0", "[ ] F16")
        await pilot.press("enter")
        await shows(pilot, "✘ GGUF files are made with llama.cpp's tools, which are not installed.",
                    "Enter install llama.cpp's tools (20 MB)")  # fmt: skip
        await pilot.press("left", "left", "space", "right", "right", "space", "down")
        await pilot.press(*"me")
        await pilot.press("enter")
        await shows(pilot, "✘ export.upload: a repository is OWNER/NAME")
        app.screen.query_one(".upload", Input).value = ""
        app.screen.query_one(".checkpoint", Input).value = "[/x] [red]b[/red]"
        await pilot.press("enter")
        await shows(pilot, "✘ one has no '[/x] [red]b[/red]'.")
        await pilot.press("escape")
        await until(pilot, lambda: not isinstance(app.screen, ExportScreen))
    assert not (run.path / "export.json").exists()


async def test_an_upload_is_shown_with_its_files_before_it_starts(
    finished: Finished, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(export__upload="me/model", export__save_method="lora", export__private=True)
    asked: list[Any] = []

    def looked(run: Run, plan: Plan) -> list[str]:
        asked.append(plan.export)
        return ["one: upload", "Upload to me/model (PUBLIC, will be made), as me, lora"]

    monkeypatch.setattr("tui.export.check_export", looked)
    app = FinetuiApp(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await shows(pilot, "one")
        await pilot.press("enter")
        await shows(pilot, "✔ SFT")
        await pilot.press("u")
        await shows(pilot, "me/model", "◉ private", "◉ adapter as it is")
        await pilot.press("enter")
        await shows(pilot, "Upload to me/model (PUBLIC, will be made)", "Enter start")
        await pilot.press("escape")
    assert asked[0].private and asked[0].upload == "me/model"


async def test_a_recorded_log_cannot_be_exported(folder: Path, folder_made: None) -> None:
    log = folder / "x.jsonl"
    shutil.copy(Path(__file__).parent / "runs" / "done.jsonl", log)
    from tui.follow import recording

    app = FinetuiApp(folder, recording(log))
    async with app.run_test(size=(80, 24)) as pilot:
        text = await shows(pilot, "✔ done after")
        assert "u Export" not in text
        await pilot.press("u")
        assert not isinstance(app.screen, ExportScreen)


# What is told --------------------------------------------------------------------------------------------------------


def log(run: Run, *lines: dict[str, Any]) -> None:
    text = "".join(json.dumps({"t": 1000 + 10 * number, **line}) + "\n" for number, line in enumerate(lines))
    run.events_path.write_text(text)


def test_the_end_of_everything_is_foretold_once_all_that_is_ahead_is_known(folder: Path, folder_made: None) -> None:
    run = recorded(folder, "done")
    lock = take_lock(run)
    begun = [
        {"kind": "created", "stages": ["sft", "merge", "upload"]}, {"kind": "run_start"},
        {"kind": "stage_start", "name": "sft"}, {"kind": "totals", "stage": "sft", "steps": 30},
        *({"kind": "log", "stage": "sft", "step": step, "loss": 1.0} for step in (10, 20)),
    ]  # fmt: skip
    log(run, *begun, {"kind": "expected", "seconds": {"merge": 50}})
    snapshot = Follower(run).read()
    assert snapshot and "10 s left, next stage at" in now_words(snapshot, 80).plain
    log(run, *begun, {"kind": "expected", "seconds": {"merge": 50, "upload": 3600}})
    snapshot = Follower(run).read()
    stage = snapshot.state.current if snapshot else None
    assert snapshot and stage
    over = time.strftime("%H:%M", time.localtime(snapshot.taken + 10 + 50 + 3600))
    assert left_words(stage, snapshot) == f"  10 s left, everything done at {over}"
    os.close(lock)


def test_kto_of_which_nothing_is_known_is_foretold_by_the_pace_of_sft(folder: Path, folder_made: None) -> None:
    run = recorded(folder, "done")
    lock = take_lock(run)
    begun = [
        {"kind": "created", "stages": ["sft", "kto", "evaluate"]}, {"kind": "run_start"},
        {"kind": "expected", "seconds": {"evaluate": 50}, "examples": {"kto": 40}},
        {"kind": "stage_start", "name": "sft"}, {"kind": "totals", "stage": "sft", "steps": 30, "batch": 4},
        *({"kind": "log", "stage": "sft", "step": step, "loss": 1.0} for step in (10, 20)),
    ]  # fmt: skip
    log(run, *begun)
    snapshot = Follower(run).read()
    stage = snapshot.state.current if snapshot else None
    assert snapshot and stage
    over = time.strftime("%H:%M", time.localtime(snapshot.taken + 10 + KTO_COST * 40 / 4 + 50))
    assert left_words(stage, snapshot) == f"  10 s left, everything done at {over}"
    os.close(lock)


def test_what_was_made_is_told_with_its_size_and_how_far_it_agrees(folder: Path, folder_made: None) -> None:
    run = recorded(folder, "done")
    with run.events_path.open("a") as stream:
        for event in (
            {"what": "Q8_0", "path": "gguf/m.Q8_0.gguf", "bytes": 3 << 30, "check": {"token_agreement": 0.995}},
            {"what": "upload", "path": "https://hub/me/x", "bytes": 1 << 30},
        ):
            stream.write(json.dumps({"t": 2e9, "kind": "artefact", "stage": "gguf", **event}) + "\n")
    snapshot = Follower(run).read()
    assert snapshot
    text = end_words(snapshot, 200).plain
    assert f"✔ Q8_0: {run.path}/gguf/m.Q8_0.gguf  (3.00 GiB, 99.5 % of the tokens)" in text
    beside = end_words(snapshot).plain
    assert "✔ Q8_0: done/gguf/m.Q8_0.gguf  (3.00" in beside and "✔ model after SFT: done/sft/final_model" in beside
    assert "✔ upload: https://hub/me/x  (1.00 GiB)" in text


@pytest.mark.parametrize(
    "event",
    [
        {"kind": "artefact", "what": 5, "bytes": 1e400}, {"kind": "artefact", "what": ["x"], "path": {}, "check": 7},
        {"kind": "artefact", "what": "x", "check": {"token_agreement": 10**400}}, {"kind": "expected", "seconds": [1]},
        {"kind": "expected", "seconds": {"merge": "soon"}}, {"kind": "stages", "stages": 9, "ahead": {"a": 1}},
        {"kind": "artefact", "what": HOSTILE, "path": HOSTILE, "bytes": 5, "check": {"token_agreement": True}},
    ],
)  # fmt: skip
def test_events_that_are_no_events_harm_nobody(folder: Path, folder_made: None, event: dict[str, Any]) -> None:
    run = recorded(folder, "done")
    with run.events_path.open("a") as stream:
        stream.write(json.dumps({"t": 2e9, **event}) + "\n")
    snapshot = Follower(run).read()
    assert snapshot and "✔" in end_words(snapshot).plain
    assert not CONTROLS.search("".join(words.plain for words in made_words(snapshot.state, "/x")))


def test_a_pause_before_a_later_export_is_not_counted_as_time_it_took(folder: Path, folder_made: None) -> None:
    run = recorded(folder, "done")
    start, day = state_of(run.events_path), 86_400
    before = Follower(run).read()
    with run.events_path.open("a") as stream:
        for offset, event in enumerate(({"kind": "run_start"}, {"kind": "run_end", "status": "done"})):
            stream.write(json.dumps({"t": (start.ended or 0) + day + 60 * offset, **event}) + "\n")
    after = Follower(run).read()
    assert before and after and before.took_s and after.took_s
    assert after.took_s == pytest.approx(before.took_s + 60, abs=0.1)


def test_the_log_of_a_run_names_the_stages_asked_for_later_in_their_order(finished: Finished) -> None:
    run = finished()
    run.events.append("stages", stages=["sft", "merge", "gguf"], ahead=["merge", "gguf"])
    run.events.append("stage_start", name="gguf")
    run.events.append("totals", stage="gguf", steps=8)
    run.events.append("log", stage="gguf", step=8)
    run.events.append("stage_end", name="gguf", status="done")
    run.events.append("stages", stages=["sft", "merge", "gguf", "upload"], ahead=["gguf", "upload"])
    run.events.append("stage_start", name="gguf")
    state = RunState()
    for event in EventTail(run.events_path).read():
        state.fold(event)
    assert [stage.name for stage in state.stages] == ["sft", "merge", "gguf", "upload"]
    assert state.current and state.current.name == "gguf" and state.current.step == 0, "it is made anew"


def test_the_review_says_what_follows_the_training() -> None:
    plan = Plan(export=ExportPlan(gguf=["Q4_K_M"], upload="me/x", save_method="merged_4bit"))
    assert after_words(plan) == ", then merge (4-bit), GGUF Q4_K_M, upload to me/x (public if it is new)"
    assert after_words(Plan()) == "" and Ticks(["a"]).ticked == ()


def test_asking_twice_for_the_same_is_told(finished: Finished) -> None:
    run = finished(export__save_method="lora")
    with pytest.raises(Exception, match="made already"):
        begin(run, run.plan())
    assert runner and not (run.path / "stop").exists()
