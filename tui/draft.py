"""The wizard's draft: everything typed so far, kept on disk, and the plan and the command line it makes. No widgets."""

import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from core.backend import gpu_present, settle
from core.config import OPTIONS, Resolved, flatten, resolve, size_presets
from core.errors import FinetuiError
from core.flags import flags_of
from core.paths import cache_dir, configs_dir, remove_torn, replacing, torn_beside
from core.plan import Option, Plan
from core.sources import model_source
from core.stages import Method

SOURCE = "wizard"
STEPS = ("Method", "Model", "Data", "Settings", "Review")
DEMO = "demo.yaml"
ELSEWHERE = ("method", "model.size", "model.name")  # these have pages of their own


class RowsDraft(BaseModel):
    """Where the rows of a stage come from. What is typed for the other kinds is kept."""

    kind: Literal["demo", "file", "hub"] = "demo"
    file: str = ""
    dataset: str = ""
    dataset_config: str = ""
    dataset_split: str = ""
    dataset_file: str = ""
    dataset_revision: str = ""
    columns: dict[str, str] = {}
    """Which column is what, where the person said so."""


class Draft(BaseModel):
    """A run being planned. Texts stand as they were typed."""

    model_config = ConfigDict(validate_assignment=True)

    step: int = Field(default=0, ge=0, le=len(STEPS) - 1)
    method: Method = "sft-kto"
    size: str = ""
    """Empty: what suits this machine."""
    model: str = ""
    """A model of one's own; wins over `size`."""
    data: dict[str, RowsDraft] = Field(default_factory=lambda: {"sft": RowsDraft(), "kto": RowsDraft()})
    values: dict[str, str] = {}
    """Settings that were changed, by dotted path; an empty text is the preset's value again."""

    @property
    def stages(self) -> list[str]:
        return self.method.split("-")

    def fitting_size(self) -> str:
        """The chosen size, else the default of this machine; empty for a model of one's own."""
        return "" if self.model.strip() else self.size or ("7b" if gpu_present() else "135m")

    def is_demo(self) -> bool:
        """Whether this is the demo, perhaps with settings changed."""
        return (
            self.method == "sft-kto"
            and self.fitting_size() == "135m"
            and all(self.data[stage].kind == "demo" for stage in self.stages)
        )

    @property
    def untouched(self) -> bool:
        """Whether nothing was chosen yet but perhaps the method."""
        return self == Draft(method=self.method)

    def changed(self) -> dict[str, str]:
        """The settings that differ from the presets, of the chosen stages only."""
        return {
            path: text.strip()
            for path, text in self.values.items()
            if text.strip() and path in OPTIONS and applies(path, self.stages)
        }

    def chosen(self) -> dict[str, Any]:
        """Model and rows as the plan's values, by dotted path; none for the demo."""
        if self.is_demo():
            return {}
        values: dict[str, Any] = {}
        if own := self.model.strip():
            values["model.name"] = own
        elif self.size:
            values["model.size"] = self.size
        for stage in self.stages:
            rows = self.data[stage]
            values[f"{stage}.data.demo"] = rows.kind == "demo"
            if rows.kind == "file":
                values[f"{stage}.data.file"] = rows.file.strip() or None
            elif rows.kind == "hub":
                values[f"{stage}.data.dataset"] = rows.dataset.strip() or None
                for name in ("dataset_config", "dataset_file", "dataset_revision"):
                    values[f"{stage}.data.{name}"] = getattr(rows, name).strip() or None
                if rows.dataset_split.strip():
                    values[f"{stage}.data.split"] = rows.dataset_split.strip()
            if rows.columns and rows.kind != "demo":
                values[f"{stage}.data.columns"] = dict(rows.columns)
        return values


def applies(path: str, stages: list[str]) -> bool:
    """Whether a setting belongs to the chosen stages and to no other page."""
    section = path.split(".")[0]
    return path not in ELSEWHERE and (section not in ("sft", "kto") or section in stages)


def parsed(option: Option, text: str) -> Any:
    """What was typed for an option as the plan takes it. Raises FinetuiError for what is not even YAML."""
    if option.choices and option.kind is not list or option.kind is str:
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise FinetuiError(f"{option.path}: {text[:60]!r} cannot be read.", f"{option.help}.") from error


@dataclass(frozen=True)
class Checked:
    """What a draft makes: the plan settled for this machine, and every problem by dotted path ("" is the whole plan).

    The plan leaves out the values that are wrong; it is None where not even that gives one.
    """

    resolved: Resolved | None
    problems: dict[str, FinetuiError]
    demo: bool
    model: str = ""
    """Where a model of one's own was found."""


