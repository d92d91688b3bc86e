"""What is done with a run that has ended: `finetui eval`, `finetui compare`, `finetui report`."""

import argparse
from typing import Any

from rich.table import Table
from rich.text import Text

from core.console import open_app, print_json
from core.errors import FinetuiError
from core.evaluation import Report, Threshold, evaluation_path, read_report
from core.evaluation_report import remarks
from core.evaluation_start import checked, start
from core.events import EventTail, RunState
from core.flags import EVAL_FLAGS
from core.paths import expanded, runs_dir
from core.runs import Run, find_run, is_alive
from core.text import clean
from core.variants import variants_of
from core.watch import console, follow_task, shown_result

EXIT_UNDER = 4
MOST_COMPARED = 6


def evaluate(arguments: argparse.Namespace) -> int:
    """``finetui eval RUN``: check, start a detached evaluation, follow it, judge it."""
    run = find_run(runs_dir(arguments.runs_dir), arguments.run)
    plan = run.plan()
    thresholds = [Threshold.parse(text) for text in arguments.fail_under]
    names = [variant.name for variant in variants_of(run, plan)]
    for threshold in thresholds:
        if threshold.variant not in ("", "start", *names):
            raise FinetuiError(f"{run.name} has no model {threshold.variant!r}.", f"It has {', '.join(names)}.")
    values: dict[str, Any] = {key: value for key in EVAL_FLAGS if (value := getattr(arguments, key)) is not None}
    values |= {key: value for key in ("file", "tools") if (value := getattr(arguments, key))}
    if arguments.ignore_argument:
        values["ignore_arguments"] = arguments.ignore_argument
    name, options = checked(run, plan, values)
    tail, state = EventTail(run.events_path), RunState(name=run.name)
    while events := tail.read():
        for event in events:
            state.fold(event)
    start(run, name, options)
    if arguments.detach:
        _say_detached(run, name, as_json=arguments.json)
        return 0
    ended = follow_task(run, tail, state, "evaluate", quiet=arguments.json, ask=not arguments.json)
    if ended is None:
        return 130
    report = read_report(evaluation_path(run, name))
    if ended != "done" or report is None:
        return _not_done(run, state, ended, judge=bool(thresholds))
    return judged(run, report, thresholds, as_json=arguments.json)


def _say_detached(run: Run, name: str, *, as_json: bool) -> None:
    where = evaluation_path(run, name)
    if as_json:
        print_json({"run": run.name, "evaluation": name, "path": str(where)})
        return
    _say(f"{run.name} is being evaluated. Follow it with: finetui watch {run.name}")
    _say(f"The report will be {where / 'report.md'}")


def _not_done(run: Run, state: RunState, ended: str, *, judge: bool) -> int:
    """The exit code of an evaluation that has no new report: where there was something to judge, it is no success."""
    if ended == "stopped":
        _say(f"Stopped. The answers so far are kept: finetui eval {run.name} goes on.")
        return 1 if judge else 0
    said = (
        state.errors[-1] if state.errors else {"message": "It ended without a word.", "advice": f"See {run.log_path}."}
    )
    raise FinetuiError(str(said.get("message", ""))[:600], str(said.get("advice") or ""), exit_code=1)


def judged(run: Run, report: Report, thresholds: list[Threshold], *, as_json: bool) -> int:
    """Print a report and what it misses of `thresholds`; the exit code."""
    missed = [words for threshold in thresholds if (words := threshold.missed(report))]
    if as_json:
        print_json({**report, "fail_under": missed})
    else:
        out = console()
        if (table := shown_result(report, out.width)) is not None:
            out.print(table)
        for sentence in remarks(report):
            _say(sentence)
        _say(f"Report with the failing cases: {evaluation_path(run, report['name']) / 'report.md'}")
        for words in missed:
            _say(f"✘ {words}", "red")
    return EXIT_UNDER if missed else 0


def compare(arguments: argparse.Namespace) -> int:
    """``finetui compare RUN RUN …``: tables, JSON, or an HTML page."""
    from core.compare import change_rows, differences, evaluation_rows, results, sides_of
    from core.report_files import write_comparison

    folder = runs_dir(arguments.runs_dir)
    runs = list({run.name: run for run in (find_run(folder, name) for name in arguments.runs)}.values())
    if not 2 <= len(runs) <= MOST_COMPARED:
        raise FinetuiError(
            f"{len(runs)} runs cannot be compared." if len(runs) > 1 else f"There is only {runs[0].name} to compare.",
            f"Name 2 to {MOST_COMPARED} different runs; `finetui runs` lists them.",
        )
    sides = sides_of(runs)
    unlike = differences([side.settings for side in sides])
    if arguments.json:
        print_json({
            "runs": [side.name for side in sides], "results": dict(results(sides)),
            "evaluation": [side.report for side in sides], "changes": change_rows(sides), "settings": dict(unlike),
        })  # fmt: skip
    else:
        settings = [(path, ["–" if value is None else str(value) for value in values]) for path, values in unlike]
        for title, rows in (
            ("Results", results(sides)), ("Held-out prompts", evaluation_rows(sides)),
            ("Settings that differ", settings),
        ):  # fmt: skip
            if rows:
                console().print(_sheet(title, [side.name for side in sides], rows))
        for sentence in change_rows(sides):
            _say(sentence)
    if arguments.output:
        path = write_comparison(sides, expanded(arguments.output).absolute(), rows=not arguments.no_rows)
        if not arguments.json:
            _say(f"Page: {path}")
    return 0


def _sheet(title: str, names: list[str], rows: list[tuple[str, list[str]]]) -> Table:
    table = Table(box=None, pad_edge=False, title=Text(title, style="italic"), title_justify="left")
    for name in ("", *names):
        table.add_column(Text(clean(name, 40)), justify="right" if name else "left", overflow="fold")
    for word, cells in rows:
        table.add_row(Text(clean(word, 60), style="dim"), *(Text(clean(cell, 80)) for cell in cells))
    return table


def report(arguments: argparse.Namespace) -> int:
    """``finetui report RUN``: RUN/report.html and RUN/report.md, or the one file that is named."""
    from core.report_files import write_report_file, write_reports

    run = find_run(runs_dir(arguments.runs_dir), arguments.run)
    if arguments.output:
        written = [write_report_file(run, expanded(arguments.output).absolute(), rows=not arguments.no_rows)]
    else:
        written = write_reports(run, rows=not arguments.no_rows)
    for path in written:
        _say(f"Report: {path}")
    return 0


def chat(arguments: argparse.Namespace) -> int:
    """``finetui chat RUN``: the app's room for trying a model."""
    folder = runs_dir(arguments.runs_dir)
    run = find_run(folder, arguments.run)
    if is_alive(run):
        raise FinetuiError(f"{run.name} is running.", "Its model can be tried when it has ended.")
    variants_of(run, run.plan())
    return open_app("--chat", str(run.path), "--runs-dir", str(folder))


def _say(text: str, style: str = "") -> None:
    if text:
        console().print(clean(text), markup=False, highlight=False, style=style)
