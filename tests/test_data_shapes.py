"""The shapes of rows: each that is read becomes a conversation, each other is left out by its line and reason."""

import json
from collections import Counter
from typing import Any

import pytest
from conftest import ANSWER, CALL, USER, WriteFile, good

from core.data import conversations_of, read_rows

# --- shapes ---


@pytest.mark.parametrize(
    ("row", "label"),
    [
        ({"conversations": [USER, ANSWER], "label": True}, True),
        ({"messages": [USER, ANSWER], "label": False}, False),
        ({"messages": [USER, ANSWER]}, None),
        ({"conversation": [USER, ANSWER], "label": None}, None),
        ({"messages": None, "conversations": [USER, ANSWER]}, None),
        ({"conversations": [{"from": "human", "value": USER["content"]}, {"from": "gpt", "value": CALL}]}, None),
        ({"prompt": USER["content"], "completion": CALL, "label": False}, False),
        ({"prompt": [USER], "completion": [ANSWER], "label": 1}, True),
        ({"prompt": [USER], "completion": CALL, "label": " False "}, False),
        ({"messages": [{**USER, "content": [{"type": "text", "text": USER["content"]}]}, ANSWER]}, None),
    ],
)
def test_each_shape_of_row_becomes_the_same_conversation(row: dict[str, Any], label: bool | None) -> None:
    found, _ = conversations_of(row)
    assert found == [([USER, ANSWER], label)]


@pytest.mark.parametrize("prompt", [USER["content"], [USER], None])
def test_a_preference_pair_gives_a_good_and_a_bad_conversation(prompt: Any, file: WriteFile) -> None:
    wrong = {"role": "assistant", "content": "No."}
    before = [USER] if prompt is None else []
    row = {"prompt": prompt, "chosen": [*before, ANSWER], "rejected": [*before, wrong]}
    found, _ = conversations_of(row)
    assert found == [([USER, ANSWER], True), ([USER, wrong], False)]
    rows = read_rows(file([row]), "kto")
    assert (rows.total, len(rows.used), rows.labels) == (1, 2, Counter({True: 1, False: 1}))
    assert [row.label for row in read_rows(file([row]), "sft").used] == [True]


@pytest.mark.parametrize("content", [None, "One moment.", ""])
@pytest.mark.parametrize("arguments", ['{"minutes": 5}', {"minutes": 5}])
def test_tool_calls_are_read_with_or_without_text_and_with_arguments_as_a_string(content: Any, arguments: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "set_timer", "arguments": arguments}}
    found, repairs = conversations_of(
        {"messages": [USER, {"role": "assistant", "content": content, "tool_calls": [call]}]}
    )
    answer = found[0][0][-1]
    assert answer["content"] == content
    assert answer["tool_calls"] == [
        {"id": "1", "type": "function", "function": {"name": "set_timer", "arguments": {"minutes": 5}}}
    ]
    assert repairs == []


