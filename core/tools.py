"""Tools as JSON Schemas: read from a row or a file, and what is wrong with a call of one of them.

A schema refers to nothing outside itself: nothing is ever fetched.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import FinetuiError
from core.text import clean
from core.toolcalls import ToolCall

ADVICE = 'Give a JSON list of {"type": "function", "function": {"name": …, "parameters": {…}}}.'
SCHEMA_KEYS = ("parameters", "inputSchema", "input_schema")
MAX_FILE_BYTES = 20_000_000


@dataclass(frozen=True)
class Tool:
    """A tool by name with the JSON Schema of its arguments."""

    name: str
    schema: dict[str, Any]

    @property
    def required(self) -> list[str]:
        """Arguments that a call must have."""
        found = self.schema.get("required")
        return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []

    @functools.cached_property
    def _validator(self) -> Any:
        from jsonschema.validators import Draft202012Validator, validator_for
        from referencing import Registry

        kind = validator_for(self.schema, default=Draft202012Validator)
        kind.check_schema(self.schema)
        return kind(self.schema, registry=Registry())

    def fault(self, arguments: Any) -> str:
        """What the schema says against these arguments; empty where they are valid."""
        from jsonschema.exceptions import ValidationError

        try:
            self._validator.validate(arguments)
        except ValidationError as error:
            where = "".join(f".{part}" for part in error.absolute_path)
            return clean(f"{where.removeprefix('.')}: {error.message}".removeprefix(": "), 200)
        except Exception as error:  # a schema that breaks on these arguments alone: a reference, a pattern, its depth
            return f"its schema cannot be applied: {clean(f'{type(error).__name__}: {error}', 120)}"
        return ""

    def refuse_broken(self) -> None:
        """Raises FinetuiError where the schema is none, or refers to something outside itself."""
        from jsonschema.exceptions import SchemaError, ValidationError
        from referencing.exceptions import Unresolvable

        try:
            self._validator.validate({})
        except ValidationError:
            return
        except SchemaError as error:
            reason = clean(error.message, 160)
        except Unresolvable as error:
            reason = f"it refers to {clean(getattr(error, 'ref', 'something outside'), 100)}, which is not in it"
        except Exception as error:  # a foreign schema: whatever the library makes of it is the reason
            reason = clean(f"{type(error).__name__}: {error}", 160)
        else:
            return
        raise FinetuiError(f"The schema of the tool {clean(self.name, 60)} cannot be used: {reason}.", "Mend it.")


def tools_of(given: Any) -> dict[str, Tool]:
    """Tools by name, from a list or one written as JSON: OpenAI's, bare ones, or those of MCP.

    Raises FinetuiError for what is no tool; a tool without a schema takes any arguments.
    """
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            raise FinetuiError("The tools are no JSON.", ADVICE) from None
    if isinstance(given, dict) and isinstance(given.get("tools"), list):
        given = given["tools"]
    if not isinstance(given, list):
        raise FinetuiError(f"The tools are {type(given).__name__}, not a list.", ADVICE)
    found: dict[str, Tool] = {}
    for number, entry in enumerate(given, 1):
        function = entry.get("function", entry) if isinstance(entry, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise FinetuiError(f"Tool {number} of the list has no name.", ADVICE)
        schema = next((function[key] for key in SCHEMA_KEYS if function.get(key) is not None), {"type": "object"})
        if not isinstance(schema, dict):
            raise FinetuiError(f"The schema of the tool {clean(function['name'], 60)} is no object.", ADVICE)
        found[function["name"]] = Tool(function["name"], schema)
    return found


def read_tools(path: Path) -> dict[str, Tool]:
    """The tools of a JSON file, every schema checked. Raises FinetuiError."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_FILE_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise FinetuiError(f"{path} cannot be read: {error.strerror}.", "Check the path.") from error
    except UnicodeDecodeError as error:
        raise FinetuiError(f"{path} is not UTF-8 text.", ADVICE) from error
    if len(raw) > MAX_FILE_BYTES:
        raise FinetuiError(f"{path} is larger than 20 MB.", "Give a file of tools, not of rows.")
    tools = tools_of(text)
    if not tools:
        raise FinetuiError(f"{path} names no tool.", ADVICE)
    for tool in tools.values():
        tool.refuse_broken()
    return tools


def call_fault(call: ToolCall, tools: Mapping[str, Tool]) -> str:
    """What is wrong with a call of one of these tools; empty where nothing is."""
    if call.arguments is None:
        return "its arguments are no JSON object"
    if (tool := tools.get(call.name)) is None:
        return f"there is no tool {clean(call.name, 60)!r}"
    return tool.fault(call.arguments)
