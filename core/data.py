"""Read, recognise and check training rows, and name every row that is left out. No torch, no tokenizer.

A file becomes conversations with an optional label; what a row may look like is told by `conversation_of`. Nothing is
dropped silently: a row is either used or listed in `Rows.left_out` with file, line and reason; the two add up to the
file's rows (a preference pair is one row of the file and two conversations).
"""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.errors import FinetuiError
from core.text import clean

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
LABELS = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}
BINARY_STARTS = {
    b"\x1f\x8b": "a gzip file",
    b"PK\x03\x04": "a zip file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"GGUF": "a GGUF file",
    b"BZh": "a bzip2 file",
    b"\xff\xfe": "UTF-16 or binary",
    b"\xfe\xff": "UTF-16 or binary",
}
MAX_DEPTH = 64


@dataclass(frozen=True)
class Conversation:
    """One usable example: `messages` as role/content (and tool_calls), `label` where the row has one."""

    file: str
    line: int
    messages: list[dict[str, Any]]
    label: bool | None = None
    tools: list[dict[str, Any]] | None = None

    @property
    def prompt(self) -> list[dict[str, Any]]:
        """Everything before the last assistant turn."""
        return self.messages[: self.last_assistant]

    @property
    def last_assistant(self) -> int:
        """Index of the last assistant turn."""
        return max(index for index, message in enumerate(self.messages) if message["role"] == "assistant")

    @property
    def prompt_key(self) -> str:
        """Hash of the prompt: rows with equal keys must not be split between training and held-out."""
        return hashlib.sha256(json.dumps(self.prompt, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class LeftOut:
    """A row that is not trained on, and why."""

    file: str
    line: int
    reason: str


@dataclass
class Rows:
    """What one file holds for one method: usable conversations and every row left out or repaired."""

    file: str
    used: list[Conversation] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    repaired: list[LeftOut] = field(default_factory=list)
    total: int = 0

    @property
    def labels(self) -> Counter[bool | None]:
        """How many usable rows carry which label."""
        return Counter(row.label for row in self.used)

    def reasons(self) -> Counter[str]:
        """How many rows were left out for which reason, most frequent first."""
        return Counter(entry.reason for entry in self.left_out)


class RowError(ValueError):
    """This row cannot be used; the message is the reason shown to the person."""


def raw_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, row) of a JSONL, JSON, CSV or Parquet file.

    A JSON array and Parquet count rows instead of lines. Blank lines are passed over.
    Raises FinetuiError for a missing, empty, binary, non-UTF-8 or broken file, naming the line.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(4096)
            while head and not head.strip():
                head = stream.read(4096)
    except IsADirectoryError as error:
        raise FinetuiError(f"{path} is a folder.", "Give the data file inside it.") from error
    except OSError as error:
        advice = "Check the path and its permissions."
        raise FinetuiError(f"{path} cannot be read: {error.strerror}.", advice) from error
    except ValueError as error:  # a path with a NUL
        raise FinetuiError(f"{str(path)!r} is no path.", "Check the path.") from error
    if not head:
        raise FinetuiError(f"{path} is empty.", "Give a file with one JSON object a line.")
    if head.startswith(b"PAR1"):
        yield from _parquet_rows(path)
        return
    kind = next((name for start, name in BINARY_STARTS.items() if head.startswith(start)), None)
    if kind or b"\0" in head:
        raise FinetuiError(
            f"{path} is {kind or 'binary'}, not UTF-8 text.", "Give JSONL, JSON, CSV or Parquet."
        )
    if path.suffix.lower() in (".csv", ".tsv"):
        yield from _csv_rows(path)
    elif head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _json_rows(path)
    else:
        yield from _jsonl_rows(path)


def _decoded_lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise FinetuiError(
                    f"{path}, line {number}: not UTF-8 (byte 0x{raw[error.start]:02x}).", "Save the file as UTF-8."
                ) from error


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in _decoded_lines(path):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _broken(path, number, error) from error


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    text = "".join(line for _, line in _decoded_lines(path))
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _broken(path, getattr(error, "lineno", 1), error) from error
    yield from enumerate(rows, 1)


def _broken(path: Path, line: int, error: Exception) -> FinetuiError:
    what = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply or a number too long"
    return FinetuiError(f"{path}, line {line}: broken JSON ({what}).", "Mend or delete that line.")


def _csv_rows(path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(2**31 - 1)
    lines = (line for _, line in _decoded_lines(path))
    # Strict: a quotation mark that is never closed would swallow the rest of the file without a word.
    reader = csv.DictReader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    try:
        for row in reader:
            yield reader.line_num, {key: _cell(value) for key, value in row.items()}
    except csv.Error as error:
        raise FinetuiError(f"{path}, line {reader.line_num}: broken CSV ({error}).", "Mend that line.") from error


def _cell(value: Any) -> Any:
    """A CSV cell: JSON lists and objects are read as such, everything else stays text."""
    if isinstance(value, str) and value[:1] in "[{" and value[-1:] in "]}":
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in table.iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())[:80]
        raise FinetuiError(f"{path} is not a readable Parquet file ({reason}).", "Write it anew.") from error


def conversations_of(row: Any) -> tuple[list[tuple[list[dict[str, Any]], bool | None]], list[str]]:
    """The conversations of one row as (messages, label), and what had to be repaired.

    Shapes: ``messages`` or ``conversations`` (role/content or from/value) with an optional ``label``;
    ``prompt``/``completion`` with an optional ``label``; ``chosen``/``rejected``, with or without ``prompt``, which
    give a desirable and an undesirable conversation. Prompts and answers may be text or lists of messages.
    Raises RowError with the reason a row cannot be used.
    """
    if not isinstance(row, dict):
        raise RowError(f"a row must be a JSON object, not {type(row).__name__}")
    if None in row:
        raise RowError("the row has more cells than the header")
    repairs: list[str] = []
    turns = next((row[key] for key in ("messages", "conversations", "conversation") if row.get(key) is not None), None)
    if turns is not None:
        return [(_messages(turns, repairs), _label(row, repairs))], repairs
    if row.get("chosen") is not None and row.get("rejected") is not None:
        pair: list[tuple[list[dict[str, Any]], bool | None]] = [
            (_joined(row.get("prompt"), row[key], repairs), label)
            for key, label in (("chosen", True), ("rejected", False))
        ]
        return pair, repairs
    if row.get("prompt") is not None and row.get("completion") is not None:
        return [(_joined(row["prompt"], row["completion"], repairs), _label(row, repairs))], repairs
    found = ", ".join(sorted(clean(key, 30) for key in row)[:6]) or "nothing"
    raise RowError(f"no conversation found (the row has: {found})")


def _joined(prompt: Any, answer: Any, repairs: list[str]) -> list[dict[str, Any]]:
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
    after = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    if not isinstance(before, list) or not isinstance(after, list):
        raise RowError("prompt and answer must be text or lists of messages")
    return _messages([*before, *after], repairs)


def _messages(turns: Any, repairs: list[str]) -> list[dict[str, Any]]:
    if not isinstance(turns, list):
        raise RowError(f"the conversation is {type(turns).__name__}, not a list of messages")
    messages = [_message(turn, repairs) for turn in turns]
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError("no assistant turn")
    if next(message["role"] for message in messages if message["role"] != "system") == "assistant":
        raise RowError("nothing stands before the first assistant turn")
    return messages


def _message(turn: Any, repairs: list[str]) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise RowError("a message is not an object")
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str):
        raise RowError("a message has no role")
    if role.lower() not in ROLES:
        raise RowError(f"unknown role {role[:30]!r}")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(part["text"] if isinstance(part.get("text"), str) else "" for part in content)
    calls = _tool_calls(turn.get("tool_calls"), repairs)
    if content is None and not calls:
        raise RowError("a turn has neither content nor tool_calls")
    if content is not None and not isinstance(content, str):
        raise RowError(f"content is {type(content).__name__}, not text")
    _check_json([content, calls])
    message: dict[str, Any] = {"role": ROLES[role.lower()], "content": content}
    if calls:
        message["tool_calls"] = calls
    elif not content and message["role"] == "assistant":
        raise RowError("an assistant turn is empty")
    return message


