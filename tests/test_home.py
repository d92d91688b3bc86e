"""Home: filter, pin and note, again, compare, paths, many runs; and what a run does at its end."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_until
from pilots import CONTROLS, HOSTILE, RECORDED, frame, recorded, shows, until

from core import runner
from core.backend import settle
from core.children import ON_END_ENV
from core.compare import settings_of
from core.config import resolve
from core.flags import build_parser
from core.gpu import GpuReport, GpuSample
from core.notes import Note, read_note, write_note
from core.paths import configs_dir
from core.runs import Run, create_run, is_alive, summary
from tui.app import FinetuiApp
from tui.charts import Chart
from tui.compare import CompareScreen, differences_table
from tui.dialogs import Ask, PathsScreen
from tui.draft import checked, draft_of
from tui.follow import machine_words
from tui.history import History
from tui.home import PAGE, HomeScreen
from tui.report import figures
from tui.wizard import WizardScreen

pytestmark = pytest.mark.usefixtures("own_cache_and_no_gpu", "folder_made")


def planned(folder: Path, name: str, method: str = "sft", **settings: Any) -> Run:
    """A run with a real plan and no events but the first."""
    values = {key.replace("__", "."): (value, "test") for key, value in {"name": name, **settings}.items()}
    config = configs_dir() / "demo.yaml" if method == "demo" else None
    found = resolve("sft-kto" if method == "demo" else method, config, values, gpu_present=False)
    return create_run(folder, settle(found))


async def test_typing_filters_and_escape_shows_all(folder: Path) -> None:
    for name in ("apple", "banana", "cherry"):
        recorded(folder, "failed" if name == "banana" else "done", name)
    app = FinetuiApp(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await shows(pilot, "apple", "banana", "cherry")
        await pilot.press("slash", *"fail")
        text = await shows(pilot, "1 of 3 runs", "banana")
        assert "cherry" not in text
        await pilot.press("enter")
        await shows(pilot, "fail")
        assert app.screen.query_one("#runs").has_focus
        await pilot.press("escape")
        await shows(pilot, "apple", "banana", "cherry")
        await pilot.press("slash", *"nothing")
        await shows(pilot, "0 of 3")
        await pilot.press("escape")
        await shows(pilot, "apple")


async def test_pin_and_note_are_kept_with_the_run(folder: Path) -> None:
    for name in ("a-run", "b-run"):
        recorded(folder, "stopped", name)
    app = FinetuiApp(folder)
    async with app.run_test(size=(120, 40)) as pilot:
        await shows(pilot, "a-run", "b-run")
        await pilot.press("down")
        name = app.screen.selected  # type: ignore[attr-defined]
        await pilot.press("p")
        text = await shows(pilot, f"★ {name}")
        lines = [line for line in text.splitlines() if "-run" in line and "■" in line]
        assert name in lines[0], "pinned runs stand first"
        await pilot.press("t")
        await until(pilot, lambda: isinstance(app.screen, Ask))
        await pilot.press(*"best", "enter")
        await shows(pilot, "note best")
    assert read_note(folder / name) == Note("best", True)
    assert (summary(Run(folder / name))["note"], summary(Run(folder / name))["pinned"]) == ("best", True)


def test_a_broken_or_hostile_note_is_none(tmp_path: Path) -> None:
    for content in ("", "[", "[1]", "null", "x" * 9):
        (tmp_path / "note.json").write_text(content)
        assert read_note(tmp_path) is None
    write_note(tmp_path, Note("é" * 600))
    assert read_note(tmp_path) == Note("é" * 500)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("demo", {}),
        ("demo", {"sft__learning_rate": 1e-3, "sft__max_steps": 7}),
        ("sft", {"model__size": "135m", "sft__data__demo": True, "lora__target_modules": ["q_proj"], "lora__r": 8}),
        ("kto", {"model__name": "owner/name", "kto__data__file": "/rows.jsonl", "kto__beta": 0.3}),
        ("kto", {"model__name": "run:base", "kto__data__dataset": "o/n", "kto__data__dataset_file": "a.jsonl"}),
    ],
)
def test_training_again_makes_the_same_plan(folder: Path, method: str, settings: dict[str, Any]) -> None:
    plan = planned(folder, "one", method, **settings).plan()
    found = checked(draft_of(plan))
    assert found.problems == {} and found.resolved
    again = found.resolved.plan.model_copy(update={"name": plan.name, "note": plan.note})
    assert again == plan


async def test_again_opens_the_review_with_the_settings_of_the_run(folder: Path) -> None:
    planned(folder, "one", "demo", sft__learning_rate=1.5e-3)
    app = FinetuiApp(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await shows(pilot, "one")
        await pilot.press("g")
        await until(pilot, lambda: isinstance(app.screen, WizardScreen))
        assert app.screen.draft.values["sft.learning_rate"] == "0.0015"  # type: ignore[attr-defined]
        await shows(pilot, "5 Review", "✔ ready")


async def test_marked_runs_are_compared(folder: Path) -> None:
    first = planned(folder, "first", "sft", model__size="135m", sft__data__demo=True, sft__learning_rate=1e-3)
    second = planned(folder, "second", "sft", model__size="135m", sft__data__demo=True)
    shutil.copy(RECORDED / "done.jsonl", first.events_path)
    shutil.copy(RECORDED / "stopped.jsonl", second.events_path)
    app = FinetuiApp(folder)
    async with app.run_test(size=(120, 40)) as pilot:
        await shows(pilot, "first", "second")
        await pilot.press("c")
        assert isinstance(app.screen, HomeScreen), "one run alone is not compared"
        await pilot.press("space", "space")
        if len(app.screen.marked) < 2:  # type: ignore[attr-defined]
            await pilot.press("up", "space")
        await shows(pilot, "2 marked: c compares", "◆ first", "◆ second")
        await pilot.press("c")
        await until(pilot, lambda: isinstance(app.screen, CompareScreen))
        text = await shows(pilot, "2 runs", "SFT loss", "Results", "65/110")
        assert " o " in text and " x " in text
        await pilot.press("M")
        await shows(pilot, "KTO")  # what one run alone has comes last
        await pilot.press("m")
        await shows(pilot, "SFT loss", " first 0.0215", " second 0.0561")
        await pilot.press("t", "e", "y", "z")
        await shows(pilot, "over training time", "smoothed", "min")
        await pilot.press("end")
        await shows(pilot, "sft.learning_rate", "0.001")
        await pilot.press("escape")
        await until(pilot, lambda: isinstance(app.screen, HomeScreen))
    assert "all the same" in str(differences_table([settings_of(first), settings_of(first)], ["a", "b"]).title)


@pytest.mark.parametrize("size", [(80, 24), (200, 60)])
async def test_hostile_runs_are_compared_harmlessly(folder: Path, size: tuple[int, int]) -> None:
    for name in ("a", "[INST]\x1b]0;evil\x07"):
        run = Run(folder / name)
        run.path.mkdir()
        run.plan_path.write_text(f"note: {HOSTILE!r}\n")
        write_note(run.path, Note(HOSTILE))
        run.events.append("stage_start", name="sft")
        run.events.append("log", stage="sft", step=1, loss=2.0)
        run.events.append("log", stage="sft", step=2, loss=None)
        run.events.append("log", stage="sft", step=3, loss=1.0)
        run.events.append("result", table={"sft": {"exact": HOSTILE}}, prompts=HOSTILE)
    app = FinetuiApp(folder)
    async with app.run_test(size=size) as pilot:
        await shows(pilot, "a")
        await app.push_screen(CompareScreen([Run(path) for path in sorted(folder.iterdir())] + [Run(folder / "gone")]))
        await shows(pilot, "SFT loss", "[INST]", "not finite")
        await pilot.press("end")
        await shows(pilot, "Settings")
        assert any(chart.panel for chart in app.screen.query(Chart))
        assert CONTROLS.findall(frame(app).replace("\n", "")) == []


async def test_paths_of_the_selected_run(folder: Path) -> None:
    recorded(folder, "done")
    app = FinetuiApp(folder)
    async with app.run_test(size=(120, 40)) as pilot:
        await shows(pilot, "KTO loss")
        await pilot.press("o")
        await until(pilot, lambda: isinstance(app.screen, PathsScreen))
        await shows(pilot, "rsync -av", "train.log")
        await pilot.press("escape")
        await until(pilot, lambda: isinstance(app.screen, HomeScreen))


def test_figures_break_between_two_of_them(folder: Path) -> None:
    stage = recorded(folder, "done").state().stage("kto")
    whole, narrow = figures(stage), figures(stage, 37)
    assert narrow.count("\n") >= 1 and max(map(len, narrow.splitlines())) <= 37 < len(whole)
    assert narrow.replace("\n", "   ") == whole == figures(stage, 5).replace("\n", "   ")


async def test_of_many_runs_the_table_shows_a_page_and_the_filter_finds_the_rest(folder: Path) -> None:
    for number in range(PAGE + 60):
        run = Run(folder / f"run-{number:03}")
        run.path.mkdir()
        run.plan_path.write_text("method: sft\n")
        os.utime(run.plan_path, (1e9 + number, 1e9 + number))
        run.events.append("run_end", status="done")
    app = FinetuiApp(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await shows(pilot, f"{PAGE + 60} runs", f"run-{PAGE + 59:03}")
        table: Any = app.screen.query_one("#runs")
        assert table.row_count == PAGE
        table.move_cursor(row=PAGE - 1)
        await until(pilot, lambda: table.row_count == PAGE + 60)
        await pilot.press("slash", *"run-003")
        await shows(pilot, f"1 of {PAGE + 60} runs", "run-003")


def test_the_history_comes_in_parts_pinned_runs_first(folder: Path) -> None:
    for number in range(5):
        recorded(folder, "stopped", f"r{number}")
    write_note(folder / "r0", Note(pinned=True))
    history = History(folder)
    parts = list(history.batches(2))
    assert [len(part) for part in parts] == [2, 5] and parts[0][0]["name"] == "r0"
    assert len(list(history.batches(2))) == 1, "nothing is read again"


def test_each_card_has_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 1 << 30
    cards = (
        GpuSample(0, "NVIDIA GeForce RTX 3090", memory_used_bytes=12 * gib, memory_total_bytes=24 * gib,
                  utilisation_percent=98, temperature_c=71, power_w=341.2, power_limit_w=350.0),
        GpuSample(1),
    )  # fmt: skip
    monkeypatch.setattr("tui.follow.gpu_report", lambda: GpuReport(cards))
    first, second = machine_words().splitlines()
    assert first == "GPU 0 RTX 3090  █████░░░░░  12.0 of 24 GiB  98 %  71 °C  341 of 350 W"
    assert second == "GPU 1 GPU  no figures"


# --- the end of a run, and the command line ---


def test_on_end_runs_the_command_with_run_and_status_and_no_child_sees_it(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = planned(folder, "one", model__name="/no/model", sft__data__demo=True)
    # one file is moved into place, so that it is never seen half-written
    monkeypatch.setenv(ON_END_ENV, 'env >told.txt; echo "$FINETUI_STATUS of $FINETUI_RUN" > ended; mv ended end')
    runner.start(run)
    wait_until((run.path / "end").exists, 60)
    assert (run.path / "end").read_text() == f"failed of {run.path}\n"
    assert not is_alive(run)
    assert ON_END_ENV not in (run.path / "told.txt").read_text()
    assert "told.txt" not in run.events_path.read_text() + run.plan_path.read_text()


def test_watch_in_the_app_takes_a_run_or_a_recorded_log(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[tuple[str, ...]] = []
    monkeypatch.setattr("core.commands.open_app", lambda *words: opened.append(words) or 0)
    from core import commands

    run = recorded(folder, "done")
    for reference in ("last", str(run.events_path), str(run.path)):
        arguments = build_parser().parse_args(["watch", "--tui", reference, "--runs-dir", str(folder)])
        assert commands.watch(arguments) == 0
    assert [words[1] for words in opened] == [str(run.path), str(run.events_path), str(run.path)]
