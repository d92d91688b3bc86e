"""The report of a run and the comparison of several: what is in them, what is kept out, that nothing in them acts."""

import contextlib
import io
import json
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeNamed, Refused
from pilots import HOSTILE, recorded

from core.card import model_card
from core.cli import main
from core.compare import differences, over_examples, same_prompts, shared_answers, sides_of
from core.evaluate import evaluate
from core.evaluation import HELD_OUT, evaluation_path
from core.machine_use import use_of, versions
from core.markdown import block, plain
from core.notes import Note, write_note
from core.places import value_without_places, without_places
from core.report import artefact_row, gather, headline, plan_sources
from core.report_files import write_reports
from core.report_html import compared_as_html
from core.runs import Run, take_lock
from core.svg import chart, digits, steps, thinned
from core.train_events import Reporter

ACTIVE = {
    "script",
    "iframe",
    "object",
    "embed",
    "form",
    "link",
    "base",
    "img",
    "a",
    "input",
    "button",
    "audio",
    "video",
}


class Page(HTMLParser):
    """A page taken apart: its text, every element that could act or fetch, whether its tags close."""

    VOID = {"meta", "br", "hr", "line", "circle", "polyline", "img", "link", "input"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.acting, self.open = "", [], []  # type: ignore[var-annotated]
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ACTIVE or any(
            key.startswith("on") or key in ("src", "href", "srcset", "xlink:href") for key, _ in attrs
        ):
            self.acting.append((tag, attrs))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ACTIVE:
            self.acting.append((tag, attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def page_of(html: str) -> Page:
    page = Page(html)
    assert page.open == [] and page.acting == [], "nothing in a report acts or is fetched"
    assert "http" not in re.sub(r"http-equiv", "", html.split("</style>")[1]) or "http" in page.text
    return page


@pytest.fixture
def evaluated(chain: Run) -> Run:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        evaluate(chain, chain.plan(), Reporter(chain, "evaluate"))
    return chain


def test_a_report_holds_everything_worth_knowing_and_no_place(
    evaluated: Run, said: Callable[..., str], tmp_path: Path
) -> None:
    evaluated.events.append("notice", level="warning", text=f"see {evaluated.log_path}", advice="ask secret-host")
    write_note(evaluated.path, Note("for /home/jane/notes/today.txt"))
    told = said("report", "chain")
    html, markdown = (Path(line.removeprefix("Report: ")).read_text() for line in re.findall(r"Report: \S+", told))
    page = page_of(html)
    for words in (
        "chain", "✔ done", "SFT→KTO", "Evaluation: held out from rows.jsonl", "right tool", "after KTO",
        "Failing cases",
        "Learning rate", "Margin", "rows.jsonl", "label is false", "learning_rate", "0.01", "today.txt",
        "see train.log",
        "Answers while it trained", "Set a timer for",
    ):  # fmt: skip
        assert words in page.text, words
        assert plain(words) in markdown or words == "✔ done", words
    assert html.count("<polyline") > 8 and "prefers-color-scheme: dark" in html
    for secret in (str(tmp_path), str(evaluated.plan().model.name), "/home/jane", "secret-host"):
        assert secret not in html and secret not in markdown


def test_a_report_without_rows_holds_no_prompt_and_no_answer(evaluated: Run, said: Callable[..., str]) -> None:
    target = evaluated.path / "short.html"
    assert str(target) in said("report", "chain", "--output", target, "--no-rows").replace("\n", "")
    page = page_of(target.read_text())
    assert "Set a timer" not in page.text and "right tool" in page.text
    assert not (evaluated.path / "report.html").exists()


def test_foreign_text_is_shown_and_never_obeyed(evaluated: Run) -> None:
    evil = f"<script>alert(1)</script><img src=x onerror=alert(1)> | `` ``` {HOSTILE} </pre></details>{{{{7*7}}}}"
    folder = evaluation_path(evaluated, HELD_OUT)
    report = json.loads((folder / "report.json").read_text())
    report |= {
        "source": evil,
        "notes": [evil],
        "left_out": {evil: 3},
        "by_tool": {evil: report["by_tool"]["set_timer"]},
    }
    (folder / "report.json").write_text(json.dumps(report))
    rows = [json.loads(line) for line in (folder / "cases.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"prompt": evil, "expected": evil, "file": evil}
        for answer in row["answers"].values():
            answer["answer"] = evil
    (folder / "cases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_note(evaluated.path, Note(evil))
    evaluated.events.append("sample", stage="sft", step=9, number=0, prompt=evil, answer=evil, expected=evil)
    evaluated.events.append("notice", stage="sft", text=evil, advice=evil)
    evaluated.events.append("gpu", gpus=[{"index": evil, "name": evil, "memory_used_bytes": 1 << 30}])
    evaluated.events.append("gpu", gpus=[{"index": evil, "name": evil, "memory_used_bytes": 2 << 30}])
    html, markdown = (path.read_text() for path in write_reports(evaluated))
    page = page_of(html)
    assert "<script>alert(1)</script>" in page.text and "{{7*7}}" in page.text
    assert "\x1b" not in html + markdown and "\u202e" not in html + markdown
    outside = re.sub(r"(`{3,})text\n.*?\n\1\n", "", markdown, flags=re.DOTALL)
    assert not re.search(r"(?<!\\)<script", outside)
    page_of(compared_as_html(sides_of([evaluated, evaluated])))


@pytest.mark.parametrize("log", ["done", "failed", "nan", "stopped", "torn", "demo"])
def test_every_recorded_run_can_be_reported(folder: Path, folder_made: None, log: str) -> None:
    run = recorded(folder, log)
    html, markdown = (path.read_text() for path in write_reports(run))
    assert log in page_of(html).text and markdown.startswith(f"# {log}: ")


def test_a_run_with_nothing_in_it_can_be_reported(folder: Path, folder_made: None) -> None:
    run = Run(folder / "bare")
    run.path.mkdir()
    run.plan_path.write_text("nonsense: [")
    page_of(write_reports(run)[0].read_text())


def test_a_report_is_refused_a_name_that_is_neither_page_nor_markdown(refused: Refused, evaluated: Run) -> None:
    assert "neither HTML nor Markdown" in refused("report", "chain", "--output", evaluated.path / "x.pdf")
    assert "cannot be written" in refused("report", "chain", "--output", "/proc/none/x.html")


def test_the_headline_takes_the_strictest_mark_that_was_earned() -> None:
    def rate(hits: int) -> dict[str, float]:
        return {"hits": hits, "total": 10, "low": 0.1, "high": 0.9}

    table = {"base": {"exact": rate(0), "tool": rate(1)}, "sft": {"exact": rate(0), "tool": rate(5)}}
    words = headline({"variants": ["base", "sft"], "table": table})
    assert words == (
        "After SFT 50 % of 10 held-out prompts are answered with the right tool (95 % interval 10 to 90 %); "
        "base model 10 %."
    )
    table["sft"]["exact"] = rate(2)
    assert "20 % of 10" in headline({"variants": ["base", "sft"], "table": table})
    assert headline({"variants": ["base"], "table": {"base": {}}}) == ""


# --- places ---


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("see /home/jane/runs/x/train.log.", "see train.log."), ("~/data/rows.jsonl", "rows.jsonl"),
        ("'C:\\Users\\jane\\rows.jsonl'", "'rows.jsonl'"),
        ("https://localhost/a/b and a/b/c", "https://localhost/a/b and a/b/c"),
        ("use /tool or 3/4/5", "use /tool or 3/4/5"), ("on desk-7: desk-7x", "on …: desk-7x"), ("", ""),
        ("(/a/b/c),/d/e/f", "(c),f"),
    ],
)  # fmt: skip
def test_places_are_cut_to_their_last_part(text: str, shown: str) -> None:
    assert without_places(text, "desk-7") == shown


def test_values_of_a_plan_lose_their_places() -> None:
    assert value_without_places(["/a/b", {"x": "./y/z"}, 5, None]) == ["b", {"x": "z"}, 5, None]
    assert value_without_places("HuggingFaceTB/SmolLM2-135M-Instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_sources_are_read_from_the_plans_comments(chain: Run) -> None:
    found = plan_sources(chain.plan_path.read_text())
    assert found["sft.data.holdout"] == "test" and found["device"] == "test" and "sft" not in found
    assert plan_sources("a: 1\n  b:  # x\n c: '#  # not'  # real\n")["c" if "c" in plan_sources("c: 1  # y") else "c"]


# --- curves ---


def test_a_curve_is_drawn_with_gaps_and_names_that_are_escaped() -> None:
    svg = chart(
        [("<b>", [(1, 1.0), (2, None), (3, 2.0), (4, float("nan")), (5, 1.5), (6, 1.0)]), ("b", [(1, 3.0)])], "x&y"
    )
    assert svg.count("<polyline") == 1 and svg.count("<circle") == 3 and "&lt;b&gt;" in svg and "x&amp;y" in svg
    Page(svg)
    assert chart([], "x") == chart([("a", [(1, 1.0)])], "x") == chart([("a", [(1, None), (2, None)])], "x") == ""
    assert "<polyline" in chart([("flat", [(1, 5.0), (2, 5.0)])], "x", log=True)
    assert "<polyline" in chart([("zero", [(1, 0.0), (2, 0.0)])], "x", log=True, seconds=True)


def test_a_scale_has_round_figures_that_differ() -> None:
    assert steps(0, 10, 4) == [0, 5, 10] and steps(3, 3, 4) == [3]
    assert [round(value, 6) for value in steps(0.11, 0.38, 4)] == [0.2, 0.3]
    assert digits([0.0, 1e-14, 1.0]) == ["0", "0", "1"] and len(set(digits([1.001, 1.002]))) == 2


def test_a_long_curve_is_thinned_and_keeps_its_extremes() -> None:
    points = [(step, float(step % 100)) for step in range(100_000)]
    points[54_321] = (54_321, 1e6)
    kept = thinned(points, 500)
    assert len(kept) < 1100 and (54_321, 1e6) in kept and kept[-1] == points[-1]


def test_what_a_run_used_is_folded_from_its_samples() -> None:
    card: dict[str, Any] = {"index": 0, "name": "Card", "memory_used_bytes": 1 << 30, "power_w": 100, "energy_j": 7000}
    events = [
        {"t": 10.0, "kind": "gpu", "gpus": [card], "rss_bytes": 2 << 30, "cpu_s": 1},
        {"t": 20.0, "kind": "gpu", "gpus": [{**card, "energy_j": 7600, "power_w": None}, 5], "cpu_s": 11},
        {"t": 30.0, "kind": "gpu", "gpus": "none", "cpu_s": True, "rss_bytes": float("nan")},
    ]
    use = use_of(events)
    assert use.cards == ["Card"] and use.energy_j == 600
    assert use.curves["utilisation"]["CPU"] == [(10.0, 100.0)] and use.highest("memory") == 2.0
    assert use.mean("power") == 100 and use.mean("temperature") is use.highest("temperature") is None
    assert versions()["torch"]


def test_markdown_shows_foreign_text_as_it_is() -> None:
    assert plain("a|b*c_[x](y) <z>\n") == r"a\|b\*c\_\[x\](y) \<z\>⏎"
    assert block("a```b") == "````text\na```b\n````"


# --- comparing ---


@pytest.fixture
def two(evaluated: Run, folder: Path) -> list[Run]:
    """The chain twice, the second with other answers and another setting."""
    import shutil

    other = Run(folder / "other")
    shutil.copytree(evaluated.path, other.path)
    plan = other.plan_path.read_text()
    other.plan_path.write_text(re.sub(r"(?m)^  beta: \S+", "  beta: 0.5", plan))
    folder_of = evaluation_path(other, HELD_OUT)
    rows = [json.loads(line) for line in (folder_of / "cases.jsonl").read_text().splitlines()]
    rows[0]["answers"]["kto"] |= {"answer": "better", "marks": {**rows[0]["answers"]["kto"]["marks"], "exact": True}}
    (folder_of / "cases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [evaluated, other]


def test_runs_are_compared_by_settings_evaluations_and_answers(two: list[Run], said: Callable[..., str]) -> None:
    sides = sides_of(two)
    assert [path for path, _ in differences([side.settings for side in sides])] == ["kto.beta"]
    assert same_prompts(sides)
    shared = shared_answers(sides)
    assert [one.unlike for one in shared] == [True, False, False]
    assert shared[0].answers[1] and shared[0].answers[1]["answer"] == "better"
    assert over_examples([(2, 1.0)], 4) == [(8, 1.0)]


def test_the_command_prints_tables_or_json_and_writes_a_page(
    two: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "pages" / "both.html"
    assert main(["compare", "chain", "other", "--output", str(page)]) == 0
    out = capsys.readouterr().out
    assert "kto.beta" in out and "KTO margin" in out and "1 whole answers mended, 0 broken" in out
    shown = page_of(page.read_text()).text
    assert "2 runs compared" in shown and "better" in shown and "kto.beta" in shown
    assert main(["compare", "chain", "other", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["kto.beta"][1] == 0.5


def test_one_run_alone_is_not_compared(refused: Refused, evaluated: Run, tmp_path: Path) -> None:
    assert "There is only chain to compare." in refused("compare", "chain", "chai")
    assert "There is no run" in refused("compare", "chain", "none")


def test_gathering_reads_only_what_is_there(evaluated: Run) -> None:
    report = gather(evaluated, rows=False)
    assert [stage.name for stage in report.stages] == ["SFT", "KTO"] and report.evaluations[0].cases == []
    assert all(not stage.samples for stage in report.stages)


def test_settings_of_a_stage_that_one_run_has_not_do_not_differ() -> None:
    chain = {"method": "sft-kto", "kto.beta": 2.0, "sft.max_steps": 5}
    alone = {"method": "sft", "kto.beta": 0.1, "sft.max_steps": 6}
    assert [path for path, _ in differences([chain, alone])] == ["method", "sft.max_steps"]
    assert [path for path, _ in differences([chain, {**chain, "kto.beta": 1.0}, {}])] == ["kto.beta"]


@pytest.mark.parametrize("as_task", [True, False], ids=["asked for later", "in its plan"])
def test_the_report_of_a_run_that_is_being_evaluated_says_so_and_how_long_it_trained(
    named: MakeNamed, as_task: bool
) -> None:
    run = named("sft")
    ended = {"t": 5100, "kind": "run_end", "status": "done"}
    told: list[dict[str, Any]] = [
        {"t": 1000, "kind": "run_start"}, {"t": 1010, "kind": "stage_start", "name": "sft"},
        {"t": 1400, "kind": "log", "stage": "sft", "step": 9, "loss": 1.0},
        {"t": 1500, "kind": "run_end", "status": "stopped"},
        {"t": 5000, "kind": "run_start"}, {"t": 5010, "kind": "stage_start", "name": "sft"},
        {"t": 5100, "kind": "stage_end", "name": "sft", "status": "done"},
        ended if as_task else ended | {"status": "aborted"},
        {"t": 9000, "kind": "task_start", "name": "evaluate"} if as_task else {"t": 9000, "kind": "run_start"},
        {"t": 9001, "kind": "stage_start", "name": "evaluate"},
        {"t": 9003, "kind": "step", "stage": "evaluate", "step": 2},
    ]  # fmt: skip
    with run.events_path.open("a") as log:
        log.writelines(json.dumps(event) + "\n" for event in told)
    lock = take_lock(run)
    try:
        report, side = gather(run), sides_of([run])[0]
        assert (report.status, report.going_on) == ("running", "training done, being evaluated")
        assert dict(report.facts)["training took"] == "10 min 00 s" and "took" not in dict(report.facts)
        assert side.took_s == 600 or not as_task
        html, markdown = (path.read_text() for path in write_reports(run))
        assert "● training done, being evaluated" in page_of(html).text
        assert markdown.startswith("# sft: training done, being evaluated\n")
    finally:
        os.close(lock)


def test_counts_have_a_separator_of_thousands_in_reports_and_on_the_model_card(named: MakeNamed) -> None:
    run, left_out = named("sft"), {"no assistant turn": 2998}
    run.events.append("run_start")
    run.events.append("stage_start", name="sft")
    run.events.append("totals", stage="sft", steps=4000, rows=6000, examples=3002, left_out_reasons=left_out)
    run.events.append("step", stage="sft", step=1500)
    html, markdown = (path.read_text() for path in write_reports(run))
    assert "* left out: 2,998 × no assistant turn" in markdown and "* steps: 1,500 of 4,000" in markdown
    assert "<td>2,998</td><td>no assistant turn</td>" in html
    data = {"name": "rows", "rows": 6000, "examples": 3002, "left_out": 2998, "held_out": 1024,
            "left_out_reasons": left_out, "labels": {"true": 1001, "false": 2001}}  # fmt: skip
    stage = {"name": "sft", "steps": 4000, "seconds": 9.0, "settings": {}, "data": data}
    lineage = {"method": "sft", "base": {"name": "a/b"}, "trained_on": {"name": "a/b", "dtype": "bfloat16"},
               "adapter": {}, "stages": [stage], "hardware": "a GPU", "versions": {}, "finetui": "1"}  # fmt: skip
    card = model_card(run, run.plan(), lineage, "me/it", {})
    for words in ("6,000 rows, 3,002 trained on, 2,998 left out, 1,024 held out; 1,001 good and 2,001 bad answers",
                  "left out: 2,998 × no assistant turn", "| steps | 4,000 |"):  # fmt: skip
        assert words in card, words


def test_what_was_made_is_listed_with_what_its_check_found() -> None:
    def row(what: str, **event: Any) -> tuple[str, str, str]:
        return artefact_row(what, {"t": 1.0, "kind": "artefact", "what": what, **event}, str)

    found = {"prompts": 8, "same_answers": 6, "token_agreement": 0.98333}
    packed = {**found, "reference": "4-bit base and adapter"}
    assert row("merged_16bit", bytes=3 << 20, path="merge/x", check=packed) == (
        "merged_16bit", "3 MiB", "98.3 % of the tokens of the 4-bit base and adapter, 6 of 8 answers whole",
    )  # fmt: skip
    told = row("Q4_K_M", check={**found, "calls": 8, "valid": 7, "right": 4})[2]
    assert told == "98.3 % of the tokens of the merged model, 6 of 8 answers whole, 7 of 8 calls valid and 4 right"
    assert row("merged_16bit", check={"skipped": "there is no GPU here"})[2] == "not compared: there is no GPU here"
    assert row("upload", path="https://hub/me/x", bytes=1)[2] == "https://hub/me/x"
    assert row("Q8_0", bytes="many", check={"prompts": 8})[1:] == ("", "")
    assert row("Q8_0", check=["?"])[2] == ""


def test_between_two_times_at_work_the_curves_of_the_machine_have_a_gap() -> None:
    def sample(t: float, rss: int, cpu: float) -> dict[str, Any]:
        return {"t": t, "kind": "gpu", "rss_bytes": rss << 30, "cpu_s": cpu}

    use = use_of([sample(9, 1, 0), sample(14, 2, 5), sample(3009, 1, 6), sample(3014, 1, 11)])
    assert use.curves["memory"]["process, RAM"] == [(0, 1), (5, 2), (3000, None), (3000, 1), (3005, 1)]
    assert use.curves["utilisation"]["CPU"] == [(5, 100), (3005, None), (3005, 100)]
