"""The app, driven by its keys: newcomer's path, draft, wrong values, hostile text, dashboards of recorded runs."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pilots import CONTROLS, HOSTILE, frame, recorded, shows, until
from textual import events
from textual.widgets import Input

from core import commands
from core.backend import settle
from core.config import resolve
from core.flags import build_parser
from core.paths import configs_dir
from core.runs import Run, is_alive, take_lock
from tui.app import FinetuiApp
from tui.completion import PathLine
from tui.dashboard import DashboardScreen
from tui.data_room import DataRoom
from tui.dialogs import Ask, Confirm, HelpScreen, LogScreen
from tui.draft import Draft, RowsDraft, checked, command_line, draft_path, load_draft, save_draft
from tui.home import HomeScreen
from tui.settings import Setting
from tui.widgets import Choice
from tui.wizard import WizardScreen

pytestmark = pytest.mark.usefixtures("own_cache_and_no_gpu", "folder_made")


def demo_fingerprint() -> str:
    return settle(resolve("sft-kto", configs_dir() / "demo.yaml", {}, gpu_present=False)).fingerprint


async def test_a_newcomer_reaches_the_demos_review_by_enter_alone(folder: Path) -> None:
    app = FinetuiApp(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await shows(pilot, "Welcome", "No NVIDIA GPU", "Enter, d")
        await pilot.press("n")
        for word in ("SFT→KTO: both", "SmolLM2-135M-Instruct", "✔ 480 rows", "learning_rate"):
            await shows(pilot, word)
            await pilot.press("enter")
        text = await shows(pilot, "✔ ready", "finetui demo")
        assert "5 Review" in text
        screen = app.screen
        assert isinstance(screen, WizardScreen) and screen.found and screen.found.resolved
        assert screen.found.resolved.fingerprint == demo_fingerprint()


async def test_enter_on_an_empty_history_is_the_demo_and_enter_starts_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Run] = []
    monkeypatch.setattr("tui.wizard.runner.start", lambda run, ready: started.append(run))
    app = FinetuiApp(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await shows(pilot, "Welcome")
        await pilot.press("enter")
        await shows(pilot, "✔ ready")
        await pilot.press("enter", "enter")
        await until(pilot, lambda: isinstance(app.screen, DashboardScreen))
    assert len(started) == 1
    assert started[0].plan().method == "sft-kto"


async def test_what_was_typed_is_there_after_the_terminal_died(folder: Path) -> None:
    app = FinetuiApp(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await shows(pilot, "Welcome")
        await pilot.press("n")
        await shows(pilot, "1 Method")
        await pilot.press("up", "up", "enter")
        await shows(pilot, "Which model?")
        await pilot.press("enter")
        await shows(pilot, "a Hub data set")
        await pilot.press("right", "tab", *"rows.jsonl")
        await shows(pilot, "rows.jsonl cannot be read")
        left = load_draft(draft_path())
    assert left and left.method == "sft" and left.data["sft"].file == "rows.jsonl"
    again = FinetuiApp(folder)
    async with again.run_test(size=(80, 24)) as pilot:
        await shows(pilot, "your draft is kept at Data")
        await pilot.press("n")
        await shows(pilot, "rows.jsonl", "3 Data", "◉ a file")
        await pilot.press("escape", "escape")
        await until(pilot, lambda: again.screen.query("#method"))
        await pilot.press("escape")
        await until(pilot, lambda: isinstance(again.screen, HomeScreen))


async def test_keys_that_come_at_once_reach_the_field_they_were_meant_for(folder: Path) -> None:
    save_draft(Draft(step=1, method="sft"), draft_path())
    app, path = FinetuiApp(folder), "/some/where/a-file-with-123-letters.jsonl"
    async with app.run_test(size=(80, 24)) as pilot:
        await shows(pilot, "your draft is kept")
        for key in ("n", "enter", "right", "tab"):
            app.post_message(events.Key(key, key if len(key) == 1 else None))
        for letter in path:
            app.post_message(events.Key("a", letter))
        app.post_message(events.Key("enter", None))
        await shows(pilot, "Not yet. ✘", "cannot be read: No such file")
        left = load_draft(draft_path())
    assert left and left.data["sft"].file == path and left.model == "" and left.step == 2


async def test_a_wrong_value_is_explained_under_its_field_and_holds_the_page(folder: Path) -> None:
    save_draft(Draft(step=3), draft_path())
    app = FinetuiApp(folder)
    async with app.run_test(size=(120, 40)) as pilot:
        await shows(pilot, "your draft is kept")
        await pilot.press("n")
        await shows(pilot, "learning_rate")
        rate = next(s for s in app.screen.query(Setting) if s.option.path == "sft.learning_rate")
        rate.query_one(".value").focus()
        await pilot.press("-", "1")
        await shows(pilot, "✘ Input should be greater than 0")
        await pilot.press("enter")
        await shows(pilot, "4 Settings", "cannot be used")
        assert rate.query_one(".value").has_focus
        await pilot.press("backspace", "backspace", *"1e-3", "enter")
        await shows(pilot, "✔ ready", "finetui demo --set sft.learning_rate=1e-3")
        await pilot.press("ctrl+r")
        await until(pilot, lambda: load_draft(draft_path()).values == {})  # type: ignore[union-attr]


async def test_the_plan_is_saved_as_yaml_and_nothing_is_overwritten(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    app = FinetuiApp(folder)
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await shows(pilot, "Welcome")
        await pilot.press("d")
        await shows(pilot, "✔ ready")
        await pilot.press("v")
        await until(pilot, lambda: isinstance(app.screen, Ask))
        await pilot.press("enter")
        await shows(pilot, "Saved")
        before = (tmp_path / "finetui-sft-kto.yaml").read_text()
        await pilot.press("v")
        await until(pilot, lambda: isinstance(app.screen, Ask))
        await pilot.press("enter")
        await shows(pilot, "exists")
    saved = resolve("sft-kto", tmp_path / "finetui-sft-kto.yaml", {}, gpu_present=False)
    assert settle(saved).fingerprint == demo_fingerprint()
    assert (tmp_path / "finetui-sft-kto.yaml").read_text() == before


async def test_a_plan_that_cannot_run_is_refused_with_its_reason_and_the_way_back(
    folder: Path, rows_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    draft = Draft(step=4, method="sft")
    draft.data["sft"] = RowsDraft(kind="file", file="nowhere.jsonl")
    save_draft(draft, draft_path())
    app = FinetuiApp(folder)
    async with app.run_test(size=(120, 40)) as pilot:
        await shows(pilot, "your draft is kept")
        await pilot.press("n")
        await shows(pilot, "✘", "nowhere.jsonl cannot be read")
        await pilot.press("enter")
        await until(pilot, lambda: not app.screen.starting)  # type: ignore[attr-defined]
        await shows(pilot, "✘", "nowhere.jsonl cannot be read", "3 leads back to Data")
        assert not list(folder.iterdir()) and load_draft(draft_path()) == draft
        screen = app.screen
        assert isinstance(screen, WizardScreen)
        await until(pilot, lambda: screen.inspection.troubles.get("sft"))
        await pilot.press("3")
        await shows(pilot, "Not yet. ✘ nowhere.jsonl cannot be read")
        assert app.focused and app.focused.has_class("file")
        await pilot.press("enter")
        await shows(pilot, "● 3 Data", "Not yet. ✘")
        rows_file(name="nowhere.jsonl")  # Enter looks again
        await pilot.press("enter")
        await shows(pilot, "✔ 40 rows")
        await pilot.press("enter")
        await shows(pilot, "● 4 Settings", "learning_rate")


async def test_the_data_page_holds_until_every_stage_has_rows_to_learn_from(
    folder: Path, rows_file: Callable[..., Path]
) -> None:
    draft = Draft(step=2, method="sft-kto")
    draft.data["sft"] = RowsDraft(kind="file")
    draft.data["kto"] = RowsDraft(kind="file", file=str(rows_file([{"prompt": "a", "completion": "b"}] * 3)))
    save_draft(draft, draft_path())
    app = FinetuiApp(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await shows(pilot, "your draft is kept")
        await pilot.press("n")
        await shows(pilot, "Type the path of a file.", "no usable row for KTO")
        await pilot.press("enter")
        await shows(pilot, "Not yet. ✘ No file is named for SFT.")
        assert isinstance(app.focused, PathLine)
        app.focused.value = str(rows_file(name="good.jsonl"))
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.focused, Choice))  # what KTO lacks may have been said before
        await shows(pilot, "Not yet. ✘ rows.jsonl has no usable row for KTO")
        assert app.screen.query_one(DataRoom).stage == "kto"
        screen = app.screen
        assert isinstance(screen, WizardScreen)
        line = screen.query("PathLine.file").last(Input)
        line.value = str(rows_file(name="good.jsonl"))
        line.focus()
        await pilot.press("enter")
        await shows(pilot, "● 4 Settings", "learning_rate")


async def test_rows_of_ones_own_for_one_stage_and_the_demos_for_the_other_are_warned_of(
    folder: Path, rows_file: Callable[..., Path]
) -> None:
    draft = Draft(step=2, method="sft-kto")
    draft.data["sft"] = RowsDraft(kind="file", file=str(rows_file()))
    save_draft(draft, draft_path())
    app = FinetuiApp(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await shows(pilot, "your draft is kept")
        await pilot.press("n")
        await shows(pilot, "! KTO would learn the demo's made-up tool calls, not what SFT learns.")
        await shows(pilot, "✔ 40 rows")
        await pilot.press("enter")
        await shows(pilot, "● 4 Settings", "learning_rate")
        await pilot.press("enter")
        await shows(pilot, "✔ ready", "! KTO trains on the demo's rows")


@pytest.mark.parametrize("size", [(40, 10), (200, 60)])
async def test_odd_sizes_crash_nothing(folder: Path, size: tuple[int, int]) -> None:
    recorded(folder, "done")
    app = FinetuiApp(folder)
    async with app.run_test(size=size) as pilot:
        await shows(pilot, "✔ done")
        await pilot.press("enter")
        await shows(pilot, "✔ done after")
        await pilot.resize_terminal(100, 30)
        await pilot.press("h", "n", "enter", "enter", "enter", "enter")
        await until(pilot, lambda: app.screen.query("#verdict"))


async def test_advanced_holds_every_option_that_the_other_pages_do_not(folder: Path) -> None:
    save_draft(Draft(step=3), draft_path())
    app = FinetuiApp(folder)
    async with app.run_test(size=(120, 40)) as pilot:
        await shows(pilot, "your draft is kept")
        await pilot.press("n")
        await shows(pilot, "learning_rate")
        app.screen.query_one("CollapsibleTitle").focus()
        await pilot.press("enter")
        await until(pilot, lambda: len(app.screen.query(Setting)) > 60)
        sign = next(s for s in app.screen.query(Setting) if s.option.path == "kto.sign_correction")
        sign.query_one(Choice).focus()
        await pilot.press("left")
        await until(pilot, lambda: load_draft(draft_path()).values.get("kto.sign_correction") == "true")  # type: ignore[union-attr]
        await pilot.press("backspace")
        await until(pilot, lambda: load_draft(draft_path()).values.get("kto.sign_correction") == "")  # type: ignore[union-attr]


async def test_rows_are_looked_into_while_one_types(folder: Path, rows_file: Callable[..., Path]) -> None:
    path = rows_file([{"messages": [{"role": "user", "content": "x"}]}] + [
        {"prompt": "p", "completion": "c", "label": label} for label in (True, False, True)
    ])  # fmt: skip
    draft = Draft(step=2, method="kto")
    draft.data["kto"] = RowsDraft(kind="file", file=str(path))
    save_draft(draft, draft_path())
    app = FinetuiApp(folder)
    async with app.run_test(size=(120, 40)) as pilot:
        await shows(pilot, "your draft is kept")
        await pilot.press("n")
        await shows(pilot, "✔ 4 rows: 3 ", "from (2 good answers, 1 bad).", "1 left out: without an answer.")
        await pilot.press("2")
        await shows(pilot, "1 row left out: no assistant turn.", "2 Findings")
        path.write_text('{"messages": [}\n')
        await pilot.press("escape", "tab", "end", "backspace", "l")
        await shows(pilot, "✘", "1 × broken JSON")


@pytest.mark.parametrize("size", [(80, 24), (120, 40)])
@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("done", ["✔ done", "40 held-out prompts", "after KTO", "[78–100]", "model after KTO", "✔ evaluate"]),
        ("failed", ["✘ failed", "CUDA out of memory", "Fewer rows at once", "f sets sft.batch_size 4 → 2"]),
        ("stopped", ["■ stopped", "65/110", "r goes on"]),
        ("nan", ["✘ crashed", "not finite", "ended without a word"]),
        ("torn", ["✘ crashed", "18/44", "margin 0.54"]),
    ],
)
async def test_a_recorded_run_is_shown(folder: Path, log: str, words: list[str], size: tuple[int, int]) -> None:
    recorded(folder, log)
    app = FinetuiApp(folder)
    async with app.run_test(size=size) as pilot:
        await shows(pilot, log)
        await pilot.press("enter")
        await shows(pilot, *words[:2])
        seen = ""
        for _ in range(8):
            await pilot.pause()
            seen += frame(app)
            await pilot.press("pagedown")
        assert [word for word in words if word not in seen] == []


async def test_left_and_right_go_through_the_curves_of_the_stages(folder: Path) -> None:
    recorded(folder, "done")
    app = FinetuiApp(folder)
    async with app.run_test(size=(120, 40)) as pilot:
        await shows(pilot, "done")
        await pilot.press("enter")
        await shows(pilot, "KTO loss", "KTO margin", "←→ Stage")
        await pilot.press("left")
        assert "KTO margin" not in await shows(pilot, "SFT loss")
        await pilot.press("right")
        await shows(pilot, "KTO margin")


async def test_leaving_a_living_run_does_not_stop_it(folder: Path) -> None:
    run = recorded(folder, "torn")
    lock = take_lock(run)
    app = FinetuiApp(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await shows(pilot, "● running")
        await pilot.press("enter")
        await shows(pilot, "KTO: train", "18/44", "41 %")
        with run.events_path.open("a") as log:
            log.write(
                'ss":0.4}\n'
                + json.dumps({"t": 1795417900, "kind": "log", "stage": "kto", "step": 22, "loss": 0.3})
                + "\n"
            )
        await shows(pilot, "22/44", "loss 0.3")
        await pilot.press("s")
        await until(pilot, lambda: isinstance(app.screen, Confirm))
        await pilot.press("enter")  # the safe answer has the focus
        await pilot.press("h")
        await until(pilot, lambda: isinstance(app.screen, HomeScreen))
        await pilot.press("x", "q")
    assert is_alive(run) and not run.stop_path.exists() and not run.abort_path.exists()
    os.close(lock)


async def test_stop_asks_and_then_asks_the_run(folder: Path) -> None:
    run = recorded(folder, "torn")
    lock = take_lock(run)
    app = FinetuiApp(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await shows(pilot, "● running")
        await pilot.press("s")
        await until(pilot, lambda: isinstance(app.screen, Confirm))
        await pilot.press("y")
        await until(pilot, run.stop_path.exists)
        await shows(pilot, "◐ stopping")
    os.close(lock)


async def test_delete_asks_and_keeps_the_cursor(folder: Path) -> None:
    for name in ("a-run", "b-run", "c-run"):
        recorded(folder, "stopped", name)
    app = FinetuiApp(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await shows(pilot, "a-run", "b-run", "c-run")
        await pilot.press("down")
        name = app.screen.selected  # type: ignore[attr-defined]
        recorded(folder, "done", "d-run")
        await shows(pilot, "d-run")
        assert app.screen.selected == name  # type: ignore[attr-defined]
        await pilot.press("x")
        await until(pilot, lambda: isinstance(app.screen, Confirm))
        await pilot.press("escape", "x", "y")
        await until(pilot, lambda: not (folder / name).exists())
        await until(pilot, lambda: name not in frame(app))
    assert sorted(path.name for path in folder.iterdir()) == sorted({"a-run", "b-run", "c-run", "d-run"} - {name})


async def test_hostile_names_events_and_logs_are_shown_harmlessly(folder: Path) -> None:
    run = Run(folder / "[INST]\x1b]0;evil\x07")
    run.path.mkdir()
    run.plan_path.write_text("method: sft\n")
    for kind, fields in (
        (
            "created",
            {"name": HOSTILE, "method": HOSTILE, "model": HOSTILE, "note": HOSTILE, "stages": ["sft", HOSTILE]},
        ),
        ("run_start", {}),
        ("stage_start", {"name": "sft", "base": HOSTILE}),
        ("phase", {"stage": "sft", "name": HOSTILE, "detail": HOSTILE, "seconds": 4}),
        ("log", {"stage": "sft", "step": 1, "loss": 1.0}),
        ("log", {"stage": "sft", "step": 2, "loss": 0.5}),
        ("notice", {"level": "warning", "text": HOSTILE, "advice": HOSTILE}),
        ("error", {"type": HOSTILE, "message": HOSTILE, "advice": HOSTILE}),
        ("result", {"prompts": HOSTILE, "table": {HOSTILE: {"format": {"hits": 1, "total": 2}}}}),
        ("stage_end", {"name": "sft", "status": HOSTILE, "output": HOSTILE}),
        ("run_end", {"status": HOSTILE}),
    ):
        run.events.append(kind, **fields)  # type: ignore[arg-type]
    run.log_path.write_text(f"{HOSTILE}\n50%\rdone {HOSTILE}\n" + "x" * 1_000_000 + "\n")
    app = FinetuiApp(folder)
    async with app.run_test(size=(120, 40)) as pilot:
        await until(pilot, lambda: "evil" in frame(app))
        shots = [frame(app)]
        await pilot.press("enter")
        await shows(pilot, "loss 0.5")
        shots.append(frame(app))
        await pilot.press("l")
        await until(pilot, lambda: isinstance(app.screen, LogScreen) and "xxx" in frame(app))
        await pilot.press("home")
        shots.append(frame(app))
        await pilot.press("escape", "escape", "x")
        await until(pilot, lambda: isinstance(app.screen, Confirm))
        shots.append(frame(app))
    assert [CONTROLS.findall(shot.replace("\n", "")) for shot in shots] == [[], [], [], []]
    assert all("[INST]" in shot for shot in shots)


async def test_help_lists_the_keys_of_the_screen(folder: Path) -> None:
    app = FinetuiApp(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await shows(pilot, "Welcome")
        await pilot.press("question_mark")
        await until(pilot, lambda: isinstance(app.screen, HelpScreen))
        await shows(pilot, "n  New", "d  Demo", "q  Quit")


DRAFTS = {
    "demo": Draft(),
    "demo changed": Draft(values={"sft.learning_rate": "1e-3", "kto.two_stage_lr": "true", "note": "yes"}),
    "sft on the demo's rows": Draft(method="sft"),
    "sft on a file": Draft(
        method="sft",
        size="135m",
        data={"sft": RowsDraft(kind="file", file="rows [1].jsonl"), "kto": RowsDraft()},
        values={"sft.learning_rate": "3e-4", "sft.max_steps": "-1", "lora.target_modules": "[q_proj]", "note": "a b"},
    ),
    "kto from the Hub": Draft(
        method="kto",
        model="owner/name",
        data={"sft": RowsDraft(), "kto": RowsDraft(kind="hub", dataset="o/n", dataset_file="a.jsonl")},
        values={"kto.two_stage_lr": "true", "kto.beta": "0.3", "sft.seed": "7"},
    ),
    "two kinds of rows": Draft(data={"sft": RowsDraft(), "kto": RowsDraft(kind="file", file="k.jsonl")}),
}


@pytest.mark.parametrize("draft", DRAFTS.values(), ids=DRAFTS.keys())
def test_the_command_line_makes_the_same_plan(draft: Draft) -> None:
    import shlex

    found = checked(draft)
    assert found.problems == {} and found.resolved
    words = shlex.split(command_line(draft))
    assert words[0] == "finetui"
    arguments = build_parser().parse_args(words[1:])
    plan = commands.resolved(arguments, draft.method, demo=words[1] == "demo")
    assert plan.plan == found.resolved.plan


def test_every_problem_of_a_draft_is_found_at_once() -> None:
    draft = Draft(values={"sft.learning_rate": "-1", "kto.batch_size": "1", "sft.seed": "[", "lora.r": "x"})
    found = checked(draft)
    assert set(found.problems) == set(draft.values)
    assert found.resolved and found.resolved.fingerprint == demo_fingerprint()
    assert "model" in checked(Draft(method="sft", size="7b")).problems
    no_file = Draft(method="sft", data={"sft": RowsDraft(kind="file"), "kto": RowsDraft()})
    assert set(checked(no_file).problems) == {"sft.data.file"}


def test_the_app_imports_no_training_stack() -> None:
    code = (
        "import sys, tui.app\n"
        "print([name for name in ('torch','transformers','trl','peft','datasets','accelerate') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_without_a_terminal_the_app_refuses_with_a_hint() -> None:
    found = subprocess.run(
        [sys.executable, "-P", "-m", "tui"], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert found.returncode == 2
    assert "needs a terminal" in found.stderr and "finetui --help" in found.stderr
