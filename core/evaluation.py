"""Evaluations of a run as they lie in RUN/evaluate/NAME. No torch.

options.json           what was asked for            report.json, report.md   the tables
answers-VARIANT.jsonl  answers as they came          cases.jsonl              every prompt with every answer
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core import clock
from core.errors import FinetuiError
from core.paths import writing_whole
from core.runs import Run
from core.scores import MARKS, Rate, changes, mean_loss, rates

if TYPE_CHECKING:  # viewers of an evaluation need no plan
    from core.plan import EvaluatePlan

HELD_OUT = "held-out"
"""The evaluation of what the run itself held out, or of what its plan names."""
REPORT_KEYS = {
    "source": str, "prompts": int, "variants": list, "table": dict, "losses": dict, "by_tool": dict, "changes": list,
    "cut": dict, "seconds": dict, "notes": list, "left_out": dict, "settings": dict, "t": float,
}  # fmt: skip
STAGE_WORDS = {"base": "base model", "start": "at the start", "sft": "after SFT", "kto": "after KTO"}
Report = dict[str, Any]
Row = dict[str, Any]


def evaluation_path(run: Run, name: str) -> Path:
    return run.path / "evaluate" / name


def name_of(file: Path | None) -> str:
    """The name of the evaluation of a file; of none, that of the run's own held-out rows."""
    if file is None:
        return HELD_OUT
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", file.stem).strip("-")[:40] or "file"
    return f"{stem}-{hashlib.sha256(str(file).encode()).hexdigest()[:6]}"


def variant_words(name: str) -> str:
    """A model of a run for people: ``after SFT``, ``SFT at step 50``."""
    stage, _, step = name.partition("-")
    return f"{stage.upper()} at step {step}" if step.isdigit() else STAGE_WORDS.get(name, name)


def ask(run: Run, options: "EvaluatePlan", name: str) -> None:
    """Write what an evaluation shall do, for the process that does it. Raises FinetuiError."""
    with writing_whole(evaluation_path(run, name) / "options.json") as stream:
        json.dump(options.model_dump(mode="json"), stream, indent=1)


def options_of(folder: Path) -> "EvaluatePlan":
    """What was asked for. Raises FinetuiError."""
    from core.plan import EvaluatePlan

    try:
        return EvaluatePlan.model_validate_json((folder / "options.json").read_bytes())
    except (OSError, ValueError) as error:
        raise FinetuiError(f"{folder / 'options.json'} cannot be read.", "Start the evaluation again.") from error


class Store:
    """The answers of one model in a JSONL file, by a hash of the rendered prompt, appended as they come.

    The first line says what they depend on; a file that says otherwise is begun anew. A torn last line is passed over.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self._entries: dict[str, dict[str, Any]] = {}
        lines = list(_lines(path))
        if lines and lines[0].get("settings") == settings:
            for line in lines[1:]:
                self._entries.setdefault(str(line.get("key")), {}).update(line)
            whole = path.read_bytes().endswith(b"\n")
            self._stream = path.open("a", encoding="utf-8")
            if not whole:
                self._stream.write("\n")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = path.open("w", encoding="utf-8")
            self._stream.write(json.dumps({"settings": settings}) + "\n")

    @staticmethod
    def key(prompt: str) -> str:
        return hashlib.sha256(prompt.encode("utf-8", "replace")).hexdigest()[:24]

    def entry(self, prompt: str) -> dict[str, Any]:
        """What is known of the answer to a rendered prompt; empty for nothing."""
        return self._entries.get(self.key(prompt), {})

    def has_answer(self, prompt: str, limit: int) -> bool:
        """Whether there is an answer as the limit (tokens) would give it: one that another limit cut is none."""
        entry = self.entry(prompt)
        if not isinstance(entry.get("answer"), str):
            return False
        return entry.get("limit") == limit or (not entry.get("cut") and entry.get("tokens", limit) < limit)

    def keep(self, prompt: str, **fields: Any) -> None:
        """Add fields to the entry of a prompt, on disk at once."""
        key = self.key(prompt)
        self._entries.setdefault(key, {}).update(fields)
        self._stream.write(json.dumps({"key": key, **fields}, ensure_ascii=True) + "\n")
        self._stream.flush()


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a JSONL file; broken lines and a missing file hold none."""
    with contextlib.suppress(OSError), path.open("rb") as stream:
        for raw in stream:
            with contextlib.suppress(ValueError, RecursionError):
                line = json.loads(raw)
                if isinstance(line, dict):
                    yield line


