"""Tool calls in text: read in every form people train, and no text can hurt."""

import json
import time
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from core.scores import expected_of, score
from core.toolcalls import MAX_CALLS, Reading, ToolCall, paired, read_calls, same, structured_calls

TIMER = 'tool_call: set_timer\narguments: {"minutes": 10}'
CALL = ToolCall("set_timer", {"minutes": 10})

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
names = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1)
MARKS = [
    "tool_call:",
    "arguments:",
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "[CALL_ID]",
    '"tool_calls"',
]
pieces = st.sampled_from(
    [*MARKS, '{"name": "x"', " ", "\n", "\r\n", "{", "}", "[", "]", '"', "a", ":", ",", "1", "NaN"]
)


def written(name: str, arguments: Any, form: str) -> str:
    """A call as a model writes it."""
    bare = json.dumps({"name": name, "arguments": arguments})
    quoted = json.dumps({"type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}})
    return {
        "text": f"tool_call: {name}\narguments: {json.dumps(arguments)}",
        "tags": f"<tool_call>\n{bare}\n</tool_call>",
        "mistral": f"[TOOL_CALLS] [{bare}]",
        "mistral new": f"[TOOL_CALLS]{name}[ARGS]{json.dumps(arguments)}",
        "json": bare,
        "json message": f'{{"role": "assistant", "content": null, "tool_calls": [{quoted}]}}',
        "json parameters": json.dumps([{"name": name, "parameters": arguments}]),
    }[form]


FORMS = ("text", "tags", "mistral", "mistral new", "json", "json message", "json parameters")


@pytest.mark.parametrize("form", FORMS)
def test_a_call_is_read_with_what_stands_around_it(form: str) -> None:
    call = written("set_timer", {"minutes": 10}, form)
    read = read_calls(f"Sure!\n{call}\nDone.")
    assert read == Reading((CALL,), form.split()[0], "Sure!\nDone.") and read.well_formed
    assert read_calls(call).outside == ""


@pytest.mark.parametrize("form", FORMS)
def test_several_calls_are_all_read(form: str) -> None:
    read = read_calls("\n".join(written(name, {"a": 1}, form) for name in ("one", "two", "three")))
    assert [call.name for call in read.calls] == ["one", "two", "three"] and not read.outside and read.well_formed


@example("_", {"[TOOL_CALLS]": None}, "json")
@example("a", {"b": "<tool_call> [TOOL_CALLS]"}, "json message")
@given(names, st.dictionaries(st.text(), json_values, max_size=5), st.sampled_from(FORMS))
def test_every_written_call_is_read_back(name: str, arguments: dict[str, object], form: str) -> None:
    text = written(name, arguments, form)
    read = read_calls(text)
    assert (read.calls, read.outside) == ((ToolCall(name, arguments),), "")
    assert score(text, expected_of(text), {})["exact"]


@pytest.mark.parametrize(
    "text",
    ["", "I would use tool_call: set_timer here", "{}", "[1, 2]", '{"name": "Ada"}', '{"a": 1}\n[TOOL CALLS]', "[]",
     '{"tool_calls": []}', '{"arguments": {}}', "Use the <tool_calls> tag"],
)  # fmt: skip
def test_a_text_without_a_call_holds_none(text: str) -> None:
    assert read_calls(text) == Reading(outside=text)


@pytest.mark.parametrize(
    "arguments",
    ["{'minutes': 10}", '{"minutes": 10', "{minutes: 10}", "10", "[1]", '"x"', "", '{"a": NaN}', '{"a": ' + "9" * 5000],
)
def test_arguments_that_are_no_json_object_are_none_and_the_name_stays(arguments: str) -> None:
    read = read_calls(f"tool_call: set_timer\narguments: {arguments}\nmore")
    assert read == Reading((ToolCall("set_timer", None),), "text", "more") and not read.well_formed


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('<tool_call>{"name": "x", "arguments": {"a": 1}}', "x"),
        ('<tool_call>{"name": "x", "arguments": {"a": </tool_call>', "x"),
        ('<tool_call>{"name": "x"}</tool_call>', "x"),
        ("<tool_call>x</tool_call>", ""),
        ("<tool_call>", ""),
        ("[TOOL_CALLS]", ""),
        ("[TOOL_CALLS] x", ""),
        ('[TOOL_CALLS]x[ARGS]{"a": ', "x"),
        ('[TOOL_CALLS] [{"name": "x", "arguments": {}}', ""),
    ],
)
def test_a_broken_call_is_a_call_and_not_well_formed(text: str, name: str) -> None:
    read = read_calls(text)
    assert [call.name for call in read.calls] == [name] and not read.well_formed


