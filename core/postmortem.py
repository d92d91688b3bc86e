"""What happened to a run that failed: the facts of its log, the likely cause, and the remedy that resumes it. No torch.

Read from the two ends of the event log and of the trainer's log, so that a long run costs no more than a short one.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from core.causes import RESTARTED, UNKNOWN, VANISHED, Cause, cause_of, cause_of_signal
from core.checkpoints import checkpoints_in, is_complete, step_of
from core.clock import boot_id
from core.errors import FinetuiError
from core.events import Event
from core.machine_use import GIB
from core.paths import last_lines
from core.remedy import Remedy, remedy_for
from core.runs import Run, head_and_tail
from core.stages import TRAINING_STAGES
from core.text import clean, shortened

TAIL_BYTES = 300_000
LOG_BYTES = 8_000
KEPT_SAMPLES = 32
BARS = "▁▂▃▄▅▆▇█"
SIZE = r"([\d.]+ [KMG]iB)"
SIZES = (
    (rf"Tried to allocate {SIZE}", "{} more were wanted"), (rf"of which {SIZE} is free", "{} were free"),
    (rf"total capacity of {SIZE}", "of {}"), (rf"this process has {SIZE} memory in use", "the trainer held {}"),
)  # fmt: skip
TRACE = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt|Fault)\b.*|^Fatal Python error: .*|.*\bKilled\b.*")
SPEAKS = re.compile(
    r"^(?!File \").*(?:error\b|exception\b|\bfatal\b|\bkilled\b|\baborted\b|segmentation fault|core dumped|"
    r"out of memory|terminate called|double free|\bcorrupt|\bassertion\b|\bpanicked\b|\bfailed\b|\bcannot\b)",
    re.IGNORECASE,
)
WARNING = re.compile(r"\b[A-Z]\w*Warning\b|\bWARN(?:ING)?\b|^\[RANK \d+\]")
NO_EVIDENCE = re.compile(r"^\{'|^Extension modules:|^File \"<frozen|^\s*\^+$")
CRASHED_IN = re.compile(r"most recent call first\):\n\s*(File .*)")


@dataclass(frozen=True)
class PostMortem:
    """One failure. `what` are facts, `evidence` lines of the log, `memory` used bytes over the last samples."""

    cause: Cause
    stage: str
    step: int
    total: int
    what: str
    evidence: Sequence[str] = ()
    memory: Sequence[float] = ()
    room: float | None = None
    place: str = ""
    resumes_at: int | None = None
    remedy: Remedy | None = None

    @property
    def title(self) -> str:
        if self.stage not in TRAINING_STAGES:
            return clean(f"{self.stage or 'The run'} failed: {self.cause.title}", 200)
        total = f" of {self.total}" if self.total else ""
        first = f"before it went on from step {self.resumes_at}" if self.resumes_at else "before its first step"
        steps = f"at step {self.step}{total}" if self.step else first
        return clean(f"{self.stage.upper()} failed {steps}: {self.cause.title}", 200)

    def lines(self, key: str) -> list[tuple[str, str]]:
        """The card below its title: (word, clean text). `key` is what applies the remedy, a key or a command."""
        found = [("what", self.what), *(("log", line) for line in self.evidence), ("memory", self.memory_words)]
        resume_is_all = self.remedy is not None and self.cause.advice.startswith("Resume: ")
        found += [("cause", self.cause.cause), ("advice", "" if resume_is_all else self.cause.advice)]
        if self.remedy:
            start = f"resumes from step {self.resumes_at}" if self.resumes_at else "begins the stage again"
            changes = f"{self.remedy.words}, and " if self.remedy.changes else ""
            found.append(("remedy", f"{key} {changes}{start}."))
        return [(word, clean(shortened(text, 400))) for word, text in found if text]

    @property
    def memory_words(self) -> str:
        if not self.memory:
            return ""
        top = max(*self.memory, self.room or 0) or 1
        curve = "".join(BARS[min(7, int(8 * max(0.0, value) / top))] for value in self.memory)
        of = f" of {self.room / GIB:.1f} GiB" if self.room else " GiB"
        return f"{curve}  {self.memory[-1] / GIB:.1f}{of} at the last look ({self.place})"


@dataclass
class Facts:
    """What the last attempt of a run left in its log."""

    stage: str = ""
    step: int = 0
    total: int = 0
    error: Event = field(default_factory=dict)
    end: Event = field(default_factory=dict)
    start: Event = field(default_factory=dict)
    alarm: Event = field(default_factory=dict)
    samples: list[Event] = field(default_factory=list)

    def fold(self, event: Event) -> None:
        kind = event["kind"]
        if kind in ("run_start", "task_start"):
            self.__init__()  # type: ignore[misc]
            self.start = event
        elif kind == "stage_start":
            self.stage, self.step, self.end, self.error = _word(event.get("name")), 0, {}, {}
        elif kind == "totals":
            self.total, self.step = _whole(event.get("steps")), _whole(event.get("resumed_step"))
        elif kind in ("log", "step"):
            self.step, self.stage = _whole(event.get("step")), self.stage or _word(event.get("stage"))
        elif kind == "gpu":
            self.samples.append(event)
            del self.samples[:-KEPT_SAMPLES]
        elif kind == "notice" and event.get("alarm"):
            self.alarm = event
        elif kind == "error":
            self.error = event
        elif kind == "stage_end":
            self.end, self.stage = event, self.stage or _word(event.get("name"))


def post_mortem(run: Run, status: str) -> PostMortem | None:
    """What happened to a run of status ``failed`` or ``crashed``; None for any other."""
    if status not in ("failed", "crashed"):
        return None
    facts = Facts()
    for event in head_and_tail(run.events_path, TAIL_BYTES):
        facts.fold(event)
    tail = _ending(facts.end.get("log_tail")) or log_tail(run)
    cause = _cause(facts, tail)
    memory, room, place = memory_curve(facts.samples)
    at = next((step_of(path) for path in _checkpoints(run, facts.stage) if is_complete(path)), None)
    return PostMortem(
        cause, facts.stage, facts.step, facts.total, _what(facts), _evidence(facts, tail), memory, room, place,
        at, remedy_for(cause, run, facts.stage),
    )  # fmt: skip


def _cause(facts: Facts, tail: str) -> Cause:
    message = f"{_text(facts.error.get('type'))}: {_text(facts.error.get('message'))}"
    signal = _text(facts.end.get("exit"))
    if signal.startswith(("SIG", "signal ")):
        return cause_of_signal(signal, _kernel(facts), facts.stage)
    if facts.error or facts.end:
        own = facts.error.get("type") == "FinetuiError"  # its message and advice were written for this
        found = cause_of(message) or cause_of(_ending(facts.error.get("traceback"))[-2000:])
        found = found or (None if own else cause_of(tail[-3000:]))
        if own and found is None:
            return Cause("refused", "it could not go on", "", _text(facts.error.get("advice")), again=True)
        if own and found and facts.error.get("advice"):
            return Cause(found.kind, found.title, found.cause, _text(facts.error.get("advice")), found.again)
        return found or UNKNOWN
    boot = facts.start.get("boot")
    if boot and boot_id() and boot != boot_id():
        return RESTARTED
    return cause_of(tail[-3000:]) or VANISHED


def _kernel(facts: Facts) -> bool:
    """Whether the machine's memory had run out: the kernel's count of killings rose, or hardly any was left."""
    if _whole(facts.end.get("oom_kills")):
        return True
    last = facts.samples[-1] if facts.samples else {}
    free, held = last.get("ram_available_bytes"), last.get("rss_bytes")
    return isinstance(free, int | float) and isinstance(held, int | float) and 0 <= free < 0.06 * (free + held)


def _what(facts: Facts) -> str:
    """The facts in a sentence: the message, sizes, how the process ended."""
    message = _text(facts.error.get("message"))
    parts = []
    if "out of memory" in message:
        sizes = [words.format(found[1]) for pattern, words in SIZES if (found := re.search(pattern, message))]
        parts.append(f"CUDA out of memory: {', '.join(sizes)}" if sizes else shortened(message, 200))
    elif message:
        name = _text(facts.error.get("type"))
        said = shortened(message, 300)
        parts.append(said if name in ("FinetuiError", "Killed", "") else f"{name}: {said}")
    parts = [part if part.endswith((".", "!", "…")) else f"{part}." for part in parts]
    if (ended := _text(facts.end.get("exit"))) and ended not in message:
        parts.append(f"The process ended with {ended}.")
    if kills := _whole(facts.end.get("oom_kills")):
        parts.append(f"The kernel ended {kills} process{'es' if kills > 1 else ''} for lack of memory meanwhile.")
    return " ".join(parts)


def _evidence(facts: Facts, tail: str, limit: int = 2) -> list[str]:
    """The lines of the log that say most: the alarm, and the last that speak of an error, else the last."""
    found = [_text(facts.alarm.get("text"))] if facts.alarm else []
    found += CRASHED_IN.findall(tail)[-1:]
    lines = list(_lines(tail))
    telling = [line for line in lines if TRACE.match(line)] or [line for line in lines if SPEAKS.search(line)] or lines
    said = _text(facts.error.get("message"))[:40]
    found += [shortened(line, 300) for line in telling[-limit:] if not said or said not in line]
    return found[:limit]


def _lines(tail: str) -> Iterator[str]:
    """What may be quoted of a log: no warnings, and not the line of code that Python prints below one."""
    below = False
    for line in tail.splitlines():
        words, code = line.strip(), below and line[:1].isspace()
        below = bool(WARNING.search(words)) and not TRACE.match(words)
        if words and not (below or code or NO_EVIDENCE.match(words)):
            yield words


def memory_curve(samples: Sequence[Event]) -> tuple[list[float], float | None, str]:
    """Bytes used over the samples, what there is in all, and where: the first card, else the trainer's own RAM."""
    cards = [card for one in samples if isinstance(one.get("gpus"), list) for card in one["gpus"][:1]]
    used = [card.get("memory_used_bytes") for card in cards if isinstance(card, dict)]
    if used and all(isinstance(value, int | float) for value in used):
        total = cards[-1].get("memory_total_bytes")
        return used, float(total) if isinstance(total, int | float) and total > 0 else None, "GPU"  # type: ignore[return-value]
    held = [value for one in samples if isinstance(value := one.get("rss_bytes"), int | float)]
    free = samples[-1].get("ram_available_bytes") if samples else None
    room = held[-1] + free if held and isinstance(free, int | float) and free >= 0 else None
    return [float(value) for value in held], room, "RAM of the trainer"


def log_tail(run: Run) -> str:
    """The last words of ``train.log``, if they are as new as the event log."""
    with contextlib.suppress(OSError):
        if run.log_path.stat().st_mtime >= run.events_path.stat().st_mtime - 120:
            return last_lines(run.log_path, LOG_BYTES)
    return ""


def _checkpoints(run: Run, stage: str) -> list[Any]:
    if stage not in TRAINING_STAGES:
        return []
    return checkpoints_in(run.stage_path(stage) / "checkpoints")


def _text(value: Any) -> str:
    return value[:8000] if isinstance(value, str) else ""


def _ending(value: Any) -> str:
    return value[-20_000:] if isinstance(value, str) else ""


def _word(value: Any) -> str:
    return clean(value, 40) if isinstance(value, str) else ""


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else 0


def examined(run: Run, status: str) -> PostMortem | None:
    """As `post_mortem`, but for a run whose log or plan cannot be made sense of there is none."""
    try:
        return post_mortem(run, status)
    except (FinetuiError, OSError, ValueError, TypeError, LookupError):
        return None
