"""From flags, YAML and presets to a resolved plan that says where each value came from.

Precedence, lowest first: the field's default, the method's preset (``configs/METHOD.yaml``), the size's preset
(``configs/models.yaml``), the person's file, the command line. The word ``auto`` in a file means "not set here".
"""

import difflib
import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from core.errors import FinetuiError
from core.paths import configs_dir, open_regular, writing_whole
from core.plan import SIZES, ExportPlan, Option, Plan, options
from core.stages import METHODS, TRAINING_STAGES
from core.text import clean

OPTIONS: dict[str, Option] = {option.path: option for option in options()}
SECTIONS = {path.rsplit(".", depth)[0] for path in OPTIONS for depth in range(1, path.count(".") + 1)}
MAPPINGS = tuple(f"{path}." for path, option in OPTIONS.items() if option.kind is dict)
"""Starts of the paths whose last part is the person's own word: ``sft.extra.``, ``sft.data.columns.`` …"""
MAX_PLAN_BYTES = 1_000_000
REQUEST = "export.json"
"""Beside the plan: what was asked for later, which wins over its section ``export``."""


@dataclass(frozen=True)
class Resolved:
    """A plan and, for every dotted path, where its value came from."""

    plan: Plan
    sources: dict[str, str]

    def as_yaml(self) -> str:
        """The plan as YAML, each value followed by a comment with its source."""
        lines: list[str] = []
        _annotate(self._values(), "", self.sources, lines)
        return "\n".join(lines) + "\n"

    def _values(self) -> dict[str, Any]:
        """Every value of the plan, without the settings of a stage that this method does not have."""
        return self.plan.model_dump(mode="json", exclude=set(TRAINING_STAGES) - set(self.plan.training_stages))

    @property
    def fingerprint(self) -> str:
        """Short hash of every value; equal plans have equal fingerprints."""
        return hashlib.sha256(json.dumps(self._values(), sort_keys=True).encode()).hexdigest()[:12]


class _OneLine(yaml.SafeDumper):
    """Writes every value on one line, so that a comment can follow it."""


