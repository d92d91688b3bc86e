"""The rooms of results in the app: evaluations and their cases, samples, comparing with answers, the report."""

import contextlib
import io
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from conftest import MakeRun
from pilots import CONTROLS, HOSTILE, frame, shows, until

from core.evaluate import evaluate
from core.evaluation import HELD_OUT, evaluation_path, evaluations, missed_words
from core.events import RunState
from core.runs import Run, is_alive, take_lock
from core.train_events import Reporter
from tui.app import FinetuiApp
from tui.compare import CompareScreen
from tui.dashboard import DashboardScreen
from tui.evaluation import AskEvaluation, EvaluationScreen, SideBySide
from tui.evaluation import answer_words as case_words
from tui.home import HomeScreen
from tui.samples import (
    SamplesScreen,
    answer_words,
    cost_words,
    history_words,
    newest_words,
    series_of,
    step_words,
    verdict_of,
)

pytestmark = pytest.mark.usefixtures("own_cache_and_no_gpu")


@pytest.fixture
def evaluated(chain: Run) -> Run:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        evaluate(chain, chain.plan(), Reporter(chain, "evaluate"))
    chain.events.append("stage_end", name="evaluate", status="done", output="evaluate")
    return chain


@pytest.mark.parametrize("size", [(80, 24), (120, 40)])
async def test_an_evaluation_is_looked_at_case_by_case(evaluated: Run, folder: Path, size: tuple[int, int]) -> None:
    app = FinetuiApp(folder)
    async with app.run_test(size=size) as pilot:
        await shows(pilot, "chain")
        await pilot.press("v")
        await shows(pilot, "held out from rows.jsonl", "after KTO", "3 of 3 cases fail", "set_timer")
        screen = app.screen
        assert isinstance(screen, EvaluationScreen)
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, SideBySide))
        text = await shows(pilot, "1 of 3", "expected", "line")
        assert "Set a timer for" in text
        await pilot.press("right", "right", "right")
        await shows(pilot, "3 of 3")
        await pilot.press("escape")
        await until(pilot, lambda: app.screen is screen)
        await pilot.press("f")
        await shows(pilot, "all are shown")
        await pilot.press("escape")
        await until(pilot, lambda: isinstance(app.screen, HomeScreen))


async def test_an_evaluation_is_started_from_the_dashboard_and_survives_the_app(chain: Run, folder: Path) -> None:
    app = FinetuiApp(folder)
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await shows(pilot, "chain")
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, DashboardScreen) and app.screen.snapshot)
        await pilot.press("v")
        await shows(pilot, "No evaluation yet")
        await pilot.press("v")
        await until(pilot, lambda: app.screen.query("#prompts"))
        assert isinstance(app.screen, AskEvaluation)
        app.screen.query_one("#file").value = "/nowhere.jsonl"
        await pilot.press("enter")
        await shows(pilot, "/nowhere.jsonl")
        await pilot.press("v")
        await until(pilot, lambda: app.screen.query("#prompts"))
        app.screen.query_one("#prompts").value = "2"
        await pilot.press("enter")
        await shows(pilot, "● running")
        assert is_alive(chain)
    assert is_alive(chain) or evaluations(chain), "the app is gone, the evaluation is not"
    app = FinetuiApp(folder, watch=chain)
    async with app.run_test(size=(120, 40)) as pilot:
        await until(pilot, lambda: not is_alive(chain), 6000)
        await shows(pilot, "✔ done", "2 held-out prompts", "✔ evaluate")
        await pilot.press("v")
        await shows(pilot, "2 of 2 cases fail")
    assert chain.state().end_status == "done"


