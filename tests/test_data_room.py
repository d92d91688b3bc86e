"""The data room of the wizard, driven by its keys: findings and their rows, the limit, contents, columns, the Hub."""

import contextlib
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import SHARED_DATA, USER, good
from hub_server import serving
from pilots import frame, shows, until
from test_wizard import WizardApp, draft_of, marked
from textual.widgets import Input

from core.config import load_plan
from tui.data_page import ColumnsScreen, DataPage
from tui.data_room import DataRoom
from tui.data_views import fewer, histogram_lines, wrapped
from tui.draft import Draft, RowsDraft, command_line, load_draft
from tui.draft import draft_of as draft_of_plan
from tui.widgets import Choice

pytestmark = pytest.mark.usefixtures("own_cache_and_no_gpu")
ROWS = [good(f"Question {n} " + "more " * n, n % 2 == 0, answer=f"Answer {n}") for n in range(30)]


def room(app: WizardApp) -> DataRoom:
    return app.wizard.query_one(DataRoom)


def body(app: WizardApp) -> str:
    return app.wizard.query_one("#preview-text").content.plain  # type: ignore[attr-defined]


def chosen(app: WizardApp) -> list[str]:
    """The views that are marked as the one shown."""
    head = app.wizard.query_one("#preview-head").content  # type: ignore[attr-defined]
    return [head.plain[span.start : span.end].strip() for span in head.spans if "reverse" in str(span.style)]


async def known(pilot: Any, app: WizardApp) -> DataRoom:
    """Wait until rows and tokens of the stage shown are known, and go into the room."""
    await until(pilot, lambda: room(app).here.row and room(app).here.count and room(app).here.look.get("whole"))
    room(app).focus()
    await pilot.pause()
    return room(app)


async def test_a_finding_leads_to_its_rows_and_back(
    tmp_path: Path, tiny_model: Path, rows_file: Callable[..., Path]
) -> None:
    rows = [*ROWS, {"messages": [USER]}, ROWS[4], good("tell", True, answer="tool_call: t\narguments: {oops")]
    app = WizardApp(draft_of("kto", tiny_model, rows_file(rows)), tmp_path)
    async with app.run_test(size=(80, 24)) as pilot:
        await known(pilot, app)
        await pilot.press("2")
        text = await shows(pilot, "1 row left out: no assistant turn.", "1 row holds tool calls whose arguments")
        assert "▸ " in text and "→ " in text
        while "▸ !  mend   1 row holds tool calls" not in body(app):
            await pilot.press("down")
        assert "In calls of t." in body(app) and "line 33" in body(app)
        await pilot.press("enter")
        await until(pilot, lambda: room(app).here.row["line"] == 33)
        assert "oops" in body(app) and room(app).view == 0
        await pilot.press("2", "up", "up", "up", "up")
        assert "▸ " in body(app).splitlines()[0]
        while "▸ !  mend   1 row left out: no assistant turn." not in body(app):
            await pilot.press("down")
        await pilot.press("enter")
        await until(pilot, lambda: room(app).here.row["line"] == 31)
        assert body(app).startswith("! left out: no assistant turn\nAs it is written:\n{")
        assert USER["content"] in body(app)
        await shows(pilot, "line 31: not learned from")


async def test_the_limit_is_moved_tried_and_kept(
    tmp_path: Path, tiny_model: Path, rows_file: Callable[..., Path]
) -> None:
    app = WizardApp(draft_of("sft", tiny_model, rows_file(ROWS), sft__max_length="500"), tmp_path)
    async with app.run_test(size=(120, 40)) as pilot:
        pane = await known(pilot, app)
        await pilot.press("3")
        await shows(pilot, "Tokens a row", "limit 500 ▶", "At 500: 15 rows fit", "Answers", "rows end to end", "Epoch")
        longest = pane.here.count["shape"]["row_percentiles"]["100"]
        while pane.here.limit_at >= longest - 20:
            await pilot.press("left")
        tried = pane.here.limit_at
        await until(pilot, lambda: pane.here.limit and pane.here.limit["at"] == tried)
        gone = pane.here.limit["limit"]["left_out"]
        assert gone > 0 and f"{gone} left out" in frame(app) and f"k keeps {tried}" in frame(app)
        await pilot.press("k")
        await until(pilot, lambda: pane.here.kept_limit == tried)
        assert app.wizard.draft.values["sft.max_length"] == str(tried)
        await shows(pilot, f"{gone} left out")
        await until(pilot, lambda: any(entry["kind"] == "too long" for entry in pane.here.findings))
        await pilot.press("shift+right", "shift+right", "shift+right")
        assert pane.here.limit_at >= longest
        text = app.wizard.query_one("#preview-text")
        await pilot.mouse_down(text, offset=(30, 3))
        first = await until(pilot, lambda: pane.here.limit_at < longest and pane.here.limit_at)
        await pilot.hover(text, offset=(30, 20))
        pointer = next(line.index("▲") for line in body(app).splitlines() if "▲" in line)
        assert abs(pointer - 30) <= 3 and pane.here.limit_at == first
        await until(pilot, lambda: pane.here.limit and pane.here.limit["at"] == first)
    assert load_draft(tmp_path / "draft.json").values["sft.max_length"] == str(tried)  # type: ignore[union-attr]


