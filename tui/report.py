"""A run in words: what happens now, how it ended, what to do next. Foreign text is cleaned here; no widgets."""

import shlex
import socket
import textwrap
import time
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len
from textual.content import Content

from core.events import RunState, StageState
from core.stages import TRAINING_STAGES
from core.text import clean, duration, number
from core.watch import GLYPHS
from tui.alerts import Alert
from tui.follow import GIB, LIVE, Recording, Snapshot
from tui.widgets import HUES, bar, status_words

if TYPE_CHECKING:
    from core.plan import Plan

FIGURES = (
    ("eval_loss", "held-out loss", 4),
    ("rewards/margins", "margin", 3),
    ("kl", "KL", 3),
    ("learning_rate", "rate", 3),
    ("grad_norm", "gradient", 3),
)
STAGE_NAMES = {"sft": "SFT", "kto": "KTO", "evaluate": "evaluate", "gguf": "GGUF"}
KTO_COST = 3.0
"""What an example of KTO takes, beside one of SFT: 2.5 to 3.5 times as long on two cores, 3.3 times on an H100."""
ALERT_SIGNS = {3: ("‼", "$text-error"), 2: ("!", "$text-warning"), 1: ("·", "$foreground-muted")}  # by weight


def stage_state(stage: StageState, snapshot: Snapshot) -> str:
    """The state of a stage; a stage of a run that died is not running."""
    return "crashed" if stage.state == "running" and not snapshot.live else stage.state


def now_words(snapshot: Snapshot, width: int) -> Content:
    """What happens at this moment, how far it is, and how fast."""
    stage = snapshot.state.current
    took = duration(snapshot.took_s)
    if not snapshot.live:
        rest = "   reading the whole log …" if snapshot.partial else ""
        head = Content.assemble(status_words(snapshot.status), f" after {took}{rest}")
        return Content("\n").join([head, Content(clean(_last_figures(snapshot), 200))])
    if stage is None or stage.state != "running":
        return Content.assemble(status_words(snapshot.status), f"  {_starting(snapshot.state)}  {took}")
    phase_s = snapshot.taken - snapshot.phase_started if snapshot.phase_started else None
    name = STAGE_NAMES.get(stage.name, stage.name)
    what = f"{clean(stage.phase, 20)} {clean(stage.detail, 60)}".strip()
    head = Content.assemble(
        (f"{clean(name, 20)}: {what}", "bold"), f"  {duration(phase_s)}", (f"   {took} in all", "$foreground-muted")
    )
    if snapshot.status == "stopping":
        head = Content.assemble(status_words("stopping"), "  ", head)
    done = min(1.0, stage.step / stage.total_steps) if stage.total_steps else 0.0
    steps = f"  {_word(stage)} {stage.step:,}/{stage.total_steps:,}" if stage.total_steps else ""
    left = left_words(stage, snapshot)
    length = max(8, min(60, width - len(steps) - len(left) - 7))
    progress = Content.assemble((bar(done, length), "$text-primary"), f" {100 * done:3.0f} %{steps}{left}")
    return Content("\n").join([head, progress, Content(figures(stage) or _before(stage))])


def preview_head(snapshot: Snapshot) -> Content:
    """The name of a run, its state and, while a stage trains, how far that is."""
    stage, head = snapshot.state.current, [Content.styled(clean(snapshot.run.name, 60), "bold")]
    head.append(Content.assemble(status_words(snapshot.status), f"  {duration(snapshot.took_s)}"))
    if snapshot.live and stage and stage.state == "running" and stage.step and stage.total_steps:
        name = clean(STAGE_NAMES.get(stage.name, stage.name), 20)
        left = f", {duration(stage.eta_s)} left" if stage.eta_s and stage.step < stage.total_steps else ""
        head.append(Content(f"{name} {_word(stage)} {stage.step:,}/{stage.total_steps:,}{left}"))
    return Content("\n").join(head)


def _word(stage: StageState) -> str:
    """What a stage goes by."""
    return "answer" if stage.name == "evaluate" else "step"


def _starting(state: RunState) -> str:
    if state.waiting_for is None:
        return "starting …"
    device, other = state.waiting_for
    return clean(f"waits for {device}: {other or 'another run'} trains there", 120)


