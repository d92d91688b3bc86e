"""Surveys: the same however a file is cut and whoever reads it; kept by content; workers that die or are not wanted."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import psutil
import pytest
from conftest import WriteFile, good, wait_until

from core import data_pieces, data_survey
from core.data_cache import content_key, data_cache, tidy
from core.data_ledger import Ledger, Source
from core.data_pieces import COLUMNS
from core.data_pool import Workers
from core.data_reader import Reader
from core.data_survey import Progress, Survey, survey
from core.errors import FinetuiError


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FINETUI_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes every file a large one, cut into pieces of some bytes."""

    def cut(size: int) -> None:
        monkeypatch.setattr(data_pieces, "PIECE_BYTES", size)
        monkeypatch.setattr(data_survey, "ALONE_BYTES", -1)
        monkeypatch.setattr(data_survey, "FIRST_BYTES", size)

    return cut


def rows(count: int) -> str:
    """Rows of very different lengths, some unusable, blank lines between them."""
    chance = random.Random(7)
    lines = []
    for number in range(count):
        row: Any = good(f"Grüße {number} " * chance.randint(1, 30), chance.choice([True, False, None]))
        row = chance.choice([row, row, row, {"x": number % 3}, "text", {"messages": []}])
        lines.append(json.dumps(row, ensure_ascii=chance.random() < 0.5) + chance.choice(["", "", "\r", "\n", "\n  "]))
    return "\ufeff" + "\n".join(lines)


def same(one: Survey, other: Survey) -> bool:
    """Whether two surveys say the same of every row."""
    assert one.reason_counts() == other.reason_counts() and one.repair_counts() == other.repair_counts()
    assert (one.shapes, one.lines, one.total) == (other.shapes, other.lines, other.total)
    for name in COLUMNS:
        if name in ("reason", "repair", "pattern"):
            words = {"reason": "reasons", "repair": "repairs", "pattern": "patterns"}[name]
            mine, theirs = (numpy.array(getattr(found, words))[found[name]].tolist() for found in (one, other))
            assert mine == theirs, name
        else:
            assert one[name].tolist() == other[name].tolist(), name
    return True


