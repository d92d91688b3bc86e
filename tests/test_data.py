"""Files of training rows: every kind gives the same rows, none can crash the reader; held-out rows and weights."""

import gzip
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ANSWER, SHARED_DATA, USER, WriteFile, good
from hypothesis import given, settings
from hypothesis import strategies as st

from core.data import Conversation, Rows, class_weights, holdout_split, read_rows
from core.data_files import kind_of
from core.errors import FinetuiError


def refused(path: Path, method: str = "sft") -> FinetuiError:
    """The one clear sentence with which `path` is refused."""
    with pytest.raises(FinetuiError) as caught:
        read_rows(path, method)
    error = caught.value
    assert error.exit_code == 2 and str(path) in error.message
    assert error.message.endswith(".") and error.advice.endswith(".") and "\n" not in str(error)
    return error


# --- files ---

ROWS = [good("a", True), good("b", False), good("c ü 🙂\u2028", True)]


def as_csv(rows: list[dict[str, Any]], delimiter: str = ",") -> str:
    """Rows as prompt, completion, label."""
    lines = ["prompt,completion,label".replace(",", delimiter)]
    for row in rows:
        turns = row["conversations"]
        cells = [turns[0]["content"], turns[1]["content"], str(row["label"])]
        lines.append(delimiter.join('"' + cell.replace('"', '""') + '"' for cell in cells))
    return "\r\n".join(lines) + "\r\n"


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("rows.jsonl", "\n".join(LINES), [1, 2, 3]),
        ("blank.jsonl", "\n\n" + "\n \n".join(LINES) + "\n\n\n", [3, 5, 7]),
        ("late.jsonl", "\n" * 9000 + "\n".join(LINES), [9001, 9002, 9003]),
        ("bom.jsonl", "\ufeff" + "\n".join(LINES), [1, 2, 3]),
        ("crlf.jsonl", "\r\n".join(LINES) + "\r\n", [1, 2, 3]),
        ("rows.txt", "\n".join(LINES), [1, 2, 3]),
        ("rows.json", json.dumps(ROWS, indent=2), [1, 2, 3]),
        ("bom.json", "\ufeff" + json.dumps(ROWS), [1, 2, 3]),
        ("rows.csv", as_csv(ROWS), [2, 3, 4]),
        ("bom.csv", "\ufeff" + as_csv(ROWS), [2, 3, 4]),
        ("rows.tsv", as_csv(ROWS, "\t"), [2, 3, 4]),
        ("rows.parquet", as_parquet(ROWS), [1, 2, 3]),
    ],
)
def test_every_kind_of_file_gives_the_same_rows_with_their_lines(
    file: WriteFile, name: str, content: str | bytes, lines: list[int]
) -> None:
    rows = read_rows(file(content, name), "kto")
    assert [row.messages for row in rows.used] == [row["conversations"] for row in ROWS]
    assert [row.label for row in rows.used] == [True, False, True]
    assert [row.line for row in rows.used] == lines
    assert (rows.total, rows.left_out) == (3, [])


def test_parquet_rows_with_absent_tool_calls_are_plain_turns(file: WriteFile) -> None:
    call = {"type": "function", "function": {"name": "set_timer", "arguments": '{"minutes": 5}'}}
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    rows = read_rows(file(as_parquet([{"messages": turns}, {"messages": [USER, ANSWER]}]), "rows.parquet"), "sft")
    assert rows.used[0].messages[1]["tool_calls"][0]["function"]["arguments"] == {"minutes": 5}
    assert rows.used[1].messages == [USER, ANSWER]


def test_a_csv_cell_may_hold_a_conversation_as_json(file: WriteFile) -> None:
    cell = json.dumps([USER, ANSWER]).replace('"', '""')
    rows = read_rows(file(f'messages,label\n"{cell}",\n', "rows.csv"), "sft")
    assert rows.used[0].messages == [USER, ANSWER] and rows.used[0].label is None


