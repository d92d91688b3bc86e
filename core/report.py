"""A run as a report to be sent to a colleague: everything in it is gathered here, for HTML and Markdown. No torch.

Foreign text comes in as it is and is made harmless where it is written. Places on this machine, its name and the
person's are left out.
"""

import contextlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core import __version__
from core.artefacts import BITS
from core.config import flatten
from core.errors import FinetuiError
from core.evaluation import Report, Row, evaluations, failed, read_cases, variant_words
from core.evaluation_report import remarks, share_words
from core.events import Event, RunState, StageState
from core.machine_use import MachineUse, use_of
from core.notes import read_note
from core.places import value_without_places, without_places
from core.runs import Run, summary
from core.scores import MARKS
from core.stages import TRAINING_STAGES
from core.svg import Points, chart
from core.text import duration, number

STAGE_WORDS = {"sft": "SFT", "kto": "KTO"}
LIVE = ("running", "stopping")
AFTER_TRAINING = {
    "evaluate": "being evaluated", "merge": "being merged", "gguf": "being made into GGUF files",
    "upload": "being uploaded",
}  # fmt: skip
CASES = 12
SAMPLES = 4
Fact = tuple[str, str]
PANELS: tuple[tuple[str, tuple[tuple[str, str], ...], bool], ...] = (
    ("Loss", (("loss", "training"), ("eval_loss", "held-out")), False),
    ("Margin", (("rewards/margins", "training"), ("eval_rewards/margins", "held-out")), False),
    ("Rewards", (("rewards/chosen", "good answers"), ("rewards/rejected", "bad answers")), False),
    ("KL", (("kl", "training"), ("eval_kl", "held-out")), False),
    ("Learning rate", (("learning_rate", "rate"),), False),
    ("Gradient norm", (("grad_norm", "gradient"),), True),
    ("Tokens a second", (("tokens_per_s", "tokens/s"),), False),
)
UNITS = {"memory": "GiB", "utilisation": "%", "temperature": "°C", "power": "W"}


@dataclass(frozen=True)
class Picture:
    """A chart with its legend: (name, newest value) of each curve."""

    title: str
    svg: str
    legend: list[Fact]


@dataclass
class StageReport:
    """One training stage."""

    name: str
    facts: list[Fact]
    pictures: list[Picture]
    data: list[Fact]
    left_out: list[tuple[int, str]] = field(default_factory=list)
    left_out_rows: list[tuple[str, int, str]] = field(default_factory=list)
    samples: list[tuple[str, str, list[Fact]]] = field(default_factory=list)
    """(prompt, expected answer, (step, answer) of the first ones and the last)."""


@dataclass
class EvaluationReport:
    """One evaluation: its report, what is to be said of it, and failing cases."""

    report: Report
    remarks: list[str]
    cases: list[Row]
    failing: int


@dataclass
class RunReport:
    """Everything the report says."""

    name: str
    status: str
    going_on: str
    """The status in words: of a run that lives, what is done after training."""
    note: str
    headline: str
    facts: list[Fact]
    stages: list[StageReport]
    evaluations: list[EvaluationReport]
    machine: list[Fact]
    machine_pictures: list[Picture]
    versions: list[Fact]
    settings: list[tuple[str, list[tuple[str, str, str]]]]
    notices: list[str]
    made: str
    artefacts: list[tuple[str, str, str]] = field(default_factory=list)
    """What was made of the result: (what, how large, how far it answers as the model it was made of)."""


def gather(run: Run, *, rows: bool = True) -> RunReport:
    """Read everything of a run. With `rows` False no prompt, answer or sample is in it. Raises FinetuiError."""
    state, head = run.state(), summary(run)
    host = str(state.start.get("host") or "")

    def hidden(text: Any) -> str:
        return without_places(str(text or ""), host)

    found = [_evaluation(path, report, hidden, rows=rows) for path, report in evaluations(run)]
    use = use_of(state.gpu)
    note = read_note(run.path)
    training = [stage for stage in state.stages if stage.name in TRAINING_STAGES and (stage.started or stage.series)]
    return RunReport(
        name=run.name,
        status=head["status"],
        going_on=going_on(state, head["status"]),
        note=hidden(note.text if note else state.note),
        headline=headline(found[0].report) if found else "",
        facts=_facts(run, state, head, hidden),
        stages=[_stage(run, stage, state.samples, hidden, rows=rows) for stage in training],
        evaluations=found,
        machine=_machine(state, use),
        machine_pictures=_machine_pictures(use),
        versions=_versions(state),
        settings=settings_of(run, hidden),
        notices=list(
            dict.fromkeys(hidden(f"{n.get('text', '')} {n.get('advice') or ''}".strip()) for n in state.notices)
        )
        + [hidden(f"{error.get('message', '')} {error.get('advice') or ''}") for error in state.errors[-1:]],
        made=made_by(),
        artefacts=[artefact_row(what, event, hidden) for what, event in state.artefacts.items()],
    )


