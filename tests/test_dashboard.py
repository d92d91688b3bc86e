"""The dashboard: curves with axes, gaps and views; alerts with advice; what is told at the end; recorded logs."""

import base64
import json
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pilots import CONTROLS, HOSTILE, RECORDED, frame, recorded, shows, until

from core.events import RunState, StageState
from core.runs import Run, take_lock
from tui.alerts import alerts
from tui.app import FinetuiApp, end_message, kept_settings, notification
from tui.charts import Chart, ChartGrid, Frame, Panel, View, over_time, panels, plot, scale_words, seen, smoothed, ticks
from tui.dashboard import DashboardScreen
from tui.dialogs import PathsScreen
from tui.follow import GIB, Follower, Recording, Snapshot, recording
from tui.report import (
    alert_words,
    energy_words,
    final_model,
    next_words,
    notes_words,
    now_words,
    paths_of,
    rsync_line,
)
from tui.wizard import WizardScreen

pytestmark = pytest.mark.usefixtures("own_cache_and_no_gpu", "folder_made")


def text_of(rows: list[list[tuple[str, int]]]) -> list[str]:
    return ["".join(text for text, _ in row) for row in rows]


def test_a_curve_spans_the_asked_size_and_leaves_gaps() -> None:
    whole = text_of(plot([[(1, 1.0), (50, 3.0), (100, 2.0)]], 30, 6))
    assert [len(row) for row in whole] == [30] * 6
    assert any(row[0] != " " for row in whole) and any(row[-1] != " " for row in whole)
    broken = text_of(plot([[(1, 1.0), (2, None), (100, 1.0)]], 30, 6))
    assert sum(character != " " for row in broken for character in row) == 2
    assert text_of(plot([[(1, None)]], 4, 2)) == ["    ", "    "]


def test_curves_over_each_other_carry_marks_that_need_no_colour() -> None:
    lines = [[(step, float(step)) for step in range(100)], [(step, 50.0) for step in range(100)]]
    drawn = "".join(text_of(plot(lines, 40, 10)))
    assert "o" in drawn and "x" in drawn
    assert "o" not in "".join(text_of(plot(lines[:1], 40, 10)))


def test_views_smooth_zoom_and_take_logarithms() -> None:
    noisy = [(step, 1.0 + step % 2) for step in range(100)]
    calm = [value for _, value in smoothed(noisy, 10) if value is not None]
    assert max(calm[50:]) - min(calm[50:]) < 0.2
    assert smoothed([(1, 1.0), (2, None), (3, 5.0)], 10) == [(1, 1.0), (2, None), (3, 5.0)]
    [zoomed], _ = seen([("", noisy)], View(zoom=2))
    assert zoomed[0][0] >= 74 and zoomed[-1][0] == 99
    [powers], log = seen([("", [(1, 100.0), (2, 0.0), (3, 1.0)])], View(log=True))
    assert log and powers == [(1, 2.0), (2, None), (3, 0.0)]
    assert seen([("", [(1, -1.0), (2, 3.0)])], View(log=True))[1] is False
    assert seen([("", [])], View(smooth=True, zoom=1)) == ([[]], False)


def test_a_scale_has_figures_that_differ() -> None:
    marks = ticks(Frame(0, 1, 0.5, 0.5004), 9, False)
    assert len(set(marks.values())) == len(marks) == 3
    assert scale_words([1.0, 1e-17, -1.0]) == ["1", "0", "-1"]
    assert ticks(Frame(0, 1, 2.0, 2.0), 9, False) == {4: "2"}


def test_every_metric_has_its_panel() -> None:
    logged = ("loss", "eval_loss", "rewards/chosen", "entropy", "kl")
    series: dict[str, Any] = {key: [(1, 1.0), (2, 2.0)] for key in logged}
    found = panels("KTO", series, {"memory": [("GPU 0", [(0.0, 1.0)])]})
    assert [panel.title for panel in found] == ["KTO loss", "KTO rewards", "KTO KL", "memory", "KTO entropy"]
    assert [name for name, _ in found[0].lines] == ["loss", "held-out"]
    assert panels("", {}, {})[0].lines == (("loss", ()),)


