"""What ``finetui check`` and ``finetui data …`` do: each takes the parsed arguments and returns an exit code."""

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from typing import Any

from core.console import print_json
from core.data import remedy_of
from core.data_headline import headline, number
from core.data_ledger import FIELDS, LEDGER, Ledger, read_ledger, save_ledger, write_entries
from core.data_look import Request
from core.data_look import look as look_at
from core.data_mend import Cleaning, Told, check_target, ledger_of
from core.data_shape import batch_words
from core.errors import FinetuiError
from core.flags import mapping_of
from core.paths import expanded, runs_dir
from core.plan import Plan
from core.sources import is_untuned
from core.text import clean as cleaned
from core.watch import console

STYLES = ("bold red", "yellow", "dim")


def say(text: str, style: str = "") -> None:
    console().print(cleaned(text, 2000), markup=False, highlight=False, style=style)


def columns_of(arguments: argparse.Namespace) -> dict[str, str]:
    """The mapping that ``--column`` words make. Raises FinetuiError for a part or a column that there is not."""
    from core.data_rows import COLUMNS
    from core.data_survey import refuse_unknown_columns, survey

    found = mapping_of("--column", arguments.column or [])
    for part in found:
        if part not in COLUMNS:
            raise FinetuiError(f"A column cannot be {part!r}.", f"It can be {', '.join(COLUMNS)}.")
    files = arguments.file if isinstance(arguments.file, list) else [arguments.file]
    if found:
        refuse_unknown_columns([survey(path.expanduser().absolute(), found) for path in files])
    return found


# --- check ---


def check(arguments: argparse.Namespace) -> int:
    """``finetui check FILE…``"""
    files = [str(expanded(path).absolute()) for path in arguments.file]
    data: dict[str, Any] = {
        "file": files[0], "files": dict.fromkeys(files[1:], 1.0), "columns": columns_of(arguments),
        "include_undesirable": arguments.include_undesirable, "holdout": arguments.split_dataset,
        "too_long": arguments.too_long,
    }  # fmt: skip
    if arguments.ledger:
        for file in map(expanded, filter(None, [*arguments.file, arguments.eval_file])):
            if file.exists():
                check_target(file, arguments.ledger, force=arguments.force)
    plan = _plan(arguments, data)
    request = Request(
        arguments.method, data, near=not arguments.no_near, untuned=plan is not None and is_untuned(plan),
        eval_file=str(arguments.eval_file.absolute()) if arguments.eval_file else "",
    )  # fmt: skip
    reports: list[dict[str, Any]] = []
    ledger = look_at(request, _teller(reports))
    assert ledger is not None
    found = reports[-1]
    if found["problem"]:
        raise FinetuiError(found["problem"]["error"], found["problem"]["advice"])
    uncounted = None
    if plan:
        try:
            counted = found["tokens"] = _counted(arguments, plan)
            found["findings"] = sorted([*counted["findings"], *found["findings"]], key=lambda entry: entry["weight"])
        except FinetuiError as error:
            uncounted = error
    elif arguments.ledger:
        save_ledger(ledger, arguments.ledger)
    if arguments.json:
        print_json(_as_json(found, ledger))
    else:
        _print_report(found, arguments)
    if uncounted:
        unwritten = f", and {arguments.ledger} was not written" if arguments.ledger else ""
        raise FinetuiError(f"Tokens were not counted{unwritten}: {uncounted.message}", uncounted.advice) from uncounted
    return 0


def _teller(reports: list[dict[str, Any]]) -> Callable[[dict[str, Any]], None]:
    """Takes what a look says: reports are kept, progress goes to a terminal's last line."""
    shown = sys.stderr.isatty()

    def tell(message: dict[str, Any]) -> None:
        if "report" in message:
            reports.append(message["report"])
        if not shown:
            return
        progress = message.get("progress")
        words = progress_words(progress) if progress else ""
        print(f"\r\x1b[K{cleaned(words, 78)}", end="", file=sys.stderr, flush=True)

    return tell


