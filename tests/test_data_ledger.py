"""The ledger: every row of every file once, used, cut or left out, adding up; weights, duplicates, limits; on disk."""

import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ANSWER, SHARED_DATA, USER, MakeRun, WriteFile, finish, good
from test_training import Stage

from core import runner
from core.chat import Template
from core.data_ledger import LEDGER, Ledger, Source, read_ledger, save_ledger
from core.data_survey import survey
from core.errors import FinetuiError
from core.plan import KTOPlan, SFTPlan, StagePlan
from core.prepare import StageData, prepare
from core.sources import demo_files

FILES = [*sorted(SHARED_DATA.glob("*.jsonl"))]


def stage_of(method: str, **settings: Any) -> StagePlan:
    """A stage's plan; a keyword `data__file` sets a key of its data."""
    values: dict[str, Any] = {"data": {}}
    for name, value in settings.items():
        if name.startswith("data__"):
            values["data"][name.removeprefix("data__")] = str(value) if isinstance(value, Path) else value
        else:
            values[name] = value
    return (KTOPlan if method == "kto" else SFTPlan).model_validate(values)


def adds_up(data: StageData) -> Counter[str]:
    """Check that every row of the files stands once in the ledger and that all counts agree; the fates."""
    ledger = data.ledger
    entries = list(ledger.entries())
    totals, report = ledger.totals(), data.report()
    fates = Counter(entry["fate"] for entry in entries)
    assert len(entries) == totals["rows"] == report["rows"] == sum(s.survey.total for s in ledger.sources)
    assert (fates["used"], fates["cut"], fates["left out"]) == (totals["used"], totals["cut"], totals["left_out"])
    assert sum(totals["reasons"].values()) == totals["left_out"] == report["left_out"]
    assert len({(entry["file"], entry["line"]) for entry in entries}) == len(entries)
    assert all(entry.get("reason") for entry in entries if entry["fate"] == "left out")
    assert all(entry["cut"] > 0 for entry in entries if entry["fate"] == "cut")
    training = data.training.examples
    held = data.held_out.examples if data.held_out else []
    counted = sum(entry.get("examples", 1) * entry.get("times", 1) for entry in entries if entry["fate"] != "left out")
    assert counted == len(training) + len(held)
    kept = [entry for entry in entries if entry["fate"] != "left out"]
    tokens = sum((entry["tokens"] - entry.get("cut", 0)) * entry.get("times", 1) for entry in kept)
    assert tokens == data.training.tokens + (data.held_out.tokens if data.held_out else 0)
    assert report["tokens"] == sum(len(example.tokens.input_ids) for example in training)
    assert report["trained_tokens"] == sum(sum(label != -100 for label in e.tokens.labels) for e in training)
    assert all(any(label != -100 for label in example.tokens.labels) for example in training)
    return fates


