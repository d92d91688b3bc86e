"""Follow a run in a plain terminal, a pipe, or as JSON lines; print the history and one run."""

import json
import os
import select
import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from core.console import NO_TERMINAL
from core.evaluation import variant_words
from core.evaluation_report import share_words
from core.events import Event, EventTail, RunState, StageState
from core.runs import Run, is_alive, request_stop, status, summary
from core.scores import MARKS
from core.stages import EXPORT_STAGES
from core.text import clean, duration, number

POLL_S = 0.5
STARTED_OVER = "The event log was replaced or cut; it is told from its beginning."
GLYPHS = {
    "running": "●", "stopping": "◐", "done": "✔", "failed": "✘", "stopped": "■", "aborted": "■", "crashed": "✘",
    "waiting": "○",
}  # fmt: skip
STYLES = {"running": "cyan", "stopping": "yellow", "done": "green", "failed": "red", "crashed": "red"}
BY_WEIGHT = ("exact", "tool", "format", "arguments", "required", "preferred", "decision", "schema", "alone")
NAME_WIDTH, MARK_WIDTH = 16, 14


def console(stderr: bool = False) -> Console:
    """A Rich console that honours NO_COLOR and pipes."""
    return Console(stderr=stderr, soft_wrap=True)


def follow(run: Run, *, as_json: bool = False, ask: bool = False, since: int = 0) -> int:
    """Print what happens until the run ends, and return its exit code.

    On a terminal a progress bar, else plain lines; with `as_json` every event. Ctrl-C leaves the run going; with
    `ask` it asks whether to stop it with a checkpoint. Nothing is said of the first `since` bytes of the log.
    """
    tail, state = EventTail(run.events_path), RunState(name=run.name)
    while tail.offset < since and (events := tail.read(since - tail.offset)):
        for event in events:
            state.fold(event)
    if not watched(run, tail, state, _Json() if as_json else _view(), ask):
        return 130
    end = status(run, state.end_status)
    if not as_json:
        show_end(console(), run, state, end)
    return 0 if end in ("done", "stopped") else 1


def follow_task(
    run: Run, tail: EventTail, state: RunState, name: str, *, quiet: bool = False, ask: bool = False
) -> str | None:
    """Print what happens from where `tail` stands until the task `name` on a run has ended.

    Returns how its stage ended, None where the person left it.
    """
    if not watched(run, tail, state, _View() if quiet else _view(), ask):
        return None
    ended = state.stage(name).state
    return "crashed" if ended in ("running", "waiting") else ended


def _view() -> "_View":
    able = os.name == "nt" or os.environ.get("TERM", "") not in NO_TERMINAL
    return _Bar() if sys.stdout.isatty() and able else _Plain()


def watched(run: Run, tail: EventTail, state: RunState, view: "_View", ask: bool) -> bool:
    """Follow a run until it has ended; False where the person left it going."""
    while True:
        try:
            with view:
                alive = True
                while alive:
                    alive = is_alive(run)
                    _catch_up(tail, state, view)
                    if alive and hung_up():
                        return False
                    if alive:
                        time.sleep(POLL_S)
            return True
        except KeyboardInterrupt:
            if not _go_on(run, ask):
                return False


def hung_up() -> bool:
    """Whether what is printed reaches nobody any more: the terminal is gone, or the pipe's reader."""
    try:
        looked = select.poll()
        looked.register(sys.stdout.fileno(), 0)
        return any(found & (select.POLLHUP | select.POLLERR | select.POLLNVAL) for _, found in looked.poll(0))
    except (AttributeError, OSError, ValueError):  # Windows; a stream that is no file
        return False


def _catch_up(tail: EventTail, state: RunState, view: "_View") -> None:
    restarts = tail.restarts
    while (events := tail.read()) or tail.restarts != restarts:
        if tail.restarts != restarts:
            restarts = tail.restarts
            state.start_over()
            view.start_over({"t": time.time(), "kind": "notice", "level": "warning", "text": STARTED_OVER}, state)
        for event in events:
            state.fold(event)
            view.show(event, state)
    view.tick(state)


