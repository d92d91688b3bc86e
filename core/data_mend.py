"""Copies of data files: cleaned, split, sampled, converted. The original is never touched, an existing file never
overwritten, and what became of every row is told.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from core.data_facts import facts_of, prompt_key_of
from core.data_files import BOM, MAX_LINE_BYTES, Unreadable, bounded_lines, kind_of, raw_rows
from core.data_repair import mended_arguments, mended_encoding, mended_line, mended_text_calls
from core.data_rows import TEXT_ROLE, Message, Reading, RowError, names_of, read_row
from core.data_spool import text_of
from core.errors import FinetuiError
from core.paths import writing_whole

SHAPES = ("messages", "sharegpt", "prompt", "alpaca", "text")
Step = Callable[[int], None]


@dataclass
class Told:
    """What became of the rows of a file that was copied: counts, and for each row that is not as it was a line."""

    rows: int = 0
    written: int = 0
    fates: Counter[str] = field(default_factory=Counter)
    entries: list[dict[str, Any]] = field(default_factory=list)

    def note(self, line: int, fate: str, reason: str) -> None:
        self.fates[f"{fate}: {reason}"] += 1
        self.entries.append({"line": line, "fate": fate, "reason": reason})


def check_target(source: Path, target: Path, *, force: bool = False) -> None:
    """Raise FinetuiError where `target` is the source itself, exists, or lies in no folder."""
    if target.exists():
        if target.samefile(source):
            raise FinetuiError(f"{target} is the file that is read.", "Give another name: the original stays.")
        if not force:
            raise FinetuiError(f"{target} exists already.", "Give another name, or --force.")
    if not target.absolute().parent.is_dir():
        raise FinetuiError(f"There is no folder {target.absolute().parent}.", "Make it first.")


# --- clean ---


@dataclass(frozen=True)
class Cleaning:
    """What `clean` does beside mending rows: each takes rows out or changes their text, so each is asked for."""

    drop_duplicates: bool = False
    mend_encoding: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)


def clean(source: Path, target: Path, cleaning: Cleaning, step: Step | None = None) -> Told:
    """Write a copy of `source` with its rows mended and those left out that cannot be, and a ledger beside it.

    The copy is JSONL with the rows' own columns: labels are truth values, roles and arguments as OpenAI has them.
    """
    told = Told()
    names = names_of(cleaning.columns)
    seen: dict[tuple[int, bool | None], int] = {}
    with writing_whole(target, "wb") as stream:
        for line, row, what in _mended_rows(source):
            told.rows += 1
            if step and told.rows % 2000 == 0:
                step(told.rows)
            mends = [what] if what else []
            try:
                row = _mended_row(row, cleaning, names, mends)
                reading = read_row(row, names)
            except RowError as error:
                told.note(line, "left out", str(error))
                continue
            if cleaning.drop_duplicates and (first := _repeated(reading, line, seen)):
                told.note(line, "left out", f"the same as line {first}")
                told.fates[f"left out: the same as line {first}"] -= 1
                told.fates["left out: the same as an earlier row"] += 1
                continue
            for mend in mends:
                told.note(line, "mended", mend)
            stream.write(text_of(row) + b"\n")
            told.written += 1
    told.fates = +told.fates
    _write_ledger(ledger_of(target), source, told)
    return told


def ledger_of(target: Path) -> Path:
    """Where the ledger of a copy lies."""
    return target.with_name(f"{target.name}.ledger.jsonl")


def _write_ledger(path: Path, source: Path, told: Told) -> None:
    encode = msgspec.json.Encoder().encode
    with writing_whole(path, "wb") as stream:
        head = {"ledger": 1, "source": str(source), "rows": told.rows, "written": told.written,
                "counts": dict(told.fates.most_common())}  # fmt: skip
        stream.write(encode(head) + b"\n")
        for entry in told.entries:
            stream.write(encode(entry) + b"\n")


def _mended_rows(source: Path) -> Iterator[tuple[int, Any, str]]:
    """(line, row, what was mended) of every row; lines of JSONL are mended where they can be."""
    if kind_of(source) != "jsonl":
        yield from ((line, row, "") for line, row in raw_rows(source))
        return
    with source.open("rb") as stream:
        for number, line in enumerate(bounded_lines(stream), 1):
            line = line.rstrip(b"\r\n") if number > 1 else line.removeprefix(BOM).rstrip(b"\r\n")
            if len(line) > MAX_LINE_BYTES:
                yield number, Unreadable(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB"), ""
            elif line.strip(b" \t\0"):
                yield number, *mended_line(line)


def _mended_row(row: Any, cleaning: Cleaning, names: Mapping[str, tuple[str, ...]], mends: list[str]) -> Any:
    """The row with its own columns and what can be mended in them; `mends` is told what was."""
    if not isinstance(row, dict):
        return row
    row = dict(row)
    if not _is_bad(row, names):  # an answer that is meant to be bad may be bad in just this way
        for name in names["messages"]:
            if isinstance(row.get(name), list):
                row[name] = [_mended_turn(turn, mends) for turn in row[name]]
        for name in (*names["completion"], *names["chosen"]):
            if isinstance(row.get(name), str):
                row |= _mended_turn({name: row[name]}, mends, (name,))
    for name in names["label"]:
        if name in row and not isinstance(row[name], bool | None):
            reading = read_row(row, names)
            words = [repair for repair in reading.repairs if repair.startswith("label ")]
            if words:
                row[name] = reading.pairs[0][1]
                mends += words
    if cleaning.mend_encoding:
        changed = _reread(row)
        if changed != row:
            mends.append("text decoded anew")
        row = changed
    return row


def _is_bad(row: dict[str, Any], names: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether the row's answer is labelled false."""
    try:
        return [label for _, label in read_row(row, names).pairs] == [False]
    except RowError:
        return False


