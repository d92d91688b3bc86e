"""``finetui merge|gguf|upload RUN``: check what is asked, keep it with the run, have its runner make it, follow it."""

import argparse
import sys
from typing import Any

from core import runner
from core.artefacts import ask_for, checked_request, chosen, made, read_report, stage_done
from core.console import print_json, take_token
from core.errors import FinetuiError
from core.paths import runs_dir
from core.plan import ExportPlan, Plan
from core.runs import Run, find_run, is_alive
from core.text import clean
from core.watch import console, follow


def merge(arguments: argparse.Namespace) -> int:
    """``finetui merge RUN``"""
    return _make(arguments, {"save_method": arguments.save_method or "merged_16bit"})


def gguf(arguments: argparse.Namespace) -> int:
    """``finetui gguf RUN --quant Q4_K_M``, and ``finetui gguf --install``"""
    if arguments.install:
        from core.gguf_tools import install

        install(lambda text: print(clean(text), flush=True))
        if not arguments.run:
            return 0
    if not arguments.run:
        raise FinetuiError("A run must be named.", "finetui gguf RUN --quant Q4_K_M; `finetui runs` lists them.")
    return _make(arguments, {"gguf": arguments.quant or ["Q4_K_M"]})


def upload(arguments: argparse.Namespace) -> int:
    """``finetui upload RUN OWNER/NAME``"""
    take_token(arguments)
    changes: dict[str, Any] = {"upload": arguments.repository}
    if arguments.private:  # what the plan or an earlier wish made private stays so
        changes["private"] = True
    if arguments.save_method:
        changes["save_method"] = arguments.save_method
    if arguments.gguf:
        changes["gguf"] = arguments.gguf
    return _make(arguments, changes, ask=True)


def _make(arguments: argparse.Namespace, changes: dict[str, Any], *, ask: bool = False) -> int:
    run = find_run(runs_dir(arguments.runs_dir), arguments.run)
    for key in ("checkpoint", "base"):
        if getattr(arguments, key) is not None:
            changes[key] = getattr(arguments, key)
    plan = checked_request(run, changes)
    if not walks(run):
        _nothing_else(run.plan(), plan, changes)
    lines = check_export(run, plan)
    if ask and not arguments.yes and not _agreed(lines, plan):
        print("Nothing was uploaded.")
        return 0
    return _start(run, plan, arguments, [] if ask and not arguments.yes else lines)


def walks(run: Run) -> bool:
    """Whether the run's stages are under way. One that has ended may be alive all the same: it is being evaluated."""
    return is_alive(run) and not run.state().task


def _nothing_else(before: Plan, plan: Plan, changes: dict[str, Any]) -> None:
    """Take out of the wish what stands in it from earlier and was not asked for now.

    Nothing is sent by a command that is not `upload`; of another checkpoint only what is named now is made.
    """
    other = plan.export.checkpoint != before.export.checkpoint
    if "upload" not in changes:
        plan.export.upload = None
    if "gguf" not in changes and ("upload" not in changes or other):
        plan.export.gguf = []
    elif other and "gguf" in changes:
        plan.export.gguf = [one for one in plan.export.gguf if one in ExportPlan(gguf=changes["gguf"]).gguf]


def _agreed(lines: list[str], plan: Plan) -> bool:
    for line in lines:
        print(clean(line, 400))
    if not sys.stdin.isatty():
        raise FinetuiError(f"Uploading to {plan.export.upload} needs a yes.", "Add --yes.")
    return input("Upload this? [y/N] ").strip().lower() in ("y", "yes")


