"""Tool calls in text: what is read, what is scored, and that no text can hurt."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.toolcalls import CallScore, parse_tool_call, score_tool_call, summarise, wilson_interval

TIMER = 'tool_call: set_timer\narguments: {"minutes": 10}'

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
names = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1)
pieces = st.sampled_from(["tool_call:", "arguments:", " ", "\n", "\r\n", "{", "}", "[", '"', "a", ":", ",", "1", "NaN"])


def test_a_call_is_read_with_what_stands_around_it() -> None:
    call = parse_tool_call(f"Sure!\n{TIMER}\nDone.")
    assert call is not None
    assert (call.name, call.arguments) == ("set_timer", {"minutes": 10})
    assert (call.before, call.after) == ("Sure!\n", "\nDone.")


def test_a_text_without_a_call_line_holds_no_call() -> None:
    assert parse_tool_call("I would use tool_call: set_timer here") is None
    assert parse_tool_call("") is None


@pytest.mark.parametrize(
    "arguments",
    ["{'minutes': 10}", '{"minutes": 10', "{minutes: 10}", "10", "[1]", '"x"', "", '{"a": NaN}', '{"a": ' + "9" * 5000],
)
def test_arguments_that_are_no_json_object_are_none_and_the_name_stays(arguments: str) -> None:
    call = parse_tool_call(f"tool_call: set_timer\narguments: {arguments}\nmore")
    assert call is not None
    assert (call.name, call.arguments, call.after) == ("set_timer", None, "more")


def test_windows_line_ends_and_json_over_several_lines_are_read() -> None:
    assert score_tool_call(TIMER.replace("\n", "\r\n"), TIMER).exact
    assert score_tool_call('tool_call: set_timer\narguments: {\n  "minutes": 10\n}\n', TIMER).exact


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (TIMER, CallScore(True, True, True)),
        ('tool_call: set_timer\narguments: {"minutes": 10.0}', CallScore(True, True, True)),
        ('tool_call: set_timer\narguments: {"minutes": "10"}', CallScore(True, True, False)),
        ('tool_call: set_timer\narguments: {"minutes": true}', CallScore(True, True, False)),
        ('tool_call: set_alarm\narguments: {"minutes": 10}', CallScore(True, False, True)),
        ("tool_call: set_timer\narguments: {}", CallScore(True, True, False)),
        ('tool_call: set_timer\narguments: {"minutes": 10, "x": 1}', CallScore(True, True, False)),
        ('tool_call: set_timer\narguments: {"minutes": 10', CallScore(False, True, False)),
        ("tool_call: set_timer", CallScore(False, True, False)),
        (f"Sure!\n{TIMER}", CallScore(False, True, True)),
        (f"{TIMER}\n{TIMER}", CallScore(False, True, True)),
        ('tool_call: set timer!\narguments: {"minutes": 10}', CallScore(False, False, True)),
        ("I set a timer for 10 minutes.", CallScore(False, False, False)),
    ],
)
def test_format_tool_and_arguments_are_scored_apart(answer: str, score: CallScore) -> None:
    assert score_tool_call(answer, TIMER) == score


def test_texts_in_arguments_are_compared_without_surrounding_spaces() -> None:
    expected = 'tool_call: note\narguments: {"text": "milk", "tags": ["a"]}'
    assert score_tool_call('tool_call: note\narguments: {"tags": [" a"], "text": " milk "}', expected).exact
    assert not score_tool_call('tool_call: note\narguments: {"tags": ["a"], "text": "Milk"}', expected).arguments


def test_where_no_call_is_expected_plain_text_is_right_and_a_call_is_wrong() -> None:
    assert score_tool_call("Hello!", "Hi.") == CallScore(True, True, True)
    assert score_tool_call(TIMER, "Hi.") == CallScore(False, False, False)


@settings(deadline=None)
@given(st.lists(pieces | st.text(max_size=5), max_size=60).map("".join), st.text(max_size=30))
def test_no_text_raises(answer: str, expected: str) -> None:
    score_tool_call(answer, expected)
    score_tool_call(TIMER + answer, TIMER)
    call = parse_tool_call(answer)
    assert call is None or (answer.startswith(call.before) and answer.endswith(call.after))


@settings(deadline=None)
@given(names, st.dictionaries(st.text(), json_values, max_size=5))
def test_every_written_call_is_read_back(name: str, arguments: dict[str, object]) -> None:
    text = f"tool_call: {name}\narguments: {json.dumps(arguments)}"
    call = parse_tool_call(text)
    assert call is not None
    assert (call.name, call.arguments, call.before, call.after) == (name, arguments, "", "")
    assert score_tool_call(text, text).exact


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
    ],
)
def test_huge_and_deeply_nested_text_is_scored_within_seconds(text: str) -> None:
    start = time.perf_counter()
    score_tool_call(text, text)
    assert time.perf_counter() - start < 5


def test_the_summary_counts_each_mark() -> None:
    summary = summarise([score_tool_call(TIMER, TIMER), score_tool_call(f"Sure!\n{TIMER}", TIMER)])
    assert (summary.format.hits, summary.tool.hits, summary.arguments.hits, summary.exact.hits) == (1, 2, 2, 1)
    assert summary.format.total == 2


def test_wilson_intervals_agree_with_published_values() -> None:
    """Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263 and 15 of 148, score method."""
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(40, 40)[1] == pytest.approx(1.0)