def _text_node(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_OneLine.add_representer(str, _text_node)


def _annotate(values: dict[str, Any], prefix: str, sources: dict[str, str], lines: list[str]) -> None:
    depth = "  " * prefix.count(".")
    for key, value in values.items():
        path = f"{prefix}{key}"
        if path in SECTIONS:
            lines.append(f"{depth}{key}:")
            _annotate(value, f"{path}.", sources, lines)
        else:
            text = yaml.dump(value, Dumper=_OneLine, default_flow_style=True, width=MAX_PLAN_BYTES, allow_unicode=True)
            lines.append(f"{f'{depth}{key}: {text.split(chr(10))[0]}':<56}  # {clean(sources.get(path, 'default'))}")


def read_yaml(path: Path) -> dict[str, Any]:
    """The plan file at `path` as nested dictionaries.

    Raises FinetuiError for a missing, oversized, non-UTF-8 or broken file, one whose top level is not a mapping,
    a key written twice, and anchors (a plan has no use for them).
    """
    try:
        with open_regular(path) as stream:
            raw = stream.read(MAX_PLAN_BYTES + 1)
        if len(raw) > MAX_PLAN_BYTES:
            raise FinetuiError(f"The plan {path} is larger than 1 MB.", "Give a plan, not a data file.")
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise FinetuiError(f"The plan {path} cannot be read: {error.strerror}.", "Check the path.") from error
    except UnicodeDecodeError as error:
        raise FinetuiError(f"The plan {path} is not UTF-8 text.", "Save it as UTF-8.") from error
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise FinetuiError(f"The plan {path} uses YAML aliases.", "Write the values out.")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            found = "list" if isinstance(node, yaml.SequenceNode) else "single value"
            advice = "See configs/sft.yaml for the form."
            raise FinetuiError(f"The plan {path} is a {found}, not keys with values.", advice)
        _check_keys(node, "", path)
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = " ".join((getattr(error, "problem", None) or str(error) or type(error).__name__).split())
        raise FinetuiError(f"The plan {path}{where} is not valid YAML: {problem}.", "Mend that line.") from error


def _check_keys(node: yaml.MappingNode, prefix: str, file: Path) -> None:
    """Refuse unknown and doubled keys, with line and nearest known key."""
    seen: set[str] = set()
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise FinetuiError(f"{file}, line {line}: a key must be a word.", "See configs/sft.yaml for the form.")
        path = f"{prefix}{key_node.value}"
        if path in seen:
            raise FinetuiError(f"{file}, line {line}: the key {path} stands twice.", "Keep one of them.")
        seen.add(path)
        if path in SECTIONS:
            if isinstance(value_node, yaml.MappingNode):
                _check_keys(value_node, f"{path}.", file)
            elif value_node.value != "auto" and value_node.tag != "tag:yaml.org,2002:null":
                raise FinetuiError(f"{file}, line {line}: {path} needs keys below it.", f"{path} is a section.")
        elif path not in OPTIONS and not path.startswith(MAPPINGS):
            raise unknown_key(path, f"{file}, line {line}: ")
        elif isinstance(value_node, yaml.MappingNode) and f"{path}.".startswith(MAPPINGS):
            _check_keys(value_node, f"{path}.", file)


class UnknownKeyError(FinetuiError):
    """A key that no option has."""


def unknown_key(path: str, where: str = "") -> FinetuiError:
    """The error for a key that no option has, naming the nearest one."""
    known = [*OPTIONS, *SECTIONS]
    nearest = difflib.get_close_matches(path, known, 1, 0.5) or [
        other for other in known if other.rsplit(".", 1)[-1] == path.rsplit(".", 1)[-1]
    ]
    advice = f"Did you mean {nearest[0]}?" if nearest else "`finetui plan` lists every key."
    return UnknownKeyError(f"{where}there is no option {path!r}.", advice)


def flatten(tree: dict[str, Any], prefix: str = "", *, keep_auto: bool = False) -> dict[str, Any]:
    """Nested dictionaries as dotted paths; `keep_auto` False leaves out each ``auto`` that means "not set here"."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if path in SECTIONS:
            flat |= flatten(value, f"{path}.", keep_auto=keep_auto) if isinstance(value, dict) else {}
        elif keep_auto or value != "auto" or path == "model.chat_template" or "auto" in OPTIONS[path].choices:
            flat[path] = value
    return flat


@functools.cache
def _method_preset(method: str) -> dict[str, Any]:
    """``configs/METHOD.yaml``, read once, as dotted paths."""
    return flatten(read_yaml(configs_dir() / f"{method}.yaml"))


@functools.cache
def size_presets() -> dict[str, dict[str, Any]]:
    """``configs/models.yaml`` by size, read once. Each entry has ``about`` (for people) beside the plan's sections."""
    return yaml.safe_load((configs_dir() / "models.yaml").read_text(encoding="utf-8"))


def parse_setting(text: str) -> tuple[str, Any]:
    """One ``key=value`` of ``--set``; the value is read as YAML. Raises FinetuiError for a malformed or unknown key."""
    path, separator, value = text.partition("=")
    path = path.strip()
    if not separator:
        raise FinetuiError(f"--set {text!r} has no '='.", "Write --set key=value, for example --set sft.seed=7.")
    if path not in OPTIONS and not path.startswith(MAPPINGS):
        raise unknown_key(path, "--set: ")
    try:
        return path, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise FinetuiError(f"--set {path}: the value {value!r} cannot be read.", "Quote it as YAML.") from error


def resolve(
    method: str | None = None,
    config: Path | None = None,
    settings: dict[str, tuple[Any, str]] | None = None,
    *,
    gpu_present: bool,
) -> Resolved:
    """Put the layers together and check them.

    `settings` maps a dotted path to (value, source) from the command line or the wizard. `gpu_present` decides the
    default size. Raises FinetuiError naming key, line and nearest key for anything that does not fit.
    """
    settings = settings or {}
    tree = read_yaml(config) if config else {}
    from_file = flatten(tree)
    chosen_method = method or from_file.get("method") or "sft"
    if chosen_method not in METHODS:
        raise FinetuiError(f"There is no method {chosen_method!r}.", f"Methods are {', '.join(METHODS)}.")
    if method:
        from_file.pop("method", None)

    values: dict[str, Any] = {}
    sources: dict[str, str] = {}

    def lay(layer: dict[str, Any], source: str) -> None:
        for path, value in layer.items():
            values[path] = value
            sources[path] = source

    lay(_method_preset(chosen_method), f"preset {chosen_method}.yaml")
    lay({"method": chosen_method}, "command" if method else sources.get("method", "file"))

    def wanted(path: str, default: Any = None) -> Any:
        return settings[path][0] if path in settings else from_file.get(path, default)

    size = wanted("model.size")
    if size is None and not wanted("model.name"):
        size = "7b" if gpu_present else "135m"
        lay({"model.size": size}, "default size" if gpu_present else "no NVIDIA GPU here")
    if size is not None and str(size) not in SIZES:
        raise FinetuiError(f"There is no model size {size!r}.", f"Sizes are {', '.join(SIZES)}.")
    presets = size_presets()
    if size is not None:
        preset = {key: part for key, part in presets[str(size)].items() if key not in ("about", "original")}
        lay(flatten(preset), f"size {size}")
    original = flatten(presets[str(size or "7b")]["original"]) if wanted("kto.values") == "original" else {}
    lay(original, "the original's values")
    lay(from_file, f"file {config}")
    if "kto.values" in settings:
        lay(original, "the original's values")
    for path, (value, source) in settings.items():
        if mapping := next((start for start in MAPPINGS if path.startswith(start)), ""):
            whole, key = mapping[:-1], path.removeprefix(mapping)
            lay({whole: {**(values.get(whole) or {}), key: value}}, source)
        else:
            lay({path: value}, source)
    prompt, longest = (values.get(path, OPTIONS[path].default) for path in ("kto.max_prompt_length", "kto.max_length"))
    if wanted("kto.max_prompt_length") is None and _longer(prompt, longest):
        lay({"kto.max_prompt_length": longest}, "kto.max_length")
    flags = {path: value for path, (value, _) in settings.items()}
    for path, off in other_sources([flags, from_file]).items():
        if values.get(path):
            lay({path: off}, "own data given" if path.endswith(".demo") else "another source given")
    stages = str(values["method"]).split("-")
    for path in [path for path in values if path.split(".")[0] in set(TRAINING_STAGES) - set(stages)]:
        del values[path], sources[path]
    return Resolved(check(values, sources), sources)


def _longer(one: Any, other: Any) -> bool:
    """Whether a length is larger than another, as far as they are lengths: what is none is refused later."""
    try:
        return int(one) > int(other) > 0
    except (TypeError, ValueError):
        return False


def other_sources(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """What switches off every source of rows but the one named: own rows win over the demo's, a layer over the next.

    `files` go together with a `file`, and are added to the one that a lower layer names.
    """
    off: dict[str, Any] = {}
    for stage in TRAINING_STAGES:
        file, files, dataset, demo = (f"{stage}.data.{name}" for name in ("file", "files", "dataset", "demo"))
        none: dict[str, Any] = {file: None, files: {}, dataset: None, demo: False}
        for layer in layers:
            chosen = [path for path in (file, files, dataset) if layer.get(path)] or ([demo] if layer.get(demo) else [])
            if chosen:
                kept = {*chosen, *([file] if chosen == [files] else [])}
                off |= {path: value for path, value in none.items() if path not in kept}
                break
    return off


def check(values: dict[str, Any], sources: dict[str, str]) -> Plan:
    """A Plan from dotted paths. Raises FinetuiError with the first thing that is wrong and where it came from."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        branch = tree
        *sections, leaf = path.split(".")
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[leaf] = value
    for path, value in values.items():
        if isinstance(value, bool) and path in OPTIONS and OPTIONS[path].kind in (int, float):
            source = f", from {sources[path]}" if path in sources else ""
            raise FinetuiError(f"{path}: {value} is not a number{source}.", f"{OPTIONS[path].help}.")
    try:
        return Plan.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        path = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        given = f" (given: {str(first['input'])[:60]!r})" if path in OPTIONS else ""
        source = f", from {sources[path]}" if path in sources else ""
        raise FinetuiError(
            f"{path or 'The plan'}: {message}{given}{source}.",
            OPTIONS[path].help + "." if path in OPTIONS else "",
        ) from error


def save_plan(resolved: Resolved, path: Path) -> None:
    """Write the annotated plan whole."""
    with writing_whole(path) as stream:
        stream.write(f"# finetui plan {resolved.fingerprint}; each value is followed by where it came from\n")
        stream.write(resolved.as_yaml())


def with_request(plan: Plan, folder: Path) -> Plan:
    """The plan with what was asked for later. Raises FinetuiError for a request that cannot be read."""
    path = folder / REQUEST
    try:
        raw = path.read_bytes()
    except OSError:
        return plan
    try:
        plan.export = ExportPlan.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise FinetuiError(
            f"{path} cannot be used: {'.'.join(map(str, first['loc']))} {first['msg']}.", "Delete that file."
        ) from error
    return plan


def load_plan(path: Path) -> Plan:
    """Read a resolved plan of a run back; a key that it does not have has its default. Raises FinetuiError."""
    try:
        return check(flatten(read_yaml(path), keep_auto=True), {})
    except UnknownKeyError as error:
        error.advice += " If another version of finetui made this run, go on with that one, or delete the line."
        raise