def _start(run: Run, plan: Plan, arguments: argparse.Namespace, lines: list[str]) -> int:
    said = run.events_path.stat().st_size
    begin(run, plan)
    if arguments.json and arguments.detach:
        print_json({"run": run.name, "path": str(run.path), "stages": plan.export.stages})
        return 0
    out = console()
    if not arguments.json:
        for line in lines:
            out.print(clean(line, 400), markup=False, highlight=False)
        if arguments.detach:
            out.print(f"Follow it with: finetui watch {run.name}", markup=False, highlight=False)
            return 0
    code = follow(run, as_json=arguments.json, ask=not arguments.json, since=said)
    if code == 0 and not arguments.json:
        for line in result_lines(run, plan):
            out.print(clean(line, 400), markup=False, highlight=False)
        if left := [stage for stage in plan.export.stages if not stage_done(run, stage)]:
            words = f"Not made yet: {', '.join(left)}. `finetui resume {run.name}` makes it."
            out.print(clean(words, 400), markup=False, highlight=False)
    return code


def begin(run: Run, plan: Plan) -> None:
    """Keep the wish with the run and start its runner; one that is alive takes it up by itself.

    Raises FinetuiError when all that is wanted is there already.
    """
    ask_for(run, plan)
    if is_alive(run):
        return
    if all(stage_done(run, stage) for stage in plan.stages):
        raise FinetuiError(
            "All of that is made already.", f"See `finetui show {run.name}`, or {run.path}.", exit_code=0
        )
    runner.start(run)


def check_export(run: Run, plan: Plan) -> list[str]:
    """Look at everything that could fail later, before anything is made. Returns what will happen, in lines.

    Raises FinetuiError: no such checkpoint, no base, no GPU for 4 bit, no tools, no room, no right to upload.
    """
    under_way = walks(run)
    if not under_way:
        chosen(run, plan.export)
        unfinished = [stage for stage in plan.training_stages if not run.trained(stage)]
        if unfinished:
            raise FinetuiError(
                f"{run.name} has not finished its training ({unfinished[0]}).", f"Resume it: finetui resume {run.name}."
            )
    lines = check_wishes(plan, run)
    done = [stage for stage in plan.export.stages if not under_way and made(run, stage, plan.export)]
    ahead = [stage for stage in plan.export.stages if stage not in done]
    of = f" of {chosen(run, plan.export).name}" if not under_way else ""
    return [f"{run.name}{of}: {', then '.join(ahead) or 'all of that is made already'}", *lines]


def check_wishes(plan: Plan, run: Run | None) -> list[str]:
    """What `check_export` says of the wishes alone: for a plan before its run is made, too. Raises FinetuiError."""
    from core.backend import installed, no_bitsandbytes
    from core.bases import find_base
    from core.gguf_tools import need_tools
    from core.outlook import export_bytes, refuse_exports

    export, lines = plan.export, []
    if "merged_4bit" in export.merged_forms and not installed("bitsandbytes"):
        raise no_bitsandbytes("merged_4bit needs")
    if export.merged_forms:
        base = find_base(plan, lambda text: None, fetch=False)
        if base.extra_download:
            lines.append(f"The 16-bit weights of {base.place} will be fetched.")
        if base.quantised:
            lines.append("It is merged into the 4-bit weights it was trained on, unpacked to 16 bit.")
    if export.gguf:
        need_tools()
    if run:  # for a run that is not made yet everything that it will write is counted together (core.disk)
        refuse_exports(plan, run)
    if needed := export_bytes(plan, run):
        lines.append("Disk: " + ", ".join(f"{what} {count / 2**30:.2f} GiB" for what, count in needed.items()))
    if export.upload:
        from core.upload import check_upload

        lines += check_upload(plan, run)
    return lines


def result_lines(run: Run, plan: Plan) -> list[str]:
    """What was made, and how to use it."""
    lines = []
    files = read_report(run, "gguf").get("files", {})
    for quantisation in plan.export.gguf:
        if entry := files.get(quantisation):
            agreement = entry.get("token_agreement")
            words = f", {100 * agreement:.1f} % of the model's tokens" if agreement is not None else ""
            lines.append(
                f"{quantisation}: {run.path / 'gguf' / entry['name']} ({entry['bytes'] / 2**20:.0f} MiB{words})"
            )
    for what, command in read_report(run, "gguf").get("serve", {}).items() if plan.export.gguf else ():
        lines.append(f"{what}: {command}")
    if plan.export.upload and (address := read_report(run, "upload").get("address")):
        lines.append(f"uploaded: {address}")
    return lines
