"""The sentences over a stage's rows: what is learned from, left out and held out adds up to the file."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED_DATA, USER, MakeRun, WriteRows, good

from core.data_headline import headline
from core.data_look import Request, look
from core.errors import FinetuiError
from core.plan import Plan
from core.train_lens import Desk

FILES = sorted(SHARED_DATA.glob("*.jsonl"))
PAIR = {"prompt": "Which?", "chosen": "This.", "rejected": "That."}


def told(plan: Plan, stage: str, **asked: Any) -> tuple[str, str, dict[str, Any]]:
    """The two sentences about a stage's rows, once counted in tokens, and the count."""
    settings = plan.stage(stage)
    reports: list[dict[str, Any]] = []
    request = Request(stage, settings.data.model_dump(mode="json"), settings.seed, near=False)
    look(request, lambda said: reports.append(said["report"]) if "report" in said else None)
    count = Desk().reply({"do": "count", "plan": plan.model_dump(mode="json"), "stage": stage, **asked})
    found = headline(reports[-1], count, stage)
    return found.rows, found.left_out, count


def number_in(pattern: str, words: str) -> int:
    found = re.search(pattern, words)
    return int(found[1].replace(",", "")) if found else 0


@pytest.mark.skipif(not FILES, reason="the shared data is not here")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("method", ["sft", "kto"])
def test_the_sentences_add_up_to_every_real_file(make_run: MakeRun, path: Path, method: str) -> None:
    settings = {f"{method}__data__file": str(path), f"{method}__data__holdout": 0.1, f"{method}__max_length": 500}
    settings |= {"kto__max_prompt_length": 400} if method == "kto" else {}
    try:
        rows, left_out, count = told(make_run(method, **settings).plan(), method)
    except FinetuiError as error:
        assert "every label is true" in error.message or "No row is left" in error.message
        return
    total, learned = number_in(r"^([\d,]+) rows:", rows), number_in(r"([\d,]+) will be learned from", rows)
    held, gone = number_in(r"([\d,]+) held out", rows), number_in(r"^([\d,]+) left out", left_out)
    assert total == sum(1 for line in path.open("rb") if line.strip()) == learned + held + gone
    assert learned == count["examples"] and held == count["held_out"] and gone == count["totals"]["left_out"]
    if ", " in left_out:
        assert gone == sum(int(number.replace(",", "")) for number in re.findall(r"[:,] ([\d,]+) [a-z]", left_out))
    if method == "kto":
        assert learned == sum(int(n.replace(",", "")) for n in re.search(r"\(([\d,]+) good answers, ([\d,]+) bad", rows)
                              .groups())  # fmt: skip


def test_labels_pairs_and_weights_are_told_in_plain_words(make_run: MakeRun, rows_file: WriteRows) -> None:
    rows = [good("a", True), good("b", False), {"messages": [USER]}, PAIR, good("c")]
    more = str(rows_file([good(f"more {n}", n > 2) for n in range(6)], "more.jsonl"))
    path = str(rows_file(rows, "own.jsonl"))
    words, left_out, _ = told(make_run("kto", kto__data__file=path).plan(), "kto")
    assert words == "5 rows: 3 will be learned from (2 good answers, 2 bad, 4 examples an epoch)."
    assert left_out == "2 left out: 1 unlabelled, 1 without an answer."
    plan = make_run("kto", name="two", kto__data__file=path, kto__data__files={more: 2}).plan()
    assert told(plan, "kto")[0] == "11 rows: 9 will be learned from (8 good answers, 8 bad, 16 examples an epoch)."
    words, left_out, _ = told(make_run("sft", name="three", sft__data__file=path).plan(), "sft")
    assert words == "5 rows: 3 will be learned from."
    assert left_out == "2 left out: 1 marked bad, 1 without an answer."


def test_a_sample_is_called_about_right(make_run: MakeRun, rows_file: WriteRows, monkeypatch: Any) -> None:
    import core.train_lens

    monkeypatch.setattr(core.train_lens, "EXACT", 20)
    monkeypatch.setattr(core.train_lens, "SAMPLE", 20)
    path = rows_file([good("long " * (400 if n % 2 else 1) + str(n)) for n in range(100)], "own.jsonl")
    plan = make_run("sft", sft__data__file=str(path), sft__max_length=300).plan()
    words, left_out, count = told(plan, "sft")
    assert not count["exact"] and words.startswith("100 rows: about ") and left_out.startswith("about ")
    exact, _, whole = told(plan, "sft", exact=True)
    assert whole["exact"] and exact == "100 rows: 50 will be learned from."


def test_the_command_says_the_same(said: Callable[..., str], rows_file: WriteRows) -> None:
    path = rows_file([good("a", True), good("b", False), good("c", True)])
    assert "3 rows: all can be learned from (2 good answers, 1 bad)." in said("check", path, "--method", "kto")
