"""Write the report of a run, as HTML and as Markdown."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from core.errors import FinetuiError
from core.paths import writing_whole
from core.report import RunReport, gather
from core.runs import Run
from core.secrets import redact

if TYPE_CHECKING:
    from core.compare import Side


def write_reports(run: Run, *, rows: bool = True) -> list[Path]:
    """RUN/report.html and RUN/report.md. With `rows` False no prompt or answer is in them. Raises FinetuiError."""
    report = gather(run, rows=rows)
    return [_write(report, run.path / name) for name in ("report.html", "report.md")]


def write_report_file(run: Run, path: Path, *, rows: bool = True) -> Path:
    """One file, whose ending says its form. Raises FinetuiError."""
    if path.suffix.lower() not in (".html", ".htm", ".md"):
        raise FinetuiError(f"{path.name} is neither HTML nor Markdown.", "Give a name that ends in .html or .md.")
    return _write(gather(run, rows=rows), path)


def write_comparison(sides: "Sequence[Side]", path: Path, *, rows: bool = True) -> Path:
    """Runs beside each other as an HTML page. Raises FinetuiError."""
    from core.report_html import compared_as_html

    if path.suffix.lower() not in (".html", ".htm"):
        raise FinetuiError(f"{path.name} is no HTML.", "Give a name that ends in .html.")
    text = compared_as_html(sides, rows=rows)
    with writing_whole(path) as stream:
        stream.write(redact(text))
    return path


def _write(report: RunReport, path: Path) -> Path:
    from core.report_html import as_html
    from core.report_markdown import as_markdown

    text = as_markdown(report) if path.suffix.lower() == ".md" else as_html(report)
    with writing_whole(path) as stream:
        stream.write(redact(text))
    return path
