"""What is done with a run that has ended: `finetui eval`, `finetui compare`, `finetui report`."""

import argparse
from pathlib import Path

from core import runner
from core.cli import EVAL_FLAGS, print_json
from core.errors import FinetuiError
from core.evaluation import (
    HELD_OUT,
    Report,
    Threshold,
    ask,
    evaluation_path,
    name_of,
    options_of,
    read_report,
)
from core.evaluation_report import remarks
from core.events import EventTail, RunState
from core.heldout import held_out
from core.paths import runs_dir
from core.plan import EvaluatePlan, Plan
from core.runs import Run, find_run, is_alive
from core.text import clean
from core.tools import read_tools
from core.variants import variants_of
from core.watch import console, follow_task, shown_result

EXIT_UNDER = 4


def evaluate(arguments: argparse.Namespace) -> int:
    """``finetui eval RUN``: check, start a detached evaluation, follow it, judge it."""
    run = find_run(runs_dir(arguments.runs_dir), arguments.run)
    thresholds = [Threshold.parse(text) for text in arguments.fail_under]
    name, options = asked(run, run.plan(), arguments, thresholds)
    ask(run, options, name)
    tail, state = EventTail(run.events_path), RunState(name=run.name)
    while events := tail.read():
        for event in events:
            state.fold(event)
    runner.start(run, "evaluate", name)
    if arguments.detach:
        where = evaluation_path(run, name)
        if arguments.json:
            print_json({"run": run.name, "evaluation": name, "path": str(where)})
        else:
            _say(f"{run.name} is being evaluated. Follow it with: finetui watch {run.name}")
            _say(f"The report will be {where / 'report.md'}")
        return 0
    ended = follow_task(run, tail, state, quiet=arguments.json, ask=not arguments.json)
    if ended is None:
        return 130
    report = read_report(evaluation_path(run, name))
    if ended != "done" or report is None:
        return _not_done(run, state, ended)
    return judged(run, report, thresholds, as_json=arguments.json)


def asked(run: Run, plan: Plan, arguments: argparse.Namespace, thresholds: list[Threshold]) -> tuple[str, EvaluatePlan]:
    """The name and options of the evaluation these arguments ask for, checked. Raises FinetuiError."""
    from pydantic import ValidationError

    if is_alive(run):
        raise FinetuiError(f"{run.name} is running.", f"Wait for its end, or stop it: finetui stop {run.name}.")
    names = [variant.name for variant in variants_of(run, plan)]
    for threshold in thresholds:
        if threshold.variant not in ("", "start", *names):
            raise FinetuiError(f"{run.name} has no model {threshold.variant!r}.", f"It has {', '.join(names)}.")
    values = {name: value for name in EVAL_FLAGS if (value := getattr(arguments, name)) is not None}
    if arguments.file:
        values["file"] = str(arguments.file.expanduser().absolute())
    if arguments.tools:
        values["tools"] = str(arguments.tools.expanduser().absolute())
    if arguments.ignore_argument:
        values["ignore_arguments"] = arguments.ignore_argument
    try:
        options = EvaluatePlan.model_validate({**plan.evaluate.model_dump(), **values})
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        flag = str(first["loc"][0]).replace("_", "-")
        raise FinetuiError(f"--{flag}: {first['msg']}.", "`finetui eval --help` lists what there is.") from error
    if options.tools:
        read_tools(Path(options.tools))
    held_out(plan, Path(options.file) if options.file else None, options.max_prompts)
    return name_of(Path(values["file"]) if "file" in values else None), options


def _not_done(run: Run, state: RunState, ended: str) -> int:
    if ended == "stopped":
        _say(f"Stopped. The answers so far are kept: finetui eval {run.name} goes on.")
        return 0
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


def _say(text: str, style: str = "") -> None:
    if text:
        console().print(clean(text), markup=False, highlight=False, style=style)


def kept_options(run: Run, name: str = HELD_OUT) -> EvaluatePlan:
    """What an evaluation was last asked to do; without one, what the plan says. Raises FinetuiError."""
    try:
        return options_of(evaluation_path(run, name))
    except FinetuiError:
        return run.plan().evaluate
