"""From a stage's plan to tokenised examples: survey, split, tokenise, count. Used by training, dry run and preview."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from core.batches import batch_sizes
from core.chat import Template, nothing_left
from core.data import check_usable, class_weights
from core.data_facts import CALLS
from core.data_ledger import LEFT_OUT, Ledger, Source
from core.data_limits import Limits
from core.data_survey import Progress, refuse_unknown_columns, survey
from core.data_tokens import Examples, Tokens, tokenize
from core.errors import FinetuiError
from core.plan import DataPlan, KTOPlan, StagePlan
from core.sources import Notify, data_sources

NAMED_ROWS = 50


@dataclass
class Part:
    """The examples of one side of the split."""

    examples: Examples

    @property
    def tokens(self) -> int:
        return int(self.examples.lengths.sum())

    @property
    def trained_tokens(self) -> int:
        return int(self.examples.trained.sum())


@dataclass
class StageData:
    """The rows of a stage, tokenised, and everything that was done to them."""

    ledger: Ledger
    tokens: Tokens
    training: Part
    held_out: Part | None
    notices: list[str]

    @property
    def labels(self) -> Counter[bool | None]:
        return self.ledger.label_counts()

    def report(self) -> dict[str, Any]:
        """Counts and the first rows left out, as events and dry runs show them."""
        totals = self.ledger.totals()
        gone = islice((entry for entry in self.ledger.entries() if entry["fate"] == "left out"), NAMED_ROWS)
        files = [source.survey.file for source in self.ledger.sources]
        return {
            "files": files,
            "rows": totals["rows"],
            "examples": len(self.training.examples),
            "held_out": len(self.held_out.examples) if self.held_out else 0,
            "labels": {str(label).lower(): count for label, count in self.labels.items()},
            "left_out": totals["left_out"],
            "left_out_reasons": dict(list(totals["reasons"].items())[:12]),
            "left_out_rows": [
                {"file": files[entry["file"]], "line": entry["line"], "reason": entry.get("reason", "")}
                for entry in gone
            ],
            "repaired": totals["repaired"],
            "cut": totals["cut"],
            "tokens": self.training.tokens,
            "trained_tokens": self.training.trained_tokens,
            "longest": int(self.training.examples.lengths.max()),
        }


Step = Callable[[str, int, int], None]


def open_ledger(
    data: DataPlan, name: str, seed: int, notify: Notify, say: Callable[[Progress], None] | None = None
) -> Ledger:
    """The ledger of a stage as far as it goes without a tokenizer, held-out rows and file weights included."""
    sources = [Source(survey(path, data.columns, say), weight) for path, weight in data_sources(data, name, notify)]
    ledger = Ledger.of(
        sources, name, include_undesirable=data.include_undesirable, max_rows=data.max_rows,
        drop_duplicates=data.duplicates == "drop",
    )  # fmt: skip
    ledger.hold_out(data.holdout, seed)
    ledger.weigh(seed)
    return ledger


def check_ledger(ledger: Ledger) -> None:
    """Raise FinetuiError when a column is named that there is not, no row is usable, or KTO has only one label."""
    refuse_unknown_columns([source.survey for source in ledger.sources])
    totals = ledger.totals()
    labels = ledger.label_counts(held_out=True)
    check_usable(files_words(ledger.sources), ledger.method, totals["rows"], labels, totals["reasons"])


def stage_ledger(stage: StagePlan, name: str, notify: Notify, say: Callable[[Progress], None] | None = None) -> Ledger:
    """The same for a stage, checked. Raises FinetuiError when no row is usable, for KTO when only one label occurs."""
    ledger = open_ledger(stage.data, name, stage.seed, notify, say)
    check_ledger(ledger)
    return ledger


def files_words(sources: list[Source]) -> str:
    """The files of a stage in a few words."""
    more = len(sources) - 1
    return sources[0].survey.file + (f" and {more} more file{'s' * (more > 1)}" if more else "")


def prepare(stage: StagePlan, name: str, template: Template, notify: Notify, progress: Step | None = None) -> StageData:
    """Survey, split and tokenise the rows of stage `name`. Raises FinetuiError when nothing usable is left."""

    def read(found: Progress) -> None:
        if progress:
            progress("read", found.rows, 0)

    ledger = stage_ledger(stage, name, notify, read)
    tokens = tokenize(
        ledger, template, (lambda done, total: progress("tokenize", done, total)) if progress else None
    )
    notices = changes(template, ledger)
    limits = Limits.of(stage, name)
    tokens.enter(ledger, limits)
    if not len(ledger.training()):
        reasons = {ledger.reasons[number] for number in set(ledger.reason[tokens.which].tolist())} - {""}
        raise nothing_left(reasons, limits)
    held_out = ledger.evaluation()
    data = StageData(
        ledger, tokens, Part(Examples(ledger, tokens, ledger.training())),
        Part(Examples(ledger, tokens, held_out)) if len(held_out) else None, notices,
    )  # fmt: skip
    if name == "kto":
        if len(data.labels) < 2:
            raise FinetuiError(
                "After the length limit only one label is left for KTO.",
                "Raise kto.max_length or kto.max_prompt_length.",
            )
        if data.held_out and len(data.held_out.examples) < 2:
            raise FinetuiError("One held-out row is too few for KTO.", "Raise the share given to --split-dataset.")
    return data


def changes(template: Template, ledger: Ledger) -> list[str]:
    """What the template makes of the rows other than they are, in sentences."""
    import numpy

    used = ledger.fate != LEFT_OUT
    systems = ledger.each("pattern", lambda survey, at: numpy.array(["s" in word for word in survey.patterns])[at])
    called = ledger.each("flags") & CALLS > 0
    return template.changes(int((systems & used).sum()), int((called & used).sum()))


def planned_steps(stage: StagePlan, name: str, examples: int) -> int:
    """Optimiser steps of the whole stage."""
    if stage.max_steps > 0:
        return stage.max_steps
    batch = stage.effective_batch
    per_epoch = max(len(batch_sizes(examples, batch)) if name == "kto" else -(-examples // batch), 1)
    return -(-int(stage.num_train_epochs * per_epoch * 1000) // 1000)


def kto_weights(stage: KTOPlan, labels: Counter[bool | None]) -> tuple[float, float]:
    """(desirable, undesirable) weights: the plan's where set, else from the label counts."""
    desirable, undesirable = class_weights(labels[True], labels[False])
    return stage.desirable_weight or desirable, stage.undesirable_weight or undesirable
