"""From a row of a file to the conversations it holds: which shapes are understood, and why a row cannot be used.

No torch, no tokenizer. A row is used or has one reason why not; what had to be repaired on the way is named.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from core.data_files import Unreadable
from core.text import clean

Message = dict[str, Any]
Pair = tuple[list[Message], bool | None]

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "function_call": "assistant", "tool": "tool", "function": "tool", "observation": "tool",
    "function_response": "tool",
}  # fmt: skip
LABELS: dict[Any, bool] = {
    "true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False, "yes": True, "no": False,
    "good": True, "bad": False, "desirable": True, "undesirable": False, "chosen": True, "rejected": False,
}  # fmt: skip
MAX_DEPTH = 64
TEXT_ROLE = "text"
"""The role of a plain text, which is trained as a whole and gets no template."""


class RowError(ValueError):
    """This row cannot be used; the message is the reason shown to the person."""


# --- which column is what ---

COLUMNS = {
    "messages": ("messages", "conversations", "conversation", "dialog", "dialogue"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "prompt": ("prompt", "instruction", "question", "query", "input"),
    "context": ("input", "context"),
    "completion": ("completion", "response", "output", "answer"),
    "system": ("system",),
    "history": ("history",),
    "tools": ("tools", "functions"),
    "label": ("label",),
    "text": ("text",),
}
"""What a column can be, and the names under which it is looked for, first match first."""
BODIES = ("messages", "chosen", "rejected", "prompt", "completion", "text")
"""The parts of which one shape of row is made; naming one of them names the shape."""
ROLE_HELP = {
    "messages": "list of turns, role/content or from/value",
    "chosen": "the better answer of a pair",
    "rejected": "the worse answer of a pair",
    "prompt": "what is asked: text or turns",
    "context": "text that goes below the prompt",
    "completion": "the answer: text or turns",
    "system": "system prompt before the rest",
    "history": "earlier exchanges, pairs of texts",
    "tools": "the tools' JSON schemas",
    "label": "whether the answer is good, for KTO",
    "text": "plain text, trained as it stands",
}


def names_of(columns: Mapping[str, str] | None) -> dict[str, tuple[str, ...]]:
    """Under which column names each part is looked for, with the person's choice laid over the usual ones.

    An empty name switches a part off. Who names one of the BODIES has chosen the shape: the others are not looked for.
    """
    if not columns:
        return COLUMNS
    names = dict(COLUMNS)
    if any(columns.get(part) for part in BODIES):
        names |= {part: () for part in (*BODIES, "context", "history")}
    return names | {part: (name,) if name else () for part, name in columns.items()}


def _first(row: dict[str, Any], names: tuple[str, ...]) -> Any:
    for name in names:
        if (value := row.get(name)) is not None:
            return value
    return None


SHAPE_PARTS = {
    "messages": ("messages",), "sharegpt": ("messages",), "prompt": ("prompt", "context", "history", "completion"),
    "alpaca": ("prompt", "context", "history", "completion"), "pairs": ("prompt", "chosen", "rejected"),
    "pairs, prompt implicit": ("chosen", "rejected"), TEXT_ROLE: ("text",),
}  # fmt: skip
"""The parts of which each shape of row is made; system prompt, tools and label go with all but plain text."""


def mapped_parts(
    columns: Iterable[str], mapping: Mapping[str, str] | None, shapes: Iterable[str]
) -> dict[str, str]:
    """Which part is read from which of a file's columns, for the shapes that were found in it."""
    there, names = set(columns), names_of(mapping)
    wanted = [part for shape in shapes for part in SHAPE_PARTS.get(shape, ())]
    if any(shape != TEXT_ROLE for shape in shapes):
        wanted += ["system", "tools", "label"]
    found: dict[str, str] = {}
    for part in dict.fromkeys(wanted):
        name = next((name for name in names[part] if name in there and name not in found.values()), "")
        if name:
            found[part] = name
    return found


class Reading(NamedTuple):
    """What one row holds: its conversations, the tools it names, and what was repaired on the way.

    A preference pair is two conversations, the better one first.
    """

    pairs: list[Pair]
    tools: list[Message] | None
    repairs: list[str]
    shape: str