def artefact_row(what: str, event: Event, hidden: Callable[[Any], str]) -> tuple[str, str, str]:
    """A merged model, a GGUF file or an upload: what it is, its size, and what its check found."""
    size, check = event.get("bytes"), event.get("check")
    found = check if isinstance(check, dict) else {}
    told = hidden(event.get("path")) if "://" in str(event.get("path")) else ""
    with contextlib.suppress(LookupError, TypeError, ValueError):
        told = f"not compared: {hidden(found['skipped'])}" if "skipped" in found else told
    with contextlib.suppress(LookupError, TypeError, ValueError):
        of = "merged model" if what in BITS else str(found["reference"]).replace("merged_16bit", "merged model")
        told = f"{100 * found['token_agreement']:.1f} % of the tokens of the {of}" if "prompts" in found else told
        told += f", {int(found['same_answers'])} of {int(found['prompts'])} answers whole" if "prompts" in found else ""
        if "calls" in found:
            told += f", {int(found['valid'])} of {int(found['calls'])} calls valid and {int(found['right'])} right"
    return hidden(what), f"{size / (1 << 20):,.0f} MiB" if isinstance(size, int) and size else "", hidden(told)


def made_by() -> str:
    return f"finetui {__version__}, {time.strftime('%d %B %Y %H:%M')}"


def headline(report: Report) -> str:
    """The result in a sentence."""
    last = report["variants"][-1]
    marks = report["table"][last]
    mark = next((name for name in ("exact", "tool", "decision", "schema") if marks.get(name, {}).get("hits")), "exact")
    entry = marks.get(mark)
    if not entry or not entry["total"]:
        return ""
    what = {"exact": "wholly right", "tool": "with the right tool", "schema": "with a valid call"}
    before = [(name, report["table"][name].get(mark)) for name in report["variants"][:-1]]
    others = ", ".join(
        f"{variant_words(name)} {100 * rate['hits'] / rate['total']:.0f} %" for name, rate in before if rate
    )
    words = variant_words(last)
    return (
        f"{words[:1].upper()}{words[1:]} {100 * entry['hits'] / entry['total']:.0f} % of {entry['total']:,.0f} "
        f"held-out prompts are answered {what.get(mark, 'with the right decision to call a tool or not')} "
        f"(95 % interval {100 * entry['low']:.0f} to {100 * entry['high']:.0f} %)" + (f"; {others}." if others else ".")
    )


def _evaluation(path: Path, report: Report, hidden: Callable[[Any], str], *, rows: bool) -> EvaluationReport:
    cases = read_cases(path)
    wrong = [case for case in cases if failed(case, report["variants"][-1])]
    said = [hidden(sentence) for sentence in remarks(report)]
    return EvaluationReport(report, said, wrong[:CASES] if rows else [], len(wrong))


def _facts(run: Run, state: RunState, head: dict[str, Any], hidden: Callable[[Any], str]) -> list[Fact]:
    started = time.strftime("%d %B %Y %H:%M", time.localtime(head["started"])) if head["started"] else ""
    model = state.model
    with contextlib.suppress(FinetuiError):
        model = run.plan().model.name
    took = ("took so far" if head["status"] in LIVE else "took", head["duration_s"])
    if _after_training(state, head["status"]):
        took = ("training took", state.trained_s)
    found = [
        ("method", str(state.method).upper().replace("-", "→")), ("model", hidden(value_without_places(model))),
        ("started", started), (took[0], duration(took[1])),
    ]  # fmt: skip
    return [(word, value) for word, value in found if value]