async def test_hostile_answers_are_shown_harmlessly(evaluated: Run, folder: Path) -> None:
    cases = evaluation_path(evaluated, HELD_OUT) / "cases.jsonl"
    rows = [json.loads(line) for line in cases.read_text().splitlines()]
    for row in rows:
        row |= {"prompt": HOSTILE, "expected": HOSTILE, "tool": HOSTILE, "file": HOSTILE}
        row["answers"]["kto"]["answer"] = HOSTILE
    cases.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluated.events.append("sample", stage="kto", step=99, number=0, prompt=HOSTILE, answer=HOSTILE, expected=HOSTILE)
    app = FinetuiApp(folder)
    async with app.run_test(size=(100, 60)) as pilot:
        await shows(pilot, "chain")
        await pilot.press("v")
        await shows(pilot, "cases fail")
        assert not CONTROLS.search(frame(app).replace("\n", ""))
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, SideBySide))
        assert not CONTROLS.search((await shows(pilot, "[INST]")).replace("\n", ""))
        await pilot.press("escape", "escape", "enter")
        await until(pilot, lambda: isinstance(app.screen, DashboardScreen) and app.screen.snapshot)
        await shows(pilot, "answers while it trains")
        assert not CONTROLS.search(frame(app).replace("\n", ""))
        await pilot.press("p")
        await until(pilot, lambda: isinstance(app.screen, SamplesScreen) and app.screen.series)
        assert not CONTROLS.search(frame(app).replace("\n", ""))


async def test_samples_are_read_step_by_step(chain: Run, folder: Path) -> None:
    app = FinetuiApp(folder)
    async with app.run_test(size=(120, 40)) as pilot:
        await shows(pilot, "chain")
        await pilot.press("enter")
        await shows(pilot, "answers while it trains, what changed underlined", "KTO step 4")
        await pilot.press("p")
        screen = await until(pilot, lambda: isinstance(app.screen, SamplesScreen) and app.screen)
        await shows(pilot, "prompt 1 of", "SFT 0  2  4  KTO 0  2  4", "expected")
        await pilot.press("left")
        assert screen.at == len(screen.series[0]) - 2
        await pilot.press("right")
        assert screen.at is None, "at the newest it stays at the newest"
        await pilot.press("n")
        await shows(pilot, "prompt 2 of")
        await pilot.press("escape")
        await until(pilot, lambda: isinstance(app.screen, DashboardScreen))
        await pilot.press("w")
        await until(pilot, lambda: (chain.path / "report.html").exists() and (chain.path / "report.md").exists())


def test_what_changed_in_an_answer_is_marked() -> None:
    def sample(step: int, answer: str, **more: object) -> dict[str, object]:
        return {
            "t": 1.0,
            "kind": "sample",
            "stage": "sft",
            "step": step,
            "number": 0,
            "prompt": "p",
            "answer": answer,
            **more,
        }

    words = answer_words(sample(2, "tool_call: set_timer"), sample(0, "tool_call: set_alarm"))
    assert words.plain == "tool_call: set_timer"
    assert [(span.start, span.end) for span in words.spans] == [(11, 20)]
    assert answer_words(sample(2, "a"), None).spans == []
    expected = 'tool_call: a\narguments: {"x": 1}'
    assert verdict_of(sample(1, expected, expected=expected)) == "✔ as expected"
    assert verdict_of(sample(1, "tool_call: a\narguments: {}", expected=expected)) == "~ the right tool"
    assert verdict_of(sample(1, "Hi", expected=expected)) == "✘ not as expected" and verdict_of(sample(1, "x")) == ""
    state = RunState()
    assert newest_words(state, 80).plain == "" and cost_words(state) == ""
    for step in range(0, 40, 2):
        state.fold(sample(step, f"answer {step}", seconds=0.5))
    state.fold({"t": 1.0, "kind": "phase", "stage": "sft", "name": "train", "seconds": 200.0})
    [series] = series_of(state)
    assert cost_words(state) == "10 s, 5.0 % of the training"
    assert step_words(series, 19).plain.endswith(" 38 ") and step_words(series, 0).plain.endswith(" ›")
    assert "SFT step 38" in newest_words(state, 80).plain
    assert history_words(series, 19, 60).plain.splitlines()[1].split() == ["›", "SFT", "step", "38", "answer", "38"]
    twice = [sample(0, "a\nb", expected="c"), sample(2, "a\nb", expected="c"), sample(4, "c", expected="c")]
    newest, same, first = history_words(twice, 2, 60).plain.splitlines()[1:]
    assert newest.startswith("› SFT step 4") and newest.endswith("✔ c")
    assert same.endswith("✘ the same") and first.endswith("✘ a⏎b")