def test_a_csv_row_with_more_cells_than_the_header_is_left_out_instead_of_cut(file: WriteFile) -> None:
    rows = read_rows(file("prompt,completion\nHi,Hello\nHi,Hello, world\n", "rows.csv"), "sft")
    assert [(entry.line, entry.reason) for entry in rows.left_out] == [(3, "the row has more cells than the header")]


@pytest.mark.parametrize("column", ["PK", "BZ"])
def test_a_csv_is_not_taken_for_an_archive_by_its_first_column(file: WriteFile, column: str) -> None:
    assert len(read_rows(file(f"{column},prompt,completion\n1,Hi,Hello\n", "rows.csv"), "sft").used) == 1


# --- any rows, any bytes ---

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
roles = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "x"]) | json_values
calls = st.fixed_dictionaries(
    {"function": st.fixed_dictionaries({"name": st.text(max_size=4) | json_values, "arguments": json_values})}
)
turns = st.fixed_dictionaries(
    {"role": roles, "content": st.text(max_size=8) | json_values}, optional={"tool_calls": st.lists(calls, max_size=2)}
)
labels = st.sampled_from([True, False, None, "true", "0", ""]) | json_values
some_rows = (
    st.builds(good, st.text(max_size=5), st.sampled_from([True, False, None]))
    | st.fixed_dictionaries({}, optional={"messages": st.lists(turns, max_size=4) | json_values, "label": labels})
    | st.fixed_dictionaries({"prompt": st.text() | json_values}, optional={"completion": st.text(), "label": labels})
    | st.fixed_dictionaries({"prompt": st.text(), "chosen": json_values | st.text(), "rejected": st.text()})
    | json_values
)


def adds_up(rows: Rows, method: str) -> bool:
    """Every row is used (a pair twice for KTO) or left out with a reason, and none is both."""
    used, left = Counter(row.line for row in rows.used), [entry.line for entry in rows.left_out]
    assert all(count <= (2 if method == "kto" else 1) for count in used.values())
    assert not set(used) & set(left) and len(set(left)) == len(left)
    assert all(entry.reason and entry.file == rows.file for entry in rows.left_out)
    return len(used) + len(left) == rows.total


def read_or_refused(path: Path, method: str) -> Rows | None:
    """The rows of `path`, or None where it is refused; every other exception escapes."""
    try:
        rows = read_rows(path, method)
    except FinetuiError as error:
        assert error.message and "\n" not in error.message
        return None
    for row in rows.used:
        assert row.prompt_key and row.messages[row.last_assistant]["role"] == "assistant"
        json.dumps(row.messages, ensure_ascii=False).encode()
    assert adds_up(rows, method)
    return rows


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=200)
@given(st.lists(some_rows, max_size=8), st.sampled_from(["sft", "kto"]))
def test_used_rows_and_rows_left_out_add_up_to_the_file(scratch: Path, rows: list[Any], method: str) -> None:
    path = scratch / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in [good("x", True), *rows, good("y", False)]))
    found = read_or_refused(path, method)
    assert found is not None and found.total == len(rows) + 2


pieces = st.sampled_from(
    [*LINES, "\n", "\r\n", "\ufeff", "{", "}", "[", "]", '"', ",", "null", "NaN", "1e999", "\\ud800", "\0", "\u2028",
     '{"messages": [', '"role": "assistant"', '{"prompt": "a", "completion": "b"}', "9" * 5000, "[" * 3000,
     '{"a":' * 2000]
)  # fmt: skip
garbage = st.binary(max_size=200) | st.lists(pieces | st.text(max_size=4), max_size=8).map(
    lambda parts: "".join(parts).encode("utf-8", "surrogatepass")
)


@settings(max_examples=500)
@given(garbage, st.sampled_from(["jsonl", "json", "csv", "tsv", "parquet"]), st.sampled_from(["sft", "kto"]))
def test_no_bytes_raise_anything_but_one_clear_sentence(scratch: Path, content: bytes, kind: str, method: str) -> None:
    path = scratch / f"rows.{kind}"
    path.write_bytes(content)
    read_or_refused(path, method)