def test_windows_line_ends_and_json_over_several_lines_are_read() -> None:
    for text in (TIMER.replace("\n", "\r\n"), 'tool_call: set_timer\narguments: {\n  "minutes": 10\n}\n'):
        assert score(text, expected_of(TIMER), {})["exact"]


def test_the_form_that_comes_first_is_read_and_a_mistral_call_may_have_an_id() -> None:
    assert read_calls(f'{TIMER}\n<tool_call>{{"name": "x", "arguments": {{}}}}</tool_call>').calls == (CALL,)
    assert read_calls('[TOOL_CALLS]set_timer[CALL_ID]a1B2[ARGS]{"minutes": 10}').calls == (CALL,)


def test_tool_calls_of_a_row_are_taken_as_they_stand() -> None:
    rows = [
        {"type": "function", "function": {"name": "set_timer", "arguments": '{"minutes": 10}'}},
        {"function": {"name": "set_timer", "arguments": "{broken"}},
        {"name": 5}, None, "x",
    ]  # fmt: skip
    assert structured_calls(rows) == (CALL, ToolCall("set_timer", None))
    assert structured_calls(None) == structured_calls({"a": 1}) == ()


def test_calls_are_paired_whatever_their_order_and_an_equal_one_before_a_namesake() -> None:
    one, two, other = ToolCall("a", {"x": 1}), ToolCall("a", {"x": 2}), ToolCall("b", {})
    assert {id(wanted): got for got, wanted in paired([other, two, one], [one, two, other])} == {
        id(one): one, id(two): two, id(other): other,
    }  # fmt: skip
    assert paired([two], [one, two]) == [(two, two), (None, one)]
    assert paired([], [one]) == [(None, one)]


def test_json_values_are_equal_as_people_mean_it() -> None:
    assert same({"a": [1, " x"]}, {"a": [1.0, "x "]}) and same(None, None)
    assert not same(True, 1) and not same("1", 1) and not same([1], [1, 2]) and not same({}, []) and not same(0, None)


@settings(deadline=None, max_examples=300)
@given(st.lists(pieces | st.text(max_size=5), max_size=60).map("".join), st.text(max_size=30))
def test_no_text_raises(answer: str, expected: str) -> None:
    for text in (answer, TIMER + answer, answer + "\n" + written("x", {}, "tags")):
        read = read_calls(text)
        assert len(read.calls) <= MAX_CALLS and bool(read.calls) is bool(read.form)
        score(text, expected_of(expected), {})
        score(text, expected_of(TIMER), {})


@pytest.mark.parametrize(
    "text",
    [
        "tool_call: x\narguments: " + '{"a":' * 200_000,
        "tool_call: x\narguments: " + '{"a":' * 900 + "1" + "}" * 900,
        "tool_call: x\narguments: " + '{"a":' + "[" * 200_000,
        "tool_call: x\narguments: {" + '"a": "' + "\\" * 1_000_001,
        "tool_call:" * 100_000,
        "\n" * 1_000_000 + "tool_call:",
        "x\ntool_call" * 100_000,
        "tool_call: " + " " * 1_000_000 + "\narguments:" + " " * 1_000_000,
        "tool_call: x\narguments: {" + '"k": 1, ' * 100_000,
        "tool_call: x\n" * 100_000,
        "<tool_call>" * 100_000,
        "<tool_call>" + "{" * 500_000,
        '<tool_call>{"name": "' * 50_000,
        "[TOOL_CALLS]" * 100_000,
        "[TOOL_CALLS][" * 100_000,
        "[TOOL_CALLS]x{" * 100_000,
        "{\n" * 300_000,
        '{"name": "x", "arguments": {}}\n' * 50_000,
        '{"a": 1}\n' * 100_000,
    ],
    ids=range(19),
)
def test_huge_and_deeply_nested_text_is_scored_within_seconds(text: str) -> None:
    start = time.perf_counter()
    score(text, expected_of(text), {})
    assert time.perf_counter() - start < 5
