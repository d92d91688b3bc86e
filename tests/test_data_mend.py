"""Mended, split, sampled and converted copies: the original stays, nothing is overwritten, every change is told."""

import csv
import json
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from conftest import ANSWER, SHARED_DATA, USER, Refused, WriteFile, good
from hypothesis import given, settings
from hypothesis import strategies as st

from core.cli import main
from core.data import read_rows
from core.data_files import Unreadable
from core.data_repair import mended_arguments, mended_encoding, mended_line, mended_text_calls


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
TEXT = json.dumps(ROW)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (TEXT.encode(), ""),
        (TEXT.replace("Hello", "Hel\tlo").encode(), "control characters taken out"),
        (TEXT.replace("}]", "},]").encode(), "a comma before a closing bracket taken out"),
        ((TEXT + ",").encode(), "a comma before a closing bracket taken out"),
        (repr(ROW).encode(), "a Python literal written as JSON"),
        (TEXT.replace("Hello", "Grüße").encode("cp1252"), "bytes that are not UTF-8 read as Windows-1252"),
        (b"\xef\xbb\xbf" + TEXT.encode(), "control characters taken out"),
        (TEXT.encode().replace(b"Hello", b"He\0llo"), "control characters taken out"),
    ],
)
def test_lines_that_are_nearly_json_are_mended(line: bytes, what: str) -> None:
    row, mended = mended_line(line)
    assert mended == what and row["messages"][0] == ROW["messages"][0]


@pytest.mark.parametrize(
    "line", [b"", b"{", b"hello", TEXT[:-5].encode(), b"{'a': __import__('os')}", b"[1, 2", b"\xff\xfe", b"{" * 5000]
)
def test_what_cannot_be_mended_without_guessing_stays_out(line: bytes) -> None:
    assert isinstance(mended_line(line)[0], Unreadable)


@settings(max_examples=300)
@given(st.binary(max_size=80) | st.text("{}[]'\":,\\ \n\0a1é", max_size=40).map(str.encode))
def test_no_line_raises(line: bytes) -> None:
    mended_line(line)


@given(st.text(max_size=60))
def test_text_that_was_right_comes_back_from_being_read_wrongly(text: str) -> None:
    assert mended_encoding(text.encode("ascii", "ignore").decode()) == text.encode("ascii", "ignore").decode()
    mended_encoding(text)


@pytest.mark.parametrize("right", ["Grüße", "it’s “fine”", "naïve café – über 5 °C", "Привет, мир", "🙂", "plain"])
def test_wrongly_decoded_text_is_put_back(right: str) -> None:
    wrong = right.encode().decode("cp1252", "replace")
    if "\ufffd" not in wrong:
        assert mended_encoding(wrong) == right
    assert mended_encoding(right) == right


def test_arguments_and_text_calls_are_mended() -> None:
    assert mended_arguments("{'a': True, 'b': [1,],}") == {"a": True, "b": [1]}
    assert mended_arguments('{"a": 1,}') == {"a": 1} and mended_arguments("{oops") is None
    text = 'Sure.\ntool_call: write\narguments: {"text": "one\ntwo\t"}\n\nDone.'
    mended = mended_text_calls(text)
    assert mended == 'Sure.\ntool_call: write\narguments: {"text": "one\\ntwo\\t"}\n\nDone.'
    assert mended_text_calls(mended) == mended and mended_text_calls("no call") == "no call"


def test_clean_writes_a_mended_copy_and_a_ledger_and_never_the_original(
    said: Callable[..., str], file: WriteFile, tmp_path: Path
) -> None:
    broken_call = {"role": "assistant", "content": None, "tool_calls": [
        {"type": "function", "function": {"name": "t", "arguments": "{'a': 1}"}}]}  # fmt: skip
    rows = [good("a") | {"label": "yes", "own": 3}, {"messages": [USER, broken_call]},
            {"messages": [USER, broken_call], "label": False}, {"messages": [USER]}, good("GrÃ¼ÃŸe"), good("a") | {
            "label": True}]  # fmt: skip
    path = file("".join(f"{json.dumps(row)}\n" for row in rows) + f"{repr(ROW)}\n\n{{\n")
    before = path.read_bytes()
    out = tmp_path / "out.jsonl"
    shown = said("data", "clean", path, out, "--drop-duplicates", "--mend-encoding")
    assert path.read_bytes() == before
    assert "5 of 8 rows written" in shown and "1 × mended: text decoded anew" in shown
    written = lines(out)
    assert written[0] == rows[0] | {"label": True}, "own columns stay"
    assert json.loads(written[1]["messages"][1]["tool_calls"][0]["function"]["arguments"]) == {"a": 1}
    assert written[2] == rows[2], "a bad answer may be bad in just this way"
    assert written[3]["conversations"][0]["content"] == "Grüße" and written[4] == ROW
    ledger = lines(tmp_path / "out.jsonl.ledger.jsonl")
    assert ledger[0]["rows"] == 8 and ledger[0]["written"] == 5
    assert [(entry["line"], entry["fate"]) for entry in ledger[1:]] == [
        (1, "mended"), (2, "mended"), (4, "left out"), (5, "mended"), (6, "left out"), (7, "mended"), (9, "left out")
    ]  # fmt: skip
    assert ledger[5]["reason"] == "the same as line 1" and ledger[7]["reason"].startswith("broken JSON")
    assert read_rows(out, "sft", include_undesirable=True).left_out == []


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the shared data is not here")
def test_clean_mends_the_broken_calls_of_a_real_file(said: Callable[..., str], tmp_path: Path) -> None:
    from core.data_survey import survey

    source = SHARED_DATA / "tool_calls_sft.jsonl"
    shown = said("data", "clean", source, tmp_path / "out.jsonl")
    assert "3,198 of 3,198 rows written" in shown and "20 × mended: arguments of a tool call mended" in shown
    assert sum(survey(source).problems.values()) == 20 and not survey(tmp_path / "out.jsonl").problems