def _after_training(state: RunState, status: str) -> str:
    """What is done to a living run's result, in words; empty while it trains and for a run that has ended."""
    current = state.current
    now = state.task or (current.name if current and current.state == "running" else "")
    return AFTER_TRAINING.get(now, "") if status in LIVE else ""


def going_on(state: RunState, status: str) -> str:
    """The status of a run in words, and what is done to it where it has been trained."""
    after = _after_training(state, status)
    if not after:
        return status
    trained = all(stage.state == "done" for stage in state.stages if stage.name in TRAINING_STAGES)
    words = f"training {'done' if trained else state.end_status or 'not done'}, {after}"
    return words if status == "running" else f"{words}, {status}"


def _stage(
    run: Run, stage: StageState, samples: list[Event], hidden: Callable[[Any], str], *, rows: bool
) -> StageReport:
    totals = stage.totals
    took = duration(stage.ended - stage.started) if stage.ended and stage.started else ""
    done = max([stage.step, *stage.checkpoints, *(step for step, _ in stage.series.get("eval_loss", []))])
    best = [(value, step) for step, value in stage.series.get("eval_loss", []) if value is not None]
    facts = [
        ("steps", f"{done:,} of {stage.total_steps:,}" if stage.total_steps else f"{done:,}"),
        ("examples a step", str(totals.get("batch") or "")),
        ("trained parameters", f"{totals['trainable']:,}" if totals.get("trainable") else ""),
        ("took", took),
        ("time went into", ", ".join(f"{name} {duration(s)}" for name, s in stage.phase_seconds.items() if s >= 1)),
        ("lowest held-out loss", f"{number(min(best)[0])} at step {min(best)[1]:,}" if best else ""),
        ("peak GPU memory", _gib(max((v or 0 for _, v in stage.series.get("vram_peak_bytes", [])), default=0))),
    ]
    found = StageReport(
        STAGE_WORDS.get(stage.name, stage.name),
        [(word, value) for word, value in facts if value],
        pictures(stage.series),
        [],
    )
    _add_data(found, run.stage_path(stage.name) / "data.json", totals, hidden)
    if rows:
        found.samples = _samples([sample for sample in samples if sample.get("stage") == stage.name])
    return found


def _gib(value: float) -> str:
    return f"{value / (1 << 30):.2f} GiB" if value else ""


def pictures(series: dict[str, Any]) -> list[Picture]:
    """The curves of a stage that can be drawn, what matters most first."""
    found = []
    for title, members, log in PANELS:
        lines: list[tuple[str, Points]] = [(name, series[key]) for key, name in members if series.get(key)]
        if svg := chart(lines, "step", log=log):
            found.append(Picture(title, svg, [(name, number(_newest(points))) for name, points in lines]))
    return found


def _newest(points: Points) -> float | None:
    return next((value for _, value in reversed(points) if value is not None), None)