@settings(max_examples=100)
@given(st.data())
def test_no_damage_to_a_good_file_raises_anything_but_one_clear_sentence(scratch: Path, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["jsonl", "json", "csv", "parquet"]))
    whole = {"jsonl": "\n".join(LINES).encode(), "json": json.dumps(ROWS).encode(), "csv": as_csv(ROWS).encode(),
             "parquet": as_parquet(ROWS)}[kind]  # fmt: skip
    place = data.draw(st.integers(0, len(whole)))
    path = scratch / f"damaged.{kind}"
    path.write_bytes(whole[:place] + data.draw(st.binary(max_size=3)) + whole[place + data.draw(st.integers(0, 9)) :])
    read_or_refused(path, "kto")


# --- bad files ---


@pytest.mark.parametrize(
    ("content", "name", "says"),
    [
        ("", "a.jsonl", "is empty"),
        (" \n\r\n\t\n" * 3000, "a.jsonl", "is empty"),
        (b"\x7fELF\0\0\x01", "a.jsonl", "is binary, not UTF-8 text"),
        (gzip.compress(LINES[0].encode()), "a.jsonl.gz", "is a gzip file, not UTF-8 text"),
        (b"PK\x03\x04aaaa", "a.zip", "is a zip file, not UTF-8 text"),
        (LINES[0].encode("utf-16"), "a.jsonl", "is UTF-16 or binary, not UTF-8 text"),
        ("日本".encode("utf-16"), "a.jsonl", "is UTF-16 or binary, not UTF-8 text"),
        (b"\xd0\x05\0\0\0\0\0\0" + LINES[0].encode() * 9, "a.jsonl", "is binary, not UTF-8 text"),
        (LINES[0].encode("utf-16")[2:], "a.jsonl", "is binary, not UTF-8 text"),
        ('{"train": [{"a": 1}], "test": []}', "a.json", "holds more than one list of rows"),
        ("[\n{},\n}]", "a.json", "line 3: broken JSON"),
        ("prompt,completion\nHi,\"Hello\n" + "x,y\n" * 50, "a.csv", "broken CSV (unexpected end of data)"),
        (b"PAR1 nothing", "a.parquet", "is not a readable Parquet file"),
        (b"PAR1" + b"\0" * 40 + b"\xff\xff\xff\x7fPAR1", "a.parquet", "is not a readable Parquet file"),
        ('{"title": "a"}\n' * 3, "a.jsonl",
         "has no usable row for SFT among 3 (3 × no conversation found (the row has: title))"),
        ('{"a"}\n' * 3, "a.jsonl", "has no usable row for SFT among 3 (3 × broken JSON (Expecting ':' delimiter))"),
        ("[]", "a.json", "has no usable row for SFT among 0 (no rows)"),
        ("\ufeff", "a.jsonl", "is empty"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_refused_in_one_sentence(
    file: WriteFile, content: str | bytes, name: str, says: str
) -> None:
    assert says in refused(file(content, name)).message


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        (LINES[0].encode() + b"\n\n\xff\xfe", 3, "not UTF-8 (byte 0xff)"),
        (LINES[0] + '\n{"a": 1\n', 2, "broken JSON (Expecting ',' delimiter)"),
        (LINES[0] + "\n" + LINES[1] + "\n" + LINES[2][:-4], 3, "broken JSON (Expecting value)"),
        (LINES[0] + "\n" + "[" * 100_000, 2, "broken JSON (nested too deeply or a number too long)"),
        (LINES[0] + '\n{"a": ' + "9" * 5000 + "}", 2, "broken JSON (nested too deeply or a number too long)"),
        ("\n" * 5000 + LINES[0] + "\n" * 5000 + '{"a": "x\0y"}', 10001, "broken JSON (a NUL byte)"),
        ("\0" + LINES[0] + "\n" + LINES[1] + "\n" + LINES[2], 1, "broken JSON (a NUL byte)"),
    ],
    ids=["bytes", "open", "torn", "deep", "number", "nul", "nul at the start"],
)
def test_a_line_that_is_no_json_is_left_out_by_its_number_and_the_others_are_read(
    file: WriteFile, content: str | bytes, line: int, reason: str
) -> None:
    rows = read_rows(file(content), "sft")
    broken = [(entry.line, entry.reason) for entry in rows.left_out if "label is false" not in entry.reason]
    assert broken == [(line, reason)]
    assert rows.used and adds_up(rows, "sft")


@pytest.mark.parametrize("key", ["train", "data", "rows"])
@pytest.mark.parametrize("indent", [None, 1])
def test_rows_under_one_key_are_unwrapped(file: WriteFile, key: str, indent: int | None) -> None:
    path = file(json.dumps({key: ROWS}, indent=indent), "a.json")
    assert kind_of(path) == f'json, rows under "{key}"'
    assert [row.messages for row in read_rows(path, "kto").used] == [row["conversations"] for row in ROWS]


def test_a_row_whose_turns_stand_under_such_a_key_is_a_row(file: WriteFile) -> None:
    path = file([{"data": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 2)
    assert kind_of(path) == "jsonl" and len(read_rows(path, "sft", columns={"messages": "data"}).used) == 2


def test_a_missing_file_a_folder_and_a_path_that_is_none_are_refused(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in refused(tmp_path / "none.jsonl").message
    assert "is a folder" in refused(tmp_path).message
    with pytest.raises(FinetuiError, match="is no path"):
        read_rows(Path("a\0b"), "sft")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_refused(file: WriteFile) -> None:
    path = file([good()])
    path.chmod(0)
    assert "Permission denied" in refused(path).message


@pytest.mark.parametrize(
    ("label", "advice"), [(True, "Train with SFT instead."), (False, "Add rows with good answers.")]
)
def test_kto_needs_both_labels(file: WriteFile, label: bool, advice: str) -> None:
    error = refused(file([good("a", label), good("b", label)]), "kto")
    assert f"every label is {str(label).lower()}, and KTO needs good and bad answers" in error.message
    assert error.advice == advice


def test_kto_without_any_label_says_so(file: WriteFile) -> None:
    assert "2 × no label, which KTO needs" in refused(file([good(), good()]), "kto").message


def test_a_line_of_a_megabyte_and_nul_as_an_escape_are_read(file: WriteFile) -> None:
    rows = read_rows(file([good(answer="x" * 1_000_000), good(answer="a\0b")]), "sft")
    assert len(rows.used[0].messages[1]["content"]) == 1_000_000
    assert rows.used[1].messages[1]["content"] == "a\0b"


def test_a_long_csv_cell_is_read(file: WriteFile) -> None:
    rows = read_rows(file(f"prompt,completion\nHi,{'x' * 300_000}\n", "rows.csv"), "sft")
    assert len(rows.used[0].messages[1]["content"]) == 300_000


# --- held-out rows and weights ---


def conversations(prompts: list[int], marks: list[bool]) -> list[Conversation]:
    return [
        Conversation("f", line, good(str(prompt))["conversations"], mark)
        for line, (prompt, mark) in enumerate(zip(prompts, marks, strict=True))
    ]


labelled = st.integers(2, 80).flatmap(
    lambda count: st.tuples(
        st.lists(st.integers(0, count), min_size=count, max_size=count),
        st.lists(st.booleans(), min_size=count, max_size=count),
    )
)


@settings(max_examples=150)
@given(labelled, st.floats(0.01, 0.5), st.integers(0, 99))
def test_a_prompt_is_never_on_both_sides_of_the_split(
    rows: tuple[list[int], list[bool]], share: float, seed: int
) -> None:
    every = conversations(*rows)
    training, held = holdout_split(every, share, seed)
    assert not {row.prompt_key for row in training} & {row.prompt_key for row in held}
    assert sorted(row.line for row in [*training, *held]) == list(range(len(every)))
    assert [row.line for row in training] == sorted(row.line for row in training)
    assert training and bool(held) is (len(set(rows[0])) > 1)
    assert holdout_split(every, share, seed) == (training, held)


def test_labels_keep_their_proportion_and_the_seed_chooses_the_rows() -> None:
    every = conversations(list(range(400)), [number % 4 == 0 for number in range(400)])
    training, held = holdout_split(every, 0.1, 1)
    assert Counter(row.label for row in held) == {True: 10, False: 30}
    assert Counter(row.label for row in training) == {True: 90, False: 270}
    assert held != holdout_split(every, 0.1, 2)[1]
    assert holdout_split(every, 0, 1) == (every, [])


def test_prompts_with_both_labels_stay_whole_and_keep_their_share() -> None:
    every = conversations([number // 2 for number in range(200)], [number % 2 == 0 for number in range(200)])
    held = holdout_split(every, 0.2, 3)[1]
    assert Counter(row.label for row in held) == {True: 20, False: 20}


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_class_weights_bring_the_labels_into_the_published_band(desirable: int, undesirable: int) -> None:
    good_weight, bad_weight = class_weights(desirable, undesirable)
    ratio = good_weight * desirable / (bad_weight * undesirable)
    assert 1 - 1e-4 <= ratio <= 4 / 3 + 1e-4
    assert min(good_weight, bad_weight) == 1 or 1 <= desirable / undesirable <= 4 / 3


def test_counts_inside_the_band_or_of_one_label_need_no_weights() -> None:
    assert class_weights(100, 100) == class_weights(133, 100) == class_weights(5, 0) == (1.0, 1.0)
    assert class_weights(50, 100) == (2.0, 1.0)
    assert class_weights(400, 100) == (1.0, 3.0)


# --- the real files ---


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the shared data is not here")
@pytest.mark.parametrize(
    ("name", "method", "total", "used", "left_out"),
    [
        ("ask_first_pairs", "sft", 100, {True: 50}, {"label is false: SFT would teach a bad answer": 50}),
        ("ask_first_pairs", "kto", 100, {True: 50, False: 50}, {}),
        ("behaviour_kto", "sft", 2388, {True: 1344},
         {"label is false: SFT would teach a bad answer": 1042, "no assistant turn": 2}),
        ("behaviour_kto", "kto", 2388, {True: 1344, False: 1042}, {"no assistant turn": 2}),
        ("tool_calls_labelled", "sft", 1438, {True: 719}, {"label is false: SFT would teach a bad answer": 719}),
        ("tool_calls_labelled", "kto", 1438, {True: 719, False: 719}, {}),
        ("tool_calls_sft", "sft", 3198, {True: 3198}, {}),
        ("tool_calls_sft", "kto", 3198, None, "every label is true"),
        ("vault_manager_tool_calls", "sft", 1469, {True: 1028, None: 441}, {}),
        ("vault_manager_tool_calls", "kto", 1469, None, "every label is true"),
    ],
)  # fmt: skip
def test_the_five_real_files_are_read_whole(name: str, method: str, total: int, used: Any, left_out: Any) -> None:
    path = SHARED_DATA / f"{name}.jsonl"
    if used is None:
        assert left_out in refused(path, method).message
        return
    rows = read_rows(path, method)
    assert (rows.total, dict(rows.labels), dict(rows.reasons())) == (total, used, left_out)
    assert adds_up(rows, method)


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the shared data is not here")
def test_the_real_prompts_with_both_labels_are_split_whole() -> None:
    rows = read_rows(SHARED_DATA / "behaviour_kto.jsonl", "kto").used
    marks: dict[str, set[bool | None]] = {}
    for row in rows:
        marks.setdefault(row.prompt_key, set()).add(row.label)
    assert sum(len(found) == 2 for found in marks.values()) == 766
    training, held = holdout_split(rows, 0.1, 42)
    assert not {row.prompt_key for row in training} & {row.prompt_key for row in held}
    share = {label: count / len(held) for label, count in Counter(row.label for row in held).items()}
    assert share[True] == pytest.approx(1344 / 2386, abs=0.03)
    assert len(held) == pytest.approx(0.1 * len(rows), rel=0.1)