def read_row(row: Any, names: Mapping[str, tuple[str, ...]] = COLUMNS) -> Reading:
    """The conversations of one row. Raises RowError with the reason it cannot be used.

    Shapes: a list of turns (role/content or from/value); ``prompt``/``completion`` and their kin (alpaca's
    instruction/input/output, question/answer); ``chosen``/``rejected`` with or without ``prompt``, which give a
    desirable and an undesirable conversation; ``text``. `names` says where each part is looked for.
    """
    if not isinstance(row, dict):
        if isinstance(row, Unreadable):
            raise RowError(row.reason)
        raise RowError(f"a row must be a JSON object, not {type(row).__name__}")
    repairs: list[str] = []
    turns = _first(row, names["messages"])
    if turns is not None and not ("chosen" in row and "rejected" in row and names["chosen"]):
        messages = _messages(turns, repairs)
        shape = "messages"
        if turns and isinstance(turns[0], dict) and "from" in turns[0]:
            shape = "sharegpt"
        pairs: list[Pair] = [(messages, _label(row, names, repairs))]
    else:
        shape, pairs = _other_shape(row, names, repairs)
    system = _first(row, names["system"])
    if isinstance(system, str) and system.strip() and shape != TEXT_ROLE:
        _check_json(system)
        pairs = [(_with_system(messages, system), label) for messages, label in pairs]
    given = _first(row, names["tools"])
    tools = _tools(given, repairs) if given else None
    return Reading(pairs, tools, repairs, shape)


def _other_shape(
    row: dict[str, Any], names: Mapping[str, tuple[str, ...]], repairs: list[str]
) -> tuple[str, list[Pair]]:
    chosen, rejected = _first(row, names["chosen"]), _first(row, names["rejected"])
    prompt, completion = _first(row, names["prompt"]), _first(row, names["completion"])
    if chosen is not None and rejected is not None:
        shape = "pairs" if prompt is not None else "pairs, prompt implicit"
        if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
            prompt, chosen, rejected = _implicit(chosen, rejected)
        return shape, [(_joined(prompt, chosen, repairs), True), (_joined(prompt, rejected, repairs), False)]
    if prompt is not None and completion is not None:
        context = _first(row, names["context"])
        if context is prompt:
            context = None
        shape = "alpaca" if "instruction" in row and context is not None else "prompt"
        if isinstance(prompt, str) and isinstance(context, str) and context.strip():
            prompt = f"{prompt}\n\n{context}"
        prompt = _with_history(prompt, _first(row, names["history"]))
        return shape, [(_joined(prompt, completion, repairs), _label(row, names, repairs))]
    text = _first(row, names["text"])
    if isinstance(text, str):
        if not text.strip():
            raise RowError("the text is empty")
        _check_json(text)
        return TEXT_ROLE, [([{"role": TEXT_ROLE, "content": text}], None)]
    found = ", ".join(sorted(clean(key, 30) for key in row)[:6]) or "nothing"
    raise RowError(f"no conversation found (the row has: {found})")


def conversations_of(row: Any, columns: Mapping[str, str] | None = None) -> tuple[list[Pair], list[str]]:
    """The conversations of one row as (messages, label), and what had to be repaired. Raises RowError."""
    reading = read_row(row, names_of(columns))
    return reading.pairs, reading.repairs


