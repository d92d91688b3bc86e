"""The report of a run as Markdown: the same as the page, with figures in place of curves."""

from collections.abc import Sequence

from core.evaluation import variant_words
from core.evaluation_report import table_lines, tool_lines
from core.markdown import block, plain, table
from core.report import EvaluationReport, Fact, Picture, RunReport, StageReport
from core.report_html import missed
from core.text import count


def as_markdown(report: RunReport) -> str:
    """The whole report."""
    lines = [f"# {plain(report.name)}: {plain(report.going_on)}", ""]
    lines += [text for text in (plain(report.note, 500), f"**{plain(report.headline, 600)}**") if text.strip("*")]
    lines += ["", *_facts(report.facts)]
    for evaluation in report.evaluations:
        lines += _evaluation(evaluation)
    for stage in report.stages:
        lines += _stage(stage)
    if report.artefacts:
        rows = [[plain(what), plain(size), plain(told, 300)] for what, size, told in report.artefacts]
        lines += ["", "## Made of it", "", *table(["what", "size", "answers"], rows)]
    lines += (
        ["", "## Machine", "", *_facts(report.machine), *_figures(report.machine_pictures)] if report.machine else []
    )
    if report.notices:
        lines += ["", "## Notices", "", *(f"* {plain(notice, 600)}" for notice in report.notices)]
    if report.settings:
        lines += ["", "## Settings", ""]
        rows = [
            [f"{plain(section)}.{plain(key)}", plain(value), plain(source)]
            for section, entries in report.settings
            for key, value, source in entries
        ]
        lines += table(["setting", "value", "from"], rows)
    lines += ["", "## Versions", "", *_facts(report.versions), "", f"Made by {plain(report.made)}."]
    return "\n".join(lines) + "\n"


def _facts(facts: Sequence[Fact]) -> list[str]:
    return [f"* {plain(word)}: {plain(value, 600)}" for word, value in facts]


def _figures(pictures: Sequence[Picture]) -> list[str]:
    """What the curves' legends say: the newest value of each."""
    return [
        f"* {plain(picture.title)}, at the end: "
        + ", ".join(f"{plain(name)} {plain(value)}" for name, value in picture.legend)
        for picture in pictures
    ]


def _evaluation(evaluation: EvaluationReport) -> list[str]:
    report = evaluation.report
    lines = ["", f"## Evaluation: {plain(report['source'])}", "", f"{count(report['prompts'])} prompts.", ""]
    lines += [*table_lines(report), "", *(f"* {plain(sentence, 600)}" for sentence in evaluation.remarks)]
    if any(report["by_tool"]):
        lines += ["", "### By tool", "", *tool_lines(report)]
    if evaluation.cases:
        lines += ["", f"### Failing cases ({len(evaluation.cases)} of {count(evaluation.failing)})"]
    for case in evaluation.cases:
        lines += ["", f"#### Line {case['line']} of {plain(case['file'])}", "", block(case["prompt"])]
        if case["expected"] is not None:
            lines += ["", "Expected", "", block(case["expected"])]
        for name in report["variants"]:
            if name in case["answers"]:
                wrong = missed(case, name)
                lines += ["", f"{variant_words(name)} ({wrong or 'right'})", "", block(case["answers"][name]["answer"])]
    return lines


def _stage(stage: StageReport) -> list[str]:
    lines = ["", f"## {stage.name}", "", *_facts(stage.facts), *_figures(stage.pictures), "", "### Data", ""]
    lines += _facts(stage.data)
    lines += [f"* left out: {count(many)} × {plain(reason)}" for many, reason in stage.left_out]
    for prompt, expected, answers in stage.samples:
        lines += ["", "### Answers while it trained", "", block(prompt)]
        for step, answer in [*answers, *([("expected", expected)] if expected else [])]:
            lines += ["", step, "", block(answer)]
    return lines
