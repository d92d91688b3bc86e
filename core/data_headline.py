"""What will be learned from a stage's rows, in two sentences for people who never trained a model. No widgets."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.data_ledger import BEYOND, DUPLICATE, NOT_DRAWN
from core.data_limits import TOO_LONG
from core.data_rows import label_reason

SHOWN = 3
SHORT = (
    (label_reason("sft", False, False, False), "marked bad"),
    (label_reason("kto", None, False, False), "unlabelled"),
    ("no assistant turn", "without an answer"), ("an assistant turn is empty", "with an empty answer"),
    ("broken JSON", "broken JSON"), ("the label", "with a label that is none"),
    ("no conversation found", "in no shape that is known"),
    ("unknown role", "with an unknown role"), ("not UTF-8", "not UTF-8"), ("a row must be", "no JSON object"),
    ("a turn has neither", "with an empty turn"), ("the row has more cells", "with too many cells"),
    (TOO_LONG, "too long"), (DUPLICATE, "repeats of an earlier row"), (BEYOND, "beyond max_rows"),
    (NOT_DRAWN, "not drawn by the file's weight"),
)  # fmt: skip
Report = Mapping[str, Any]


@dataclass(frozen=True)
class Headline:
    """`rows` says what is learned from; `left_out` what is not and why, empty where that is nothing."""

    rows: str
    left_out: str


def headline(look: Report, count: Report | None, stage: str) -> Headline:
    """The sentences for a report of `core.data_look` and, once the rows are counted in tokens, of the lens's ``count``.

    Before that, and where only a sample of the rows was counted, what the length limit does is unknown or about right.
    """
    exact = bool(count and count["exact"])
    totals = count["totals"] if count and exact else look["totals"]
    reasons = Counter(totals["reasons"])
    about = ""
    if count and not exact and (over := count["left_out"].get(TOO_LONG, 0)):
        reasons[TOO_LONG] += over
        about = "about "
    rows, held = int(totals["rows"]), int(totals["held_out"])
    learned = rows - reasons.total() - held
    verb = "will be" if count else "can be"
    what = "all" if learned == rows else f"{about}{learned:,}"
    labels = count["labels"] if count and exact else look["labels"]
    details = [words for words in (_answers(labels, stage), _examples(labels, learned, about)) if words]
    among = f" ({', '.join(details)})" if details else ""
    told = f"{number(rows, 'row')}: {what} {verb} learned from{among}"
    if held:
        told += f", {held:,} held out to test on"
    return Headline(f"{told}.", _left_out(reasons, about) if reasons else "")


def number(count: int, word: str) -> str:
    """``1 row``, ``2,388 rows``."""
    return f"{count:,} {word}{'s' * (count != 1)}"


def _answers(labels: Mapping[str, int], stage: str) -> str:
    good, bad, none = (labels.get(key, 0) for key in ("true", "false", "none"))
    if stage == "kto" or bad:
        return f"{number(good, 'good answer')}, {bad:,} bad{f', {none:,} unlabelled' if none else ''}"
    return ""


def _examples(labels: Mapping[str, int], learned: int, about: str) -> str:
    """How many examples an epoch has, where that is not simply the rows."""
    examples = sum(labels.values())
    return "" if examples == learned or about else f"{number(examples, 'example')} an epoch"


def _left_out(reasons: Counter[str], about: str) -> str:
    grouped: Counter[str] = Counter()
    for reason, many in reasons.items():
        grouped[short(reason)] += many
    common = grouped.most_common(SHOWN)
    named = [f"{many:,} {words}" for words, many in common]
    if rest := grouped.total() - sum(many for _, many in common):
        named.append(f"{rest:,} for other reasons")
    if len(grouped) == 1:
        named = [common[0][0]]
    return f"{about}{grouped.total():,} left out: {', '.join(named)}."


def short(reason: str) -> str:
    """The reason for which a row is left out in a few words."""
    return next((words for start, words in SHORT if start and reason.startswith(start)), reason[:80])
