"""What each command does. Every function takes the parsed arguments and returns an exit code."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core import runner
from core.backend import make_plan
from core.children import ON_END_ENV, child_environment, stage_environment
from core.config import Resolved
from core.console import open_app, print_json, take_token
from core.data import Conversation
from core.errors import FinetuiError, about
from core.flags import settings_of
from core.heldout import NO_PROMPTS, NO_PROMPTS_ADVICE, held_out, prompts_of
from core.hub import refuse_name
from core.paths import configs_dir, expanded, runs_dir, scratch
from core.plan import DataPlan, Plan, StagePlan
from core.runs import Run, create_run, delete_run, find_run, list_runs, request_stop, status, summary
from core.sources import is_untuned, model_folder, model_source
from core.text import clean
from core.tools import read_tools
from core.watch import console, follow, runs_table, show_run

if TYPE_CHECKING:
    from core.data_ledger import Ledger


def resolved(arguments: argparse.Namespace, method: str, *, demo: bool = False, card: int | None = None) -> Resolved:
    """The plan these arguments make, checked and settled for this machine, or for a `card` of so many bytes.

    Raises FinetuiError.
    """
    take_token(arguments)
    config = arguments.config or (configs_dir() / "demo.yaml" if demo else None)
    settings = settings_of(arguments, method)
    if arguments.output_dir:
        target = expanded(arguments.output_dir).absolute()
        arguments.runs_dir = target.parent
        settings["name"] = (target.name, "flag --output-dir")
    return make_plan(method, config, settings, card=card)


def train(arguments: argparse.Namespace, method: str, *, demo: bool = False) -> int:
    """``finetui sft|kto|sft-kto|demo``: check, start a detached run, follow it."""
    if arguments.resume_from_checkpoint:
        reference = Path(arguments.resume_from_checkpoint)
        stages = (part for part in [reference, *reference.parents] if part.name in ("sft", "kto"))
        folder = expanded(next((part.parent for part in stages), reference))
        if len(folder.parts) > 1:
            arguments.runs_dir = folder.parent
        arguments.run = folder.name
        return resume(arguments)
    plan = resolved(arguments, method, demo=demo)
    if arguments.runs_dir:
        os.environ["FINETUI_RUNS"] = str(runs_dir(arguments.runs_dir))
    notices = preflight(plan.plan)
    from core.doctor import windows_disk

    if windows := windows_disk(runs_dir(arguments.runs_dir)):
        notices.append(f"{runs_dir(arguments.runs_dir)} is on {windows} Work under your Linux home.")
    if arguments.dry_run:
        return dry_run(plan, arguments, notices)
    run = create_run(runs_dir(arguments.runs_dir), plan)
    _take_on_end(arguments)
    runner.start(run)
    return _after_start(run, arguments, notices)


def _take_on_end(arguments: argparse.Namespace) -> None:
    if arguments.on_end:
        os.environ[ON_END_ENV] = arguments.on_end


def _after_start(
    run: Run, arguments: argparse.Namespace, notices: list[str] | None = None, done: Sequence[str] = (), since: int = 0
) -> int:
    """Say that the run was started, and follow it from byte `since` of its events; `done` are stages behind it."""
    if arguments.json and arguments.detach:
        print_json({"run": run.name, "path": str(run.path), "notices": notices or []})
        return 0
    if arguments.json:
        for notice in notices or []:
            print(json.dumps({"t": time.time(), "kind": "notice", "level": "warning", "text": notice}), flush=True)
    else:
        out = console()
        for notice in notices or []:
            out.print(clean(notice), style="yellow", markup=False, highlight=False)
        before = f"; {', '.join(stage.upper() for stage in done)} was done before" if done else ""
        verb = "started again" if since else "started"
        out.print(f"Run {run.name} {verb} in {run.path}{before}", markup=False, highlight=False)
        if arguments.detach:
            out.print(f"Follow it with: finetui watch {run.name}", markup=False, highlight=False)
            return 0
    return follow(run, as_json=arguments.json, ask=not arguments.json, since=since)


def preflight(plan: Plan) -> list[str]:
    """Look at model and data before a run is made, so that bad input costs seconds. Returns notices.

    Raises FinetuiError for what would fail later: no such file, broken rows, one label, no weights, no disk.
    """
    from core.data_reader import Rows
    from core.disk import refuse_small_disk
    from core.prepare import planned_steps

    with about("model"):
        source = model_source(plan.model, lambda text: None, fetch=False)
    notices, steps = demo_beside_own(plan), {}
    for stage in plan.training_stages:
        settings = plan.stage(stage)
        if settings.data.dataset and not (settings.data.file or settings.data.files):
            with about(f"{stage}.data"):
                refuse_name(settings.data.dataset)
            continue
        with about(f"{stage}.data"):
            ledger = _checked_ledger(plan, stage)
        with about(f"{stage}.max_length"):
            _refuse_hopeless_limit(stage, settings, Rows(ledger).each(ledger.used), source.base)
        steps[stage] = planned_steps(settings, stage, len(ledger.training()))
        totals = ledger.totals()
        if totals["left_out"]:
            reasons = "; ".join(f"{count:,} × {reason}" for reason, count in list(totals["reasons"].items())[:3])
            left_out = f"{totals['left_out']:,} of {totals['rows']:,}"
            notices.append(f"{stage.upper()}: {left_out} rows are left out: {reasons}")
    if is_untuned(plan):
        notices.append("KTO alone from a model that was not fine-tuned: SFT first usually works better.")
    if plan.export.stages:
        from core.commands_export import check_wishes

        notices += [line for line in check_wishes(plan, None) if not line.startswith("Disk: ")]
    if plan.evaluate.enabled:
        notices += _preflight_evaluation(plan)
    refuse_small_disk(plan, source, steps, runs_dir())
    return notices


def demo_beside_own(plan: Plan) -> list[str]:
    """Which stages would train on the demo's rows while others have rows of their own: seldom what is meant."""
    demo = [name for name in plan.training_stages if plan.stage(name).data.demo]
    own = [name for name in plan.training_stages if name not in demo]
    return [
        f"{name.upper()} trains on the demo's rows (made-up tool calls), {own[0].upper()} on yours. "
        f"Rows for {name.upper()} too: on the wizard's data page, or --set {name}.data.file=FILE."
        for name in demo
        if own
    ]