@pytest.mark.skipif(not FILES, reason="the shared data is not here")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("method", ["sft", "kto"])
@pytest.mark.parametrize(("too_long", "limit"), [("drop", 500), ("cut", 400), ("drop", 4000)])
def test_rows_used_cut_and_left_out_add_up_to_every_real_file(
    tiny_template: Template, path: Path, method: str, too_long: str, limit: int
) -> None:
    settings: dict[str, Any] = {"data__file": path, "data__too_long": too_long, "max_length": limit}
    settings |= {"max_prompt_length": limit // 2} if method == "kto" else {}
    stage = stage_of(method, data__holdout=0.1, **settings)
    try:
        data = prepare(stage, method, tiny_template, print)
    except FinetuiError as error:
        assert "every label is true" in error.message or "No row is left" in error.message
        return
    fates = adds_up(data)
    assert (fates["cut"] > 0) is (too_long == "cut") and data.held_out
    longest = max(len(example.tokens.input_ids) for example in data.training.examples)
    assert longest <= limit == data.report()["longest"] or longest == data.report()["longest"] < limit


@pytest.mark.parametrize("method", ["sft", "kto"])
def test_the_demos_rows_add_up(tiny_template: Template, method: str) -> None:
    data = prepare(stage_of(method, data__file=demo_files()[method]), method, tiny_template, print)
    assert adds_up(data)["used"] == data.report()["rows"] == {"sft": 480, "kto": 320}[method]


PAIR = {"prompt": "Which?", "chosen": "This one.", "rejected": "That one, " + "which is far too long to be kept. " * 20}
MIXED = [
    good("a", True), good("b", False), good("a", True), "no row", {"messages": [USER]}, PAIR,
    {"messages": [USER, ANSWER], "label": "yes"}, good("c"), good("long " * 200, True), good("a", True),
]  # fmt: skip


def entries_of(data: StageData) -> dict[int, dict[str, Any]]:
    return {entry["line"]: entry for entry in data.ledger.entries()}


def test_each_row_of_a_mixed_file_has_its_fate_and_its_reason(tiny_template: Template, file: WriteFile) -> None:
    stage = stage_of("kto", data__file=file(MIXED), max_length=200, max_prompt_length=150)
    data = prepare(stage, "kto", tiny_template, print)
    assert dict(adds_up(data)) == {"used": 6, "left out": 4}
    entries = entries_of(data)
    assert entries[4]["reason"] == "a row must be a JSON object, not str"
    assert entries[5]["reason"] == "no assistant turn" and entries[8]["reason"] == "no label, which KTO needs"
    assert entries[9] == {"file": 0, "line": 9, "fate": "left out", "reason": "longer than the limit",
                          "tokens": entries[9]["tokens"]}  # fmt: skip
    assert entries[9]["tokens"] > 200
    assert (entries[6]["fate"], entries[6]["examples"], entries[6]["reason"]) == ("used", 1, "longer than the limit")
    assert entries[7]["repaired"] == "label 'yes' read as True"
    assert "reason" not in entries[1] and entries[1]["tokens"] > entries[1]["trained"] > 0


def test_a_cut_row_tells_how_much_went_and_whether_the_answer_was_hit(tiny_template: Template, file: WriteFile) -> None:
    rows = [good("short"), good("long " * 60), good("x", answer="talk " * 100)]
    stage = stage_of("sft", data__file=file(rows), max_length=90, data__too_long="cut")
    entries = entries_of(prepare(stage, "sft", tiny_template, print))
    assert [entries[line]["fate"] for line in (1, 2, 3)] == ["used", "cut", "cut"]
    assert entries[2]["cut"] == entries[2]["tokens"] - 90 and "answer_cut" not in entries[2]
    assert entries[3]["answer_cut"] > 0 and entries[3]["trained"] < 90
    with pytest.raises(FinetuiError, match=r"line 2: \d+ tokens, over the limit of 90"):
        prepare(stage.model_copy(update={"data": stage.data.model_copy(update={"too_long": "refuse"})}), "sft",
                tiny_template, print)  # fmt: skip


def test_duplicates_are_dropped_where_asked_and_the_first_one_stays(tiny_template: Template, file: WriteFile) -> None:
    stage = stage_of("sft", data__file=file(MIXED), data__duplicates="drop", max_length=4000)
    data = prepare(stage, "sft", tiny_template, print)
    adds_up(data)
    entries = entries_of(data)
    repeated = [line for line, entry in entries.items() if entry.get("reason") == "the same row stands before it"]
    assert repeated == [3, 10]
    kept = prepare(stage_of("sft", data__file=file(MIXED), max_length=4000), "sft", tiny_template, print)
    assert kept.ledger.totals()["used"] == data.ledger.totals()["used"] + 2


def test_the_first_rows_asked_for_are_used_and_the_others_named(tiny_template: Template, file: WriteFile) -> None:
    data = prepare(stage_of("sft", data__file=file(MIXED), data__max_rows=2), "sft", tiny_template, print)
    assert adds_up(data)["used"] == 2
    entries = entries_of(data)
    assert (entries[1]["fate"], entries[3]["fate"]) == ("used", "used")
    assert entries[6]["reason"] == "not among the first rows that were asked for (max_rows)"


def test_several_files_are_shown_as_often_as_their_weights_say(tiny_template: Template, file: WriteFile) -> None:
    one = file([good(f"one {n}") for n in range(10)], "one.jsonl")
    two = file([good(f"two {n}") for n in range(10)], "two.jsonl")
    three = file([good(f"three {n}") for n in range(10)], "three.jsonl")
    stage = stage_of("sft", data__file=one, data__files={str(two): 2.5, str(three): 0.3})
    data = prepare(stage, "sft", tiny_template, print)
    adds_up(data)
    shown = Counter(example.row.messages[0]["content"].split()[0] for example in data.training.examples)
    assert shown == {"one": 10, "two": 25, "three": 3}
    assert data.ledger.totals()["reasons"] == {"not drawn: the weight of its file is below 1": 7}
    again = prepare(stage, "sft", tiny_template, print)
    assert list(again.ledger.entries()) == list(data.ledger.entries()), "what is drawn follows from the seed"
    assert {Path(data.report()["files"][n]).name for n in range(3)} == {"one.jsonl", "two.jsonl", "three.jsonl"}


def test_held_out_rows_are_told_and_shown_once(tiny_template: Template, file: WriteFile) -> None:
    rows = [good(str(number), number % 2 == 0) for number in range(40)]
    weighted = {str(file(rows, "more.jsonl")): 3}
    data = prepare(stage_of("sft", data__files=weighted, data__holdout=0.25, data__include_undesirable=True), "sft",
                   tiny_template, print)  # fmt: skip
    adds_up(data)
    held = [entry for entry in data.ledger.entries() if entry.get("split") == "held out"]
    assert len(held) == 10 and not any("times" in entry for entry in held)
    assert len(data.training.examples) == 90


def test_good_and_bad_rows_may_lie_in_two_files(tiny_template: Template, file: WriteFile) -> None:
    stage = stage_of("kto", data__file=file([good("a", True)] * 4, "good.jsonl"),
                     data__files={str(file([good("b", False)] * 4, "bad.jsonl")): 1})  # fmt: skip
    assert prepare(stage, "kto", tiny_template, print).labels == {True: 4, False: 4}
    with pytest.raises(FinetuiError, match=r"good.jsonl: every label is true"):
        prepare(stage_of("kto", data__file=file([good("a", True)] * 4, "good.jsonl")), "kto", tiny_template, print)


def test_a_run_keeps_its_ledger_and_gives_it_out_as_csv(
    make_run: MakeRun, file: WriteFile, said: Callable[..., str], tmp_path: Path
) -> None:
    rows = [*[good(f"row {n}") for n in range(9)], {"messages": [USER]}, good("l" * 3000)]
    run = make_run("sft", sft__data__file=str(file(rows, "own.jsonl")), sft__max_steps=1, sft__max_length=256)
    runner.start(run)
    assert finish(run) == "done"
    path = run.stage_path("sft") / LEDGER
    head, entries = read_ledger(path)
    found = list(entries)
    assert head["totals"]["rows"] == len(found) == 11 and head["totals"]["used"] == 9
    assert json.loads((run.stage_path("sft") / "data.json").read_text())["left_out"] == 2
    shown = said("data", "ledger", run.name, tmp_path / "ledger.csv", "--runs-dir", run.path.parent)
    assert "9 used, 0 cut, 2 left out" in shown and "1 × longer than the limit" in shown
    with (tmp_path / "ledger.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert [(row["line"], row["fate"]) for row in table] == [(str(e["line"]), e["fate"]) for e in found]
    assert table[9]["reason"] == "no assistant turn" and Path(table[0]["file"]).name == "own.jsonl"
    said("data", "ledger", run.name, tmp_path / "ledger.jsonl", "--runs-dir", run.path.parent)
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in lines[:9]] == [int(row["tokens"]) for row in table[:9]]


def test_the_ledgers_of_all_stages_are_given_out_with_the_stage_beside_each_row(
    make_run: MakeRun, file: WriteFile, said: Callable[..., str], tmp_path: Path
) -> None:
    run, path = make_run("sft-kto"), file(MIXED)
    for stage in ("sft", "kto"):
        run.stage_path(stage).mkdir()
        Ledger.of([Source(survey(path))], stage).save(run.stage_path(stage) / LEDGER)
    words = ("--runs-dir", run.path.parent)
    shown = said("data", "ledger", run.name, tmp_path / "all.csv", *words)
    assert f"{run.name} SFT: 10 rows" in shown and f"{run.name} KTO: 10 rows" in shown
    with (tmp_path / "all.csv").open(newline="") as stream:
        assert [row["stage"] for row in csv.DictReader(stream)] == ["sft"] * 10 + ["kto"] * 10
    said("data", "ledger", run.name, tmp_path / "all.jsonl", *words)
    assert len((tmp_path / "all.jsonl").read_text().splitlines()) == 20
    said("data", "ledger", run.name, tmp_path / "kto.csv", "--stage", "kto", *words)
    assert (tmp_path / "kto.csv").read_text().startswith("file,line,fate")


def test_a_file_that_is_there_is_overwritten_by_a_ledger_only_where_that_is_asked_for(
    make_run: MakeRun, file: WriteFile, said: Callable[..., str], refused: Any, tmp_path: Path
) -> None:
    run, path, mine = make_run("sft"), file(MIXED), tmp_path / "mine.csv"
    run.stage_path("sft").mkdir()
    Ledger.of([Source(survey(path))], "sft").save(run.stage_path("sft") / LEDGER)
    mine.write_text("my own")
    for words in (("data", "ledger", run.name, mine, "--runs-dir", run.path.parent),
                  ("check", path, "--method", "sft", "--ledger", mine)):  # fmt: skip
        assert "mine.csv exists already. Give another name, or --force." in " ".join(refused(*words).split())
        assert mine.read_text() == "my own"
        said(*words, "--force")
        assert mine.read_text().startswith("file,line,fate")
        mine.write_text("my own")
    own = ("data", "ledger", run.name, run.stage_path("sft") / LEDGER, "--force", "--runs-dir", run.path.parent)
    assert "is the file that is read" in refused(*own)
    for words in ((path, "--ledger", path), (path, "--eval-file", mine, "--ledger", mine)):
        assert "is the file that is read" in refused("check", *words, "--method", "sft", "--force")


def test_a_damaged_or_missing_ledger_is_one_sentence(make_run: MakeRun, refused: Any) -> None:
    run = make_run("sft")
    words = ("data", "ledger", run.name, "--runs-dir", run.path.parent)
    assert "has no ledger" in refused(*words)
    run.stage_path("sft").mkdir()
    for content in ("", "{", "[]", '{"files": 3}', "\0"):
        (run.stage_path("sft") / LEDGER).write_text(content)
        assert "cannot be read" in refused(*words)


def test_a_ledger_is_saved_before_anything_is_tokenised(file: WriteFile, tmp_path: Path) -> None:
    ledger = Ledger.of([Source(survey(file(MIXED)))], "sft")
    save_ledger(ledger, tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert [row["line"] for row in table] == [str(line) for line in range(1, 11)]
    assert [row["line"] for row in table if row["fate"] == "left out"] == ["2", "4", "5"]


def test_resuming_trains_on_the_rows_of_the_first_start(make_run: MakeRun, file: WriteFile) -> None:
    """What the ledger says, and the order of the rows, follow from plan and file alone."""
    path = str(file([good(f"row {n}", n % 3 > 0) for n in range(30)], "own.jsonl"))
    settings = {"kto__data__file": path, "kto__data__holdout": 0.2}
    one, two = (Stage(make_run("kto", **settings), "kto") for _ in range(2))
    assert list(one.data.ledger.entries()) == list(two.data.ledger.entries())
    first, second = (next(iter(stage.trainer.get_train_dataloader())) for stage in (one, two))
    assert first["input_ids"].tolist() == second["input_ids"].tolist()