def _implicit(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Prompt and two answers of texts that begin alike, as TRL's `extract_prompt` splits them: at the last blank."""
    same = next(
        (at for at, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other),
        min(len(chosen), len(rejected)),
    )
    at = chosen.rfind(" ", 0, same)
    if at <= 0:
        raise RowError("chosen and rejected have no beginning in common that could be the prompt")
    return chosen[:at], chosen[at:].lstrip(), rejected[at:].lstrip()


def _with_system(messages: list[Message], system: str) -> list[Message]:
    return messages if messages[0]["role"] == "system" else [{"role": "system", "content": system}, *messages]


def _with_history(prompt: Any, history: Any) -> Any:
    """Earlier exchanges, as pairs of texts, before the prompt."""
    if not isinstance(history, list) or not history or not isinstance(prompt, str):
        return prompt
    turns: list[Message] = []
    for exchange in history:
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise RowError("the history is not a list of pairs")
        turns += [{"role": "user", "content": exchange[0]}, {"role": "assistant", "content": exchange[1]}]
    return [*turns, {"role": "user", "content": prompt}]


def _joined(prompt: Any, answer: Any, repairs: list[str]) -> list[Message]:
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
    after = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    if not isinstance(before, list) or not isinstance(after, list):
        raise RowError("prompt and answer must be text or lists of messages")
    if before and after and after[: len(before)] == before:  # the answer's turns begin with the prompt's
        before = []
    return _messages([*before, *after], repairs)


# --- turns ---


def _messages(turns: Any, repairs: list[str]) -> list[Message]:
    if not isinstance(turns, list):
        raise RowError(f"the conversation is {type(turns).__name__}, not a list of messages")
    messages = [_message(turn, repairs) for turn in turns]
    first = ""
    for message in messages:
        role = message["role"]
        if role == "assistant":
            if not first:
                raise RowError("nothing stands before the first assistant turn")
            return messages
        if role != "system":
            first = role
    raise RowError("no assistant turn")


def _message(turn: Any, repairs: list[str]) -> Message:
    if not isinstance(turn, dict):
        raise RowError("a message is not an object")
    role, content = turn.get("role"), turn.get("content")
    if role is None:
        role = turn.get("from")
    if content is None:
        content = turn.get("value")
    if not isinstance(role, str):
        raise RowError("a message has no role")
    known = ROLES.get(role) or ROLES.get(role.lower())
    if known is None:
        raise RowError(f"unknown role {role[:30]!r}")
    if len(turn) == 2 and content.__class__ is str and content:  # most turns
        if not content.isascii():
            _check_json(content)
        return {"role": known, "content": content}
    return _full_message(known, content, turn, repairs)


def _full_message(role: str, content: Any, turn: Message, repairs: list[str]) -> Message:
    """A turn with more than role and text."""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(part["text"] if isinstance(part.get("text"), str) else "" for part in content)
    calls = _tool_calls(turn.get("tool_calls"), repairs)
    if not calls and isinstance(turn.get("function_call"), dict):
        calls = _tool_calls([turn["function_call"]], repairs)
    if content is None and not calls:
        raise RowError("a turn has neither content nor tool_calls")
    if content is not None and not isinstance(content, str):
        raise RowError(f"content is {type(content).__name__}, not text")
    _check_json([content, calls])
    message: Message = {"role": role, "content": content}
    if calls:
        message["tool_calls"] = calls
    elif not content and role == "assistant":
        raise RowError("an assistant turn is empty")
    if role == "assistant" and turn.get("weight") in (0, 0.0) and turn.get("weight") is not False:
        message["weight"] = 0
    if role == "tool":
        message |= {key: turn[key] for key in ("name", "tool_call_id") if isinstance(turn.get(key), str)}
        _check_json(message)
    return message


def _check_json(value: Any, depth: int = 0) -> None:
    """Refuse what neither a template nor a tokenizer can take: Parquet's types, deep nesting, half surrogate pairs."""
    if depth > MAX_DEPTH:
        raise RowError("nested too deeply")
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise RowError("text holds half a surrogate pair, which no tokenizer can read") from None
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str) or not key.isascii():
                _check_json(key, depth + 1)
            _check_json(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_json(item, depth + 1)
    elif not isinstance(value, bool | int | float | None):
        raise RowError(f"a value is {type(value).__name__}, which JSON cannot hold")


def _tool_calls(calls: Any, repairs: list[str]) -> list[Message]:
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
        entry: Message = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        found.append({"id": call["id"], **entry} if isinstance(call.get("id"), str) else entry)
    return found


def _tools(given: Any, repairs: list[str]) -> list[Message] | None:
    """The row's tool schemas for the template: a list, or one written as a JSON string (as Parquet files have it)."""
    _check_json(given)
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            given = None
        _check_json(given)
    if isinstance(given, list) and all(isinstance(tool, dict) for tool in given):
        return given or None
    repairs.append("its tools are no list of schemas and were left out")
    return None


def _label(row: dict[str, Any], names: Mapping[str, tuple[str, ...]], repairs: list[str]) -> bool | None:
    label = _first(row, names["label"])
    if label is None or label is True or label is False:
        return label
    if label == "":
        return None
    if not isinstance(label, str | int | float):
        raise RowError(f"the label is {type(label).__name__}, neither true nor false")
    word = str(label).strip().lower()
    if word not in LABELS:
        raise RowError(f"the label {str(label)[:30]!r} is neither true nor false")
    repairs.append(f"label {str(label)!r} read as {LABELS[word]}")
    return LABELS[word]


def label_reason(method: str, label: bool | None, plain: bool, include_undesirable: bool) -> str:
    """Why a method does not take a conversation with this label; empty where it does."""
    if method == "kto":
        if plain:
            return "plain text has no prompt, which KTO needs"
        return "no label, which KTO needs" if label is None else ""
    return "label is false: SFT would teach a bad answer" if label is False and not include_undesirable else ""