async def test_ids_are_shown_on_demand_and_turns_are_headed(
    tmp_path: Path, tiny_model: Path, rows_file: Callable[..., Path]
) -> None:
    app = WizardApp(draft_of("sft", tiny_model, rows_file(ROWS)), tmp_path)
    async with app.run_test(size=(120, 40)) as pilot:
        pane = await known(pilot, app)
        assert body(app).startswith("user ") and "assistant " in body(app) and "tokens" in body(app)
        before = marked(app)
        await pilot.press("i")
        await until(pilot, lambda: "·" in body(app))
        ids = pane.here.row["input_ids"]
        assert all(f"·{number} " in body(app) for number in ids) and len(pane.here.row["pieces"]) == len(ids)
        await pilot.press("i")
        await until(pilot, lambda: marked(app) == before)


async def test_contents_tell_labels_turns_tools_and_columns(
    tmp_path: Path, tiny_model: Path, rows_file: Callable[..., Path]
) -> None:
    rows = [row | {"source": "x"} for row in ROWS] + [good("t", True, answer='tool_call: set_it\narguments: {"a": 1}')]
    app = WizardApp(draft_of("sft-kto", tiny_model, rows_file(rows)), tmp_path)
    async with app.run_test(size=(120, 40)) as pilot:
        await known(pilot, app)
        await pilot.press("4")
        await shows(pilot, "rows.jsonl  JSONL, 31 rows", "conversations → turns, label → label", "not used: source",
                    "16 good", "16 rows: user, assistant", "set_it 1")  # fmt: skip
        assert chosen(app) == ["4 Contents"]
        await pilot.press("space")
        await shows(pilot, "KTO  1 Rows", "16 good", "15 bad", "weights 1 and 1")
        await pilot.press("3")
        assert chosen(app) == ["3 Lengths"]


async def test_columns_are_told_and_remembered_in_draft_plan_and_command(
    tmp_path: Path, tiny_model: Path, rows_file: Callable[..., Path]
) -> None:
    path = rows_file([{"frage": f"q{n}", "antwort": f"a{n}", "sicher": True} for n in range(6)])
    app = WizardApp(draft_of("sft", tiny_model, path), tmp_path)
    async with app.run_test(size=(80, 24)) as pilot:
        await shows(pilot, "✘", "no usable row for SFT", "no conversation found")
        await shows(pilot, "2 Findings 1", "Say which column is what: --column prompt=…")
        room(app).focus()
        await pilot.pause()
        await pilot.press("m")
        await until(pilot, lambda: isinstance(app.screen, ColumnsScreen))
        await shows(pilot, "The rows have: frage, antwort, sicher", "what is asked")
        app.screen.query_one("#column-prompt", Input).value = "frage"
        app.screen.query_one("#column-completion", Input).value = "antwort"
        await pilot.press("enter")
        await shows(pilot, "✔ 6 rows: all ")
        await until(pilot, lambda: room(app).here.row)
        await until(pilot, lambda: "q0" in body(app))
    draft = load_draft(tmp_path / "draft.json")
    assert draft and draft.data["sft"].columns == {"prompt": "frage", "completion": "antwort"}
    other = rows_file([{"frage": "q", "antwort": "a"}], "other.jsonl")
    app = WizardApp(draft_of("sft", tiny_model, other), tmp_path)
    async with app.run_test(size=(80, 24)) as pilot:
        await shows(pilot, "✘", "no usable row for SFT")
        app.wizard.query_one("PathLine.file", Input).value = str(path)
        await shows(pilot, "✔ 6 rows: all ")
        app.wizard.query_one("PathLine.file", Input).value = str(other)
        await shows(pilot, "✘", "no usable row for SFT")
    assert "sft.data.columns" in command_line(draft)
    from tui.draft import checked

    plan = checked(draft).resolved
    assert plan and plan.plan.sft.data.columns == {"prompt": "frage", "completion": "antwort"}
    assert draft_of_plan(plan.plan).data["sft"].columns == draft.data["sft"].columns