def left_words(stage: StageState, snapshot: Snapshot) -> str:
    """How long this stage still takes, and the moment on the clock at which it is over."""
    if stage.eta_s is None or not 0 < stage.step < stage.total_steps or snapshot.status == "stopping":
        return ""
    ahead = [other for other in snapshot.state.stages if other.state == "waiting"]
    foretold = [_expected_s(other, stage) for other in ahead]
    known = None not in foretold
    rest = stage.eta_s + sum(seconds or 0.0 for seconds in foretold if known)
    over = time.localtime(time.time() + rest)
    form = "%H:%M" if rest < 20 * 3600 else "%a %H:%M"
    what = "next stage" if not known else "everything done" if ahead else "done"
    return f"  {duration(stage.eta_s)} left, {what} at {time.strftime(form, over)}"


def _expected_s(waiting: StageState, running: StageState) -> float | None:
    """Seconds of a stage that waits: as foretold, else of KTO by the pace of the SFT that runs; None where unknown."""
    pace, batch = running.steps_per_second, running.totals.get("batch")
    if waiting.expected_s is not None or not (waiting.expected_examples and pace and batch):
        return waiting.expected_s
    return KTO_COST * waiting.expected_examples / (pace * batch)


def figures(stage: StageState, width: int = 1000) -> str:
    """The newest figures of a stage, broken between two of them where `width` is not enough; empty before the first."""
    parts = []
    if points := stage.series.get("loss"):
        parts.append(f"loss {number(stage.last('loss'))}" if points[-1][1] is not None else "loss not finite")
    for key, word, digits in FIGURES:
        if (value := stage.last(key)) is not None:
            parts.append(f"{word} {number(value, digits)}")
    if (rate := stage.last("tokens_per_s")) is not None:
        parts.append(f"{number(rate, 3)} tokens/s")
    lines = [""]
    for part in parts:
        longer = f"{lines[-1]}   {part}".lstrip()
        lines[-1:] = [longer] if len(longer) <= width or not lines[-1] else [lines[-1], part]
    return "\n".join(lines)


def _before(stage: StageState) -> str:
    """What is known before the first step."""
    if stage.name == "evaluate":
        return "held-out prompts are answered by every model of the run, and the answers scored"
    if stage.name not in TRAINING_STAGES:
        return ""
    if stage.total_steps:
        return f"{stage.total_steps} steps are ahead; the first figures come with the first logged step"
    return "loading and preparing: the steps are counted once the rows are read"


def _last_figures(snapshot: Snapshot) -> str:
    trained = [stage for stage in snapshot.state.stages if stage.name in TRAINING_STAGES and stage.series.get("loss")]
    if not trained:
        return "no step was logged"
    stage = trained[-1]
    margin = stage.last("rewards/margins")
    steps = f"{STAGE_NAMES[stage.name]} step {stage.step:,}/{stage.total_steps:,}"
    parts = [steps, f"loss {number(stage.last('loss'))}"]
    return "   ".join([*parts, f"margin {number(margin, 3)}"] if margin is not None else parts)


def end_words(snapshot: Snapshot, width: int = 0) -> Content:
    """After the end: where the model is, or what went wrong and what to try. Empty while the run lives.

    With a `width` in cells what goes over a line is set below its beginning; without, in home's narrow preview, paths
    begin at the folder of the runs, which stands above.
    """
    if snapshot.live:
        return Content("")
    lines, where = [], str(snapshot.run.path) if width else snapshot.run.path.name
    for stage in snapshot.state.stages:
        if stage.output and stage.state == "done" and stage.name in TRAINING_STAGES:
            path = clean(f"{where}/{stage.output}", 400)
            lines.append(Content.assemble((f"✔ model after {STAGE_NAMES[stage.name]}: ", "$text-success"), path))
    lines += made_words(snapshot.state, where)
    lines += card_words(snapshot, width)
    told = snapshot.card is not None and snapshot.card.remedy is not None
    if snapshot.status in ("failed", "crashed", "stopped", "aborted") and not (
        told or isinstance(snapshot.run, Recording)
    ):
        lines.append(Content.assemble("r goes on from the newest checkpoint, l shows the log."))
    return Content("\n").join(lines)


CARD_INDENT = 10


def card_words(snapshot: Snapshot, width: int = 0) -> list[Content]:
    """The card of a run that failed: what happened, evidence, cause, and the key that applies the remedy."""
    if not (card := snapshot.card):
        return []
    lines = [Content.styled(f"✘ {card.title}", "bold $text-error")]
    for word, text in card.lines("f"):
        if word == "remedy" and isinstance(snapshot.run, Recording):
            continue
        hue = "bold $text-success" if word == "remedy" else "$foreground-muted" if word == "log" else ""
        if width > 3 * CARD_INDENT:
            text = f"\n{' ' * CARD_INDENT}".join(textwrap.wrap(text, width - CARD_INDENT))
        lines.append(Content.assemble((f"  {word:<{CARD_INDENT - 3}} ", "$foreground-muted"), (text, hue)))
    return lines