def _checked_ledger(plan: Plan, stage: str) -> "Ledger":
    """The ledger of a stage before it is tokenised. Raises FinetuiError."""
    from core.prepare import stage_ledger

    try:
        return stage_ledger(plan.stage(stage), stage, lambda text: None)
    except FinetuiError as error:
        if len(plan.training_stages) > 1:
            error.advice += f" Or name other rows for {stage.upper()} alone (--set {stage}.data.file=FILE)."
        raise


def _preflight_evaluation(plan: Plan) -> list[str]:
    """Look for the prompts of the evaluation at the end, as far as that needs no network. Raises FinetuiError."""
    if plan.evaluate.tools:
        read_tools(Path(plan.evaluate.tools))
    stages = [plan.stage(stage).data for stage in plan.training_stages]
    if plan.evaluate.file:
        return prompts_of(Path(plan.evaluate.file)).notes
    if not stages[-1].demo and not stages[-1].holdout:
        raise FinetuiError(NO_PROMPTS, NO_PROMPTS_ADVICE)
    if len(stages) > 1 and all(data.file for data in stages):
        return held_out(plan, None, plan.evaluate.max_prompts).notes
    return []


def _refuse_hopeless_limit(name: str, stage: StagePlan, rows: Iterable[Conversation], model: str) -> None:
    """Refuse a length limit under which no row can fit, where the tokenizer is here: the text alone is too long.

    The template adds to it, so this never refuses what training would take. Raises FinetuiError.
    """
    file = Path(model) / "tokenizer.json"
    if stage.data.too_long == "cut" or not file.is_file():
        return
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    shortest = None
    for row in rows:
        texts = [str(message["content"]) for message in row.messages if message["content"]]
        length = sum(len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts)
        if length <= stage.max_length:
            return
        shortest = min(shortest or length, length)
    raise FinetuiError(
        f"{name}.max_length of {stage.max_length} tokens leaves no row: the shortest has {shortest} and more.",
        f"Raise {name}.max_length.",
    )


def look(plan: Resolved, how: str) -> dict[str, Any]:
    """What a child finds that tokenises the plan's rows, and with ``load`` loads its model. Raises FinetuiError."""
    from core.config import save_plan

    with scratch() as folder:
        save_plan(plan, folder / "plan.yaml")
        command = [sys.executable, "-P", "-m", "core.train_dry", str(folder), how]
        environment = {**child_environment(), **stage_environment(plan.plan)}
        if how == "data":
            environment["FINETUI_BACKEND"] = "trl"  # rows are tokenised without Unsloth, which takes half a minute
        child = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", env=environment, cwd=folder
        )
    lines = child.stdout.strip().splitlines()
    try:
        report = json.loads(lines[-1])
    except (ValueError, IndexError):
        raise FinetuiError(
            "The dry run died.", (child.stderr.strip().splitlines() or ["No word from it."])[-1][:300], exit_code=1
        ) from None
    if "error" in report:
        raise FinetuiError(report["error"], report["advice"], exit_code=report.get("exit_code", 2))
    return report