def test_broken_argument_strings_are_kept_as_text_and_counted(file: WriteFile) -> None:
    call = {"function": {"name": "set_timer", "arguments": '{"minutes": '}}
    rows = read_rows(file([{"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]}]), "sft")
    assert rows.used[0].messages[-1]["tool_calls"][0]["function"]["arguments"] == '{"minutes": '
    assert [(entry.line, entry.reason) for entry in rows.repaired] == [
        (1, "tool call arguments are broken JSON; kept as text")
    ]


def test_tools_of_a_row_come_along_and_roles_of_other_tools_are_understood(file: WriteFile) -> None:
    tools = [{"type": "function", "function": {"name": "set_timer"}}]
    turns = [
        {"role": "developer", "content": "Be brief."}, USER, {"from": "bot", "value": CALL},
        {"role": "observation", "content": "ok"}, {"role": "MODEL", "content": "Done."},
    ]  # fmt: skip
    row = read_rows(file([{"messages": turns, "tools": tools}]), "sft").used[0]
    assert [message["role"] for message in row.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert row.tools == tools
    assert row.prompt == row.messages[:4] and row.last_assistant == 4


def test_tools_written_as_a_json_string_are_read_and_what_is_no_list_is_named(file: WriteFile) -> None:
    tools = [{"type": "function", "function": {"name": "set_timer"}}]
    given = [json.dumps(tools), "[not json", '"word"', [1, 2], {"name": "x"}, "", None]
    rows = read_rows(file([{"messages": [USER, ANSWER], "tools": value} for value in given]), "sft")
    assert [row.tools for row in rows.used] == [tools, None, None, None, None, None, None]
    assert [entry.line for entry in rows.repaired] == [2, 3, 4, 5]
    assert "no list of schemas" in rows.repaired[0].reason


# --- rows left out ---


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("text", "a row must be a JSON object, not str"),
        (None, "a row must be a JSON object, not NoneType"),
        ([1], "a row must be a JSON object, not list"),
        ({}, "no conversation found (the row has: nothing)"),
        ({"title": "x", "id": 1}, "no conversation found (the row has: id, title)"),
        ({"text": " "}, "the text is empty"),
        ({"text": 5}, "no conversation found (the row has: text)"),
        ({"prompt": "only a prompt"}, "no conversation found (the row has: prompt)"),
        ({"messages": "text"}, "the conversation is str, not a list of messages"),
        ({"messages": []}, "no assistant turn"),
        ({"messages": [USER]}, "no assistant turn"),
        ({"messages": [ANSWER, USER]}, "nothing stands before the first assistant turn"),
        ({"messages": [{"role": "system", "content": "x"}, ANSWER]}, "nothing stands before the first assistant turn"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "an assistant turn is empty"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "a turn has neither content nor tool_calls"),
        ({"messages": [USER, {"role": "assistant", "content": 5}]}, "content is int, not text"),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "image"}]}]}, "content is list, not text"),
        ({"messages": [USER, {"role": "narrator", "content": "x"}]}, "unknown role 'narrator'"),
        ({"messages": [USER, {"content": "x"}]}, "a message has no role"),
        ({"messages": [USER, "x"]}, "a message is not an object"),
        ({"messages": [USER, {**ANSWER, "tool_calls": "x"}]}, "tool_calls is not a list"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{}]}]}, "a tool call has no function name"),
        ({"prompt": 3, "completion": "x"}, "prompt and answer must be text or lists of messages"),
        ({"prompt": "x", "completion": {"a": 1}}, "prompt and answer must be text or lists of messages"),
        (good() | {"label": "maybe"}, "the label 'maybe' is neither true nor false"),
        (good() | {"label": 2}, "the label '2' is neither true nor false"),
        (good() | {"label": [True]}, "the label is list, neither true nor false"),
        (good(answer="\ud800"), "text holds half a surrogate pair, which no tokenizer can read"),
        (good("\udfff"), "text holds half a surrogate pair, which no tokenizer can read"),
        ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [
            {"function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}]}]},
         "text holds half a surrogate pair, which no tokenizer can read"),
        ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [
            {"function": {"name": "f", "arguments": "[" * 80 + "]" * 80}}]}]}, "nested too deeply"),
    ],
)  # fmt: skip
def test_an_unusable_row_is_left_out_by_file_line_and_reason(file: WriteFile, row: Any, reason: str) -> None:
    path = file([good(), row, good()])
    rows = read_rows(path, "sft")
    assert [(entry.file, entry.line, entry.reason) for entry in rows.left_out] == [(str(path), 2, reason)]
    assert (rows.total, len(rows.used)) == (3, 2)


def test_sft_does_not_learn_answers_marked_bad_unless_told_to(file: WriteFile) -> None:
    path = file([good("a", True), good("b", False), good("c")])
    rows = read_rows(path, "sft")
    assert [row.label for row in rows.used] == [True, None]
    assert rows.reasons() == {"label is false: SFT would teach a bad answer": 1}
    everything = read_rows(path, "sft", include_undesirable=True)
    assert ([row.label for row in everything.used], everything.left_out) == ([True, False, None], [])


def test_kto_leaves_unlabelled_rows_out_and_says_which_labels_were_read_from_words(file: WriteFile) -> None:
    rows = read_rows(file([good("a", True), good("b"), good("c") | {"label": "0"}]), "kto")
    assert [(entry.line, entry.reason) for entry in rows.left_out] == [(2, "no label, which KTO needs")]
    assert [(entry.line, entry.reason) for entry in rows.repaired] == [(3, "label '0' read as False")]


def test_the_first_rows_can_be_asked_for(file: WriteFile) -> None:
    rows = read_rows(file([{}, *[good(str(number)) for number in range(9)]]), "sft", max_rows=3)
    assert [row.messages[0]["content"] for row in rows.used] == ["0", "1", "2"]
    assert rows.total == 4


def test_reading_says_how_far_it_is(file: WriteFile) -> None:
    seen: list[int] = []
    read_rows(file([good()] * 2500), "sft", progress=seen.append)
    assert seen == [1000, 2000]