def progress_words(progress: dict[str, Any]) -> str:
    """How far a look is, in a line."""
    done, total = progress.get("done_bytes", 0), progress.get("total_bytes", 0)
    share = f"{done / total:.0%}" if total else ""
    if progress["phase"] == "near":
        return f"{share} looking for rows that say almost the same"
    if progress["phase"] == "read":
        return f"{progress['rows']:,} rows read"
    seen = f": {'; '.join(progress['seen'][:2])}" if progress.get("seen") else ""
    return f"{share} {progress['rows']:,} rows checked{seen}"


def _plan(arguments: argparse.Namespace, data: dict[str, Any]) -> Plan | None:
    """A plan of the stage with the model of the arguments; None where none is named."""
    if not (arguments.model_size or arguments.model_name or arguments.max_seq_length):
        return None
    from core.backend import gpu_present, make_paths_absolute
    from core.config import resolve

    stage = arguments.method
    settings: dict[str, tuple[Any, str]] = {f"{stage}.data.{name}": (value, "check") for name, value in data.items()}
    for path, value in (("model.size", arguments.model_size), ("model.name", arguments.model_name),
                        (f"{stage}.max_length", arguments.max_seq_length)):  # fmt: skip
        if value is not None:
            settings[path] = (value, "check")
    found = resolve(stage, None, settings, gpu_present=gpu_present()).plan
    make_paths_absolute(found)
    return found


