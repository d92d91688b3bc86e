"""From a stage's plan to tokenised examples: read, split, tokenise, count. Used by training, dry run and preview."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from core.batches import batch_sizes
from core.chat import Template, TokenLedger, tokenize_rows
from core.data import Rows, class_weights, holdout_split, read_rows
from core.errors import FinetuiError
from core.plan import KTOPlan, StagePlan
from core.sources import Notify, data_files


@dataclass
class StageData:
    """The rows of a stage, tokenised, and everything that was done to them."""

    rows: list[Rows]
    training: TokenLedger
    held_out: TokenLedger | None
    notices: list[str]

    @property
    def labels(self) -> Counter[bool | None]:
        return Counter(example.row.label for example in self.training.examples)

    def report(self) -> dict[str, Any]:
        """Counts and the first rows left out, as events and dry runs show them."""
        ledgers = [self.training, *([self.held_out] if self.held_out else [])]
        left_out = [(entry.file, entry.line, entry.reason) for rows in self.rows for entry in rows.left_out]
        left_out += [(row.file, row.line, reason) for ledger in ledgers for row, reason in ledger.left_out]
        reasons = Counter(reason for _, _, reason in left_out)
        return {
            "files": [rows.file for rows in self.rows],
            "rows": sum(rows.total for rows in self.rows),
            "examples": len(self.training.examples),
            "held_out": len(self.held_out.examples) if self.held_out else 0,
            "labels": {str(label).lower(): count for label, count in self.labels.items()},
            "left_out": len(left_out),
            "left_out_reasons": dict(reasons.most_common(12)),
            "left_out_rows": [{"file": f, "line": line, "reason": reason} for f, line, reason in left_out[:50]],
            "repaired": sum(len(rows.repaired) for rows in self.rows),
            "cut": sum(len(ledger.cut) for ledger in ledgers),
            "tokens": self.training.tokens,
            "trained_tokens": self.training.trained_tokens,
            "longest": max(len(example.tokens.input_ids) for example in self.training.examples),
        }


def prepare(
    stage: StagePlan,
    name: str,
    template: Template,
    notify: Notify,
    progress: Callable[[str, int, int], None] | None = None,
) -> StageData:
    """Read, split and tokenise the rows of stage `name`. Raises FinetuiError when nothing usable is left."""
    rows = [
        read_rows(
            path,
            name,
            include_undesirable=stage.data.include_undesirable,
            max_rows=stage.data.max_rows,
            progress=(lambda count: progress("read", count, 0)) if progress else None,
        )
        for path in data_files(stage.data, name, notify)
    ]
    used = [row for found in rows for row in found.used]
    training, held_out = holdout_split(used, stage.data.holdout, stage.seed)
    limits: dict[str, Any] = {"max_length": stage.max_length, "too_long": stage.data.too_long}
    if isinstance(stage, KTOPlan):
        limits["max_prompt_length"] = stage.max_prompt_length
    ledgers = [
        tokenize_rows(
            template,
            part,
            name,
            progress=(lambda done, total: progress("tokenize", done, total)) if progress else None,
            **limits,
        )
        if part
        else None
        for part in (training, held_out)
    ]
    assert ledgers[0] is not None
    data = StageData(rows, ledgers[0], ledgers[1], template.notices(used))
    if name == "kto":
        if len(data.labels) < 2:
            raise FinetuiError(
                "After the length limit only one label is left for KTO.",
                "Raise kto.max_length or kto.max_prompt_length.",
            )
        if data.held_out and len(data.held_out.examples) < 2:
            raise FinetuiError("One held-out row is too few for KTO.", "Raise the share given to --split-dataset.")
    return data


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