def test_steps_become_seconds_of_training(folder: Path) -> None:
    snapshot = Follower(recorded(folder, "done")).read()
    assert snapshot
    clock = snapshot.clocks["sft"]
    assert [step for step, _ in clock] == sorted({step for step, _ in clock})
    times = [at for at, _ in over_time(snapshot.state.stages[0].series["loss"], clock)]
    assert times == sorted(times) and 150 < times[-1] < 250
    assert over_time([(1, 1.0)], []) == []


# --- alerts ---


def snapshot_of(stage: StageState, status: str = "running", **more: Any) -> Snapshot:
    return Snapshot(Run(Path("/runs/x")), status, RunState(stages=[stage]), None, 0.0, **more)


def trained(name: str = "sft", **series: list[float | None]) -> StageState:
    """A stage at its half with one value a step."""
    length = max(len(values) for values in series.values())
    points = {key.replace("__", "/"): list(enumerate(values, 1)) for key, values in series.items()}
    return StageState(name, "running", step=length, total_steps=2 * length, series=points)  # type: ignore[arg-type]


def said(snapshot: Snapshot) -> list[str]:
    return [alert.text for alert in alerts(snapshot)]


def test_a_good_run_alarms_nobody() -> None:
    assert said(snapshot_of(trained(loss=[2 / step for step in range(1, 40)]))) == []


def test_a_loss_that_is_no_number_names_the_step_and_the_checkpoint_before() -> None:
    stage = trained(loss=[1.0] * 8 + [None] * 4)
    stage.checkpoints = [4, 10]
    [alert] = alerts(snapshot_of(stage))
    assert alert.weight == 3 and "since step 9" in alert.text and "checkpoint of step 4" in alert.advice
    [alert] = alerts(snapshot_of(trained(loss=[1.0, None, 0.9, 0.8])))
    assert alert.weight == 2 and "1 times, last at step 2" in alert.text
    assert alerts(snapshot_of(trained(loss=[None, None])))[0].text.count("since step 1") == 1


def test_divergence_is_twice_the_best_over_the_last_logs() -> None:
    falling = [2.0, 1.5, 1.0, 0.8, 0.6, 0.5]
    assert "diverges" in said(snapshot_of(trained(loss=[*falling, 1.4, 1.6, 1.5])))[0]
    assert said(snapshot_of(trained(loss=[*falling, 0.5, 1.6, 0.4]))) == []
    assert said(snapshot_of(trained(loss=[0.02] * 12 + [0.05] * 3))) == [], "noise of a small loss"


def test_what_should_move_and_does_not_is_told() -> None:
    assert "loss has not moved" in said(snapshot_of(trained(loss=[1.0] * 15)))[0]
    still = trained("kto", loss=[0.5] * 15, rewards__margins=[0.001] * 15, kl=[0.0] * 15)
    assert "margin has not moved" in said(snapshot_of(still))[0] and len(said(snapshot_of(still))) == 1
    moving = trained("kto", loss=[0.5] * 15, rewards__margins=[step / 10 for step in range(15)], kl=[0.0] * 15)
    assert said(snapshot_of(moving)) == ["KTO: the KL estimate is 0 in every log, the margin moves."]
    assert said(snapshot_of(replace(still, total_steps=1000))) == [], "a warm-up moves nothing yet"


def test_the_machine_alarms_while_the_run_lives_and_the_weightiest_comes_first() -> None:
    stage = trained(loss=[1.0] * 15)
    cards = [{"index": 0, "temperature_c": 91}, {"index": 1, "throttle": ["temperature"]}, 3]
    state = RunState(stages=[stage], gpu=[{"gpus": cards}])
    snapshot = Snapshot(Run(Path("/runs/x")), "running", state, None, 0.0, disk_free=GIB)
    found = said(snapshot)
    assert "1.0 GiB are free" in found[0] and any("91 °C" in text for text in found)
    assert any("GPU 1 is slowed down: temperature" in text for text in found)
    assert said(replace(snapshot, status="done")) == ["SFT: the loss has not moved from 1 in 5 logs: it is frozen."]
    assert "! " in alert_words(alerts(snapshot)).plain