async def test_a_ledger_is_saved_from_the_room(
    tmp_path: Path, tiny_model: Path, rows_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    app = WizardApp(draft_of("sft", tiny_model, rows_file([*ROWS, {"messages": []}])), tmp_path)
    async with app.run_test(size=(80, 24)) as pilot:
        await known(pilot, app)
        await pilot.press("l")
        await shows(pilot, "Save every row with its fate as")
        await pilot.press("enter")
        await until(pilot, lambda: (tmp_path / "sft-ledger.csv").is_file())
        with (tmp_path / "sft-ledger.csv").open(newline="") as stream:
            table = list(csv.DictReader(stream))
        assert [row["fate"] for row in table].count("left out") == 16 and len(table) == 31


async def test_on_a_low_terminal_the_room_takes_the_lines_and_gives_them_back(
    tmp_path: Path, tiny_model: Path, rows_file: Callable[..., Path]
) -> None:
    app = WizardApp(draft_of("sft-kto", tiny_model, rows_file(ROWS)), tmp_path)
    async with app.run_test(size=(80, 24)) as pilot:
        await known(pilot, app)
        height = room(app).size.height
        assert height >= 12 and not app.wizard.query_one("#rows-kto").display
        await pilot.press("shift+tab")
        await until(pilot, lambda: app.wizard.query_one("#rows-kto").display)
        assert room(app).size.height < height


def children() -> list[str]:
    """The command lines of this process's children and theirs."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found.append(" ".join(child.cmdline()))
    return found


async def test_a_new_file_ends_the_look_at_the_old_one(
    tmp_path: Path, tiny_model: Path, rows_file: Callable[..., Path]
) -> None:
    big = tmp_path / "big.jsonl"
    big.write_text((json.dumps(good("x " * 400)) + "\n") * 30_000)
    app = WizardApp(draft_of("sft", tiny_model, big), tmp_path)
    async with app.run_test(size=(80, 24)) as pilot:
        await shows(pilot, "rows checked …")
        assert any("core.data_look" in words for words in children())
        app.wizard.query_one("PathLine.file", Input).value = str(rows_file(ROWS))
        await shows(pilot, "✔ 30 rows")
        await until(pilot, lambda: not any("data_worker" in words for words in children()))


async def test_a_hub_set_is_looked_at_and_fetched_on_demand(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = "".join(f"{json.dumps(row)}\n" for row in ROWS).encode()
    with serving({"us/rows": {"main": {"a/train.jsonl": content, "b/train.jsonl": content[:300]}}}) as (hub, address):
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        draft = Draft(method="sft", model=str(tiny_model), step=2)
        draft.data["sft"] = RowsDraft(kind="hub", dataset="us/rows")
        app = WizardApp(draft, tmp_path)
        async with app.run_test(size=(120, 40)) as pilot:
            await shows(pilot, "✘", "has 2 configurations", "a, b")
            page = app.wizard.query_one(DataPage)
            page.query_one(".dataset_config", Input).value = "a"
            await shows(pilot, "✔ on the Hub", "now with f", "The first rows, as they stand")
            assert "Question 0" in body(app)
            room(app).focus()
            await pilot.press("f")
            await shows(pilot, "✔ 30 rows: 15 ")
            assert any(path.endswith("a/train.jsonl") for path in hub.asked)


def test_a_histogram_marks_the_limit_below_its_bars_and_fits_the_width() -> None:
    histogram = {"edges": [10 * n for n in range(61)], "counts": [n % 7 for n in range(60)]}
    for width in (20, 38, 76, 200):
        bars, scale = histogram_lines(histogram, 300, width, 5)
        assert len(bars) == 5 and all(len(bar.plain) <= width + 1 for bar in bars)
        pointer = next(at for at, letter in enumerate(scale[1].plain) if letter in "▲▶")
        assert abs(pointer / len(bars[0].plain) - 0.5) < 0.15 and "limit 300" in scale[1].plain
    assert sum(fewer(histogram["counts"], histogram["edges"], 7)[0]) == sum(histogram["counts"])


def test_items_are_wrapped_under_each_other() -> None:
    lines = [line.plain for line in wrapped("Tools  ", ["one 1", "two 2", "three 3"], 20)]
    assert lines == ["Tools  one 1 · two 2", "       three 3"]


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the shared data is not here")
async def test_a_real_file_is_understood_at_first_sight(tmp_path: Path, tiny_model: Path) -> None:
    app = WizardApp(draft_of("kto", tiny_model, SHARED_DATA / "vault_manager_tool_calls.jsonl"), tmp_path)
    async with app.run_test(size=(80, 24)) as pilot:
        await shows(pilot, "every label is true", "Train with SFT instead.")
        await shows(pilot, "441 rows without a label", "2 Findings")


def test_saved_plans_carry_what_the_page_was_told(tmp_path: Path) -> None:
    from core.config import resolve, save_plan

    values = {"sft.data.columns": {"prompt": "a: b", "completion": "#"}, "sft.data.files": {"/x y.jsonl": 0.5}}
    found = resolve("sft", None, {key: (value, "t") for key, value in values.items()}, gpu_present=False)
    save_plan(found, tmp_path / "plan.yaml")
    data = load_plan(tmp_path / "plan.yaml").sft.data
    assert data.columns == values["sft.data.columns"] and data.files == values["sft.data.files"]


async def test_a_number_leads_from_a_stages_lines_into_its_rows_and_escape_back(
    tmp_path: Path, tiny_model: Path, rows_file: Callable[..., Path]
) -> None:
    app = WizardApp(draft_of("sft-kto", tiny_model, rows_file(ROWS)), tmp_path)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: room(app).here.look.get("whole"))
        choices = list(app.wizard.query(Choice))
        choices[1].focus()
        await pilot.press("2")
        await until(pilot, lambda: app.focused is room(app) and room(app).stage == "kto" and chosen(app)[0][0] == "2")
        await pilot.press("right", "left")
        assert app.wizard.draft.data["kto"].kind == "file"
        await pilot.press("escape")
        await until(pilot, lambda: app.focused is choices[1])
