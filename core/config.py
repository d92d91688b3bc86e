"""From flags, YAML and presets to a resolved plan that says where each value came from.

Precedence, lowest first: the field's default, the method's preset (``configs/METHOD.yaml``), the size's preset
(``configs/models.yaml``), the person's file, the command line. The word ``auto`` in a file means "not set here".
"""

import difflib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from core.errors import FinetuiError
from core.paths import configs_dir, writing_whole
from core.plan import METHODS, SIZES, Option, Plan, options

OPTIONS: dict[str, Option] = {option.path: option for option in options()}
SECTIONS = {path.rsplit(".", depth)[0] for path in OPTIONS for depth in range(1, path.count(".") + 1)}
MAX_PLAN_BYTES = 1_000_000


@dataclass(frozen=True)
class Resolved:
    """A plan and, for every dotted path, where its value came from."""

    plan: Plan
    sources: dict[str, str]

    def as_yaml(self) -> str:
        """The plan as YAML, each value followed by a comment with its source."""
        lines: list[str] = []
        _annotate(self.plan.model_dump(mode="json"), "", self.sources, lines)
        return "\n".join(lines) + "\n"

    @property
    def fingerprint(self) -> str:
        """Short hash of every value; equal plans have equal fingerprints."""
        return hashlib.sha256(json.dumps(self.plan.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()[:12]


def _annotate(values: dict[str, Any], prefix: str, sources: dict[str, str], lines: list[str]) -> None:
    depth = "  " * prefix.count(".")
    for key, value in values.items():
        path = f"{prefix}{key}"
        if path in SECTIONS:
            lines.append(f"{depth}{key}:")
            _annotate(value, f"{path}.", sources, lines)
        else:
            text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True).splitlines()[0]
            lines.append(f"{f'{depth}{key}: {text}':<56}  # {sources.get(path, 'default')}")


def read_yaml(path: Path) -> dict[str, Any]:
    """The plan file at `path` as nested dictionaries.

    Raises FinetuiError for a missing, oversized, non-UTF-8 or broken file, one whose top level is not a mapping,
    a key written twice, and anchors (a plan has no use for them).
    """
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise FinetuiError(f"The plan {path} cannot be read: {error.strerror}.", "Check the path.") from error
    except UnicodeDecodeError as error:
        raise FinetuiError(f"The plan {path} is not UTF-8 text.", "Save it as UTF-8.") from error
    if len(raw) > MAX_PLAN_BYTES:
        raise FinetuiError(f"The plan {path} is larger than 1 MB.", "Give a plan, not a data file.")
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise FinetuiError(f"The plan {path} uses YAML aliases.", "Write the values out.")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise FinetuiError(
                f"The plan {path} is a {node.id}, not a mapping of keys to values.", "See configs/sft.yaml for the form."
            )
        _check_keys(node, "", path)
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error) or type(error).__name__
        raise FinetuiError(f"The plan {path}{where} is not valid YAML: {problem}.", "Mend that line.") from error


def _check_keys(node: yaml.MappingNode, prefix: str, file: Path) -> None:
    """Refuse unknown and doubled keys, with line and nearest known key."""
    seen: set[str] = set()
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        path = f"{prefix}{key_node.value}"
        if path in seen:
            raise FinetuiError(f"{file}, line {line}: the key {path} stands twice.", "Keep one of them.")
        seen.add(path)
        if path in SECTIONS:
            if isinstance(value_node, yaml.MappingNode):
                _check_keys(value_node, f"{path}.", file)
            elif value_node.value != "auto" and value_node.tag != "tag:yaml.org,2002:null":
                raise FinetuiError(f"{file}, line {line}: {path} needs keys below it.", f"{path} is a section.")
        elif path not in OPTIONS:
            raise unknown_key(path, f"{file}, line {line}: ")


def unknown_key(path: str, where: str = "") -> FinetuiError:
    """The error for a key that no option has, naming the nearest one."""
    known = [*OPTIONS, *SECTIONS]
    nearest = difflib.get_close_matches(path, known, 1, 0.5) or [
        other for other in known if other.rsplit(".", 1)[-1] == path.rsplit(".", 1)[-1]
    ]
    advice = f"Did you mean {nearest[0]}?" if nearest else "`finetui plan` lists every key."
    return FinetuiError(f"{where}there is no option {path!r}.", advice)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as dotted paths, without the values that say ``auto`` where that means "not set here"."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if path in SECTIONS:
            flat |= flatten(value or {}, f"{path}.") if isinstance(value, dict | None) else {}
        elif value != "auto" or "auto" in (OPTIONS[path].choices if path in OPTIONS else ()):
            flat[path] = value
        elif path in ("model.chat_template",):
            flat[path] = value
    return flat


def size_presets() -> dict[str, dict[str, Any]]:
    """``configs/models.yaml`` by size. Each entry has ``about`` (for people) beside the plan's sections."""
    return yaml.safe_load((configs_dir() / "models.yaml").read_text(encoding="utf-8"))


def parse_setting(text: str) -> tuple[str, Any]:
    """One ``key=value`` of ``--set``; the value is read as YAML. Raises FinetuiError for a malformed or unknown key."""
    path, separator, value = text.partition("=")
    path = path.strip()
    if not separator:
        raise FinetuiError(f"--set {text!r} has no '='.", "Write --set key=value, for example --set sft.seed=7.")
    section = next((part for part in ("sft.extra.", "kto.extra.") if path.startswith(part)), None)
    if path not in OPTIONS and not section:
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
    if method and from_file.get("method") not in (None, method):
        from_file["method"] = method

    values: dict[str, Any] = {}
    sources: dict[str, str] = {}

    def lay(layer: dict[str, Any], source: str) -> None:
        for path, value in layer.items():
            values[path] = value
            sources[path] = source

    lay(flatten(read_yaml(configs_dir() / f"{chosen_method}.yaml")), f"preset {chosen_method}.yaml")
    lay({"method": chosen_method}, "command" if method else sources.get("method", "file"))

    def wanted(path: str, default: Any = None) -> Any:
        return settings[path][0] if path in settings else from_file.get(path, default)

    size = wanted("model.size")
    if size is None and not wanted("model.name"):
        size = "7b" if gpu_present else "135m"
        lay({"model.size": size}, "default size" if gpu_present else "no NVIDIA GPU here")
    presets = size_presets()
    if size is not None:
        if str(size) not in presets:
            raise FinetuiError(f"There is no model size {size!r}.", f"Sizes are {', '.join(SIZES)}.")
        preset = presets[str(size)]
        lay(flatten({key: part for key, part in preset.items() if key not in ("about", "original")}), f"size {size}")
        if wanted("kto.values") == "original":
            lay(flatten(preset.get("original", {})), f"size {size}, original's values")
    lay(from_file, f"file {config}")
    for path, (value, source) in settings.items():
        if path.startswith(("sft.extra.", "kto.extra.")):
            stage, _, key = path.split(".", 2)
            merged = {**(values.get(f"{stage}.extra") or {}), key: value}
            lay({f"{stage}.extra": merged}, source)
        else:
            lay({path: value}, source)
    return Resolved(check(values, sources), sources)


def check(values: dict[str, Any], sources: dict[str, str]) -> Plan:
    """A Plan from dotted paths. Raises FinetuiError with the first thing that is wrong and where it came from."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        branch = tree
        *sections, leaf = path.split(".")
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[leaf] = value
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


def load_plan(path: Path) -> Plan:
    """Read a resolved plan of a run back. Raises FinetuiError."""
    return check(flatten(read_yaml(path)), {})