def test_the_share_that_samples_take_counts_a_stage_that_still_trains() -> None:
    state = RunState()
    state.fold({"t": 0.0, "kind": "stage_start", "name": "kto"})
    state.fold({"t": 5.0, "kind": "totals", "stage": "kto", "steps": 9})
    for step in (1, 2, 3):
        state.fold({"t": 10.0 + 20 * step, "kind": "log", "stage": "kto", "step": step, "loss": 1.0})
    state.fold({"t": 70.0, "kind": "sample", "stage": "kto", "step": 3, "number": 0, "prompt": "p", "seconds": 4.0})
    assert cost_words(state) == "4 s, 10.0 % of the training"


def test_what_departs_from_the_expected_answer_is_marked_where_the_two_are_alike() -> None:
    expected = 'tool_call: play\narguments: {"artist": "the Doors"}'
    marks = {"decision": True, "format": True, "tool": True, "arguments": False, "exact": False}
    near = case_words("after KTO", {"answer": expected.replace("the Doors", "music"), "marks": marks}, expected)
    assert [near.plain[span.start : span.end] for span in near.spans if "underline" in str(span.style)] == ["music"]
    assert near.plain.endswith("✘ arguments")
    far = case_words("base model", {"answer": "I like music.", "marks": marks | {"decision": False}}, expected)
    assert far.plain.endswith("✘ no call") and not [span for span in far.spans if "underline" in str(span.style)]
    assert missed_words({"decision": False, "exact": False}) == "a call where none is expected"
    assert missed_words({"decision": True, "exact": False}) == "another text"
    assert missed_words({"decision": True, "exact": True}) == missed_words({}) == ""


async def test_training_is_not_stopped_as_an_evaluation(make_run: MakeRun, folder: Path) -> None:
    run = make_run(name="busy")
    run.events.append("run_start")
    run.events.append("stage_start", name="sft")
    handle = take_lock(run)
    app = FinetuiApp(run.path.parent)
    async with app.run_test(size=(100, 30)) as pilot:
        await app.push_screen(EvaluationScreen(run))
        await shows(pilot, "can be answered once it has ended")
        assert app.screen.check_action("stop", ()) is False and app.screen.check_action("begin", ()) is False
        run.events.append("stage_end", name="sft", status="done")
        run.events.append("stage_start", name="evaluate")
        await until(pilot, lambda: app.screen.check_action("stop", ()))
    os.close(handle)


async def test_runs_are_compared_with_evaluations_and_answers_over_three_axes(evaluated: Run, folder: Path) -> None:
    other = Run(folder / "other")
    shutil.copytree(evaluated.path, other.path)
    log = other.events_path.read_text()
    other.events_path.write_text(re.sub(r'"name":"chain"', '"name":"other"', log))
    app = FinetuiApp(folder)
    async with app.run_test(size=(120, 50), notifications=True) as pilot:
        await shows(pilot, "chain", "other")
        await app.push_screen(CompareScreen([evaluated, other]))
        await shows(pilot, "over steps", "Held-out prompts, share right", "answered by", "after KTO")
        await pilot.press("t")
        await shows(pilot, "over training time")
        await pilot.press("t")
        await shows(pilot, "over examples", "example 16")
        await pilot.press("a")
        await until(pilot, lambda: isinstance(app.screen, SideBySide))
        await shows(pilot, "the same marks", "chain", "other", "expected")
        await pilot.press("escape")
        shutil.rmtree(other.path / "evaluate")
        await app.push_screen(CompareScreen([evaluated, other]))
        await shows(pilot, "answered by")
        await pilot.press("a")
        await shows(pilot, "No prompt was answered")