def _mended_turn(turn: Any, mends: list[str], texts: tuple[str, ...] = ("content", "value")) -> Any:
    if not isinstance(turn, dict):
        return turn
    for name in texts:
        if isinstance(text := turn.get(name), str) and (better := mended_text_calls(text)) != text:
            turn = {**turn, name: better}
            mends.append("arguments of a tool call mended")
    calls = turn.get("tool_calls")
    if not isinstance(calls, list):
        return turn
    mended = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if isinstance(function, dict) and isinstance(arguments, str) and not _is_json(arguments):
            found = mended_arguments(arguments)
            if found is not None:
                call = {**call, "function": {**function, "arguments": json.dumps(found, ensure_ascii=False)}}
                mends.append("arguments of a tool call mended")
        mended.append(call)
    return {**turn, "tool_calls": mended}


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _reread(value: Any) -> Any:
    if isinstance(value, str):
        return mended_encoding(value)
    if isinstance(value, list):
        return [_reread(item) for item in value]
    if isinstance(value, dict):
        return {key: _reread(item) for key, item in value.items()}
    return value


def _repeated(reading: Reading, line: int, seen: dict[tuple[int, bool | None], int]) -> int:
    """The line of an earlier row that says the same with the same label; 0 where there is none."""
    messages, label = reading.pairs[-1]
    first = seen.setdefault((facts_of(messages).row_key, label), line)
    return first if first != line else 0


# --- split and sample ---


def split(source: Path, training: Path, held_out: Path, share: float, seed: int, columns: Mapping[str, str]) -> Told:
    """Write the rows of `source` into two files so that no prompt stands in both, as `--split-dataset` would.

    Rows that cannot be read go into neither and are told.
    """
    import numpy

    from core.data_ledger import held_prompts

    told, names = Told(), names_of(columns)
    rows: list[bytes] = []
    keys: list[int] = []
    labels: list[int] = []
    for line, row in raw_rows(source):
        told.rows += 1
        try:
            messages, label = read_row(row, names).pairs[0]
        except RowError as error:
            told.note(line, "left out", str(error))
            continue
        rows.append(text_of(row))
        keys.append(prompt_key_of(messages))
        labels.append(-1 if label is None else int(label))
    held = held_prompts(numpy.array(keys, "u8"), numpy.array(labels, "i1"), share, seed)
    for target, wanted in ((training, False), (held_out, True)):
        with writing_whole(target, "wb") as stream:
            for text, out in zip(rows, held.tolist(), strict=True):
                if out is wanted:
                    stream.write(text + b"\n")
                    told.written += 1
                    told.fates["held out" if wanted else "training"] += 1
    return told


def sample(source: Path, target: Path, count: int, seed: int, *, balanced: bool, columns: Mapping[str, str]) -> Told:
    """Write `count` rows drawn evenly from `source`, in their order; `balanced` draws as many good as bad ones."""
    told, names = Told(), names_of(columns)
    groups: dict[Any, list[tuple[int, bytes]]] = {}
    for line, row in raw_rows(source):
        told.rows += 1
        try:
            reading = read_row(row, names)
        except RowError as error:
            told.note(line, "left out", str(error))
            continue
        label = reading.pairs[0][1] if balanced and len(reading.pairs) == 1 else None
        groups.setdefault(label, []).append((line, text_of(row)))
    chance = random.Random(seed)
    drawn: list[tuple[int, bytes]] = []
    for at, (_, rows) in enumerate(sorted(groups.items(), key=lambda item: str(item[0]))):
        share = count // len(groups) + (at < count % len(groups))
        drawn += chance.sample(rows, min(share, len(rows)))
    with writing_whole(target, "wb") as stream:
        for _, text in sorted(drawn):
            stream.write(text + b"\n")
    told.written = len(drawn)
    return told


# --- convert ---


