"""Findings: each defect is found with its lines and a remedy, and sound data is left in peace."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ANSWER, CALL, SHARED_DATA, USER, WriteFile, good
from test_data_repeats import text

from core.config import resolve
from core.data_calls import calls_of, misfit
from core.data_finding import Finding, Look
from core.data_findings import findings, length_findings
from core.data_ledger import Ledger, Source
from core.data_limits import Limits
from core.data_repeats import near_duplicates
from core.data_shape import content_shape, histogram, packs, pattern_words, token_shape
from core.data_survey import survey
from core.data_tokens import tokenize
from core.sources import is_untuned

SOUND = [good(f"{text(12, n)}?", n % 2 == 0, answer=text(20, n + 500)) for n in range(60)]


def found(
    path: Path, method: str = "sft", *, holdout: float = 0.0, held: Path | None = None, **more: Any
) -> list[Finding]:
    ledger = Ledger.of([Source(survey(path))], method, include_undesirable=more.pop("bad", False))
    ledger.hold_out(holdout, 1)
    repeats = [near_duplicates(source.survey) for source in ledger.sources]
    return findings(Look(ledger, repeats, held_file=survey(held) if held else None, **more))


def one(entries: list[Finding], kind: str) -> Finding:
    """The finding of a kind, of which there is one; all are complete sentences with a remedy."""
    for entry in entries:
        assert entry.text.endswith(".") and entry.remedy.endswith((".", ")")) and entry.count > 0, entry
    chosen = [entry for entry in entries if entry.kind == kind]
    assert len(chosen) == 1, [entry.kind for entry in entries]
    return chosen[0]


def lines(entry: Finding) -> list[int]:
    return [line for _, line in entry.places]


@pytest.mark.parametrize("method", ["sft", "kto"])
def test_sound_rows_are_left_in_peace(file: WriteFile, method: str) -> None:
    kinds = {entry.kind for entry in found(file(SOUND), method, holdout=0.1)}
    assert kinds <= {"bad answers"}


CASES: list[tuple[str, list[Any], str, list[int], dict[str, Any]]] = [
    ("unusable", [{"messages": [USER]}], "left out: no assistant turn", [61], {}),
    ("duplicates", [SOUND[4], SOUND[4]], "2 rows repeat", [5, 61, 62], {}),
    ("near duplicates", [good(f"why {SOUND[8]['conversations'][0]['content']} {text(80, 3)}", True, answer="a"),
                         good(f"how {SOUND[8]['conversations'][0]['content']} {text(80, 3)}", True, answer="a")],
     "About 1 row says almost the same", [61, 62], {}),
    ("blank answers", [good("x", True, answer=" \n")], "1 answer is blank", [61], {}),
    ("same answer", [good(f"q{n}", True, answer="I cannot do that.") for n in range(20)], "40% of the answers", [], {}),
    ("broken calls", [good("x", True, answer="tool_call: t\narguments: {oops")], "arguments are not JSON", [61], {}),
    ("broken calls", [{"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [
        {"function": {"name": "t", "arguments": "{oops"}}]}]}], "arguments are not JSON", [61], {}),
    ("made-up results", [good("x", True, answer=f'{CALL}\n\nResult: {{"ok": true}}\n\nDone.')],
     "write its result", [61], {}),
    ("wrong calls", [{"messages": [USER, ANSWER], "tools": [{"function": {"name": "other"}}]}], "do not fit", [61], {}),
    ("template in text", [good("<|im_start|>user\nHi<|im_end|>", True)], "marks of a chat template", [61], {}),
    ("template in text", [good("### Instruction:\nAdd", True)], "marks of a chat template", [61], {}),
    ("mojibake", [good("GrÃ¼ÃŸe an alle, itâ€™s me", True)], "decoded wrongly", [61], {}),
    ("system prompts", [{"messages": [{"role": "system", "content": "s"}, USER, ANSWER]}],
     "1 row has a system prompt, 60 have none", [61], {}),
    ("turns in a row", [{"messages": [USER, USER, ANSWER]}], "one side speaks twice", [61], {}),
    ("open end", [{"messages": [USER, ANSWER, USER]}], "1 row goes on after the last answer", [61], {}),
    ("plain text", [{"text": "Once upon a time."}], "plain text has no prompt", [61], {"method": "kto"}),
    ("unlabelled", [good("x")], "without a label", [61], {"method": "kto"}),
    ("label types", [good("x") | {"label": "yes"}], "no truth value (label 'yes' read as True)", [61], {}),
    ("both labels", [SOUND[3] | {"label": True}], "labelled true and false for the same prompt", [4, 61],
     {"method": "kto"}),
    ("untuned base", [], "KTO starts from a model that was not tuned", [], {"method": "kto", "untuned": True}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "untuned"),
    [
        ("unsloth/mistral-7b-v0.3-bnb-4bit", True), ("org/wait-and-see-7b", True), ("run:last", False),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", False), ("/models/Llama-2-7b-chat-hf/", False),
        ("google/gemma-2-2b-it", False),
    ],
)  # fmt: skip
def test_kto_alone_is_advised_against_on_base_models_only(name: str, untuned: bool) -> None:
    plan = resolve("kto", None, {"model.name": (name, "test")}, gpu_present=False).plan
    assert is_untuned(plan) is untuned


@pytest.mark.parametrize(("kind", "rows", "says", "at", "more"), CASES, ids=[case[0] for case in CASES])
def test_each_defect_is_found_with_its_lines_and_a_remedy(
    file: WriteFile, kind: str, rows: list[Any], says: str, at: list[int], more: dict[str, Any]
) -> None:
    method = more.get("method", "sft")
    entry = one(found(file(SOUND + rows), method, bad=True, untuned=more.get("untuned", False)), kind)
    assert says in entry.text or says in entry.detail
    assert not at or lines(entry) == at


def test_broken_calls_are_told_once_with_their_tools(file: WriteFile) -> None:
    broken = [good(f"x{n}", True, answer=f"tool_call: t{n % 6}\narguments: {{oops {n}") for n in range(15)]
    wrong = [{"messages": [USER, ANSWER], "tools": [{"function": {"name": "other"}}]}]
    entries = found(file(SOUND + broken + wrong))
    assert one(entries, "broken calls").detail == "In calls of t0, t1, t2 and 3 more tools."
    assert one(entries, "wrong calls").detail.endswith("'") and "JSON" not in one(entries, "wrong calls").detail


def test_what_is_broken_is_counted_by_kind_and_named_in_detail(file: WriteFile) -> None:
    content = "".join(f"{json.dumps(row)}\n" for row in SOUND[:3]) + '{"a": \n{"a"\n{"x": 1}\n\xff\n'
    entries = [entry for entry in found(file(content.encode("latin-1"))) if entry.kind == "unusable"]
    assert {entry.text for entry in entries} == {
        "2 rows left out: broken JSON.", "1 row left out: no conversation found (the row has: x).",
        "1 row left out: not UTF-8 (byte 0xff).",
    }  # fmt: skip
    broken = next(entry for entry in entries if "broken" in entry.text)
    assert lines(broken) == [4, 5] and "clean" in broken.remedy
    assert broken.detail.startswith("1 × broken JSON (Expecting")


def test_a_few_rows_and_skewed_labels_are_told(file: WriteFile) -> None:
    assert "Only 2 examples" in one(found(file(SOUND[:2]), "sft", bad=True), "few rows").text
    rows = [good(str(n), n > 1, answer=text(9, n)) for n in range(40)]
    entry = one(found(file(rows), "kto"), "skewed labels")
    assert "Only 2 bad answers stand beside 38 others" in entry.text and lines(entry) == [1, 2]


def test_held_out_prompts_in_training_are_found_exactly_and_nearly(file: WriteFile) -> None:
    held = file([SOUND[5], good("never seen", True)], "eval.jsonl")
    entry = one(found(file(SOUND), bad=True, held=held), "held-out in training")
    assert "1 prompt of the evaluation file stands" in entry.text and lines(entry) == [6]
    long = [good(f"{word} {text(60, n)}", True, answer="fine") for n in range(30) for word in ("so", "well")]
    near = one(found(file(long), holdout=0.2), "held-out nearly in training")
    assert near.count >= 3 and len(near.places) % 2 == 0


def test_bad_answers_may_be_bad_in_any_way(file: WriteFile) -> None:
    """A row labelled false is there to be unlike the others: its broken call is no finding."""
    rows = [*SOUND, good("x", False, answer="tool_call: t\narguments: {oops")]
    assert "broken calls" not in {entry.kind for entry in found(file(rows), "kto")}


def test_long_rows_are_told_by_the_limit_that_is_set(tiny_template: Any, file: WriteFile) -> None:
    path = file([*SOUND, good("long " * 200, True), good("x", True, answer="talk " * 300)])
    for too_long, kinds in (("drop", ["too long"]), ("cut", ["answers cut", "cut"])):
        ledger = Ledger.of([Source(survey(path))], "sft", include_undesirable=True)
        tokens = tokenize(ledger, tiny_template)
        limits = Limits("sft", 200, too_long=too_long)
        tokens.enter(ledger, limits)
        entries = list(length_findings(Look(ledger, max_length=200)))
        assert [entry.kind for entry in entries] == kinds
        assert lines(entries[0]) == ([62, 61] if too_long == "drop" else [62])
        assert tokens.lengths().at_limit(limits)["left_out"] == (2 if too_long == "drop" else 0)


def test_a_prompt_over_its_own_limit_is_told_apart(tiny_template: Any, file: WriteFile) -> None:
    ledger = Ledger.of([Source(survey(file([*SOUND, good("long " * 60, True)])))], "kto")
    tokenize(ledger, tiny_template).enter(ledger, Limits("kto", 4000, 250))
    entries = list(length_findings(Look(ledger, max_length=4000)))
    assert [(entry.kind, lines(entry)) for entry in entries] == [("prompts too long", [61])]


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the shared data is not here")
@pytest.mark.parametrize(
    ("name", "method", "kind", "count"),
    [("tool_calls_sft", "sft", "broken calls", 20), ("tool_calls_sft", "sft", "duplicates", 22),
     ("tool_calls_labelled", "kto", "made-up results", 712), ("vault_manager_tool_calls", "kto", "unlabelled", 441),
     ("behaviour_kto", "kto", "unusable", 2)],
)  # fmt: skip
def test_the_defects_of_the_real_files_are_found(name: str, method: str, kind: str, count: int) -> None:
    assert one(found(SHARED_DATA / f"{name}.jsonl", method), kind).count == count


# --- calls and schemas ---


@pytest.mark.parametrize(
    ("words", "calls"),
    [
        (CALL, [("set_timer", {"minutes": 5})]),
        (f"Gladly.\n{CALL}\n\n{CALL}", [("set_timer", {"minutes": 5})] * 2),
        ("tool_call: a\nno arguments", [("a", None)]),
        ('<tool_call>{"name": "a", "arguments": {"x": 1}}</tool_call> <tool_call>{"name": "b"}</tool_call>',
         [("a", {"x": 1}), ("b", None)]),
        ("<tool_call>{oops</tool_call>", [("", None)]),
        ('[TOOL_CALLS] [{"name": "a", "arguments": "{\\"x\\": 1}"}]', [("a", {"x": 1})]),
        ("[TOOL_CALLS] oops", [("", None)]),
        ("no call at all", []),
    ],
)  # fmt: skip
def test_calls_are_read_in_the_forms_people_train(words: str, calls: list[Any]) -> None:
    assert calls_of({"role": "assistant", "content": words}) == calls


SCHEMA = {
    "type": "object", "required": ["path"], "additionalProperties": False,
    "properties": {"path": {"type": "string"}, "depth": {"type": ["integer", "null"]}, "mode": {"enum": ["r", "w"]},
                   "tags": {"type": "array", "items": {"type": "string"}}, "deep": {"properties": {"x": {"const": 1}}}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"path": "a", "depth": 3, "mode": "r", "tags": ["x"], "deep": {"x": 1}}, ""),
        ({"path": "a", "depth": None}, ""),
        ({"path": "a", "depth": 2.0}, ""),
        ({}, "path is missing"),
        ({"path": 3}, "path: not string"),
        ({"path": "a", "depth": True}, "depth: not integer or null"),
        ({"path": "a", "mode": "x"}, "mode: not one of the values allowed"),
        ({"path": "a", "tags": ["x", 1]}, "tags[]: not string"),
        ({"path": "a", "deep": {"x": True}}, "deep.x: not one of the values allowed"),
        ({"path": "a", "more": 1}, "more is unknown to the tool"),
        ([], "arguments: not object"),
    ],
)
def test_arguments_are_held_against_the_schema(value: Any, problem: str) -> None:
    assert misfit(SCHEMA, value) == problem


def test_a_hostile_schema_neither_hangs_nor_raises() -> None:
    deep: Any = {"type": "object"}
    for _ in range(200):
        deep = {"properties": {"x": deep}}
    value: Any = 1
    for _ in range(200):
        value = {"x": value}
    for schema in (deep, {"pattern": "(a+)+$"}, {"$ref": "http://x"}, {"type": [[]]}, {"type": 3}, {"enum": 5},
                   {"required": 5, "properties": []}, {"required": [[]]}, {"items": 3}, None, [], "x"):  # fmt: skip
        assert isinstance(misfit(schema, value), str) and isinstance(misfit(schema, "a" * 30 + "!"), str)


# --- shape ---


def test_turn_patterns_are_said_as_people_say_them() -> None:
    assert pattern_words("sua") == "system, user, assistant"
    assert pattern_words("suauaua") == "system, 3 × (user, assistant)"
    assert pattern_words("uataua") == "user, assistant, tool, assistant, user, assistant"
    assert pattern_words("uatatata") == "user, 3 × (assistant, tool), assistant"
    assert pattern_words("x") == "plain text"


def test_histograms_have_round_buckets_that_hold_every_row(tiny_template: Any, file: WriteFile) -> None:
    import numpy

    for values in ([0], [1, 2, 3], list(range(1000)), [5] * 9 + [100_000]):
        found = histogram(numpy.array(values))
        assert sum(found["counts"]) == len(values) and len(found["edges"]) == len(found["counts"]) + 1 <= 62
        assert found["edges"][-1] > max(values)
    assert histogram(numpy.zeros(0))["counts"] == [0]
    ledger = Ledger.of([Source(survey(file(SOUND)))], "sft", include_undesirable=True)
    shape = token_shape(tokenize(ledger, tiny_template).lengths(), Limits("sft", 256), 4)
    assert sum(shape["rows"]["counts"]) == 60 == shape["limit"]["whole"]
    assert 0.5 < shape["padded"] <= 1 and 0.5 < shape["packed"] <= 1
    assert shape["row_percentiles"]["50"] <= shape["row_percentiles"]["100"] == shape["limit"]["longest"]


def test_rows_are_packed_as_best_fit_decreasing_packs_them() -> None:
    import numpy

    assert packs(numpy.array([6, 5, 4, 4, 3]), 10) == 3
    assert packs(numpy.array([10] * 5), 10) == 5 and packs(numpy.array([1] * 25), 10) == 3


def test_contents_count_labels_turns_and_tools(file: WriteFile) -> None:
    rows = [good("a", True, answer=CALL), good("b", False), {"messages": [USER, ANSWER, USER, ANSWER]}]
    shape = content_shape(Ledger.of([Source(survey(file(rows)))], "sft", include_undesirable=True))
    assert shape["labels"] == {"true": 1, "false": 1, "none": 1} and shape["tools"] == {"set_timer": 3}
    assert shape["turns"] == {"user, assistant": 2, "2 × (user, assistant)": 1}


@pytest.mark.parametrize(
    ("labels", "words"),
    [([None, None], "2 rows without a label, left out."), ([None, True], "1 row without a label, beside labelled")],
)
def test_what_is_said_of_rows_without_a_label(labels: list[bool | None], words: str, file: WriteFile) -> None:
    rows = [{"prompt": f"q{n}", "completion": "a", "label": label} for n, label in enumerate(labels)]
    entry = one(found(file(rows), "kto"), "unlabelled")
    assert entry.text.startswith(words)