def _go_on(run: Run, ask: bool) -> bool:
    """After Ctrl-C: whether to keep following. Leaving is the default and never harms the run."""
    if not (ask and sys.stdin.isatty()):
        print(f"\nLeft. {run.name} goes on; watch it with: finetui watch {run.name}", file=sys.stderr)
        return False
    try:
        answer = input("\n[s]top with a checkpoint, [l]eave it running, or [c]ontinue watching? [l] ").strip().lower()
    except (EOFError, KeyboardInterrupt):
        answer = ""
    if answer.startswith("s"):
        request_stop(run)
        print("Stopping at the next step …")
        return True
    if answer.startswith("c"):
        return True
    print(f"{run.name} goes on; watch it with: finetui watch {run.name}")
    return False


class _View:
    """What `follow` shows events with."""

    def __enter__(self) -> "_View":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, event: Event, state: RunState) -> None:
        pass

    def start_over(self, notice: Event, state: RunState) -> None:
        """The log is another one: what follows is told from its beginning."""
        self.show(notice, state)

    def tick(self, state: RunState) -> None:
        pass


class _Json(_View):
    def show(self, event: Event, state: RunState) -> None:
        print(json.dumps(event, ensure_ascii=False), flush=True)


def line_of(event: Event, state: RunState) -> str:
    """One plain line for an event, or "" for those that people need not see; a malformed one is not worth a crash."""
    try:
        return _line_of(event, state)
    except (TypeError, ValueError, AttributeError):
        return f"{event['kind'][:40]}: malformed"


def _line_of(event: Event, state: RunState) -> str:
    kind = event["kind"]
    name = str(event.get("stage") or event.get("name") or "")
    stage = name.upper()
    if kind == "stage_start":
        return f"{stage}: started" + (f" from {event['base']}" if event.get("base") else "")
    if kind == "phase" and "seconds" not in event:
        return f"{stage}: {event.get('name')} {event.get('detail', '')}".rstrip()
    if kind == "totals" and event.get("examples"):
        resumed = f", from step {event['resumed_step']}" if event.get("resumed_step") else ""
        return (
            f"{stage}: {event['examples']:,} examples, {event.get('tokens', 0):,} tokens, "
            f"{event.get('left_out', 0):,} rows left out, {event.get('steps') or 0:,} steps "
            f"of {event.get('batch')} examples{resumed}"
        )
    if kind == "log" and "loss" in event:
        return f"{stage}: {metrics_line(state.stage(name))}"
    if kind == "eval":
        named = (("eval_loss", "held-out loss"), ("eval_rewards/margins", "held-out margin"))
        shown = {word: event[key] for key, word in named if key in event}
        return f"{stage}: step {event.get('step')}  " + "  ".join(f"{k} {number(v)}" for k, v in shown.items())
    if kind == "checkpoint":
        return f"{stage}: checkpoint at step {event.get('step')}"
    if kind in ("notice", "error"):
        word = "error: " if kind == "error" else ""
        text = str(event.get("text") or event.get("message") or "").removeprefix(f"{stage}: ").removeprefix(f"{stage} ")
        return f"{stage}: {word}{text} {event.get('advice') or ''}".rstrip().removeprefix(": ")
    if kind == "waiting":
        return f"waits for {event.get('device')}: {event.get('holder') or 'another run'} trains there"
    if kind == "preflight":
        peak = int(event.get("reserved_bytes") or 0) / 2**30
        return f"{stage}: {event.get('batch_size')} of the longest rows at once take {peak:.1f} GiB"
    if kind == "stage_end" and event.get("status") == "refit":
        return f"{stage}: starts again with a smaller micro-batch"
    if kind == "stage_end":
        why = f" ({event.get('exit')})" if event.get("status") == "failed" else ""
        return f"{stage}: {event.get('status')}{why}"
    return ""


def metrics_line(stage: StageState) -> str:
    """Step, time left, loss or margin, and pace of a stage: what matters most first, where the rest is cut off."""
    total = f"/{stage.total_steps:,}" if stage.total_steps else ""
    parts = [f"{'answer' if stage.name == 'evaluate' else 'step'} {stage.step:,}{total}"]
    if stage.eta_s is not None and stage.state == "running" and stage.step < stage.total_steps:
        parts.append(f"{duration(stage.eta_s)} left")
    loss, margin = stage.last("loss"), stage.last("rewards/margins")
    if stage.series.get("loss"):
        newest = stage.series["loss"][-1][1]
        parts.append(f"loss {'not finite' if newest is None else number(loss)}")
    if margin is not None:
        parts.append(f"margin {number(margin, 3)}  kl {number(stage.last('kl'), 3)}")
    if (rate := stage.last("tokens_per_s")) is not None:
        parts.append(f"{number(rate)} tokens/s")
    return "  ".join(parts)