def test_an_alarm_of_the_trainer_is_not_told_twice_and_stays_once_it_is_over() -> None:
    state = RunState(notices=[{"text": "the loss is not finite", "level": "error", "alarm": "nan"}])
    assert "not finite" in notes_words(state).plain and notes_words(state, told=["nan"]).plain == ""


def test_hostile_figures_of_a_card_alarm_harmlessly() -> None:
    for card in ({"temperature_c": "hot", "throttle": 3}, {"index": HOSTILE, "temperature_c": 99}):
        state = RunState(gpu=[{"gpus": [card]}], stages=[trained(loss=[1.0, 0.5])])
        text = alert_words(alerts(Snapshot(Run(Path("/x")), "running", state, None, 0.0))).plain
        assert CONTROLS.findall(text.replace("\n", "")) == []


# --- what is told ---


def _card(t: float, **figures: float) -> dict[str, Any]:
    return {"t": t, "kind": "gpu", "gpus": [{"index": 0, **figures}]}


def test_energy_is_counted_while_the_run_runs_only(folder: Path) -> None:
    run = Run(folder / "e")
    run.path.mkdir()
    lines: list[dict[str, Any]] = [{"t": 1000, "kind": "run_start"}]
    lines += [_card(1000 + t, energy_j=1000 + 300 * t, power_w=300) for t in (5, 10)]
    lines += [{"t": 1900, "kind": "run_start"}, _card(1901, energy_j=9e6)]
    lines += [_card(1906, energy_j=9e6 + 2100, power_w=1e99)]
    run.events_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    snapshot = Follower(run).read()
    assert snapshot and snapshot.energy_j == 3600 and energy_words(3600) == "1.0 Wh"
    assert snapshot.sensors["power"] == [("GPU 0", [(5.0, 300.0), (10.0, 300.0)])]
    assert energy_words(None) == "" and energy_words(9e6) == "2.50 kWh"


def test_the_end_is_told_as_a_time_on_the_clock(folder: Path) -> None:
    run = recorded(folder, "torn")
    lock = take_lock(run)
    snapshot = Follower(run).read()
    assert snapshot and "left, done at " in now_words(snapshot, 80).plain
    os.close(lock)


def test_a_done_run_says_how_to_fetch_its_model(folder: Path) -> None:
    snapshot = Follower(recorded(folder, "done", "my runs [1]")).read()
    assert snapshot
    assert rsync_line(snapshot, "/a b/c") == "rsync -av 'vm:/a b/c' ."
    command = f"rsync -av {shlex.quote(f'vm:{final_model(snapshot)}')} ."
    words = next_words(snapshot, 400).plain
    assert words.startswith(f"fetch  {command}\n") and "k goes on" not in words
    words = next_words(snapshot, len(command) + 6).plain
    assert "rsync" not in words and "o lists the command" in words, "in pieces it could not be copied"
    assert ("fetch", command) in paths_of(snapshot)


def test_notifications_hold_only_our_own_text() -> None:
    assert notification("finetui: x is done", in_tmux=False) == "\x1b]9;finetui: x is done\x07"
    assert notification("hi", in_tmux=True) == "\x1bPtmux;\x1b\x1b]9;hi\x07\x1b\\"
    assert end_message("a\x07b", "done") == "finetui: a run is done"
    assert end_message("sft-7b", "\x1b[31m") == "finetui: sft-7b is over"


