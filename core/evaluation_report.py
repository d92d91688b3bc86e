"""An evaluation as Markdown: the tables, what changed from model to model, the failing cases side by side."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.evaluation import Report, Row, failed, missed_words, variant_words
from core.markdown import block, plain, table
from core.paths import writing_whole
from core.scores import MARKS, Rate
from core.text import count, duration

CASES_SHOWN = 40
SURE = 0.05


def share_words(entry: Mapping[str, float] | None) -> str:
    """A rate for people: ``85 % [71–93]``; – where there is none."""
    if not entry or not entry.get("total"):
        return "–"
    return f"{100 * entry['hits'] / entry['total']:.0f} % [{100 * entry['low']:.0f}–{100 * entry['high']:.0f}]"


def loss_words(entry: Mapping[str, float] | None) -> str:
    """A loss with its interval; – where there is none."""
    return f"{entry['mean']:.3f} [{entry['low']:.3f}–{entry['high']:.3f}]" if entry else "–"


def marks_in(rates: Mapping[str, Mapping[str, Rate]]) -> list[str]:
    """The marks that at least one model has, in their order."""
    return [name for name in MARKS if any(name in marks for marks in rates.values())]


def change_words(change: Mapping[str, Any]) -> str:
    """What one model mends and breaks of another's answers, in a sentence."""
    marks = change["marks"].get("exact") or next(iter(change["marks"].values()), None)
    if marks is None:
        return ""
    what = "whole answers" if "exact" in change["marks"] else MARKS[next(iter(change["marks"]))][0]
    models = f"{_sentence(variant_words(change['to']))} against {variant_words(change['from'])}"
    if not marks["mended"] and not marks["broken"]:
        return f"{models}: as many {what} right, and the same ones."
    sure = "" if marks["p"] < SURE else ": that may be chance"
    test = f"(exact McNemar test, p = {marks['p']:.3g})"
    return f"{models}: {marks['mended']} {what} mended, {marks['broken']} broken {test}{sure}."


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]


def remarks(report: Report) -> list[str]:
    """What must be known beside the table, in sentences; with foreign text in them."""
    found = [sentence for change in report["changes"] if (sentence := change_words(change))]
    found += [str(note) for note in report["notes"]]
    found += [f"Left out: {count(many)} × {reason}." for reason, many in report["left_out"].items()]
    limit = report["settings"]["max_new_tokens"]
    found += [
        f"{_sentence(variant_words(name))}: {count(many)} answers were cut at {count(limit)} tokens."
        for name, many in report["cut"].items()
        if many
    ]
    return [*found, f"Answering took {duration(sum(report['seconds'].values()))}."]


def table_lines(report: Report) -> list[str]:
    """The table by model."""
    marks = marks_in(report["table"])
    heads = ["", *(MARKS[name][0] for name in marks), *(["loss a token"] if report["losses"] else [])]
    rows = []
    for name in report["variants"]:
        cells = [plain(variant_words(name)), *(share_words(report["table"][name].get(mark)) for mark in marks)]
        rows.append(cells + ([loss_words(report["losses"].get(name))] if report["losses"] else []))
    return table(heads, rows)


def tool_lines(report: Report) -> list[str]:
    """The table by tool: how many prompts expect it and how many of them each model gets right, and wholly right."""
    heads = ["tool", "prompts"]
    for name in report["variants"]:
        heads += [f"{variant_words(name)}: right tool", "all right"]
    rows = []
    for tool, rates in sorted(report["by_tool"].items(), key=lambda entry: -_prompts(entry[1])):
        cells = [plain(tool) if tool else "(no call)", count(_prompts(rates))]
        for name in report["variants"]:
            marks = rates.get(name, {})
            cells += [_count(marks.get("tool" if tool else "decision")), _count(marks.get("exact"))]
        rows.append(cells)
    return table(heads, rows)


def _prompts(rates: Mapping[str, Mapping[str, Rate]]) -> int:
    return max((int(entry["total"]) for marks in rates.values() for entry in marks.values()), default=0)


def _count(entry: Mapping[str, float] | None) -> str:
    return count(int(entry["hits"])) if entry else "–"


def as_markdown(report: Report, rows: Sequence[Row]) -> str:
    """The whole report."""
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(report["t"]))
    settings = report["settings"]
    how = "greedily" if not settings["temperature"] else f"at temperature {settings['temperature']:g}"
    lines = [
        f"# Evaluation: {plain(report['source'])}", "",
        f"{count(report['prompts'])} prompts, answered {how} with at most {settings['max_new_tokens']} tokens, {when}. "
        "Share right and its 95 % interval.",
        "", *table_lines(report), "",
    ]  # fmt: skip
    lines += [f"* **{MARKS[name][0]}**: {MARKS[name][1]}." for name in marks_in(report["table"])]
    if ignored := settings["ignore_arguments"]:
        lines.append(f"* Not compared: the arguments {', '.join(plain(name) for name in ignored)}.")
    lines += ["", *(f"* {plain(sentence)}" for sentence in remarks(report)), ""]
    if any(report["by_tool"]):
        lines += ["## By tool", "", *tool_lines(report), ""]
    return "\n".join([*lines, *_case_lines(report, rows)]).rstrip() + "\n"


def _case_lines(report: Report, rows: Sequence[Row]) -> list[str]:
    last = report["variants"][-1]
    wrong = [row for row in rows if failed(row, last)]
    if not wrong:
        return ["## Failing cases", "", f"None: {variant_words(last)} every mark is earned."]
    shown = f"The first {CASES_SHOWN} of {len(wrong):,}" if len(wrong) > CASES_SHOWN else f"{len(wrong)}"
    lines = [
        "## Failing cases",
        "",
        f"{shown} of {count(report['prompts'])} prompts ({variant_words(last)}). All answers are in cases.jsonl.",
    ]
    for row in wrong[:CASES_SHOWN]:
        lines += ["", f"### Line {row['line']} of {plain(row['file'])}", "", "Prompt", "", block(row["prompt"])]
        if row["expected"] is not None:
            lines += ["", "Expected", "", block(row["expected"])]
        for name in report["variants"]:
            missing = missed_words(row["answers"][name]["marks"])
            verdict = f"wrong: {missing}" if missing else "right"
            lines += ["", f"{variant_words(name)} ({verdict})", "", block(row["answers"][name]["answer"])]
    return lines


def write_report(folder: Path, report: Report, rows: Sequence[Row]) -> None:
    """Write cases.jsonl, report.md and, last, report.json. Raises FinetuiError."""
    with writing_whole(folder / "cases.jsonl") as stream:
        for row in rows:
            stream.write(json.dumps(row) + "\n")
    with writing_whole(folder / "report.md") as stream:
        stream.write(as_markdown(report, rows))
    with writing_whole(folder / "report.json") as stream:
        json.dump(report, stream, indent=1)