class _Plain(_View):
    """Plain lines, one an event, for pipes and dumb terminals."""

    def __init__(self) -> None:
        self.last = ""

    def show(self, event: Event, state: RunState) -> None:
        line = clean(line_of(event, state))
        if line and line != self.last:
            print(line, flush=True)
            self.last = line


class _Words(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(str(task.fields.get("words", "")), no_wrap=True, overflow="ellipsis")


class _Bar(_View):
    """A line of progress under the lines that stay."""

    def __enter__(self) -> "_Bar":
        self.progress = Progress(
            TextColumn("{task.description:<9}"), BarColumn(24), _Words(), refresh_per_second=2, console=console()
        )
        self.tasks: dict[str, Any] = {}
        self.last = ""
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def show(self, event: Event, state: RunState) -> None:
        line = clean(line_of(event, state))
        quiet = event["kind"] == "log" or (event["kind"] == "phase" and "seconds" not in event)
        if line and not quiet and line != self.last:
            self.last = line
            style = "red" if event["kind"] == "error" else "yellow" if event.get("level") == "warning" else "dim"
            self.progress.console.print(Text(line, style=style), highlight=False)

    def start_over(self, notice: Event, state: RunState) -> None:
        for task in self.tasks.values():
            self.progress.remove_task(task)
        self.tasks = {}
        super().start_over(notice, state)

    def tick(self, state: RunState) -> None:
        for stage in state.stages:
            if stage.state == "waiting":
                continue
            if stage.name not in self.tasks:
                self.tasks[stage.name] = self.progress.add_task(stage.name.upper(), total=None)
            working = stage.phase in ("train", "generate") or stage.state != "running"
            words = metrics_line(stage) if working and stage.step else f"{stage.phase} {stage.detail}"
            self.progress.update(
                self.tasks[stage.name],
                total=stage.total_steps or None,
                completed=stage.total_steps if stage.state == "done" else stage.step,
                words=clean(words, 120),
            )


def runs_table(found: list[dict[str, Any]], width: int = 120) -> Table:
    """The history as a table that fits `width` cells; every cell is plain text."""
    columns = ["status", "run", "method", "took", "loss", "margin"]
    columns += [name for name, needed in (("started", 100), ("model", 112)) if width >= needed]
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=True, overflow="ellipsis" if column == "model" else "fold")
    for row in found:
        started = time.strftime("%d %b %H:%M", time.localtime(row["started"])) if row["started"] else "–"
        cells = {
            "status": f"{GLYPHS.get(row['status'], '?')} {row['status']}", "run": row["name"], "method": row["method"],
            "took": duration(row["duration_s"]), "loss": number(row["loss"]), "margin": number(row["margin"], 3),
            "started": started, "model": row["model"],
        }  # fmt: skip
        style = STYLES.get(row["status"], "")
        table.add_row(*(Text(clean(cells[c], 100), style=style if c == "status" else "") for c in columns))
    return table