async def test_the_end_of_a_watched_run_rings_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = recorded(folder, "torn")
    lock = take_lock(run)
    monkeypatch.delenv("TMUX", raising=False)
    app = FinetuiApp(folder)
    written: list[str] = []
    async with app.run_test(size=(80, 24)) as pilot:
        monkeypatch.setattr(app._driver, "write", written.append)
        await shows(pilot, "● running")
        await pilot.press("enter")
        await shows(pilot, "KTO: train")
        run.events.append("run_end", status="done")
        os.close(lock)
        await shows(pilot, "✔ done after")
        await until(pilot, lambda: "\x1b]9;finetui: torn is done\x07" in written)
        await pilot.press("h")
        text = await shows(pilot, "none running", "✔ torn is done")
        assert "✔ torn is done" in text.splitlines()[0] and not app._notifications
    assert sum(text.startswith("\x1b]9;") for text in written) == 1


# --- the screen ---


@pytest.mark.parametrize(("size", "charts"), [((80, 24), 1), ((120, 40), 4), ((200, 60), 6)])
async def test_as_many_charts_as_there_is_room_for(folder: Path, size: tuple[int, int], charts: int) -> None:
    run = recorded(folder, "torn")
    lock = take_lock(run)
    app = FinetuiApp(folder, run)
    async with app.run_test(size=size) as pilot:
        await shows(pilot, "KTO loss", "1 loss", "┤", "step 18")
        await until(pilot, lambda: sum(chart.display for chart in app.screen.query(Chart)) == charts)
        await pilot.resize_terminal(80, 24)
        await until(pilot, lambda: sum(chart.display for chart in app.screen.query(Chart)) == 1)
    os.close(lock)


async def test_keys_choose_the_curves_and_how_they_are_seen(folder: Path) -> None:
    app = FinetuiApp(folder, recorded(folder, "torn"))
    async with app.run_test(size=(80, 24)) as pilot:
        await shows(pilot, "KTO loss")
        await pilot.press("3")
        await shows(pilot, "KTO rewards", "o chosen 0.18", "x rejected -0.36")
        await pilot.press("m")
        assert "KTO rewards" not in await shows(pilot, "KTO KL")
        await pilot.press("M", "M", "e", "y", "z")
        await shows(pilot, "KTO margin", "smoothed · log scale · last 50%")
        await pilot.press("9", "z", "z", "z", "y", "e")
        await until(pilot, lambda: app.screen.view == View())  # type: ignore[attr-defined]


async def test_a_recorded_log_is_watched_without_a_run(folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "elsewhere.jsonl"
    log.write_bytes((RECORDED / "nan.jsonl").read_bytes())
    found = recording(log)
    assert isinstance(found, Recording) and isinstance(recording(recorded(folder, "done").events_path), Run)
    assert recording(folder / "done").name == "done"
    app = FinetuiApp(folder, found)
    async with app.run_test(size=(120, 40)) as pilot:
        text = await shows(pilot, "elsewhere", "✘ crashed", "the loss is not finite since step 45", "‼", "not finite")
        assert "r Resume" not in text
        await pilot.press("r", "s", "a", "escape")
        await shows(pilot, "done")


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (200, 60)])
@pytest.mark.parametrize("log", sorted(path.stem for path in RECORDED.glob("*.jsonl")))
async def test_every_view_of_every_recorded_log_at_every_size(
    folder: Path,
    log: str,
    size: tuple[int, int],
) -> None:
    app = FinetuiApp(folder, recorded(folder, log))
    async with app.run_test(size=size) as pilot:
        await shows(pilot, log, " after ")
        await pilot.press(*"eyzmmmMzz9", "left", "right", "l", "escape")
        assert CONTROLS.findall(frame(app).replace("\n", "")) == []
        assert isinstance(app.screen, DashboardScreen)


async def test_paths_are_shown_and_copied(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = FinetuiApp(folder, recorded(folder, "done"))
    written: list[str] = []
    async with app.run_test(size=(120, 40)) as pilot:
        await shows(pilot, "model after KTO")
        monkeypatch.setattr(app._driver, "write", written.append)
        await pilot.press("c")
        await pilot.press("o")
        await until(pilot, lambda: isinstance(app.screen, PathsScreen))
        await shows(pilot, "rsync -av", "vm:/", "events.jsonl", "cd ")
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, DashboardScreen))
    copied = [base64.b64decode(text[7:-1]).decode() for text in written if text.startswith("\x1b]52;c;")]
    assert copied == [str(folder / "done/kto/final_model"), str(folder / "done")]