@pytest.mark.parametrize("words", [("clean",), ("sample",), ("convert",)])
def test_nothing_is_overwritten_unasked_and_the_source_never(
    refused: Refused, said: Callable[..., str], file: WriteFile, tmp_path: Path, words: tuple[str, ...]
) -> None:
    path = file([good("a"), good("b")])
    (tmp_path / "there.jsonl").write_text("mine")
    (tmp_path / "same.jsonl").symlink_to(path)
    assert "exists already" in refused("data", *words, path, tmp_path / "there.jsonl")
    for target in (path, tmp_path / "same.jsonl"):
        assert "is the file that is read" in refused("data", *words, path, target, "--force")
    assert "There is no folder" in refused("data", *words, path, tmp_path / "no" / "x.jsonl")
    assert "No such file" in refused("data", *words, tmp_path / "none.jsonl", tmp_path / "x.jsonl")
    said("data", *words, path, tmp_path / "there.jsonl", "--force")
    assert len(lines(tmp_path / "there.jsonl")) == 2


def test_split_lets_no_prompt_stand_in_both_files(said: Callable[..., str], refused: Refused, file: WriteFile) -> None:
    rows = [good(f"p{n % 20}", n % 2 == 0, answer=str(n)) for n in range(100)] + ["no row"]
    path = file(rows, "rows.jsonl")
    shown = said("data", "split", path, "--share", "0.2", "--seed", "3")
    train, held = (path.with_name(f"rows-{name}.jsonl") for name in ("train", "heldout"))
    assert f"{train} and {held}" in shown and "1 × left out" in shown
    prompts = [{row["conversations"][0]["content"] for row in lines(part)} for part in (train, held)]
    assert not prompts[0] & prompts[1] and len(prompts[1]) == 4
    assert len(lines(train)) + len(lines(held)) == 100
    assert "exists already" in refused("data", "split", path)
    assert "is no share" in refused("data", "split", path, "--share", "2", "--force")


def test_sample_draws_evenly_keeps_the_order_and_can_balance(
    said: Callable[..., str], file: WriteFile, tmp_path: Path
) -> None:
    path = file([good(str(n), n % 10 == 0) for n in range(200)])
    said("data", "sample", path, tmp_path / "a.jsonl", "-n", "50", "--seed", "1")
    drawn = [int(row["conversations"][0]["content"]) for row in lines(tmp_path / "a.jsonl")]
    assert len(set(drawn)) == 50 and drawn == sorted(drawn)
    said("data", "sample", path, tmp_path / "b.jsonl", "-n", "30", "--balanced")
    assert Counter(row["label"] for row in lines(tmp_path / "b.jsonl")) == {True: 15, False: 15}
    said("data", "sample", path, tmp_path / "c.jsonl", "-n", "999")
    assert len(lines(tmp_path / "c.jsonl")) == 200


PLAIN = [good("a, b", True, answer='say "x"\nnow'), good("c ü 日本", False)]
PAIR = {"prompt": "Which?", "chosen": "This.", "rejected": "That."}


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("shape", ["messages", "sharegpt", "prompt", "alpaca"])
def test_rows_survive_every_conversion(
    said: Callable[..., str], file: WriteFile, tmp_path: Path, kind: str, shape: str
) -> None:
    path, out = file([*PLAIN, PAIR]), tmp_path / f"out.{kind}"
    shown = said("data", "convert", path, out, "--to", shape)
    assert "4 of 3 rows written" in shown
    expected = [(row.messages, row.label) for row in read_rows(path, "kto").used]
    assert [(row.messages, row.label) for row in read_rows(out, "kto").used] == expected