def can_be_exported(snapshot: Snapshot) -> bool:
    """Whether there is a run to make something of, or one that will have trained."""
    return not isinstance(snapshot.run, Recording) and (snapshot.live or bool(final_model(snapshot)))


def made_words(state: RunState, where: str) -> list[Content]:
    """What was made of the result, a line each: files with their size and how far they answer as the model does."""
    lines = []
    for what, event in state.artefacts.items():
        path, check = str(event.get("path", "")), event.get("check")
        shown = path if "://" in path else f"{where}/{path}"
        agreement = check.get("token_agreement") if isinstance(check, dict) else None
        share = f", {100 * agreement:.1f} % of the tokens" if isinstance(agreement, int | float) else ""
        size = event.get("bytes")
        size = f"  ({size / GIB:.2f} GiB{share})" if isinstance(size, int | float) else ""
        lines.append(Content.assemble((f"✔ {clean(what, 20)}: ", "$text-success"), clean(f"{shown}{size}", 400)))
    return lines


def next_words(snapshot: Snapshot, width: int) -> Content:
    """After a good end, in `width` columns: what to do with the model. Empty otherwise."""
    if snapshot.status != "done" or not (folder := final_model(snapshot)):
        return Content("")
    command = clean(rsync_line(snapshot, folder), 400)
    if cell_len(command) > width - len("fetch  "):  # in pieces it could not be copied
        command = "to another machine: o lists the command, Enter on it copies it"
    lines = [Content.assemble(("fetch  ", "$foreground-muted"), command)]
    steps = "i tries the model, v evaluates, u merges or uploads, w reports, c copies its path, o shows every path"
    if can_go_on_with_kto(snapshot):
        steps = f"k goes on with KTO, {steps}"
    lines.append(Content.assemble(("next   ", "$foreground-muted"), steps))
    return Content("\n").join(lines)


def can_go_on_with_kto(snapshot: Snapshot) -> bool:
    """Whether the run ended with an SFT model."""
    done = [stage.name for stage in snapshot.state.stages if stage.output and stage.state == "done"]
    return snapshot.status == "done" and "sft" in done and "kto" not in done and not isinstance(snapshot.run, Recording)


def final_model(snapshot: Snapshot) -> str:
    """The folder of the newest model the run made, empty for none."""
    made = [
        str(snapshot.run.path / stage.output)
        for stage in snapshot.state.stages
        if stage.output and stage.state == "done" and stage.name in TRAINING_STAGES
    ]
    return made[-1] if made else ""


def rsync_line(snapshot: Snapshot, folder: str) -> str:
    """The command that fetches `folder` to another machine."""
    host = str(snapshot.state.start.get("host") or socket.gethostname())
    return f"rsync -av {shlex.quote(f'{host}:{folder}')} ."


def paths_of(snapshot: Snapshot) -> list[tuple[str, str]]:
    """What lies where, and commands to get there: (what it is, a line to copy)."""
    run = snapshot.run
    found = [("folder", str(run.path)), ("plan", str(run.plan_path)), ("events", str(run.events_path))]
    found.append(("log", str(run.log_path)))
    found += [
        (f"{STAGE_NAMES.get(stage.name, stage.name)} result", str(run.path / stage.output))
        for stage in snapshot.state.stages
        if stage.output and stage.state == "done"
    ]
    found += [
        (str(what), str(event.get("path") if "://" in str(event.get("path")) else run.path / str(event.get("path"))))
        for what, event in snapshot.state.artefacts.items()
    ]
    if folder := final_model(snapshot):
        found.append(("fetch", rsync_line(snapshot, folder)))
    found.append(("go there", f"cd {shlex.quote(str(run.path))}"))
    return found


def settings_words(plan: "Plan") -> str:
    """The settings that matter, a line a stage and one for the model."""
    lines = []
    for name in plan.training_stages:
        stage = plan.stage(name)
        epochs = f"{number(stage.num_train_epochs)} epochs, steps"
        length = f"{stage.max_steps:,} steps" if stage.max_steps > 0 else epochs
        beta = f", β {number(plan.kto.beta)}" if name == "kto" else ""
        rate = number(stage.learning_rate, 3)
        lines.append(f"{STAGE_NAMES[name]} {length} of {stage.effective_batch} rows, rate {rate}{beta}")
    bits = "4-bit" if plan.model.load_in_4bit else plan.model.dtype
    lines.append(f"LoRA r {plan.lora.r}, alpha {plan.lora.alpha}, {bits}, {plan.model.name}")
    return "\n".join(clean(line, 120) for line in lines)


