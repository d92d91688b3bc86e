"""Training rows in memory: every row of a file is used or listed with file, line and reason. No torch, no tokenizer.

What a row may look like is told by `core.data_rows`; files too large for memory are surveyed (`core.data_survey`) and
read row by row (`core.data_reader`) by the same rules. A preference pair is one row of the file and two conversations.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.data_facts import prompt_key_of
from core.data_files import raw_rows
from core.data_rows import TEXT_ROLE, RowError, conversations_of, label_reason, names_of, read_row
from core.errors import FinetuiError

MASK = 2**64 - 1
ROW_HELP = (
    'A row looks like {"conversations": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}], '
    '"label": true}.'
)
REPAIR = "finetui data clean FILE OUT writes a copy in which it is mended."
REMEDIES = (
    ("broken JSON", "finetui data clean FILE OUT mends what can be mended without guessing, and leaves out the rest."),
    ("not UTF-8", "Save the file as UTF-8; " + REPAIR),
    ("no conversation found", "Say which column is what: --column prompt=… --column completion=… (m in the wizard)."),
    ("no assistant turn", "Nothing could be learnt from it: add the answer, or let it go."),
    ("an assistant turn is empty", "Add the answer, or let the row go."),
    ("a turn has neither", "Add the answer, or let the row go."),
    ("unknown role", "Roles are system, user, assistant and tool: rename it."),
    ("the label", "Labels are true and false: mend these."),
    ("no label", "Label them true or false, or train them with SFT."),
    ("label is false", "--include-undesirable learns them all the same; KTO learns from good and bad answers."),
    ("plain text", "Use SFT."),
    ("nothing stands before", "An answer needs a question before it."),
    ("the row has more cells", "A cell holds a comma and no quotation marks: quote it."),
    ("a row must be", ROW_HELP),
    ("prompt and answer must be", ROW_HELP),
)
"""What to do about rows that cannot be used, by how the reason begins."""
__all__ = ["Conversation", "LeftOut", "Rows", "class_weights", "conversations_of", "holdout_split", "raw_rows",
           "read_rows"]  # fmt: skip


@dataclass(frozen=True)
class Conversation:
    """One usable example: `messages` as role/content (and tool_calls), `label` where the row has one.

    A plain text is one message of the role ``text``.
    """

    file: str
    line: int
    messages: list[dict[str, Any]]
    label: bool | None = None
    tools: list[dict[str, Any]] | None = None

    @property
    def prompt(self) -> list[dict[str, Any]]:
        """Everything before the last assistant turn."""
        return self.messages[: self.last_assistant]

    @property
    def last_assistant(self) -> int:
        """Index of the last assistant turn."""
        return max(at for at, message in enumerate(self.messages) if message["role"] in ("assistant", TEXT_ROLE))

    @property
    def prompt_key(self) -> int:
        """Hash of the prompt: rows with equal keys must not be split between training and held-out."""
        return prompt_key_of(self.messages)


@dataclass(frozen=True)
class LeftOut:
    """A row that is not trained on, and why."""

    file: str
    line: int
    reason: str


@dataclass
class Rows:
    """What one file holds for one method: usable conversations and every row left out or repaired."""

    file: str
    used: list[Conversation] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    repaired: list[LeftOut] = field(default_factory=list)
    total: int = 0

    @property
    def labels(self) -> Counter[bool | None]:
        """How many usable rows carry which label."""
        return Counter(row.label for row in self.used)

    def reasons(self) -> Counter[str]:
        """How many rows were left out for which reason, most frequent first."""
        return Counter(entry.reason for entry in self.left_out)


def read_rows(
    path: Path,
    method: str,
    *,
    include_undesirable: bool = False,
    max_rows: int | None = None,
    columns: Mapping[str, str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Rows:
    """Read `path` for a stage, ``"sft"`` or ``"kto"``, into memory.

    SFT leaves out answers labelled false unless `include_undesirable`; KTO leaves out unlabelled rows. `columns` says
    which column is what. `progress` is called with the number of rows read, about every thousand. Raises FinetuiError
    when no row is usable, and for KTO when only one label occurs.
    """
    rows, names = Rows(str(path)), names_of(columns)
    for number, raw in raw_rows(path):
        rows.total += 1
        if progress and rows.total % 1000 == 0:
            progress(rows.total)
        _sort_in(rows, number, raw, method, include_undesirable, names)
        if max_rows and len(rows.used) >= max_rows:
            break
    check_usable(str(path), method, rows.total, rows.labels, rows.reasons())
    return rows


def _sort_in(rows: Rows, number: int, raw: Any, method: str, include_undesirable: bool, names: Any) -> None:
    try:
        reading = read_row(raw, names)
    except RowError as error:
        rows.left_out.append(LeftOut(rows.file, number, str(error)))
        return
    rows.repaired.extend(LeftOut(rows.file, number, repair) for repair in reading.repairs)
    reasons = []
    for messages, label in reading.pairs:
        reason = label_reason(method, label, messages[0]["role"] == TEXT_ROLE, include_undesirable)
        if reason:
            reasons.append(reason)
        else:
            rows.used.append(Conversation(rows.file, number, messages, label, reading.tools))
    if len(reasons) == len(reading.pairs):
        rows.left_out.append(LeftOut(rows.file, number, reasons[0]))


def check_usable(
    file: str, method: str, total: int, labels: Mapping[bool | None, int], reasons: Mapping[str, int]
) -> None:
    """Raise FinetuiError where `file` has no usable row, or for KTO only one label; `labels` counts the usable ones."""
    if not sum(labels.values()):
        often = Counter(reasons).most_common(2)
        named = "; ".join(f"{count:,} × {reason}" for reason, count in often)
        raise FinetuiError(
            f"{file} has no usable row for {method.upper()} among {total} ({named or 'no rows'}).",
            remedy_of(often[0][0]) if often and not often[0][0].startswith("broken JSON") else ROW_HELP,
        )
    if method == "kto" and sum(count > 0 for count in labels.values()) < 2:
        only = "true" if labels.get(True) else "false"
        raise FinetuiError(
            f"{file}: every label is {only}, and KTO needs good and bad answers.",
            "Train with SFT instead." if only == "true" else "Add rows with good answers.",
        )


def remedy_of(reason: str) -> str:
    """What to do about a reason for which rows are left out."""
    return next((remedy for start, remedy in REMEDIES if reason.startswith(start)), "Mend or delete these rows.")


def holdout_split(
    rows: list[Conversation], share: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Split into (training, held out) by prompt as `core.data_ledger.held_prompts` does."""
    if share <= 0:
        return rows, []
    import numpy

    from core.data_ledger import held_prompts

    keys = numpy.array([row.prompt_key for row in rows], "u8")
    labels = numpy.array([-1 if row.label is None else int(row.label) for row in rows], "i1")
    held = held_prompts(keys, labels, share, seed)
    training = [row for row, out in zip(rows, held, strict=True) if not out]
    return training, [row for row, out in zip(rows, held, strict=True) if out]


def drawn(key: int, seed: int) -> int:
    """What puts prompts into an order of chance that depends on nothing but the prompt's key and `seed`.

    The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014); `core.data_ledger.held_prompts` does it for arrays.
    """
    mixed = (key ^ (seed * 0x9E3779B97F4A7C15)) & MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK
    return mixed ^ (mixed >> 31)


def class_weights(desirable: int, undesirable: int) -> tuple[float, float]:
    """(desirable_weight, undesirable_weight) so that λ_D·n_D / λ_U·n_U lies in [1, 4/3].

    Equation (8) of the KTO paper (arXiv 2402.01306). The rarer class is weighted up, the other keeps 1; where the
    counts are inside the band already both are 1.
    """
    if not desirable or not undesirable:
        return 1.0, 1.0
    ratio = desirable / undesirable
    if 1 <= ratio <= 4 / 3:
        return 1.0, 1.0
    return (round(1 / ratio, 6), 1.0) if ratio < 1 else (1.0, round(ratio / (4 / 3), 6))
