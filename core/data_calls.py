"""Tool calls in rows: which tools are called, whether the arguments are JSON, and whether they fit the tool's schema.

Schemas come with the data and are foreign: only what is listed at `misfit` is looked at, no pattern is run and no
reference followed, so that a check can neither hang nor leave the machine.
"""

from typing import Any

from core.toolcalls import MISTRAL_MARK, NAME_MARK, OPEN_TAG, read_calls

MAX_CALLS, MAX_DEPTH = 64, 32
JSON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "array": (list,),
    "object": (dict,), "null": (type(None),),
}  # fmt: skip
NOT_JSON = "the arguments are not JSON"
Call = tuple[str, Any]
"""The tool's name and its arguments; None where they are missing or no JSON object: servers take neither for a call."""


def calls_of(message: dict[str, Any]) -> list[Call]:
    """The calls of an assistant turn: in ``tool_calls``, or in the text in one of the forms people train."""
    found: list[Call] = []
    for call in message.get("tool_calls") or ():
        arguments = call["function"]["arguments"]
        found.append((call["function"]["name"], None if isinstance(arguments, str) else arguments))
    text = message["content"]
    if text and (NAME_MARK in text or OPEN_TAG in text or MISTRAL_MARK in text):
        found += [(call.name[:80], call.arguments) for call in read_calls(text).calls] or [("", None)]
    return found[:MAX_CALLS]


def schemas_of(tools: list[dict[str, Any]] | None) -> dict[str, Any]:
    """The parameters' schema of each tool by its name, for tools as OpenAI writes them or bare."""
    found = {}
    for tool in tools or ():
        inner = tool.get("function")
        function = inner if isinstance(inner, dict) else tool
        if isinstance(function.get("name"), str):
            found[function["name"]] = function.get("parameters", function.get("input_schema"))
    return found


def call_problem(call: Call, schemas: dict[str, Any]) -> str:
    """What is wrong with a call, in a few words; empty where nothing is. Without schemas only the JSON is judged."""
    name, arguments = call
    if arguments is None:
        return NOT_JSON
    if not schemas:
        return ""
    if name not in schemas:
        return f"no tool is called {name[:40]!r}"
    return misfit(schemas[name], arguments)


def misfit(schema: Any, value: Any, where: str = "", depth: int = 0) -> str:
    """The first way in which a value does not fit a JSON Schema, in a few words; empty where it fits.

    Judged are ``type``, ``enum``, ``const``, ``required``, ``properties``, ``additionalProperties: false`` and
    ``items``; other keywords let everything pass.
    """
    if not isinstance(schema, dict) or depth > MAX_DEPTH:
        return ""
    wanted = schema.get("type")
    names = [wanted] if isinstance(wanted, str) else wanted if isinstance(wanted, list) else []
    known = [name for name in names if isinstance(name, str) and name in JSON_TYPES]
    if known and len(known) == len(names) and not any(_is(value, name) for name in known):
        return f"{where or 'arguments'}: not {' or '.join(known)}"
    choices = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(choices, list) and not any(value == choice and _like(value, choice) for choice in choices):
        return f"{where or 'arguments'}: not one of the values allowed"
    if isinstance(value, dict):
        return _object_misfit(schema, value, where, depth)
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        for item in value[:100]:
            if problem := misfit(schema["items"], item, f"{where}[]", depth + 1):
                return problem
    return ""


def _object_misfit(schema: dict[str, Any], value: dict[str, Any], where: str, depth: int) -> str:
    required = schema.get("required")
    for name in required if isinstance(required, list) else []:
        if isinstance(name, str) and name not in value:
            return f"{where + '.' if where else ''}{name[:40]} is missing"
    given = schema.get("properties")
    properties: dict[str, Any] = given if isinstance(given, dict) else {}
    for name, item in value.items():
        place = f"{where + '.' if where else ''}{name[:40]}"
        if name not in properties:
            if schema.get("additionalProperties") is False:
                return f"{place} is unknown to the tool"
        elif problem := misfit(properties[name], item, place, depth + 1):
            return problem
    return ""


def _is(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, JSON_TYPES[name]) or (
        name == "integer" and isinstance(value, float) and value.is_integer()
    )


def _like(value: Any, choice: Any) -> bool:
    """Python takes True for 1, JSON does not."""
    return isinstance(value, bool) is isinstance(choice, bool)