def test_tool_calls_survive_where_a_shape_has_a_place_for_them_and_are_told_where_not(
    said: Callable[..., str], file: WriteFile, tmp_path: Path
) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "t", "arguments": {"a": [1, {"b": None}]}}}]}  # fmt: skip
    other = {"role": "assistant", "content": None, "tool_calls": [
        {"id": "2", "type": "function", "function": {"name": "t", "arguments": {"a": "x"}}}]}  # fmt: skip
    tools = [{"type": "function", "function": {"name": "t", "parameters": {"type": "object"}}}]
    path = file([{"messages": [USER, call], "tools": tools}, {"messages": [USER, other]}, good("x")])
    before = read_rows(path, "sft").used
    for kind in ("jsonl", "parquet", "csv"):
        out = tmp_path / f"out.{kind}"
        said("data", "convert", path, out)
        assert [(row.messages, row.tools) for row in read_rows(out, "sft").used] == [
            (row.messages, row.tools) for row in before
        ]
    shown = said("data", "convert", path, tmp_path / "alpaca.jsonl", "--to", "alpaca")
    assert "1 of 3 rows written" in shown and "2 × left out: tool calls have no place in this shape" in shown
    assert pyarrow.parquet.read_table(tmp_path / "out.parquet").num_rows == 3
    with (tmp_path / "out.csv").open(newline="") as stream:
        assert list(csv.DictReader(stream))[2]["tools"] == ""


def test_an_ending_that_says_nothing_is_refused(refused: Refused, file: WriteFile, tmp_path: Path) -> None:
    assert "has no ending that says what it is" in refused("data", "convert", file([good("a")]), tmp_path / "out.xyz")


def test_show_prints_a_row_as_the_model_sees_it(said: Callable[..., str], file: WriteFile, tiny_model: Path) -> None:
    path = file([good("a", True), {"messages": [USER, ANSWER, USER, ANSWER], "label": False}])
    shown = said("data", "show", path, "--method", "kto", "--line", "2", "--model-name", tiny_model)
    assert "line 2, labelled false" in shown and "<|im_start|>user" in shown and "KL partner" in shown
    marked = f"<|im_start|>assistant\n⟦{ANSWER['content']}<|im_end|>⟧\n"
    assert "trained (in ⟦⟧)" in shown and str(tiny_model) in shown and shown.split("KL partner")[0].count(marked) == 1
    ids = said("data", "show", path, "--method", "sft", "--model-name", tiny_model, "--ids")
    assert "·" in ids and ids.count("⟦") == ids.count("⟧") == 2


def test_a_line_without_a_row_is_refused_by_show(refused: Refused, file: WriteFile, tiny_model: Path) -> None:
    path = file([good("a")] * 2)
    for line in (0, 3):
        said = refused("data", "show", path, "--method", "sft", "--line", line, "--model-name", tiny_model)
        assert f"has no row at line {line}." in said and "--line " in said


def test_a_copy_that_holds_nothing_says_what_to_do(said: Callable[..., str], file: WriteFile, tmp_path: Path) -> None:
    shown = said("data", "clean", file([{"frage": "a", "antwort": "b"}] * 2), tmp_path / "out.jsonl")
    assert "0 of 2 rows written" in shown and "--column prompt=…" in shown


def test_check_ends_with_a_command_that_can_be_copied(said: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "my rows.jsonl"
    path.write_text('{"frage": "a", "antwort": "b"}\n{"frage": "c"}\n')
    columns = ("--column", "prompt=frage", "--column", "completion=antwort")
    command = said("check", path, "--method", "sft", *columns).splitlines()[-1].partition(": finetui ")[2]
    said(*shlex.split(command.replace("OUT.csv", shlex.quote(str(tmp_path / "out.csv")))))
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 3


def test_check_counts_tokens_where_a_model_is_named(
    said: Callable[..., str], file: WriteFile, tiny_model: Path
) -> None:
    path = file([good(f"{n} " * n) for n in range(1, 30)])
    shown = said("check", path, "--method", "sft", "--model-name", tiny_model, "--max-seq-length", "40")
    assert "tokens an epoch" in shown and "rows fit" in shown and "longer than 40 tokens and left out" in shown



def test_a_check_without_the_tokenizer_says_what_it_found_all_the_same(
    file: WriteFile, capsys: pytest.CaptureFixture[str]
) -> None:
    path = file([*[good(f"row {n}") for n in range(3)], {"messages": [USER]}])
    assert main(["check", str(path), "--method", "sft", "--model-name", "nobody/nothing"]) == 2
    out, err = capsys.readouterr()
    assert "4 rows" in out and "no assistant turn" in out
    assert "Tokens were not counted: The tokenizer of nobody/nothing is not on this machine yet." in err
