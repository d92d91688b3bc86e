"""Formats: every known shape becomes the same conversation, found out or told by a mapping; files with weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ANSWER, USER, Refused, WriteFile, good

from core.config import resolve
from core.data import conversations_of, read_rows
from core.data_files import raw_rows
from core.data_rows import mapped_parts
from core.data_survey import survey

Q, A = "What is two and two?", "Four."
ASKED, ANSWERED = {"role": "user", "content": Q}, {"role": "assistant", "content": A}
SYSTEM = {"role": "system", "content": "Be brief."}

SHAPES: list[tuple[str, dict[str, Any], list[Any]]] = [
    ("alpaca", {"instruction": "What is two", "input": "and two?", "output": A},
     [([{"role": "user", "content": "What is two\n\nand two?"}, ANSWERED], None)]),
    ("alpaca", {"instruction": Q, "input": "", "output": A, "system": "Be brief."},
     [([SYSTEM, ASKED, ANSWERED], None)]),
    ("alpaca", {"instruction": Q, "input": "", "output": A, "history": [["Hi", "Hello"]]},
     [([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, ASKED, ANSWERED], None)]),
    ("prompt", {"question": Q, "answer": A, "label": 0}, [([ASKED, ANSWERED], False)]),
    ("prompt", {"input": Q, "output": A}, [([ASKED, ANSWERED], None)]),
    ("prompt", {"prompt": Q, "response": A, "label": "good"}, [([ASKED, ANSWERED], True)]),
    ("prompt", {"query": Q, "response": A, "system": "Be brief."}, [([SYSTEM, ASKED, ANSWERED], None)]),
    ("sharegpt", {"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}], "system": "Be brief."},
     [([SYSTEM, ASKED, ANSWERED], None)]),
    ("sharegpt", {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "user", "value": Q},
                                    {"from": "chatgpt", "value": A}], "system": "ignored: one is there"},
     [([SYSTEM, ASKED, ANSWERED], None)]),
    ("pairs", {"prompt": Q, "chosen": A, "rejected": "Five."},
     [([ASKED, ANSWERED], True), ([ASKED, {"role": "assistant", "content": "Five."}], False)]),
    ("pairs", {"prompt": Q, "chosen": [ASKED, ANSWERED], "rejected": [ASKED, {"role": "assistant", "content": "No."}],
               "messages": [ASKED, ANSWERED], "score_chosen": 9.0},
     [([ASKED, ANSWERED], True), ([ASKED, {"role": "assistant", "content": "No."}], False)]),
    ("pairs, prompt implicit",
     {"chosen": [ASKED, ANSWERED], "rejected": [ASKED, {"role": "assistant", "content": "No."}]},
     [([ASKED, ANSWERED], True), ([ASKED, {"role": "assistant", "content": "No."}], False)]),
    ("pairs, prompt implicit", {"chosen": "The sky is blue.", "rejected": "The sky is black."},
     [([{"role": "user", "content": "The sky is"}, {"role": "assistant", "content": "blue."}], True),
      ([{"role": "user", "content": "The sky is"}, {"role": "assistant", "content": "black."}], False)]),
    ("text", {"text": "Once upon a time."}, [([{"role": "text", "content": "Once upon a time."}], None)]),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "row", "expected"), SHAPES, ids=[f"{n}-{c[0]}" for n, c in enumerate(SHAPES)])
def test_each_shape_is_found_out(file: WriteFile, shape: str, row: dict[str, Any], expected: list[Any]) -> None:
    pairs, _ = conversations_of(row)
    assert pairs == expected
    found = survey(file([row]))
    assert found.shapes == {shape: 1} and found.conversations == len(expected)


def test_openais_tools_calls_ids_names_and_weights_are_kept() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    turns = [ASKED, {"role": "assistant", "content": None, "tool_calls": [call]},
             {"role": "tool", "tool_call_id": "call_1", "name": "add", "content": "4"},
             {"role": "assistant", "content": "wrong", "weight": 0}, {**ANSWERED, "weight": 1}]  # fmt: skip
    tools = [{"type": "function", "function": {"name": "add"}}]
    messages = conversations_of({"messages": turns, "tools": tools})[0][0][0]
    assert messages[1]["tool_calls"] == [{"id": "call_1", "type": "function",
                                          "function": {"name": "add", "arguments": {"a": 2}}}]  # fmt: skip
    assert messages[2] == {"role": "tool", "content": "4", "name": "add", "tool_call_id": "call_1"}
    assert messages[3]["weight"] == 0 and "weight" not in messages[4]
    old = {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 2}'}}
    assert conversations_of({"messages": [ASKED, old]})[0][0][0][1]["tool_calls"][0]["function"]["name"] == "add"


def test_a_turn_of_weight_0_is_shown_and_not_trained(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    from core.chat import Template

    template = Template.of(AutoTokenizer.from_pretrained(tiny_model))
    turns = [ASKED, {**ANSWERED, "content": "Five!", "weight": 0}, ASKED, ANSWERED]
    tokens = template.tokenize(turns)
    trained = [token for token, learnt in zip(tokens.input_ids, tokens.trained, strict=True) if learnt]
    assert template.tokenizer.decode(trained) == "Four.<|im_end|>"
    assert "Five!" in template.tokenizer.decode(tokens.input_ids)
    assert not any(template.tokenize([ASKED, {**ANSWERED, "weight": 0}], only_last=True).trained)


# --- mappings ---


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"frage": Q, "antwort": A, "gut": True}, {"prompt": "frage", "completion": "antwort", "label": "gut"},
         [([ASKED, ANSWERED], True)]),
        ({"messages": [USER, ANSWER], "q": Q, "a": A}, {"prompt": "q", "completion": "a"}, [([ASKED, ANSWERED], None)]),
        ({"chat": [ASKED, ANSWERED], "label": True}, {"messages": "chat", "label": ""}, [([ASKED, ANSWERED], None)]),
        ({"prompt": Q, "best": A, "worst": "Five."}, {"prompt": "prompt", "chosen": "best", "rejected": "worst"},
         [([ASKED, ANSWERED], True), ([ASKED, {"role": "assistant", "content": "Five."}], False)]),
        ({"story": "Once.", "prompt": Q, "completion": A}, {"text": "story"},
         [([{"role": "text", "content": "Once."}], None)]),
        ({"prompt": Q, "completion": A, "persona": "Be brief."}, {"system": "persona"},
         [([SYSTEM, ASKED, ANSWERED], None)]),
        ({"a.b": Q, "c": A}, {"prompt": "a.b", "completion": "c"}, [([ASKED, ANSWERED], None)]),
    ],
)  # fmt: skip
def test_a_mapping_wins_over_what_would_be_found_out(row: Any, columns: dict[str, str], expected: Any) -> None:
    assert conversations_of(row, columns)[0] == expected


def test_a_mapping_to_columns_that_are_not_there_leaves_rows_out_by_reason(file: WriteFile) -> None:
    found = survey(file([{"question": Q, "answer": A}]), {"prompt": "nowhere", "completion": "answer"})
    assert found.reason_counts() == {"no conversation found (the row has: answer, question)": 1}


def test_what_is_read_from_which_column_is_told(file: WriteFile) -> None:
    row = {"instruction": Q, "input": "x", "output": A, "id": 3, "label": True}
    found = survey(file([row]))
    parts = {"prompt": "instruction", "context": "input", "completion": "output", "label": "label"}
    assert mapped_parts(found.keys, {}, found.shapes) == parts
    assert mapped_parts(["q", "a"], {"prompt": "q", "completion": "a"}, ["prompt"]) == {
        "prompt": "q",
        "completion": "a",
    }


def test_the_plan_remembers_mapping_and_weights_and_flags_give_them(said: Callable[..., str], tmp_path: Path) -> None:
    one, two = tmp_path / "one=1.jsonl", tmp_path / "two.jsonl"
    for path in (one, two):
        path.write_text(json.dumps({"q": Q, "a": A}) + "\n")
    shown = said("plan", "sft", "--local-file", one, "--add-file", f"{two}=0.5", "--column", "prompt=q", "--column",
                 "completion=a")  # fmt: skip
    data = yaml.safe_load(shown)["sft"]["data"]
    assert data["files"] == {str(two): 0.5} and data["columns"] == {"prompt": "q", "completion": "a"}
    assert data["file"] == str(one) and data["demo"] is False
    (tmp_path / "plan.yaml").write_text(shown)
    again = said("plan", "sft", "--config", tmp_path / "plan.yaml", "--set", "sft.data.columns.label=l",
                 "--add-file", one)  # fmt: skip
    data = yaml.safe_load(again)["sft"]["data"]
    assert data["columns"] == {"prompt": "q", "completion": "a", "label": "l"}
    assert data["file"] == str(one), "what is added does not replace"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--column", "prompt"), "--column 'prompt' has no '='"),
        (("--column", "frage=q"), "sft.data.columns: 'frage' is nothing a column can be"),
        (("--add-file", "x=0"), "the weight of"),
        (("--add-file", "x=-1"), "the weight of"),
        (("--add-file", "x=1000"), "the weight of"),
        (("--add-file", "nowhere.jsonl"), "cannot be read: No such file"),
        (("--set", "sft.data.files.x=heavy"), "sft.data.files"),
    ],
)
def test_mappings_and_weights_that_make_no_sense_are_refused(
    refused: Refused, words: tuple[str, ...], says: str
) -> None:
    assert says in refused("sft", *words)


def test_own_rows_switch_the_others_off_and_files_go_with_a_file() -> None:
    def data(**settings: Any) -> Any:
        values = {f"sft.data.{name}": (value, "test") for name, value in settings.items()}
        return resolve("sft", None, values, gpu_present=False).plan.sft.data

    assert not data(files={"a": 1}).demo and not data(file="a", files={"b": 2}).demo
    assert data(files={"a": 1}).dataset is None
    assert data(demo=True).demo


# --- kinds of files ---


@pytest.mark.parametrize(
    ("content", "name", "rows"),
    [
        ("one\ntwo\n\n", "a.txt", [(1, "one"), (2, "two")]),
        ("\n\none\nstill one\n\n\n\ntwo\n", "a.txt", [(3, "one\nstill one"), (8, "two")]),
        ("# Head\n\nBody.\n", "a.md", [(1, "# Head"), (3, "Body.")]),
        ("only", "a.txt", [(1, "only")]),
    ],
)
def test_plain_text_is_cut_at_blank_lines_or_by_line(file: WriteFile, content: str, name: str, rows: Any) -> None:
    assert [(line, row["text"]) for line, row in raw_rows(file(content, name))] == rows


def test_objects_over_several_lines_are_read_one_after_the_other(file: WriteFile) -> None:
    rows = [good("a", True), good("b", False)]
    content = "\n".join(json.dumps(row, indent=2) for row in rows)
    assert [row for _, row in raw_rows(file(content, "a.json"))] == rows
    assert [row for _, row in raw_rows(file(content.replace("}\n{", "},\n{"), "a.jsonl"))] == rows


def test_a_long_list_is_read_in_pieces(file: WriteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.data_files.BLOCK", 64)
    rows: list[Any] = [good(f"Grüße 日本 {n} " * (n % 40), n % 2 == 0) for n in range(80)]
    rows += [12345678901234567890, 1.5, "text", None, [], {}]
    for indent in (None, 1):
        path = file(json.dumps(rows, indent=indent, ensure_ascii=False), "a.json")
        assert [row for _, row in raw_rows(path)] == rows
    assert [entry.line for entry in read_rows(path, "kto").left_out] == list(range(81, 87))
