"""Damaged data files by seed: bytes, JSON structure, Unicode, nesting, numbers, NUL, CRLF, BOM, gzip, wrong types."""

import gzip
import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

USER = {"role": "user", "content": "Set a timer for 5 minutes"}
ANSWER = {"role": "assistant", "content": 'tool_call: set_timer\narguments: {"minutes": 5}'}
TOOLS = [{"type": "function", "function": {"name": "set_timer", "parameters": {
    "type": "object", "properties": {"minutes": {"type": "integer"}}, "required": ["minutes"]}}}]  # fmt: skip
CALL = {"role": "assistant", "content": None, "tool_calls": [
    {"id": "1", "type": "function", "function": {"name": "set_timer", "arguments": '{"minutes": 5}'}}]}  # fmt: skip
ROWS: list[dict[str, Any]] = [
    {"conversations": [USER, ANSWER], "label": True},
    {"messages": [{"role": "system", "content": "Be brief."}, USER, CALL, {"role": "tool", "content": "ok"}, ANSWER],
     "tools": TOOLS, "label": False},
    {"conversations": [{"from": "human", "value": "Grüße 日本 🙂"}, {"from": "gpt", "value": "ok"}], "system": "s"},
    {"prompt": "Hi", "completion": "Hello", "label": True},
    {"prompt": [USER], "completion": [ANSWER], "label": "false"},
    {"instruction": "Add", "input": "1 2", "output": "3"},
    {"prompt": "Hi", "chosen": "Good day", "rejected": "No"},
    {"chosen": [USER, ANSWER], "rejected": [USER, {"role": "assistant", "content": "no"}]},
    {"chosen": "The sky is blue", "rejected": "The sky is green"},
    {"text": "Once upon a time."},
]  # fmt: skip
HUGE: tuple[Any, ...] = (10**400, -(10**25), 1e308, float("nan"), float("inf"), 2**63, -0.0, 1e-320)
TEXTS = ("", " ", "\n", "\0", "\ud800", "\udfff\ud800", "\u202e", "\u2028", "🙂" * 50, "a" * 5000, "[INST]",
         "<|im_start|>", "tool_call: ", "tool_call: x\narguments: {", "<tool_call>{", "[TOOL_CALLS] [[", "Ã¤â€™",
         "\x1b[2J", "{", "[/x]", "null", "true", "\ufeff", "\x85", "arguments: {}" * 200)  # fmt: skip
KEYS = (*TEXTS, "role", "label", "messages", "weight", "function_call")
KINDS = ("jsonl", "jsonl", "jsonl", "json", "csv", "tsv", "parquet", "txt")


@dataclass(frozen=True)
class Sample:
    """One damaged file: what it is called and what is in it."""

    name: str
    content: bytes


def sample(seed: int) -> Sample:
    """The damaged file of a seed."""
    chance = random.Random(seed)
    kind = chance.choice(KINDS)
    rows = [json.loads(json.dumps(chance.choice(ROWS))) for _ in range(chance.randint(1, 8))]
    for _ in range(chance.choice((0, 1, 1, 2, 4))):
        at = chance.randrange(len(rows))
        rows[at] = changed(rows[at], chance)
    content = written(rows, kind, chance)
    for _ in range(chance.choice((0, 0, 1, 1, 2, 5))):
        content = chance.choice(BYTES)(content, chance)
    suffix = kind if chance.random() < 0.9 else chance.choice(KINDS)
    return Sample(f"{seed}.{suffix}", content[: 1 << 20])


# --- JSON ---