def _counted(arguments: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    """The rows in tokens; every row with its fate is written where that is asked for."""
    from core.lens import ask_once

    if sys.stderr.isatty():
        print("\r\x1b[Kcounting tokens …", end="", file=sys.stderr, flush=True)
    saved = str(arguments.ledger.absolute()) if arguments.ledger else ""
    asked = {"do": "count", "exact": True, "ledger": saved, "stage": arguments.method}
    try:
        return ask_once({**asked, "plan": plan.model_dump(mode="json")})
    finally:
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _as_json(found: dict[str, Any], ledger: Ledger) -> dict[str, Any]:
    totals = found["totals"]
    entries = list(ledger.entries())
    files = [entry["file"] for entry in found["files"]]
    left_out = [
        {"file": files[entry["file"]], "line": entry["line"], "reason": entry.get("reason", "")}
        for entry in entries
        if entry["fate"] == "left out"
    ]
    repaired = [
        {"file": files[entry["file"]], "line": entry["line"], "reason": entry["repaired"]}
        for entry in entries
        if "repaired" in entry
    ]
    labels = {str(label).lower(): count for label, count in ledger.label_counts(held_out=True).items()}
    return {
        **found, "file": files[0], "rows": totals["rows"], "used": found["usable"], "labels": labels,
        "left_out": left_out, "repaired": repaired,
    }  # fmt: skip


def _print_report(found: dict[str, Any], arguments: argparse.Namespace) -> None:
    totals = found["totals"]
    for entry in found["files"]:
        shapes = ", ".join(entry["shapes"]) or "no shape found"
        blank = f", {number(entry['blank'], 'blank line')}" if entry["blank"] else ""
        say(f"{entry['file']}: {number(entry['rows'], 'row')} ({entry['kind']}: {shapes}{blank})", "bold")
    told = headline(found, found.get("tokens"), arguments.method)
    say(f"  {told.rows}")
    if told.left_out:
        say(f"  {told.left_out}")
    if weights := (found.get("tokens") or found)["weights"]:
        say("  weights: desirable {:g}, undesirable {:g}".format(*weights))
    _print_content(found["content"])
    if "tokens" in found:
        for line in token_lines(found["tokens"]):
            say(f"  {line}")
    for entry in found["findings"]:
        _print_finding(entry)
    for reason, count in totals["repairs"].items():
        say(f"· {count:,} × repaired: {reason}", "dim")
    if not found["findings"]:
        say("✔ Nothing to mend was found.", "green")
    elif totals["left_out"]:
        columns = [word for pair in arguments.column or [] for word in ("--column", pair)]
        again = ["finetui", "check", *map(str, arguments.file), "--method", arguments.method, *columns]
        say(f"Every row with its fate: {shlex.join(again)} --ledger OUT.csv")


def _print_content(content: dict[str, Any]) -> None:
    turns = "; ".join(f"{count:,} × {pattern}" for pattern, count in list(content["turns"].items())[:3])
    if turns:
        say(f"  turns: {turns}{' …' if len(content['turns']) > 3 else ''}")
    if content["tools"]:
        named = ", ".join(f"{name} {count:,}" for name, count in list(content["tools"].items())[:5])
        more = len(content["tools"]) - 5
        say(f"  tools called: {named}{f' and {more} more' if more > 0 else ''}")


def _print_finding(entry: dict[str, Any]) -> None:
    from core.data_finding import Finding

    finding = Finding(**{key: value for key, value in entry.items() if key != "mark"})
    where = f" ({finding.lines_words()})" if finding.places else ""
    say(f"{finding.mark} {finding.text}{where}", STYLES[finding.weight])
    if finding.detail:
        say(f"    {finding.detail}")
    say(f"    {finding.remedy}")


def token_lines(counted: dict[str, Any]) -> list[str]:
    """Lengths in tokens, what the limit does, how batches are filled: a few lines."""
    shape = counted["shape"]
    limit, rows, answers = shape["limit"], shape["row_percentiles"], shape["answer_percentiles"]
    about = "" if counted["exact"] else "about "
    kept = f"{about}{counted['examples']:,} examples of {about}{counted['tokens']:,} tokens an epoch"
    return [
        f"tokens: {kept}, {counted['trained_tokens']:,} of them trained",
        f"rows: {_percentile_words(rows)}; answers: {_percentile_words(answers)}",
        f"limit: {limit['whole']:,} rows fit, {limit['cut']:,} are cut, {limit['left_out']:,} left out",
        f"batches: {batch_words(shape)}",
    ]


def _percentile_words(found: dict[str, int]) -> str:
    return f"half up to {found['50']:,}, 95 % up to {found['95']:,}, longest {found['100']:,}" if found else "none"


# --- data … ---


def clean(arguments: argparse.Namespace) -> int:
    """``finetui data clean IN OUT``"""
    from core.data_mend import clean as clean_file

    check_target(arguments.file, arguments.out, force=arguments.force)
    check_target(arguments.file, ledger_of(arguments.out), force=arguments.force)
    cleaning = Cleaning(arguments.drop_duplicates, arguments.mend_encoding, columns_of(arguments))
    told = clean_file(arguments.file, arguments.out, cleaning, _step())
    _told(arguments, told, f"{arguments.out}; every change: {ledger_of(arguments.out)}")
    return 0


def split(arguments: argparse.Namespace) -> int:
    """``finetui data split IN``"""
    from core.data_mend import split as split_file

    stem = arguments.file.with_suffix("")
    training = arguments.training or stem.with_name(f"{stem.name}-train.jsonl")
    held_out = arguments.held_out or stem.with_name(f"{stem.name}-heldout.jsonl")
    if not 0 < arguments.share < 1:
        raise FinetuiError(f"--share {arguments.share:g} is no share.", "Give a number between 0 and 1.")
    for target in (training, held_out):
        check_target(arguments.file, target, force=arguments.force)
    told = split_file(arguments.file, training, held_out, arguments.share, arguments.seed, columns_of(arguments))
    _told(arguments, told, f"{training} and {held_out}")
    return 0


def sample(arguments: argparse.Namespace) -> int:
    """``finetui data sample IN OUT``"""
    from core.data_mend import sample as sample_file

    check_target(arguments.file, arguments.out, force=arguments.force)
    if arguments.rows < 1:
        raise FinetuiError(f"--rows {arguments.rows} would write nothing.", "Give a number above 0.")
    told = sample_file(
        arguments.file, arguments.out, arguments.rows, arguments.seed, balanced=arguments.balanced,
        columns=columns_of(arguments),
    )  # fmt: skip
    _told(arguments, told, str(arguments.out))
    return 0


def convert(arguments: argparse.Namespace) -> int:
    """``finetui data convert IN OUT``"""
    from core.data_mend import convert as convert_file

    check_target(arguments.file, arguments.out, force=arguments.force)
    told = convert_file(arguments.file, arguments.out, arguments.to, columns_of(arguments), _step())
    _told(arguments, told, str(arguments.out))
    return 0


def _step() -> Callable[[int], None] | None:
    if not sys.stderr.isatty():
        return None
    return lambda rows: print(f"\r\x1b[K{rows:,} rows", end="", file=sys.stderr, flush=True)


def _told(arguments: argparse.Namespace, told: Told, where: str) -> None:
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    if arguments.json:
        print_json({"rows": told.rows, "written": told.written, "counts": dict(told.fates), "entries": told.entries})
        return
    say(f"{told.written:,} of {told.rows:,} rows written to {where}")
    for what, count in told.fates.most_common():
        say(f"  {count:,} × {what}")
    if told.rows and not told.written and (reason := next(iter(told.fates), "")):
        say(remedy_of(reason.removeprefix("left out: ")), "yellow")


def show(arguments: argparse.Namespace) -> int:
    """``finetui data show FILE --line N``"""
    from core.lens import ask_once

    file = str(expanded(arguments.file).absolute())
    data: dict[str, Any] = {"file": file, "columns": columns_of(arguments), "too_long": arguments.too_long}
    if not (arguments.model_size or arguments.model_name):
        arguments.model_size = "135m"
    plan = _plan(arguments, data)
    assert plan is not None
    asked = {"stage": arguments.method, "plan": plan.model_dump(mode="json")}
    place: dict[str, Any] = {"at": 0} if arguments.line is None else {"line": [file, arguments.line]}
    found = ask_once({"do": "show", **place, "ids": arguments.ids or arguments.json, **asked})
    if arguments.line is not None and found["line"] != arguments.line:
        nearest = f"The nearest one that can be used: --line {found['line']}."
        raise FinetuiError(f"{file} has no row at line {arguments.line:,}.", nearest)
    if arguments.json:
        print_json(found)
        return 0
    from core.data_show import show_row

    show_row(console(), found, plan.model.name, ids=arguments.ids)
    return 0


def ledger(arguments: argparse.Namespace) -> int:
    """``finetui data ledger RUN [OUT]``"""
    from core.runs import find_run

    run = find_run(runs_dir(arguments.runs_dir), arguments.run)
    wanted = ["sft", "kto"] if arguments.stage == "all" else [arguments.stage]
    stages = [name for name in wanted if (run.stage_path(name) / LEDGER).is_file()]
    if not stages:
        raise FinetuiError(f"{run.name} has no ledger.", "It is written when a stage has read its rows.")
    for stage in stages if arguments.out else ():
        check_target(run.stage_path(stage) / LEDGER, arguments.out, force=arguments.force)
    try:
        found = {stage: read_ledger(run.stage_path(stage) / LEDGER) for stage in stages}
        words = [line for stage, (head, _) in found.items() for line in _ledger_words(run.name, stage, head)]
        if arguments.out and len(stages) == 1:
            write_entries(found[stages[0]][1], arguments.out)
        elif arguments.out:
            named = ({"stage": stage, **entry} for stage, (_, entries) in found.items() for entry in entries)
            write_entries(named, arguments.out, ("stage", *FIELDS))
    except (ValueError, KeyError, IndexError, TypeError, OSError) as error:
        raise FinetuiError(f"The ledger of {run.name} cannot be read.", "It was damaged or changed.") from error
    for line in words:
        say(line)
    if arguments.out:
        say(f"Every row: {arguments.out}")
    return 0


def _ledger_words(run: str, stage: str, head: dict[str, Any]) -> list[str]:
    """What became of the rows of a stage, in a few lines."""
    totals = head["totals"]
    return [
        f"{run} {stage.upper()}: {totals['rows']:,} rows of {', '.join(head['files'])}",
        f"  {totals['used']:,} used, {totals['cut']:,} cut, {totals['left_out']:,} left out, "
        f"{totals['repaired']:,} repaired",
        *(f"  left out: {count:,} × {reason}" for reason, count in totals["reasons"].items()),
    ]


def look(arguments: argparse.Namespace) -> int:
    """``finetui data look OWNER/NAME``"""
    from core.data_hub import HubRows, first_rows, listing, where_words

    wanted = HubRows(
        arguments.dataset, arguments.dataset_config, arguments.dataset_file, arguments.dataset_split,
        arguments.dataset_revision,
    )  # fmt: skip
    found = listing(wanted)
    rows = first_rows(wanted, arguments.rows)
    if arguments.json:
        print_json({**found, "rows": rows})
        return 0
    for line in where_words(found):
        say(line)
    for row in rows:
        say(json.dumps(row, ensure_ascii=False, default=str)[:600], "dim")
    return 0