def dry_run(plan: Resolved, arguments: argparse.Namespace, notices: list[str]) -> int:
    """Say what would happen. A child tokenises (and with ``load`` loads the model); no run is made."""
    report = look(plan, arguments.dry_run)
    if arguments.json:
        print_json({**report, "notices": notices})
        return 0
    out = console()
    for notice in notices:
        out.print(clean(notice), style="yellow", markup=False, highlight=False)
    for line in report["text"]:
        out.print(clean(line), markup=False, highlight=False)
    for line in _ahead(plan.plan, report["stages"]):
        out.print(clean(line, 400), markup=False, highlight=False)
    out.print("Nothing was started.", markup=False)
    return 0


def _ahead(plan: Plan, stages: dict[str, Any]) -> list[str]:
    """What follows training, and what everything together puts on the disk."""
    from core.disk import disk_of, size_words

    after = [stage for stage in plan.stages if stage not in plan.training_stages]
    steps = {name: int(found["steps"]) for name, found in stages.items() if found.get("steps")}
    disk = disk_of(plan, model_source(plan.model, lambda text: None, fetch=False), steps, runs_dir())
    parts = [f"{what} {size_words(count)}" for what, count in disk.needed.items()]
    parts += [f"{what}: not known yet" for what in disk.unknown]
    return [
        *([f"then: {', '.join(after)}"] if after else []),
        f"disk: about {size_words(disk.total)} ({', '.join(parts)}), {size_words(disk.free)} free",
    ]


def fit(arguments: argparse.Namespace) -> int:
    """``finetui fit METHOD``: 0 where every stage fits, 3 where one does not."""
    from core.budget import Place, item_lines, place_of, verdicts
    from core.memory import GIB, Lengths

    card = int(arguments.card * GIB) if arguments.card else None
    try:
        plan = resolved(arguments, arguments.method, card=card)
    except FinetuiError as error:
        if card or error.exit_code != 3:
            raise
        raise FinetuiError(error.message, "--card 24 asks about a GPU of 24 GiB.", exit_code=3) from error
    place = Place(f"a GPU of {arguments.card:g} GiB", card, card) if card else place_of(plan.plan)
    if place is None:
        raise FinetuiError("The driver does not say how much memory the GPU has.", "Use --card GIB.", exit_code=3)
    lengths, notes = {}, []
    named = [name for name in plan.plan.training_stages if _has_rows(plan.plan.stage(name).data)]
    if len(named) == len(plan.plan.training_stages):
        try:
            stages = look(plan, "data")["stages"]
            lengths = {name: Lengths(stages[name]["longest_rows"], stages[name]["longest_held_out"]) for name in named}
        except FinetuiError as error:
            notes.append(f"For rows as long as max_length allows: yours cannot be tokenised yet ({error.message})")
    else:
        notes.append("For rows as long as max_length allows; name the rows to ask about those.")
    source = model_source(plan.plan.model, lambda text: None, fetch=False)
    found = verdicts(plan.plan, lengths, place, model_folder(source))
    fits = all(judged is not None and judged.fits for judged in found.values())
    if arguments.json:
        print_json({
            "place": vars(place), "notes": notes, "fits": fits,
            "stages": {name: judged and {"fits": judged.fits, "words": judged.words, "bytes": judged.estimate.total,
                       "rows": judged.estimate.rows, "tokens": judged.estimate.tokens, "items": judged.estimate.items}
                       for name, judged in found.items()},
        })  # fmt: skip
        return 0 if fits else 3
    out = console()

    def say(text: str, style: str = "") -> None:
        out.print(clean(text), markup=False, highlight=False, style=style)

    say(f"{plan.plan.model.name}, {plan.plan.backend}: {place.words}")
    for name, judged in found.items():
        if judged is None:
            say(f"{name.upper()}  not known beforehand for this model; the run measures it before its first step")
            continue
        say(f"{name.upper()}  {judged.words}", "" if judged.fits else "red")
        for item, gib in item_lines(judged.estimate):
            say(f"     {item:<22}{gib:>6.2f} GiB")
        say(f"     {'in all':<22}{judged.estimate.total / GIB:>6.2f} GiB")
    for note in notes:
        say(note, "yellow")
    return 0 if fits else 3


