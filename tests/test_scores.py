"""What an answer is given: its marks, with and without schemas; rates, intervals, what one model mends of another's."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import WriteFile

from core.errors import FinetuiError
from core.scores import Marks, changes, expected_of, mcnemar, mean_loss, rates, score, wilson_interval
from core.tools import read_tools, tools_of

TIMER = 'tool_call: set_timer\narguments: {"minutes": 10}'
TOOL = {
    "type": "function",
    "function": {
        "name": "set_timer",
        "parameters": {
            "type": "object",
            "properties": {"minutes": {"type": "integer", "minimum": 1}, "label": {"type": "string"}},
            "required": ["minutes"],
            "additionalProperties": False,
        },
    },
}
TOOLS = tools_of([TOOL])


def marks(answer: str, expected: str | None = TIMER, **more: Any) -> Marks:
    return score(answer, expected_of(expected), more.get("tools", {}), more.get("ignored", ()))


def missed(answer: str, expected: str | None = TIMER, **more: Any) -> set[str]:
    return {name for name, hit in marks(answer, expected, **more).items() if not hit and name != "exact"}


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        (TIMER, set()),
        ('tool_call: set_timer\narguments: {"minutes": 10.0}', set()),
        ('tool_call: set_timer\narguments: {"minutes": "10"}', {"arguments"}),
        ('tool_call: set_timer\narguments: {"minutes": true}', {"arguments"}),
        ('tool_call: set_alarm\narguments: {"minutes": 10}', {"tool"}),
        ("tool_call: set_timer\narguments: {}", {"arguments", "required"}),
        ('tool_call: set_timer\narguments: {"minutes": 10, "x": 1}', {"arguments"}),
        ('tool_call: set_timer\narguments: {"minutes": 10', {"format", "arguments", "required"}),
        ("tool_call: set_timer", {"format", "arguments", "required"}),
        (f"Sure!\n{TIMER}", {"alone"}),
        (f"{TIMER}\n{TIMER}", {"alone"}),
        ('tool_call: set timer!\narguments: {"minutes": 10}', {"format", "tool"}),
        ("I set a timer.", {"decision", "format", "alone", "tool", "required", "arguments"}),
        ('<tool_call>{"name": "set_timer", "arguments": {"minutes": 10}}</tool_call>', {"format"}),
    ],
)
def test_each_mark_is_given_for_itself(answer: str, wrong: set[str]) -> None:
    assert missed(answer) == wrong
    assert marks(answer)["exact"] is not bool(wrong & {"format", "alone", "tool", "arguments"})


def test_texts_in_arguments_are_compared_without_surrounding_spaces() -> None:
    expected = 'tool_call: note\narguments: {"text": "milk", "tags": ["a"]}'
    assert not missed('tool_call: note\narguments: {"tags": [" a"], "text": " milk "}', expected)
    assert missed('tool_call: note\narguments: {"tags": ["a"], "text": "Milk"}', expected) == {"arguments"}


def test_where_no_call_is_expected_the_decision_and_the_text_count() -> None:
    assert marks("Hello  there!\n", "Hello there!") == {"decision": True, "exact": True}
    assert marks("Hello!", "Hi.") == {"decision": True, "exact": False}
    assert marks(TIMER, "Hi.") == {"decision": False, "exact": False}


def test_text_around_a_call_is_no_fault_where_the_expected_answer_has_some() -> None:
    assert not missed(f"On it.\n\n{TIMER}", f"I set it.\n\n{TIMER}")
    assert not missed(TIMER, f"I set it.\n\n{TIMER}")


def test_two_expected_calls_take_two() -> None:
    two = f'{TIMER}\n\ntool_call: stop\narguments: {{"hard": true}}'
    assert not missed(two, two)
    assert missed(TIMER, two) == {"tool", "required", "arguments"}
    swapped = 'tool_call: stop\narguments: {"hard": true}\n' + TIMER
    assert not missed(swapped, two)


def test_arguments_that_are_not_compared() -> None:
    expected = 'tool_call: set_timer\narguments: {"minutes": 10, "context": {"why": "tea"}}'
    answer = 'tool_call: set_timer\narguments: {"minutes": 10, "context": {"why": "a cup of tea"}}'
    assert missed(answer, expected) == {"arguments"}
    assert not missed(answer, expected, ignored=["context"])
    assert not missed(TIMER, expected, ignored=["context"])


def test_a_form_that_is_not_read_counts_as_text() -> None:
    expected = expected_of("<|call|>set_timer(minutes=10)", [{"function": {"name": "set_timer", "arguments": {}}}])
    assert score("<|call|>set_timer(minutes=10)", expected, TOOLS) == {"decision": True, "exact": True}


# --- schemas ---


@pytest.mark.parametrize(
    ("arguments", "valid"),
    [
        ({"minutes": 10}, True), ({"minutes": 3, "label": "tea"}, True), ({"minutes": 0}, False), ({}, False),
        ({"minutes": "10"}, False), ({"minutes": 10, "x": 1}, False),
    ],
)  # fmt: skip
def test_calls_are_checked_against_the_schema(arguments: Any, valid: bool) -> None:
    answer = f"tool_call: set_timer\narguments: {json.dumps(arguments)}"
    assert marks(answer, tools=TOOLS)["schema"] is valid
    assert "schema" not in marks(answer)


def test_a_tool_that_is_not_there_and_no_call_are_not_valid() -> None:
    assert marks("tool_call: boil\narguments: {}", tools=TOOLS)["schema"] is False
    assert marks("Hello", tools=TOOLS)["schema"] is False


def test_required_arguments_are_those_of_the_schema() -> None:
    expected = 'tool_call: set_timer\narguments: {"minutes": 10, "label": "tea"}'
    assert missed(TIMER, expected) == {"required", "arguments"}
    assert missed(TIMER, expected, tools=TOOLS) == {"arguments"}


def test_a_prompt_without_an_expected_answer_is_checked_for_form_and_schema_alone() -> None:
    assert marks(TIMER, None) == {}
    assert marks(TIMER, None, tools=TOOLS) == {"format": True, "schema": True}
    assert marks("Hello", None, tools=TOOLS) == {}


def test_tools_are_read_in_the_shapes_there_are(file: WriteFile) -> None:
    schema = TOOL["function"]["parameters"]  # type: ignore[index]
    for given in (
        [TOOL], json.dumps([TOOL]), {"tools": [TOOL]}, [{"name": "set_timer", "parameters": schema}],
        [{"name": "set_timer", "inputSchema": schema}],
    ):  # fmt: skip
        assert tools_of(given)["set_timer"].required == ["minutes"]
    assert read_tools(file(json.dumps([TOOL]), "tools.json"))["set_timer"].fault({"minutes": "x"})
    assert tools_of([{"name": "bare"}])["bare"].fault({"anything": 1}) == ""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("nonsense", "no JSON"), ("{}", "not a list"), ("[]", "names no tool"), ("[5]", "Tool 1"),
        (b"\xff\xfe", "UTF-8"),
        ('[{"name": "a", "parameters": 5}]', "no object"),
        ('[{"name": "a", "parameters": {"type": "strnig"}}]', "cannot be used"),
        ('[{"name": "a", "parameters": {"$ref": "https://localhost/schema"}}]', "refers to"),
        ("[" * 100_000, "no JSON"),
    ],
)  # fmt: skip
def test_tools_that_cannot_be_used_are_refused_and_nothing_is_fetched(
    file: WriteFile, content: str | bytes, said: str
) -> None:
    with pytest.raises(FinetuiError) as refused:
        read_tools(file(content, "tools.json"))
    assert said in refused.value.message and refused.value.advice


def test_a_missing_file_of_tools_is_refused() -> None:
    with pytest.raises(FinetuiError, match="cannot be read"):
        read_tools(Path("/nowhere/tools.json"))


def test_a_schema_that_breaks_on_some_arguments_finds_fault_and_does_not_raise() -> None:
    schema = {"properties": {"a": {"$ref": "#/nowhere"}, "b": {"pattern": "("}}}
    tool = tools_of([{"name": "x", "parameters": schema}])["x"]
    assert "cannot be applied" in tool.fault({"a": 1})
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]
    assert tools_of([{"name": "x", "parameters": {"enum": [1]}}])["x"].fault(deep)


# --- counting ---


def test_rates_count_only_answers_that_have_the_mark() -> None:
    found = rates([{"tool": True, "exact": False}, {"tool": False, "exact": False}, {"exact": True}])
    assert (found["tool"]["hits"], found["tool"]["total"]) == (1, 2)
    assert (found["exact"]["hits"], found["exact"]["total"]) == (1, 3)
    assert "format" not in found and rates([]) == {}


def test_wilson_intervals_agree_with_published_values() -> None:
    """Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263 and 15 of 148, score method."""
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(40, 40)[1] == pytest.approx(1.0)


def test_what_one_model_mends_and_breaks_of_another_with_the_exact_test() -> None:
    before = [{"tool": number < 10} for number in range(20)]
    after = [{"tool": number >= 5} for number in range(20)]
    found = changes(before, [*after[:-1], {}])
    assert found == {"tool": {"mended": 9, "broken": 5, "p": pytest.approx(mcnemar(9, 5), rel=1e-2)}}
    assert mcnemar(0, 0) == 1.0 and mcnemar(5, 5) == 1.0
    assert mcnemar(8, 1) == pytest.approx(2 * (1 + 9) / 2**9)


def test_the_mean_loss_is_by_token_and_its_interval_by_answer() -> None:
    assert mean_loss([]) is None
    one = mean_loss([(10.0, 5)])
    assert one == {"mean": 2.0, "low": 2.0, "high": 2.0, "tokens": 5}
    many = mean_loss([(10.0, 10), (30.0, 10)] * 50)
    assert many is not None and many["mean"] == 2.0
    half = 1.96 * math.sqrt(100 * 100 * 100 / 99) / 1000
    assert many["high"] - many["mean"] == pytest.approx(half, rel=1e-3)