def changed(value: Any, chance: random.Random) -> Any:
    """The value with one place in it replaced, removed, doubled or buried."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(list(value))
        what = chance.random()
        if what < 0.15:
            return {name: item for name, item in value.items() if name != key}
        if what < 0.25:
            return value | {chance.choice(KEYS): odd(chance)}
        return value | {key: changed(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.85:
        at = chance.randrange(len(value))
        what = chance.random()
        if what < 0.15:
            return value[:at] + value[at + 1 :]
        if what < 0.25:
            return value[:at] + [value[at]] * chance.choice((2, 30)) + value[at:]
        return value[:at] + [changed(value[at], chance)] + value[at + 1 :]
    return odd(chance)


def odd(chance: random.Random) -> Any:
    """Anything that does not belong where it is put."""
    return chance.choice(
        (None, True, False, 0, -1, 5, [], {}, [[]], {"": {}}, chance.choice(HUGE), chance.choice(TEXTS),
         chance.choice(ROWS), [chance.choice(TEXTS)], nested(chance), [USER, ANSWER] * 20)
    )  # fmt: skip


def nested(chance: random.Random) -> Any:
    """Something deep."""
    value: Any = chance.choice((1, "x", None))
    for _ in range(chance.choice((3, 70, 150))):
        value = [value] if chance.random() < 0.5 else {"a": value}
    return value


# --- files ---


def written(rows: list[Any], kind: str, chance: random.Random) -> bytes:
    """The rows as a file of a kind."""
    if kind == "json":
        text = json.dumps(rows, indent=chance.choice((None, 1)), ensure_ascii=chance.random() < 0.5)
        return text.encode("utf-8", "surrogatepass")
    if kind in ("csv", "tsv"):
        return as_table(rows, "\t" if kind == "tsv" else ",")
    if kind == "parquet":
        return as_parquet(rows)
    if kind == "txt":
        texts = [str(row.get("text", row) if isinstance(row, dict) else row) for row in rows]
        return chance.choice(("\n", "\n\n", "\n\n\n")).join(texts).encode("utf-8", "replace")
    end = chance.choice(("\n", "\n", "\r\n", "\n\n", "\n \n"))
    lines = [json.dumps(row, ensure_ascii=chance.random() < 0.5) for row in rows]
    return (end.join(lines) + chance.choice(("", "\n"))).encode("utf-8", "surrogatepass")


def as_table(rows: list[Any], delimiter: str) -> bytes:
    import csv

    flat = [row for row in rows if isinstance(row, dict)]
    names = list(dict.fromkeys(str(name) for row in flat for name in row)) or ["prompt"]
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerow(names)
    for row in flat:
        cells = [row.get(name, "") for name in names]
        writer.writerow([json.dumps(cell) if isinstance(cell, list | dict) else cell for cell in cells])
    return out.getvalue().encode("utf-8", "replace")


def as_parquet(rows: list[Any]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    plain = [{str(key): value if isinstance(value, str) else json.dumps(value) for key, value in row.items()}
             for row in rows if isinstance(row, dict)]  # fmt: skip
    sink = pyarrow.BufferOutputStream()
    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(plain or [{"prompt": "x"}]), sink)
    except (UnicodeEncodeError, pyarrow.ArrowException):
        return b"PAR1 nothing"
    return sink.getvalue().to_pybytes()


# --- bytes ---


def _place(content: bytes, chance: random.Random) -> int:
    return chance.randint(0, len(content))


def flip(content: bytes, chance: random.Random) -> bytes:
    if not content:
        return content
    at = chance.randrange(len(content))
    return content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :]


def insert(content: bytes, chance: random.Random) -> bytes:
    at = _place(content, chance)
    piece = chance.choice(
        (b"\0", b"\xff", b"\xef\xbb\xbf", b"\r", b"\n", b'"', b"{", b"}", b"[", b"]", b",", b"\\", b"\\ud800", b"NaN",
         b"9" * 5000, b"[" * 2000, b'{"a":' * 1500, b"\xed\xa0\x80", b"\xe2\x80\xa8", chance.randbytes(8), b"1e999")
    )  # fmt: skip
    return content[:at] + piece + content[at:]


def cut(content: bytes, chance: random.Random) -> bytes:
    start, end = sorted((_place(content, chance), _place(content, chance)))
    return content[:start] + content[end:] if chance.random() < 0.5 else content[:start]


def double(content: bytes, chance: random.Random) -> bytes:
    start, end = sorted((_place(content, chance), _place(content, chance)))
    return content[:end] + content[start:end] * chance.choice((1, 1, 3)) + content[end:]


STARTS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b", b"PK\x03\x04", b"PAR1", b"\n" * 5000, b"GGUF", b"\0", b"[",
          b"{\n")  # fmt: skip


def lead(content: bytes, chance: random.Random) -> bytes:
    return chance.choice(STARTS) + content


def recode(content: bytes, chance: random.Random) -> bytes:
    text = content.decode("utf-8", "replace")
    return text.encode(chance.choice(("utf-16", "latin-1", "utf-8-sig", "utf-32")), "replace")


def pack(content: bytes, chance: random.Random) -> bytes:
    return gzip.compress(content)


def ends(content: bytes, chance: random.Random) -> bytes:
    return content.replace(b"\n", chance.choice((b"\r\n", b"\r", b"\n\n", b"")))


BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    flip, flip, insert, insert, insert, cut, cut, double, lead, recode, pack, ends,
)  # fmt: skip