def alert_words(found: Sequence[Alert], limit: int = 4) -> Content:
    """Alerts with their advice, weightiest first."""
    lines = []
    for alert in found[:limit]:
        sign, hue = ALERT_SIGNS[alert.weight]
        head = f"{sign} {alert.text}"
        lines.append(Content.assemble((head, f"bold {hue}"), f" {alert.advice}"))
    return Content("\n").join(lines)


def energy_words(joules: float | None) -> str:
    """Energy for people, empty where no card counts it."""
    if joules is None:
        return ""
    hours = joules / 3600
    return f"{hours:.1f} Wh" if hours < 1000 else f"{hours / 1000:.2f} kWh"


def notes_words(state: RunState, limit: int = 6, told: Collection[str] = ()) -> Content:
    """The newest notices, newest last, and how many figures were not finite; not the alarms that are `told` already."""
    lines = []
    if state.nonfinite:
        lines.append(Content.styled(f"! {state.nonfinite} figures were not finite (NaN or infinite)", "$text-error"))
    fresh = [notice for notice in state.notices if not notice.get("alarm") or notice["alarm"] not in told]
    unique = {(notice.get("text"), notice.get("advice")): notice for notice in fresh}  # each stage says some
    for notice in list(unique.values())[-limit:]:
        warning = notice.get("level") in ("warning", "error")
        text = f"{clean(notice.get('text', ''), 300)} {clean(notice.get('advice') or '', 200)}".rstrip()
        lines.append(
            Content.styled(f"{'!' if warning else '·'} {text}", "$text-warning" if warning else "$foreground-muted")
        )
    return Content("\n").join(lines)


def stage_words(stage: StageState, snapshot: Snapshot) -> Content:
    """One stage with its state, its phases in seconds and what it was given."""
    state = stage_state(stage, snapshot)
    over = stage.ended or (None if snapshot.live else snapshot.until)  # a clock here would repaint it all every second
    took = duration(over - stage.started) if stage.started and over and state != "waiting" else ""
    name = clean(STAGE_NAMES.get(stage.name, stage.name), 20)
    lines = [
        Content.assemble(
            (f"{GLYPHS.get(state, '?')} {name} {clean(state, 12)}", f"bold {HUES.get(state, '')}".strip()), f"  {took}"
        )
    ]
    phases = ", ".join(f"{phase} {duration(seconds)}" for phase, seconds in stage.phase_seconds.items() if seconds >= 1)
    totals = stage.totals
    facts = [phases] if phases else []
    if totals.get("examples"):
        left_out = f", {totals['left_out']:,} rows left out" if totals.get("left_out") else ""
        facts.append(f"{totals['examples']:,} examples{left_out}")
    if stage.checkpoints:
        facts.append(f"checkpoints at {', '.join(map(str, stage.checkpoints[-4:]))}")
    return Content("\n").join(
        [*lines, *(Content.styled(f"  {clean(fact, 200)}", "$foreground-muted") for fact in facts)]
    )


def peak_bytes(state: RunState) -> float:
    """The most GPU memory the trainer held, 0 where it was not told."""
    values = [value for stage in state.stages for _, value in stage.series.get("vram_peak_bytes", []) if value]
    return max(values, default=0)


def side_words(snapshot: Snapshot) -> Content:
    """Stages, memory, model and place of the run."""
    state = snapshot.state
    started = time.strftime("%d %b %H:%M:%S", time.localtime(state.started)) if state.started else "–"
    facts: Sequence[tuple[str, str]] = (
        ("model", state.model),
        ("method", state.method),
        ("started", started),
        ("note", f"{'★ ' if snapshot.note.pinned else ''}{snapshot.note.text}".strip()),
        ("memory", snapshot.memory if snapshot.status in LIVE else ""),
        ("peak", f"{peak / GIB:.2f} GiB of GPU memory" if (peak := peak_bytes(state)) else ""),
        ("energy", energy_words(snapshot.energy_j)),
        ("folder", str(snapshot.run.path)),
    )
    lines = [stage_words(stage, snapshot) for stage in state.stages]
    lines += [Content.assemble((f"{word} ", "$foreground-muted"), clean(value, 300)) for word, value in facts if value]
    return Content("\n").join(lines)