def _has_rows(data: DataPlan) -> bool:
    return bool(data.file or data.files or data.dataset or data.demo)


def runs(arguments: argparse.Namespace) -> int:
    """``finetui runs``"""
    folder = runs_dir(arguments.runs_dir)
    found = [summary(run) for run in list_runs(folder)]
    if arguments.json:
        print_json(found)
    elif not found:
        console().print(f"No runs in {folder}. Start one with `finetui demo`.", markup=False, highlight=False)
    else:
        out = console()
        out.print(runs_table(found, out.width))
    return 0


def _run(arguments: argparse.Namespace) -> Run:
    return find_run(runs_dir(arguments.runs_dir), arguments.run)


def show(arguments: argparse.Namespace) -> int:
    """``finetui show RUN``"""
    run = _run(arguments)
    if arguments.json:
        state = run.state()
        print_json({
            **summary(run), "path": str(run.path), "result": state.result, "errors": state.errors,
            "notices": state.notices, "nonfinite": state.nonfinite,
            "stages": [
                {"name": s.name, "state": s.state, "step": s.step, "total_steps": s.total_steps, "output": s.output,
                 "checkpoints": s.checkpoints, "totals": s.totals, "seconds": s.phase_seconds}
                for s in state.stages
            ],
        })  # fmt: skip
    else:
        show_run(console(), run)
    return 0


def watch(arguments: argparse.Namespace) -> int:
    """``finetui watch [--tui] RUN``; with ``--tui`` also a recorded log, or a run's directory."""
    if arguments.tui:
        there = expanded(arguments.run)
        is_log = there.is_file() or (there / "events.jsonl").is_file()
        path = there.absolute() if is_log else _run(arguments).path
        return open_app("--watch", str(path), "--runs-dir", str(runs_dir(arguments.runs_dir)))
    return follow(_run(arguments), as_json=arguments.json, ask=False)


def stop(arguments: argparse.Namespace) -> int:
    """``finetui stop RUN``"""
    run = _run(arguments)
    task = run.state().task
    request_stop(run)
    if task:
        print(f"{run.name}: its evaluation will end. The answers so far are kept: finetui eval {run.name} goes on.")
        return 0
    print(f"{run.name} will save a checkpoint at the next step and stop. Resume it with: finetui resume {run.name}")
    return 0


def abort(arguments: argparse.Namespace) -> int:
    """``finetui abort RUN``"""
    run = _run(arguments)
    task = run.state().task
    runner.abort(run)
    if task:
        print(f"{run.name}: its evaluation is being ended. The answers so far are kept.")
        return 0
    print(f"{run.name} is being ended. Resume it from its newest checkpoint with: finetui resume {run.name}")
    return 0


def resume(arguments: argparse.Namespace) -> int:
    """``finetui resume RUN``"""
    run = _run(arguments)
    _take_on_end(arguments)
    if getattr(arguments, "fix", False):
        apply_remedy(run)
    before, since = run.state(), run.events_path.stat().st_size if run.events_path.is_file() else 0
    runner.resume(run)
    done = [stage.name for stage in before.stages if stage.state == "done"]
    return _after_start(run, arguments, done=done, since=since)


def apply_remedy(run: Run) -> None:
    """Change in the run's plan what its failure asks for. Raises FinetuiError where nothing is known to help."""
    from core import remedy
    from core.postmortem import examined

    found = examined(run, status(run, run.state().end_status))
    if found is None:
        raise FinetuiError(f"{run.name} has not failed.", "See `finetui show` for what it is.")
    if found.remedy is None:
        raise FinetuiError(f"{found.title}.", found.cause.advice or found.cause.cause)
    remedy.apply(run, found.remedy)


def delete(arguments: argparse.Namespace) -> int:
    """``finetui delete RUN``"""
    run = _run(arguments)
    if not arguments.yes:
        if not sys.stdin.isatty():
            raise FinetuiError(f"Deleting {run.name} needs a yes.", "Add --yes.")
        if input(f"Delete {run.path} with its models? [y/N] ").strip().lower() not in ("y", "yes"):
            print("Kept.")
            return 0
    delete_run(run)
    print(f"{run.name} is deleted.")
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    """``finetui doctor``"""
    from core import doctor as room

    found = room.checks()
    if arguments.json:
        print(room.as_json(found))
    else:
        room.print_report(console(), found)
    return 1 if room.worst(found) == "fail" else 0