def _add_data(found: StageReport, path: Path, totals: Event, hidden: Callable[[Any], str]) -> None:
    """What the stage was trained on and what was left out, from its ledger, else from the log."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        data = totals
    if not isinstance(data, dict):
        return

    def count(key: str) -> str:
        value = data.get(key)
        return f"{value:,}" if isinstance(value, int) else ""

    files = data.get("files")
    labels = data.get("labels")
    facts = [
        ("files", ", ".join(Path(str(file)).name for file in files) if isinstance(files, list) else ""),
        ("rows", count("rows")), ("examples", count("examples")), ("held out", count("held_out")),
        ("left out", count("left_out")), ("cut to the limit", count("cut")), ("repaired", count("repaired")),
        ("labels", ", ".join(f"{n:,} {word}" for word, n in labels.items()) if isinstance(labels, dict) else ""),
        ("tokens a pass", count("tokens")), ("of them trained", count("trained_tokens")),
        ("longest row", count("longest")),
    ]  # fmt: skip
    found.data = [(word, value) for word, value in facts if value]
    reasons, listed = data.get("left_out_reasons"), data.get("left_out_rows")
    if isinstance(reasons, dict):
        found.left_out = [(int(n), hidden(reason)) for reason, n in reasons.items() if isinstance(n, int)]
    for row in listed if isinstance(listed, list) else []:
        if isinstance(row, dict) and isinstance(row.get("line"), int):
            found.left_out_rows.append((Path(str(row.get("file", ""))).name, row["line"], hidden(row.get("reason"))))


def _samples(samples: list[Event]) -> list[tuple[str, str, list[Fact]]]:
    by_prompt: dict[str, list[Event]] = {}
    for sample in samples:
        by_prompt.setdefault(str(sample.get("prompt", "")), []).append(sample)
    found = []
    for prompt, series in by_prompt.items():
        shown = series if len(series) <= SAMPLES else [*series[: SAMPLES - 1], series[-1]]
        answers = [(f"step {sample.get('step', 0)}", str(sample.get("answer", ""))) for sample in shown]
        found.append((prompt, str(series[-1].get("expected") or ""), answers))
    return found


def _machine(state: RunState, use: MachineUse) -> list[Fact]:
    memory = {name: max((y or 0 for _, y in line), default=0) for name, line in use.curves.get("memory", {}).items()}
    facts = [
        ("GPUs", ", ".join(use.cards)),
        *((f"peak memory, {name}", f"{value:.2f} GiB") for name, value in memory.items()),
        *(
            (f"mean {what}", f"{mean:.0f} {UNITS[what]}")
            for what in ("utilisation", "power")
            if (mean := use.mean(what)) is not None
        ),
        ("hottest", f"{top:.0f} °C" if (top := use.highest("temperature")) is not None else ""),
        ("energy of the GPU", f"{use.energy_j / 3600:.1f} Wh" if use.energy_j is not None else ""),
        ("system", str(state.start.get("system") or "")),
    ]
    return [(word, value) for word, value in facts if value]


def _machine_pictures(use: MachineUse) -> list[Picture]:
    found = []
    for what, unit in UNITS.items():
        lines: list[tuple[str, Points]] = list(use.curves.get(what, {}).items())
        if svg := chart(lines, "time since the start", seconds=True):
            legend = [(name, f"{number(_newest(points), 3)} {unit}") for name, points in lines]
            found.append(Picture(f"{what[:1].upper()}{what[1:]}, {unit}", svg, legend))
    return found


def _versions(state: RunState) -> list[Fact]:
    told = state.start.get("versions")
    found = [("finetui", str(state.start.get("version") or "")), ("Python", str(state.start.get("python") or ""))]
    found += [(str(name), str(version)) for name, version in told.items()] if isinstance(told, dict) else []
    return [(name, version) for name, version in found if version]


def settings_of(run: Run, hidden: Callable[[Any], str]) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """The plan by section: (key, value, where it comes from). Empty where it cannot be read."""
    try:
        plan = run.plan()
        values = flatten(
            plan.model_dump(mode="json", exclude=set(TRAINING_STAGES) - set(plan.training_stages)), keep_auto=True
        )
        sources = plan_sources(run.plan_path.read_text(encoding="utf-8"))
    except (FinetuiError, OSError, ValueError):
        return []
    sections: dict[str, list[tuple[str, str, str]]] = {}
    for path, value in values.items():
        section, _, key = path.partition(".") if "." in path else ("run", "", path)
        if value in (None, [], {}, ""):
            continue
        shown = value_without_places(value)
        text = ", ".join(map(str, shown)) if isinstance(shown, list) else str(shown)
        sections.setdefault(section, []).append((key, text, hidden(sources.get(path, ""))))
    return list(sections.items())


def plan_sources(text: str) -> dict[str, str]:
    """Where each value of a plan comes from, as the comments of plan.yaml tell it."""
    found: dict[str, str] = {}
    above: list[str] = []
    for line in text.splitlines():
        match = re.match(r"^( *)([A-Za-z_]\w*):(.*)$", line)
        if not match:
            continue
        depth = len(match.group(1)) // 2
        above = [*above[:depth], match.group(2)]
        if "  # " in match.group(3):
            found[".".join(above)] = match.group(3).rsplit("  # ", 1)[1].strip()
    return found


def rate_cells(report: Report) -> list[tuple[str, list[tuple[str, float, float, float]]]]:
    """The table by mark: (heading, (words, share, low, high) of each model); a model without the mark has –."""
    rows = []
    for mark in MARKS:
        entries = [report["table"][name].get(mark) for name in report["variants"]]
        if any(entries):
            cells = [
                (share_words(e), e["hits"] / e["total"], e["low"], e["high"])
                if e and e["total"]
                else ("–", 0.0, 0.0, 0.0)
                for e in entries
            ]
            rows.append((MARKS[mark][0], cells))
    return rows