def convert(source: Path, target: Path, shape: str, columns: Mapping[str, str], step: Step | None = None) -> Told:
    """Write the rows of `source` in another shape and kind of file: JSONL, JSON, CSV, Parquet, by the target's ending.

    A preference pair becomes two rows, one labelled true and one false. Rows that the shape cannot hold (several turns
    as a prompt and an answer hold fine, tool calls in CSV do not) are left out and told. Raises FinetuiError.
    """
    told, names = Told(), names_of(columns)

    def rows() -> Iterator[dict[str, Any]]:
        for line, raw in raw_rows(source):
            told.rows += 1
            if step and told.rows % 2000 == 0:
                step(told.rows)
            try:
                reading = read_row(raw, names)
                made = [shaped(messages, label, reading.tools, shape) for messages, label in reading.pairs]
            except RowError as error:
                told.note(line, "left out", str(error))
                continue
            for repair in reading.repairs:
                told.note(line, "mended", repair)
            told.written += len(made)
            yield from made

    write_rows(target, rows())
    return told


def shaped(messages: list[Message], label: bool | None, tools: Any, shape: str) -> dict[str, Any]:
    """A conversation as a row of a shape. Raises RowError where it cannot hold it."""
    rest: dict[str, Any] = {} if label is None else {"label": label}
    if tools:
        rest["tools"] = tools
    if messages[0]["role"] == TEXT_ROLE:
        if shape != "text":
            raise RowError("plain text has no turns")
        return {"text": messages[0]["content"]} | rest
    if shape == "messages":
        return {"messages": messages} | rest
    if shape == "sharegpt":
        names = {"system": "system", "user": "human", "assistant": "gpt", "tool": "tool"}
        _no_calls(messages)
        return {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in messages]} | rest
    last = max(at for at, message in enumerate(messages) if message["role"] == "assistant")
    before, answer = messages[:last], messages[last]
    if shape == "prompt":
        return {"prompt": before, "completion": [answer]} | rest
    if shape == "alpaca":
        _no_calls(messages)
        if [m["role"] for m in before if m["role"] != "system"] != ["user"]:
            raise RowError("alpaca holds one question and one answer")
        system = "\n\n".join(m["content"] for m in before if m["role"] == "system")
        row = {"instruction": before[-1]["content"], "input": "", "output": answer["content"]}
        return row | ({"system": system} if system else {}) | rest
    _no_calls(messages)
    return {"text": "\n\n".join(f"{m['role']}: {m['content']}" for m in messages)} | rest


def _no_calls(messages: Iterable[Message]) -> None:
    if any(message.get("tool_calls") for message in messages):
        raise RowError("tool calls have no place in this shape")


def write_rows(target: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Write rows as the ending of `target` says: .jsonl, .json, .csv, .tsv or .parquet. Raises FinetuiError."""
    kind = target.suffix.lower().lstrip(".")
    if kind not in ("jsonl", "json", "csv", "tsv", "parquet"):
        raise FinetuiError(f"{target.name} has no ending that says what it is.", "Use .jsonl, .json, .csv or .parquet.")
    if kind == "parquet":
        _write_parquet(target, rows)
        return
    with writing_whole(target, "wb") as stream:
        if kind in ("csv", "tsv"):
            _write_csv(stream, rows, "\t" if kind == "tsv" else ",")
            return
        first = True
        for row in rows:
            lead = b"" if kind == "jsonl" else b"[\n" if first else b",\n"
            stream.write(lead + text_of(row) + (b"\n" if kind == "jsonl" else b""))
            first = False
        if kind == "json":
            stream.write(b"[]\n" if first else b"\n]\n")


def _write_csv(stream: Any, rows: Iterator[dict[str, Any]], delimiter: str) -> None:
    import csv
    import io

    kept = list(rows)
    names = list(dict.fromkeys(name for row in kept for name in row))
    text = io.TextIOWrapper(stream, encoding="utf-8", newline="", write_through=True)
    writer = csv.DictWriter(text, names, delimiter=delimiter, restval="")
    writer.writeheader()
    for row in kept:
        writer.writerow({name: _cell(value) for name, value in row.items()})
    text.detach()


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict | bool) else value


def _write_parquet(target: Path, rows: Iterator[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    def plain(row: dict[str, Any]) -> dict[str, Any]:
        """Arguments as JSON strings: every call has others, and a column has one type."""
        for message in row.get("messages") or []:
            for call in message.get("tool_calls") or ():
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        return {name: json.dumps(value) if name == "tools" else value for name, value in row.items()}

    try:
        table = pyarrow.Table.from_pylist([plain(row) for row in rows])
        with writing_whole(target, "wb") as stream:
            pyarrow.parquet.write_table(table, stream)
    except (pyarrow.ArrowException, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise FinetuiError(f"These rows do not fit into Parquet ({reason}).", "Convert them to JSONL.") from error