@pytest.mark.parametrize("size", [64, 333, 5000, 100_000])
def test_a_file_says_the_same_however_it_is_cut(
    file: WriteFile, small_pieces: Callable[[int], None], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file(rows(300))
    whole = survey(path)
    small_pieces(size)
    monkeypatch.setattr(data_survey, "_side_by_side", lambda found, requests, workers: [
        found.add(data_pieces.check_piece(**request), request["end"]) for request in requests
    ])  # fmt: skip
    assert same(whole, survey(path))
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    assert whole["line"].tolist() == [number for number, line in enumerate(lines, 1) if line.strip()]


def test_workers_find_what_one_process_finds_and_the_second_look_costs_nothing(
    file: WriteFile, small_pieces: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file(rows(400))
    alone = survey(path)
    small_pieces(3000)
    monkeypatch.setattr("core.data_cache.PIECE_BYTES", 3000)
    (data_cache() / "stamps.json").unlink()
    said: list[Progress] = []
    together = survey(path, say=said.append, workers=2)
    assert same(alone, together) and together.content == content_key(path)
    assert said and said[0].total_bytes == path.stat().st_size and said[0].rows > 0
    monkeypatch.setattr(data_survey, "check_piece", None)
    monkeypatch.setattr(data_survey, "Workers", None)
    assert same(together, survey(path)), "the second time it comes from the cache"
    moved = path.rename(path.with_name("moved.jsonl"))
    assert same(together, survey(moved)), "by content, wherever the file lies"
    reader = Reader(survey(moved))
    assert reader[0].messages and reader[0].line == alone.line_of(0)


def test_a_changed_file_is_read_anew(file: WriteFile, small_pieces: Callable[[int], None]) -> None:
    small_pieces(3000)
    first = survey(file(rows(50)), workers=1)
    second = survey(file(rows(60)), workers=1)
    assert second.total > first.total and first.content != second.content


@pytest.mark.parametrize("name", ["rows.json", "rows.csv", "rows.parquet", "rows.txt"])
def test_rows_of_other_kinds_are_read_again_from_any_place(file: WriteFile, name: str) -> None:
    from test_data import ROWS, as_csv, as_parquet

    content: Any = {
        "rows.json": json.dumps(ROWS, indent=1), "rows.csv": as_csv(ROWS), "rows.parquet": as_parquet(ROWS),
        "rows.txt": "one\n\ntwo\nlines\n\n\nthree\n",
    }[name]  # fmt: skip
    path = file(content, name)
    found = survey(path)
    assert found.spooled and found.file == str(path)
    reader = Reader(found)
    texts = [reader[number].messages[0]["content"] for number in (2, 0, 1)]
    if name == "rows.txt":
        assert texts == ["three", "one", "two\nlines"] and found["line"].tolist() == [1, 3, 7]
    else:
        assert texts == ["c ü 🙂\u2028", "a", "b"] and len(set(found["line"].tolist())) == 3


def test_an_overlong_line_is_left_out_and_the_next_one_is_found(
    file: WriteFile, small_pieces: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("data_pieces", "data_files", "data_reader"):
        monkeypatch.setattr(f"core.{module}.MAX_LINE_BYTES", 4096)
    monkeypatch.setattr(data_survey, "_side_by_side", lambda found, requests, workers: [
        found.add(data_pieces.check_piece(**request), request["end"]) for request in requests
    ])  # fmt: skip
    path = file([good("a"), good("b" * 50_000), good("c")])
    small_pieces(1000)
    found = survey(path)
    assert found["line"].tolist() == [1, 2, 3]
    assert found.reason_counts() == {"the line is longer than 0 MiB": 1}
    assert [Reader(found)[number].messages[0]["content"] for number in (0, 1)] == ["a", "c"]


def test_a_look_that_is_given_up_leaves_no_worker(file: WriteFile, small_pieces: Callable[[int], None]) -> None:
    small_pieces(2000)
    before = set(psutil.Process().children(recursive=True))

    def enough(progress: Progress) -> None:
        if progress.rows > 20:
            raise KeyboardInterrupt

    data_survey.SAY_EVERY_S, kept = 0.0, data_survey.SAY_EVERY_S
    try:
        with pytest.raises(KeyboardInterrupt):
            survey(file(rows(300)), say=enough, workers=2)
    finally:
        data_survey.SAY_EVERY_S = kept
    wait_until(lambda: set(psutil.Process().children(recursive=True)) <= before)
    assert not any(path.name.startswith(".") for path in data_cache().glob("*"))


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        pool = Workers(2)
        (tmp_path / "pids").write_text(" ".join(str(child.pid) for child in pool._children))
        os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    workers = [int(word) for word in (tmp_path / "pids").read_text().split()]
    assert len(workers) == 2
    wait_until(lambda: not any(psutil.pid_exists(worker) for worker in workers))


def test_a_worker_that_dies_is_told_of(file: WriteFile) -> None:
    with Workers(1) as pool:
        replies = pool.replies([{"do": "check", "path": "/nowhere", "start": 0, "end": 9}])
        with pytest.raises(FinetuiError, match="A process that reads the data died") as caught:
            next(replies)
    assert "No such file" in caught.value.advice


def test_a_row_that_changes_under_a_reader_is_one_sentence(file: WriteFile) -> None:
    path = file([good("a"), good("b")])
    ledger = Ledger.of([Source(survey(path))], "sft")
    path.write_text("x" * path.stat().st_size)
    with pytest.raises(FinetuiError, match="was changed while it was in use"):
        Reader(ledger.sources[0].survey)[0]


def test_the_cache_stays_below_its_limit_and_keeps_what_was_used_last(tmp_path: Path) -> None:
    for number in range(6):
        folder = data_cache() / f"entry{number}"
        folder.mkdir(parents=True)
        (folder / "x").write_bytes(b"x" * 1000)
        os.utime(folder, (number, number))
    tidy(limit=2500)
    assert sorted(path.name for path in data_cache().iterdir()) == ["entry4", "entry5"]


def test_the_content_of_a_file_is_told_by_its_bytes_alone(file: WriteFile) -> None:
    one, two = file("a\n" * 5000, "one.jsonl"), file("a\n" * 5000, "two.jsonl")
    assert content_key(one) == content_key(two) != content_key(file("b\n", "three.jsonl"))
    one.write_text("c\n")
    assert content_key(one) != content_key(two)
