"""Tokens: the same in memory, in the cache and from children; made once; laid under the trainers without a copy."""

import random
from pathlib import Path
from typing import Any

import numpy
import psutil
import pytest
from conftest import WriteFile, good, wait_until

from core import data_tokens
from core.chat import Template, first_token
from core.data_cache import data_cache
from core.data_ledger import Ledger, Source
from core.data_limits import Limits
from core.data_reader import Rows
from core.data_survey import survey
from core.data_tokens import Examples, Tokens, tokenize
from core.errors import FinetuiError
from core.train_data import kto_dataset, row_lengths, sft_dataset


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FINETUI_CACHE", str(tmp_path / "cache"))


def ledger_of(path: Path, method: str = "sft") -> Ledger:
    return Ledger.of([Source(survey(path))], method, include_undesirable=True)


def many(count: int) -> list[Any]:
    chance = random.Random(3)
    return [
        good(f"Frage {n} " * chance.randint(1, 9), n % 3 > 0, answer="ja 日本 " * chance.randint(1, 9))
        for n in range(count)
    ]


def flat(tokens: Tokens) -> list[tuple[list[int], list[int]]]:
    return [tuple(part.tolist() for part in tokens.tokens(at)) for at in range(len(tokens.which))]  # type: ignore[misc]


@pytest.mark.parametrize("method", ["sft", "kto"])
def test_tokens_from_memory_cache_and_children_are_those_of_each_row(
    tiny_template: Template,
    file: WriteFile,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ledger = ledger_of(file(many(60)), method)
    memory = tokenize(ledger, tiny_template)
    rows = Rows(ledger)
    for at, number in enumerate(ledger.used):
        row = rows[number]
        single = tiny_template.tokenize(row.messages, row.tools, only_last=method == "kto")
        assert flat(memory)[at] == (single.input_ids, single.labels)
        assert (memory.length[at], memory.first[at], memory.last[at], memory.trained[at]) == single.measures
    monkeypatch.setattr(data_tokens, "KEPT_FROM", 10)
    assert flat(tokenize(ledger, tiny_template)) == flat(memory)
    monkeypatch.setattr(data_tokens, "fill", None)
    assert flat(tokenize(ledger, tiny_template)) == flat(memory), "the second time they come from the cache"


def test_children_tokenise_the_same_and_say_how_far_they_are(
    tiny_template: Template,
    file: WriteFile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ledger = ledger_of(file(many(2300)))
    alone = flat(tokenize(ledger, tiny_template))
    for folder in data_cache().iterdir():
        if folder.is_dir():
            folder.rename(data_cache().parent / folder.name)
    monkeypatch.setattr(data_tokens, "ALONE", 100)
    steps: list[tuple[int, int]] = []
    found = tokenize(ledger, tiny_template, lambda done, total: steps.append((done, total)))
    assert flat(found) == alone and len(found.shards) >= 1
    assert steps and steps == sorted(steps) and {total for _, total in steps} == {2300}


def test_children_end_with_the_process_that_wants_them(
    tiny_template: Template,
    file: WriteFile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ledger = ledger_of(file(many(2300)))
    monkeypatch.setattr(data_tokens, "ALONE", 100)
    before = set(psutil.Process().children(recursive=True))

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize(ledger, tiny_template, stop)
    wait_until(lambda: set(psutil.Process().children(recursive=True)) <= before)
    assert not [path for path in data_cache().iterdir() if path.is_dir()], "nothing half made is kept"


def test_another_template_or_another_text_is_tokenised_anew(
    tiny_template: Template,
    file: WriteFile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import copy

    monkeypatch.setattr(data_tokens, "KEPT_FROM", 1)
    ledger = ledger_of(file(many(12)))
    key = data_tokens.tokens_key(ledger, ledger.used, tiny_template)
    other = Template(copy.deepcopy(tiny_template.tokenizer))
    assert data_tokens.tokens_key(ledger, ledger.used, other) != "" and key == data_tokens.tokens_key(
        ledger_of(file(many(12), "copy.jsonl")), ledger.used, tiny_template
    )
    other.tokenizer.chat_template = other.tokenizer.chat_template.replace("<|im_end|>", "<|endoftext|>")
    assert data_tokens.tokens_key(ledger, ledger.used, other) != key
    assert data_tokens.tokens_key(ledger_of(file(many(13))), ledger.used, tiny_template) != key
    assert data_tokens.tokens_key(ledger, ledger.used[1:], tiny_template) != key


def examples_of(template: Template, path: Path, method: str, **limits: Any) -> Examples:
    ledger = ledger_of(path, method)
    tokens = tokenize(ledger, template)
    tokens.enter(ledger, Limits(method, **limits))
    ledger.times[ledger.used[:3]] = 2
    return Examples(ledger, tokens, ledger.training())


@pytest.mark.parametrize("too_long", ["drop", "cut"])
def test_a_trainers_data_set_lies_over_the_tokens_row_by_row(
    tiny_template: Template,
    file: WriteFile,
    too_long: str,
) -> None:
    path = file(many(40))
    examples = examples_of(tiny_template, path, "sft", max_length=60, too_long=too_long)
    dataset = sft_dataset(examples, 60)
    assert len(dataset) == len(examples) and dataset.column_names == ["input_ids", "labels"]
    assert examples.over.any() == (too_long == "cut") and (examples.which[1:] == examples.which[:-1]).any()
    for row, example in zip(dataset, examples, strict=True):
        assert row == {"input_ids": example.tokens.input_ids, "labels": example.tokens.labels}
    assert row_lengths(dataset) == examples.lengths.tolist()
    kto = examples_of(tiny_template, path, "kto", max_length=70, max_prompt_length=40, too_long=too_long)
    dataset = kto_dataset(kto)
    for row, example in zip(dataset, kto, strict=True):
        assert (row["prompt_ids"], row["completion_ids"]) == (example.prompt_ids, example.completion_ids)
        assert (row["label"], row["prompt_key"]) == (bool(example.row.label), example.row.prompt_key)
    assert row_lengths(dataset) == kto.lengths.tolist()


def test_rows_that_no_template_takes_leave_gaps_and_no_others(tiny_template: Template, file: WriteFile) -> None:
    tokens = tokenize(ledger := ledger_of(file(many(5))), tiny_template)
    ids = [part.tolist() for part in tokens.tokens(2)]
    assert Examples(ledger, tokens, numpy.array([2, 0, 2]))[0].tokens.input_ids == ids[0]
    assert [example.row.line for example in Examples(ledger, tokens, numpy.array([2, 0, 2]))] == [3, 1, 3]
    assert [example.row.line for example in Examples(ledger, tokens, ledger.used)[1:3]] == [2, 3]


def test_without_a_cache_tokens_stay_in_memory_and_what_needs_one_says_so(
    tiny_template: Template, file: WriteFile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(data_tokens, "KEPT_FROM", 1)
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("FINETUI_CACHE", str(tmp_path / "taken"))
    assert len(flat(tokenize(ledger_of(file(many(3))), tiny_template))) == 3
    with pytest.raises(FinetuiError, match=r"The cache .* cannot be written") as caught:
        survey(file("prompt,completion\na,b\n", "rows.csv"))
    assert "FINETUI_CACHE" in caught.value.advice


@pytest.mark.parametrize(
    "text", ["", "a", "Grüße 日本 🙂👩‍💻 x", "<|im_start|>user\nHi<|im_end|>\n", "  two  blanks ", "\u2028é"]
)
def test_the_first_token_at_a_place_is_the_one_that_the_offsets_say(
    tiny_template: Template,
    text: str,
) -> None:
    encoding = tiny_template.encode_one(text)
    for at in range(len(text) + 1):
        expected = next((n for n, (start, _) in enumerate(encoding.offsets) if start >= at), len(encoding.ids))
        assert first_token(encoding, at, text) == expected