def _check_json(value: Any, depth: int = 0) -> None:
    """Refuse what neither a template nor a tokenizer can take: Parquet's types, deep nesting, half surrogate pairs."""
    if depth > MAX_DEPTH:
        raise RowError("nested too deeply")
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise RowError("text holds half a surrogate pair, which no tokenizer can read")
    elif isinstance(value, dict):
        _check_json([*value, *value.values()], depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_json(item, depth + 1)
    elif not isinstance(value, bool | int | float | None):
        raise RowError(f"a value is {type(value).__name__}, which JSON cannot hold")


def _tool_calls(calls: Any, repairs: list[str]) -> list[dict[str, Any]]:
    """OpenAI's tool_calls with ``arguments`` as an object; a JSON string is parsed, a broken one kept as it stands."""
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise RowError("tool_calls is not a list")
    found = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError("a tool call has no function name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                repairs.append("tool call arguments are broken JSON; kept as text")
        found.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return found


def _label(row: dict[str, Any], repairs: list[str]) -> bool | None:
    label = row.get("label")
    if label is None or label == "":
        return None
    if isinstance(label, bool):
        return label
    if not isinstance(label, str | int | float):
        raise RowError(f"the label is {type(label).__name__}, neither true nor false")
    word = str(label).strip().lower()
    if word not in LABELS:
        raise RowError(f"the label {str(label)[:30]!r} is neither true nor false")
    repairs.append(f"label {str(label)!r} read as {LABELS[word]}")
    return LABELS[word]


def read_rows(
    path: Path,
    method: str,
    *,
    include_undesirable: bool = False,
    max_rows: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Rows:
    """Read `path` for a stage, ``"sft"`` or ``"kto"``.

    SFT leaves out answers labelled false unless `include_undesirable`; KTO leaves out unlabelled rows. `progress` is
    called with the number of rows read, about every thousand. Raises FinetuiError when no row is usable, and for KTO
    when only one label occurs.
    """
    rows = Rows(str(path))
    try:
        for number, raw in raw_rows(path):
            rows.total += 1
            if progress and rows.total % 1000 == 0:
                progress(rows.total)
            _sort_in(rows, number, raw, method, include_undesirable)
            if max_rows and len(rows.used) >= max_rows:
                break
    except UnicodeEncodeError as error:
        raise FinetuiError(f"{path}: text that UTF-8 cannot hold ({error.reason}).", "Mend the row.") from error
    _check_usable(rows, method)
    return rows


def _sort_in(rows: Rows, number: int, raw: Any, method: str, include_undesirable: bool) -> None:
    try:
        found, repairs = conversations_of(raw)
        _check_json(raw.get("tools"))
        tools = _tools(raw.get("tools"), repairs)
    except RowError as error:
        rows.left_out.append(LeftOut(rows.file, number, str(error)))
        return
    rows.repaired.extend(LeftOut(rows.file, number, repair) for repair in repairs)
    used = 0
    reason = ""
    for messages, label in found:
        if method == "kto" and label is None:
            reason = "no label, which KTO needs"
        elif method == "sft" and label is False and not include_undesirable:
            reason = "label is false: SFT would teach a bad answer"
        else:
            rows.used.append(Conversation(rows.file, number, messages, label, tools))
            used += 1
    if not used:
        rows.left_out.append(LeftOut(rows.file, number, reason))


def _tools(given: Any, repairs: list[str]) -> list[dict[str, Any]] | None:
    """The row's tool schemas for the template: a list, or one written as a JSON string (as Parquet files have it)."""
    if not given:
        return None
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            given = None
    if isinstance(given, list) and all(isinstance(tool, dict) for tool in given):
        return given or None
    repairs.append("its tools are no list of schemas and were left out")
    return None


def _check_usable(rows: Rows, method: str) -> None:
    if not rows.used:
        reasons = "; ".join(f"{count} × {reason}" for reason, count in rows.reasons().most_common(2))
        raise FinetuiError(
            f"{rows.file} has no usable row for {method.upper()} among {rows.total} ({reasons or 'no rows'}).",
            'A row looks like {"conversations": [{"role": "user", "content": "…"}, '
            '{"role": "assistant", "content": "…"}], "label": true}.',
        )
    if method == "kto" and len(rows.labels) < 2:
        only = "true" if True in rows.labels else "false"
        raise FinetuiError(
            f"{rows.file}: every label is {only}, and KTO needs good and bad answers.",
            "Train with SFT instead." if only == "true" else "Add rows with good answers.",
        )


def holdout_split(
    rows: list[Conversation], share: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Split into (training, held out) by prompt: no prompt stands on both sides, labels keep their proportion.

    Prompts are grouped by which labels they carry and `share` of each group is held out: those whose hash with `seed`
    is lowest. So SFT and KTO hold out nearly the same prompts of one file, though each leaves out rows of its own.
    At least one row stays on each side when `share` > 0 and there are two prompts.
    """
    if share <= 0:
        return rows, []
    by_prompt: dict[str, list[Conversation]] = {}
    for row in rows:
        by_prompt.setdefault(row.prompt_key, []).append(row)
    kinds: dict[frozenset[bool | None], list[str]] = {}
    for key, group in by_prompt.items():
        kinds.setdefault(frozenset(row.label for row in group), []).append(key)
    held: set[str] = set()
    for keys in kinds.values():
        keys.sort(key=lambda key: drawn(key, seed))
        held.update(keys[: round(share * len(keys))])
    if not held and len(by_prompt) > 1:
        held.add(min(by_prompt, key=lambda key: drawn(key, seed)))
    training = [row for row in rows if row.prompt_key not in held]
    return training, [row for row in rows if row.prompt_key in held]


def drawn(key: str, seed: int) -> str:
    """What puts prompts into an order of chance that depends on nothing but the prompt and `seed`."""
    return hashlib.sha256(f"{seed} {key}".encode()).hexdigest()


def class_weights(desirable: int, undesirable: int) -> tuple[float, float]:
    """(desirable_weight, undesirable_weight) so that λ_D·n_D / λ_U·n_U lies in [1, 4/3].

    Equation (8) of the KTO paper (arXiv 2402.01306). The rarer class is weighted up, the other keeps 1; where the
    counts are inside the band already both are 1.
    """
    if not desirable or not undesirable:
        return 1.0, 1.0
    ratio = desirable / undesirable
    if 1 <= ratio <= 4 / 3:
        return 1.0, 1.0
    return (round(1 / ratio, 6), 1.0) if ratio < 1 else (1.0, round(ratio / (4 / 3), 6))