def checked(draft: Draft) -> Checked:
    """Resolve a draft and collect all that is wrong with it, not only the first."""
    values: dict[str, tuple[Any, str]] = {path: (value, SOURCE) for path, value in draft.chosen().items()}
    problems: dict[str, FinetuiError] = _missing(draft)
    for path, text in draft.changed().items():
        try:
            values[path] = (parsed(OPTIONS[path], text), SOURCE)
        except FinetuiError as error:
            problems[path] = error
    config = configs_dir() / DEMO if draft.is_demo() else None
    while True:
        try:
            resolved = resolve(draft.method, config, values, gpu_present=gpu_present())
            break
        except FinetuiError as error:
            path = error.message.split(":", 1)[0]
            if path not in values:
                problems[""] = error
                return Checked(None, problems, draft.is_demo())
            problems[path] = error
            del values[path]
    try:
        resolved = settle(resolved)
    except FinetuiError as error:
        problems["model"] = error
    return Checked(resolved, problems, draft.is_demo())


def with_model(found: Checked) -> Checked:
    """The same with a look at the model itself: a folder without weights or an unknown run is a problem."""
    if found.resolved is None or "model.name" in found.problems:
        return found
    try:
        source = model_source(found.resolved.plan.model, lambda text: None, fetch=False)
    except FinetuiError as error:
        return replace(found, problems={**found.problems, "model.name": error})
    where = f"the adapter {source.adapter} on {source.base}" if source.adapter else source.base
    place = "" if source.local else ", from the Hub when the run starts, if it is not here"
    return replace(found, model=f"✔ {where}{place}. Clear the line to take one from the table.")


def _missing(draft: Draft) -> dict[str, FinetuiError]:
    """Rows that are not named yet."""
    found = {}
    for stage in draft.stages:
        rows = draft.data[stage]
        if rows.kind == "file" and not rows.file.strip():
            found[f"{stage}.data.file"] = FinetuiError(f"No file is named for {stage.upper()}.", "Type its path.")
        elif rows.kind == "hub" and not rows.dataset.strip():
            found[f"{stage}.data.dataset"] = FinetuiError(
                f"No Hub data set is named for {stage.upper()}.", "Type OWNER/NAME."
            )
    return found


def command_line(draft: Draft, runs_folder: str = "") -> str:
    """The command that starts the same run without the app."""
    words = ["finetui", "demo" if draft.is_demo() else draft.method]
    flags = {targets[0].path: flag for flag, targets in flags_of(draft.method).items() if len(targets) == 1}
    for path, value in draft.chosen().items():
        if value is not None and not path.endswith(".data.demo"):  # naming rows turns the demo's off, as here
            words += _word(path, json.dumps(value) if isinstance(value, dict) else str(value), flags)
    for path, text in draft.changed().items():
        words += _word(path, text, flags)
    if runs_folder:
        words += ["--runs-dir", runs_folder]
    return shlex.join(words)


def _word(path: str, text: str, flags: dict[str, str]) -> list[str]:
    """One setting as the command line says it: by its flag where that means this option alone, else by --set."""
    option = OPTIONS[path]
    flag = flags.get(path)
    if option.kind is bool and flag and isinstance(on := yaml.safe_load(text), bool):
        return [flag if on else f"--no-{flag.removeprefix('--')}"]
    if flag and option.kind not in (bool, list, dict):
        return [f"{flag}={text}"] if text.startswith("-") else [flag, text]
    quoted = json.dumps(text, ensure_ascii=False) if option.kind is str and yaml.safe_load(text) != text else text
    return ["--set", f"{path}={quoted}"]


def draft_path(name: str = "draft") -> Path:
    """Where a draft is kept."""
    return cache_dir() / f"{name}.json"


def load_draft(path: Path) -> Draft | None:
    """The draft at `path`; None where there is none that can be read. What a killed app left beside it goes."""
    remove_torn(torn_beside(path))
    try:
        return Draft.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None


def save_draft(draft: Draft, path: Path) -> None:
    """Write the draft whole. Raises OSError."""
    with replacing(path, sync=False) as stream:
        stream.write(draft.model_dump_json(indent=1))


def draft_of(plan: Plan) -> Draft:
    """A draft, at its review, that makes the same plan again on this machine. Name and note are not taken over."""
    values = flatten(plan.model_dump(mode="json"), keep_auto=True)
    draft = Draft(step=len(STEPS) - 1, method=plan.method, size=plan.model.size or "")
    preset = size_presets().get(draft.size, {}).get("model", {}).get("name")
    if not draft.size or plan.model.name not in (preset, ""):
        draft.model = plan.model.name
    for stage in draft.stages:
        rows = plan.stage(stage).data
        kind: Literal["demo", "file", "hub"] = "file" if rows.file else "hub" if rows.dataset else "demo"
        draft.data[stage] = RowsDraft(
            kind=kind, file=rows.file or "", dataset=rows.dataset or "", dataset_file=rows.dataset_file or "",
            dataset_config=rows.dataset_config or "", dataset_revision=rows.dataset_revision or "",
            dataset_split=rows.split if rows.dataset and rows.split != "train" else "", columns=rows.columns,
        )  # fmt: skip
    base = checked(draft).resolved
    usual = flatten(base.plan.model_dump(mode="json"), keep_auto=True) if base else {}
    ours = ("name", "note", *draft.chosen())
    draft.values = {
        path: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for path, value in values.items()
        if path in OPTIONS and path not in ours and applies(path, draft.stages) and value != usual.get(path, value)
    }
    return draft