def report_of(facts: dict[str, Any], rows: Sequence[Row], variants: Sequence[str], seconds: dict[str, float]) -> Report:
    """Everything that is counted: by model, by tool, and what each model mends and breaks of the one before."""
    by_tool: dict[str, dict[str, dict[str, Rate]]] = {}
    tools = sorted({row["tool"] for row in rows if row["expected"] is not None})
    for tool in tools:
        of_tool = [row for row in rows if row["tool"] == tool and row["expected"] is not None]
        by_tool[tool] = {name: rates(row["answers"][name]["marks"] for row in of_tool) for name in variants}
    answers = {name: [row["answers"][name] for row in rows] for name in variants}
    marks = {name: [answer["marks"] for answer in answers[name]] for name in variants}
    losses = {
        name: mean_loss([(a["loss"], a["loss_tokens"]) for a in answers[name] if "loss" in a]) for name in variants
    }
    return {
        **facts,
        "prompts": len(rows),
        "variants": list(variants),
        "table": {name: rates(marks[name]) for name in variants},
        "losses": {name: loss for name, loss in losses.items() if loss},
        "by_tool": by_tool,
        "changes": [
            {"from": before, "to": after, "marks": changes(marks[before], marks[after])}
            for before, after in zip(variants, variants[1:], strict=False)
        ],
        "cut": {name: sum(answer["cut"] for answer in answers[name]) for name in variants},
        "seconds": seconds,
        "t": round(clock.moment(clock.inherited()), 3),
    }


def read_report(folder: Path) -> Report | None:
    """The report of an evaluation, None where it is not done or cannot be read."""
    try:
        report = json.loads((folder / "report.json").read_bytes())
        checked = [report["table"][name][mark]["hits"] for name in report["variants"] for mark in report["table"][name]]
        kinds = [isinstance(report[key], kind) for key, kind in REPORT_KEYS.items()]
        whole = bool(report["variants"]) and all(kinds) and all(isinstance(hits, int) for hits in checked)
        return report if whole else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def evaluations(run: Run) -> list[tuple[Path, Report]]:
    """The evaluations of a run that are done, the newest first."""
    folders = list((run.path / "evaluate").glob("*/report.json"))
    found = [(path.parent, report) for path in folders if (report := read_report(path.parent))]
    return sorted(found, key=lambda entry: -float(entry[1].get("t") or 0))


def read_cases(folder: Path, limit: int = 5000) -> list[Row]:
    """The cases of an evaluation, as many as `limit`; what is no case is passed over."""
    found = []
    for row in _lines(folder / "cases.jsonl"):
        answers = row.get("answers")
        if isinstance(answers, dict) and all(
            isinstance(answer, dict) and isinstance(answer.get("marks"), dict) for answer in answers.values()
        ):
            found.append(row)
        if len(found) >= limit:
            break
    return found


def failed(row: Row, variant: str) -> list[str]:
    """The marks that a variant's answer to a case did not earn."""
    marks = row["answers"].get(variant, {}).get("marks", {})
    return [name for name in MARKS if marks.get(name) is False]


def missed_words(marks: Mapping[str, bool]) -> str:
    """What an answer is wrong in, in words; empty where it is right. Where there is no call at all, that says it."""
    wrong = [name for name in MARKS if marks.get(name) is False]
    if "decision" in wrong:
        return "no call" if "format" in marks else "a call where none is expected"
    if wrong == ["exact"]:
        return "another text"
    return ", ".join(MARKS[name][0] for name in wrong if name != "exact")


@dataclass(frozen=True)
class Threshold:
    """A share that a mark must reach; `variant` "" stands for the last model of the run."""

    mark: str
    share: float
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> "Threshold":
        """``METRIC=SHARE`` or ``MODEL.METRIC=SHARE``, a share as 0.9 or 90%. Raises FinetuiError."""
        name, separator, value = text.partition("=")
        variant, _, mark = name.strip().rpartition(".")
        if not separator or mark not in MARKS:
            raise FinetuiError(f"--fail-under {text!r} names no metric.", f"Metrics are {', '.join(MARKS)}.")
        try:
            share = float(value.strip().removesuffix("%")) / (100 if value.strip().endswith("%") else 1)
        except ValueError:
            share = -1
        if not 0 <= share <= 1:
            raise FinetuiError(f"--fail-under {text!r}: {value!r} is no share.", "Write 0.9 or 90%.")
        return cls(mark, share, variant)

    def missed(self, report: Report) -> str:
        """What is said where the report does not reach it; empty where it does."""
        variant = self.variant or report["variants"][-1]
        entry = report["table"].get(variant, {}).get(self.mark)
        if entry is None:
            models = ", ".join(report["table"])
            return f"{self.mark} of {variant} was not measured (models: {models}; see the report for what was)"
        share = entry["hits"] / entry["total"]
        if share >= self.share:
            return ""
        return f"{self.mark} of {variant} is {share:.3f} ({entry['hits']} of {entry['total']}), under {self.share:g}"
