"""The demo's data: the same every time, nothing shared between training and scoring, and faults that are faults."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from core.demo import FAULTS, GREETINGS, DemoFiles, main, write_demo_data
from core.demo_tools import FEEDBACK_VALUES, TOOLS, VALUES
from core.scores import Marks, expected_of, score
from core.toolcalls import ToolCall, read_calls

Row = dict[str, Any]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> DemoFiles:
    return write_demo_data(tmp_path_factory.mktemp("demo"))


def rows_of(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sentence(row: Row) -> str:
    return str(row["messages"][1]["content"])


def answer(row: Row) -> str:
    return str(row["messages"][2]["content"])


def core_of(text: str) -> str:
    """The request without greeting, closing, case and punctuation."""
    for greeting in GREETINGS:
        text = text.removeprefix(greeting)
    text = re.sub(r", (please|thanks)(?=[?.]?$)", "", text)
    return re.sub(r"\W+", " ", text).strip().casefold()


def call_of(row: Row) -> ToolCall | None:
    return next(iter(read_calls(answer(row)).calls), None)


def marks(given: str, expected: str) -> Marks:
    return score(given, expected_of(expected), {})


def tool_of(row: Row) -> str:
    call = call_of(row)
    assert call is not None
    return call.name


def test_the_same_seed_writes_the_same_bytes_and_another_seed_does_not(files: DemoFiles, tmp_path: Path) -> None:
    again, other = write_demo_data(tmp_path / "again"), write_demo_data(tmp_path / "other", seed=8)
    for name in ("sft", "kto", "heldout", "tuning", "tools"):
        assert getattr(files, name).read_bytes() == getattr(again, name).read_bytes()
    assert files.sft.read_bytes() != other.sft.read_bytes()


@pytest.mark.parametrize("seed", range(5))
def test_every_seed_fills_every_file(seed: int, tmp_path: Path) -> None:
    counts = write_demo_data(tmp_path, seed).counts
    assert counts == {"sft.jsonl": 480, "kto.jsonl": 320, "heldout.jsonl": 160, "tuning.jsonl": 160, "tools.json": 10}


def test_no_request_stands_on_two_sides(files: DemoFiles) -> None:
    training = {core_of(sentence(row)) for row in rows_of(files.sft) + rows_of(files.kto)}
    heldout = [core_of(sentence(row)) for row in rows_of(files.heldout)]
    tuning = [core_of(sentence(row)) for row in rows_of(files.tuning)]
    assert not training & set(heldout)
    assert not training & set(tuning)
    assert not set(heldout) & set(tuning)
    assert len(set(heldout)) == len(set(tuning)) == 160


def test_new_phrasings_are_in_no_training_row_and_differ_between_heldout_and_tuning() -> None:
    for tool in TOOLS:
        assert len(tool.phrasings) >= 14
        assert len(tool.new) >= 6
        assert len({*tool.phrasings, *tool.new}) == len(tool.phrasings) + len(tool.new)


def test_what_only_kto_rows_say_is_in_no_other_file() -> None:
    for tool in TOOLS:
        assert len(tool.feedback) >= 8
        assert not {*tool.feedback} & {*tool.phrasings, *tool.new}
    for slot, values in FEEDBACK_VALUES.items():
        assert not {*values} & {*VALUES[slot][0], *VALUES[slot][1]}


def test_no_value_is_both_known_and_new() -> None:
    for known, new in VALUES.values():
        assert len({*known, *new}) == len(known) + len(new)


def test_every_ten_rows_cover_the_ten_tools_and_half_the_scored_ones_are_phrased_anew(files: DemoFiles) -> None:
    for path in (files.sft, files.heldout, files.tuning):
        rows = rows_of(path)
        for start in range(0, len(rows), 10):
            assert len({tool_of(row) for row in rows[start : start + 10]}) == 10
    for path in (files.heldout, files.tuning):
        assert Counter((tool_of(row), row["phrasing"]) for row in rows_of(path)[:40]) == {
            (tool.name, phrasing): 2 for tool in TOOLS for phrasing in ("known", "new")
        }


def test_good_answers_follow_the_schema_and_their_values_stand_in_the_request(files: DemoFiles) -> None:
    schemas = {tool["name"]: tool["parameters"] for tool in json.loads(files.tools.read_text(encoding="utf-8"))}
    types: dict[str, type | tuple[type, ...]] = {"string": str, "integer": int, "number": (int, float)}
    good = [row for row in rows_of(files.kto) if row["label"]]
    for row in rows_of(files.sft) + rows_of(files.heldout) + rows_of(files.tuning) + good:
        call = call_of(row)
        assert call is not None and call.arguments is not None
        assert marks(answer(row), answer(row))["exact"]
        assert list(call.arguments) == schemas[call.name]["required"]
        for name, value in call.arguments.items():
            schema = schemas[call.name]["properties"][name]
            assert isinstance(value, types[schema["type"]])
            assert value in schema.get("enum", [value])
            assert str(value).casefold() in sentence(row).casefold() or "enum" in schema


def test_both_labels_are_as_many_and_take_turns(files: DemoFiles) -> None:
    labels = [row["label"] for row in rows_of(files.kto)]
    assert labels == [True, False] * 160


def test_bad_answers_are_wrong_in_the_way_their_fault_says(files: DemoFiles) -> None:
    examples = {sentence(row): answer(row) for row in rows_of(files.sft) + rows_of(files.kto) if row.get("label", True)}
    tools = {sentence(row): tool_of(row) for row in rows_of(files.sft)}
    bad = [row for row in rows_of(files.kto) if not row["label"]]
    checked = 0
    for row in bad:
        fault, call = row["fault"], call_of(row)
        if fault == "broken_json":
            assert call is not None and call.arguments is None
        if fault == "wrong_tool" and sentence(row) in tools:
            assert call is not None and call.name != tools[sentence(row)]
        if sentence(row) not in examples:
            continue
        checked += 1
        found = marks(answer(row), examples[sentence(row)])
        assert not found["exact"]
        assert (found["format"] and found["alone"]) is (fault not in ("broken_json", "chatter"))
        if fault in ("wrong_argument", "missing_argument", "invented_argument"):
            assert found["tool"] and not found["arguments"]
        if fault == "wrong_tool":
            assert not found["tool"]
    assert checked >= 80
    assert Counter(row["fault"] for row in bad) == FAULTS


def test_bad_answers_never_equal_a_good_one_for_the_same_request(files: DemoFiles) -> None:
    seen = {(sentence(row), answer(row)): row["label"] for row in rows_of(files.kto)}
    assert len(seen) == 320


def test_kto_requests_are_mostly_new_and_the_same_request_never_stands_near(files: DemoFiles) -> None:
    requests = [sentence(row) for row in rows_of(files.kto)]
    shared = set(requests) & {sentence(row) for row in rows_of(files.sft)}
    assert 0 < len(shared) < len(set(requests)) / 3
    places: dict[str, int] = {}
    for place, request in enumerate(requests):
        assert place - places.get(request, -1000) > 64
        places[request] = place


def test_rows_hold_a_system_a_user_and_an_assistant_turn(files: DemoFiles) -> None:
    for path in (files.sft, files.kto, files.heldout, files.tuning):
        for row in rows_of(path):
            assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant"]
            assert row["messages"][0]["content"]


def test_the_command_writes_the_files_and_prints_their_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 0
    assert "480" in capsys.readouterr().out
    assert main([]) == 2