async def test_kto_after_sft_opens_the_wizard_with_this_run(folder: Path) -> None:
    run = recorded(folder, "stopped", "my-sft")
    run.events.append("stage_end", name="sft", status="done", output="sft/final_model")
    run.events.append("run_end", status="done")
    app = FinetuiApp(folder, run)
    async with app.run_test(size=(80, 24)) as pilot:
        await shows(pilot, "k goes on with KTO")
        await pilot.press("k")
        await until(pilot, lambda: isinstance(app.screen, WizardScreen))
        draft = app.screen.draft  # type: ignore[attr-defined]
        assert (draft.method, draft.model) == ("kto", "run:my-sft")


async def test_a_curve_with_foreign_names_is_harmless(folder: Path) -> None:
    run = Run(folder / "evil")
    run.path.mkdir()
    run.plan_path.write_text("method: sft\n")
    run.events.append("stage_start", name="sft")
    for step in (1, 2, 3):
        run.events.append("log", **{"stage": "sft", "step": step, "loss": 1.0 / step, HOSTILE: step})
        run.events.append("gpu", gpus=[{"index": HOSTILE, "temperature_c": 50 + step}], rss_bytes=HOSTILE)
    app = FinetuiApp(folder, run)
    async with app.run_test(size=(200, 60)) as pilot:
        text = await shows(pilot, "SFT loss", "temperature", "[INST")
        assert CONTROLS.findall(text.replace("\n", "")) == []


async def test_a_long_log_is_drawn_before_it_is_read_whole(folder: Path) -> None:
    run = recorded(folder, "stopped", "long")
    filler = {"t": 1795416500, "kind": "log", "stage": "sft", "loss": 0.5, "grad_norm": 0.7, "learning_rate": 1e-4}
    with run.events_path.open("a") as stream:
        stream.writelines(json.dumps({**filler, "step": step}) + "\n" for step in range(70, 20_000))
    follower = Follower(run)
    glance, whole = follower.glance(), follower.read()
    assert glance and glance.partial and whole and not whole.partial
    assert glance.state.stages[0].checkpoints == whole.state.stages[0].checkpoints[-50:]
    assert 100 < len(glance.state.stages[0].series["loss"]) < 2000
    assert Follower(recorded(folder, "done")).glance() is None


async def test_every_action_is_in_the_palette(folder: Path) -> None:
    app = FinetuiApp(folder, recorded(folder, "done"))
    async with app.run_test(size=(120, 40)) as pilot:
        await shows(pilot, "KTO loss")
        titles = {command.title for command in app.get_system_commands(app.screen)}
        assert {"Log", "Home", "Log scale", "Copy the model's path", "Theme", "Quit"} <= titles
        assert "Abort" not in titles
        await pilot.press("ctrl+p")
        await shows(pilot, "Copy the model's path")
        await pilot.press(*"log", "space", *"scale")
        await until(pilot, lambda: "Smooth" not in frame(app) and "Log scale" in frame(app))
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, DashboardScreen) and app.screen.view.log)


async def test_a_theme_is_kept_and_no_colour_is_respected(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = FinetuiApp(folder)
    async with app.run_test(size=(80, 24)) as pilot:
        await shows(pilot, "Welcome")
        app.theme = "nord"
        await until(pilot, lambda: kept_settings().get("theme") == "nord")
    monkeypatch.setenv("NO_COLOR", "1")
    again = FinetuiApp(folder, recorded(folder, "torn"))
    assert again.theme == "nord" and again.no_color
    async with again.run_test(size=(120, 40)) as pilot:
        await shows(pilot, "KTO rewards", "o chosen", "x rejected")


def test_the_grid_shows_the_last_panels_rather_than_an_empty_place() -> None:
    class Fixed(ChartGrid):
        room = (2, 2)  # type: ignore[assignment]

    grid = Fixed()
    grid._panels, grid._first = [Panel(str(number), ()) for number in range(5)], 4
    assert grid.shown() == range(1, 5)