def result_table(result: Event, width: int = 80) -> Table:
    """The evaluation's table: how many held-out prompts each model answered rightly, with 95 % intervals.

    As many marks as `width` cells have room for, those that matter most first. Raises TypeError, ValueError or
    AttributeError for an event that is no result; see `shown_result`.
    """
    so_far = ", so far" if result.get("partial") else ""
    title = Text(
        f"{int(result['prompts'])} held-out prompts, share right and its 95 % interval{so_far}", style="italic"
    )
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    losses = result.get("losses") or {}
    there = {mark for marks in result["table"].values() for mark in marks}
    room = max(1, (width - NAME_WIDTH) // MARK_WIDTH) - bool(losses)
    kept = [mark for mark in BY_WEIGHT if mark in there][:room]
    marks = [mark for mark in MARKS if mark in kept]
    for mark in marks:
        table.add_column(MARKS[mark][0], justify="right", no_wrap=True)
    if losses:
        table.add_column("loss a token", justify="right", no_wrap=True)
    for variant, rates in result["table"].items():
        cells = [share_words(rates.get(mark)) for mark in marks]
        if losses:
            cells.append(number(losses[variant]["mean"]) if variant in losses else "–")
        table.add_row(Text(clean(variant_words(variant), 30)), *(Text(cell) for cell in cells))
    return table


def shown_result(result: Event, width: int = 80) -> Table | None:
    """The evaluation's table, or None where there is none or the event is not one."""
    try:
        return result_table(result, width)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return None


def show_end(out: Console, run: Run, state: RunState, end: str) -> None:
    """How a run ended, what it produced, and the next step."""
    show_status(out, run, end)
    show_outcome(out, run, state, end)


def show_status(out: Console, run: Run, end: str) -> None:
    """The line that names a run and says what has become of it."""
    out.print(Text(clean(f"{GLYPHS.get(end, '?')} {run.name}: {end}"), style=STYLES.get(end, "bold")), highlight=False)


def show_outcome(out: Console, run: Run, state: RunState, end: str) -> None:
    """What a run produced, what became of it, and the next step."""

    def say(text: str, style: str = "") -> None:
        out.print(Text(clean(text, newlines=False), style=style), highlight=False)

    if (table := shown_result(state.result, out.width)) is not None:
        out.print(table)
    for stage in state.stages:
        if stage.output and stage.state == "done" and stage.name not in EXPORT_STAGES:
            what = "evaluation" if stage.name == "evaluate" else f"{stage.name.upper()} result"
            say(f"{what}: {run.path / stage.output}")
    for what, event in state.artefacts.items():
        say(f"{what}: {event.get('path') if '://' in str(event.get('path')) else run.path / str(event.get('path'))}")
    if end in ("failed", "crashed"):
        show_card(run, end, say)
        say(f"Log: {run.log_path}")
    if end in ("failed", "crashed", "stopped", "aborted"):
        say(f"Resume: finetui resume {run.name}")
    elif end == "done":
        say(f"Next: finetui chat {run.name} talks with it, finetui report {run.name} writes a page to send,")
        say("      finetui alone opens the app with every run.")


def show_card(run: Run, end: str, say: Callable[..., None]) -> None:
    """What happened to a run that failed, and the command that applies the remedy."""
    from core.postmortem import examined

    if found := examined(run, end):
        say(f"✘ {found.title}", "red")
        for word, text in found.lines(f"finetui resume --fix {run.name}:"):
            say(f"  {word:<7} {text}")


def show_run(out: Console, run: Run) -> None:
    """Everything worth knowing about one run."""
    state = run.state()
    head = summary(run)

    def say(text: str, style: str = "") -> None:
        out.print(Text(clean(text), style=style), highlight=False)

    show_status(out, run, head["status"])
    what = f"{state.method} of {state.model}" if state.created else "the beginning of its log is gone"
    say(f"{what}, {duration(head['duration_s'])}, in {run.path}")
    if state.note:
        say(f"note: {state.note}")
    live = head["status"] in ("running", "stopping")
    now = state.now() if live else state.seen
    for stage in state.stages:
        if stage.state == "running" and not live:
            stage.state, stage.ended = "crashed", now
        until = stage.ended or now
        taken = duration(until - stage.started) if stage.started and until else "–"
        say(f"  {GLYPHS.get(stage.state, '?')} {stage.name:<9} {stage.state:<8} {taken:>12}   "
            f"{metrics_line(stage) if stage.series.get('loss') else stage.detail}")  # fmt: skip
        totals = stage.totals
        if totals.get("examples"):
            rows, left_out = totals.get("rows", 0), totals.get("left_out", 0)
            say(f"      {totals['examples']:,} examples of {rows:,} rows, {left_out:,} left out")
            say(f"      {totals.get('tokens', 0):,} tokens, {totals.get('trained_tokens', 0):,} of them trained")
        for reason, count in list((totals.get("left_out_reasons") or {}).items())[:3]:
            say(f"      left out: {count:,} × {reason}" if isinstance(count, int) else f"      left out: {reason}")
        if stage.output:
            say(f"      {run.path / stage.output}")
    notices = [f"{notice.get('text', '')} {notice.get('advice', '')}".strip() for notice in state.notices]
    for text in list(dict.fromkeys(notices))[-6:]:
        say(f"  {text}", "yellow")
    show_outcome(out, run, state, head["status"])
