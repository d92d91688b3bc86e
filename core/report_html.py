"""Reports as HTML pages of one file each: nothing is fetched, no script runs, all foreign text is escaped."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from core.compare import (
    Side,
    change_rows,
    differences,
    evaluation_rows,
    results,
    same_prompts,
    shared_answers,
    stage_of,
)
from core.evaluation import Row, missed_words, variant_words
from core.evaluation_report import loss_words
from core.places import value_without_places
from core.report import PANELS, Picture, RunReport, made_by, rate_cells
from core.stages import TRAINING_STAGES
from core.svg import Points, chart, key
from core.text import clean, count, number
from core.watch import GLYPHS

MAX_TEXT = 20_000
ANSWERS = 20


def as_html(report: RunReport) -> str:
    """The report of a run as a whole page."""
    return _pages().get_template("report_page.html").render(r=report)


def compared_as_html(sides: Sequence[Side], *, rows: bool = True) -> str:
    """Runs beside each other as a whole page. With `rows` False no prompt or answer is in it."""
    settings = [
        (path, ["–" if value is None else str(value_without_places(value)) for value in values])
        for path, values in differences([side.settings for side in sides])
    ]
    judged = sum(bool(side.report) for side in sides)
    page = _pages().get_template("compare_page.html")
    return page.render(
        sides=sides, evaluation=evaluation_rows(sides), same=same_prompts(sides) or judged < 2,
        changes=change_rows(sides), curves=_curves(sides), results=results(sides), settings=settings,
        answers=shared_answers(sides)[:ANSWERS] if rows else [], made=made_by(),
    )  # fmt: skip


def _curves(sides: Sequence[Side]) -> list[tuple[str, list[Picture]]]:
    """By stage the curves of all runs over each other, a chart a metric."""
    found = []
    for name in TRAINING_STAGES:
        pictures = []
        for title, members, log in PANELS:
            for metric, what in members:
                series = [stage.series.get(metric, []) if (stage := stage_of(s.state, name)) else [] for s in sides]
                lines: list[tuple[str, Points]] = [(s.name, points) for s, points in zip(sides, series, strict=True)]
                if svg := chart(lines, "step", log=log):
                    legend = [(name, number(_newest(points))) for name, points in lines if points]
                    pictures.append(Picture(f"{title}, {what}" if len(members) > 1 else title, svg, legend))
        if pictures:
            found.append((name.upper(), pictures))
    return found


def _newest(points: Points) -> float | None:
    return next((value for _, value in reversed(points) if value is not None), None)


def _pages() -> Environment:
    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, finalize=_shown,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page.globals["key"] = lambda index: Markup(key(index))
    page.filters |= {
        "svg": Markup, "variant": variant_words, "rates": rate_cells, "tools": tool_rows, "loss": loss_words,
        "missed": missed, "short": short, "glyph": lambda status: GLYPHS.get(status, "?"), "wrong": wrong,
        "many": count,
    }  # fmt: skip
    return page


def _shown(value: Any) -> Any:
    """What every expression of the template passes through before it is escaped."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else clean(value, MAX_TEXT, newlines=True)


def short(text: str, width: int = 110) -> str:
    """The beginning of a text on one line."""
    line = " ".join(str(text).split())
    return line if len(line) <= width else f"{line[: width - 1]}…"


def missed(case: Row, variant: str) -> str:
    """What a model's answer missed, in words."""
    return missed_words(case["answers"].get(variant, {}).get("marks", {}))


def wrong(answer: dict[str, Any]) -> str:
    """What an answer missed, in words."""
    return missed_words(answer["marks"])


def tool_rows(report: dict[str, Any]) -> list[tuple[str, int, list[str]]]:
    """By tool: its name, how many prompts expect it, and each model's count of right tools and of whole answers."""
    rows = []
    for tool, rates in report["by_tool"].items():
        prompts = max((int(entry["total"]) for marks in rates.values() for entry in marks.values()), default=0)
        cells = []
        for name in report["variants"]:
            marks = rates.get(name, {})
            counts = [marks.get(mark, {}).get("hits", "–") for mark in ("tool" if tool else "decision", "exact")]
            cells.append(" / ".join(count(many) for many in counts))
        rows.append((tool, prompts, cells))
    return sorted(rows, key=lambda row: (-row[1], row[0]))
