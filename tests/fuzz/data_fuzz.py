"""Damaged files through the checker, in this process: no traceback, nothing that hangs, every row accounted for.

usage: python tests/fuzz/data_fuzz.py [--files 10000] [--first SEED] [--keep FOLDER]

Prints what it saw and one line for each file that found something; the exit code is their number.
"""

import argparse
import collections
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from mutate import Sample, sample

from core import data_pieces
from core.data import read_rows
from core.data_ledger import LEFT_OUT
from core.data_look import Request, look
from core.data_mend import Cleaning, clean
from core.data_reader import Rows
from core.errors import FinetuiError

LIMIT_S = 10
PIECES = (13, 97, 1000, 1 << 22)


def examined(path: Path) -> list[str]:
    """How the file came out under each method; raises where it came out wrong."""
    outcomes = []
    for method in ("sft", "kto"):
        begun = time.monotonic()
        outcomes.append(_examined(path, method))
        assert time.monotonic() - begun < LIMIT_S, "it took too long"
    return outcomes


def _examined(path: Path, method: str) -> str:
    reports: list[dict[str, Any]] = []
    request = Request(method, {"file": str(path), "holdout": 0.2})

    def show(message: dict[str, Any]) -> None:
        if "report" in message:
            reports.append(message["report"])

    try:
        ledger = look(request, show)
    except FinetuiError as error:
        assert error.message.endswith(".") and "\n" not in str(error), "no sentence"
        _must_refuse(path, method)
        return "refused"
    assert ledger is not None
    totals = reports[-1]["totals"]
    entries = list(ledger.entries())
    assert len(entries) == totals["rows"] == totals["used"] + totals["cut"] + totals["left_out"], "rows do not add up"
    assert all(entry.get("reason") for entry in entries if entry["fate"] == "left out"), "left out without a reason"
    lines = [entry["line"] for entry in entries]
    assert lines == sorted(set(lines)), "a line is named twice"
    found = ledger.sources[0].survey
    if found.kind == "jsonl":
        written = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
        assert lines == [number for number, line in enumerate(written, 1) if line.strip()], "a line is missing"
    rows = Rows(ledger)
    used = [rows[number] for number in ledger.used]
    assert all(row.messages for row in used)
    rows.close()
    _agree(path, method, ledger, [row.line for row in used], reports[-1]["problem"])
    return "used" if len(used) else "nothing usable"


def _must_refuse(path: Path, method: str) -> None:
    """What the survey refuses the reader in memory refuses as well."""
    try:
        read_rows(path, method)
    except FinetuiError:
        return
    raise AssertionError("only the survey refuses it")


def _agree(path: Path, method: str, ledger: Any, used: list[int], problem: Any) -> None:
    """The reader in memory and the survey follow the same rules."""
    try:
        rows = read_rows(path, method)
    except FinetuiError:
        assert problem, "only the reader in memory refuses it"
        return
    assert not problem and [row.line for row in rows.used] == used, "they use other rows"
    left_out = [entry["line"] for entry in ledger.entries() if entry["fate"] == "left out"]
    assert sorted(entry.line for entry in rows.left_out) == left_out, "they leave out other rows"
    assert (ledger.fate != LEFT_OUT).sum() == len(rows.used)


def cleaned(path: Path, target: Path) -> None:
    """A cleaned copy is written or refused; all of it can be used."""
    try:
        told = clean(path, target, Cleaning(drop_duplicates=True, mend_encoding=True))
    except FinetuiError:
        return
    gone = sum(entry["fate"] == "left out" for entry in told.entries)
    assert told.rows == told.written + gone, "the copy does not add up"
    if told.written:
        names = {entry.reason for entry in _rows_of(target)}
        assert not any(name.startswith(("broken", "not UTF-8", "a row must")) for name in names), names


def _rows_of(path: Path) -> list[Any]:
    try:
        return read_rows(path, "sft", include_undesirable=True).left_out
    except FinetuiError:
        return []


def run(files: int, first: int, keep: Path | None) -> collections.Counter[str]:
    """Examine the files of `files` seeds; what found something is printed, and kept where asked."""
    outcomes: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        os.environ["FINETUI_CACHE"] = str(folder / "cache")
        for seed in range(first, first + files):
            made = sample(seed)
            if problem := problem_of(made, folder, outcomes):
                outcomes["PROBLEM"] += 1
                print(f"seed {seed} ({made.name}): {problem}", flush=True)
                if keep:
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / made.name).write_bytes(made.content)
            if (seed - first + 1) % 1000 == 0:
                print(f"{seed - first + 1} files: {dict(outcomes)}", flush=True)
    return outcomes


def problem_of(made: Sample, folder: Path, outcomes: collections.Counter[str]) -> str:
    """What a file found, as the last line of the traceback and where it arose; empty where nothing.

    Files are cut into pieces of a few bytes or many, so that pieces end in every kind of place.
    """
    path, target = folder / made.name, folder / "cleaned.jsonl"
    path.write_bytes(made.content)
    kept, data_pieces.PIECE_BYTES = data_pieces.PIECE_BYTES, PIECES[len(made.content) % len(PIECES)]
    try:
        outcomes.update(examined(path))
        cleaned(path, target)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:200]} ({Path(where.filename).name}:{where.lineno})"
    finally:
        path.unlink()
        data_pieces.PIECE_BYTES = kept
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    begun = time.monotonic()
    outcomes = run(options.files, options.first, options.keep)
    print(f"{options.files} files in {time.monotonic() - begun:.0f} s: {dict(outcomes)}")
    return min(outcomes["PROBLEM"], 100)


if __name__ == "__main__":
    sys.exit(main())
