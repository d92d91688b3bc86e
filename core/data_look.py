"""A look at the rows of a stage before anything is trained: ``python -P -m core.data_look``, started by `core.lens`.

One JSON request on stdin (see `Request`). Printed are JSON lines: ``progress`` several times a second, a first
``report`` when the rows are checked, a last one when near duplicates were looked for too; or ``error``, ``advice``.
"""

import json
import logging
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core.data import class_weights
from core.data_finding import Look
from core.data_findings import findings, glimpses
from core.data_hub import HubRows, first_rows, here, listing
from core.data_ledger import Ledger, save_ledger
from core.data_repeats import Repeats, near_duplicates
from core.data_rows import RowError, mapped_parts, names_of, read_row
from core.data_shape import content_shape
from core.data_survey import Progress, Survey, survey
from core.errors import FinetuiError
from core.plan import DataPlan
from core.prepare import check_ledger, open_ledger

GLANCED = 5
Print = Callable[[dict[str, Any]], None]


@dataclass
class Request:
    """What to look at: the rows of a stage as its plan names them, and what else findings depend on."""

    stage: str
    data: dict[str, Any]
    seed: int = 42
    eval_file: str = ""
    untuned: bool = False
    near: bool = True
    fetch: bool = True
    """Whether rows on the Hub are fetched; else only their beginning is looked at, where they are not here."""
    ledger: str = ""
    """Where to write every row with its fate instead of reporting."""


def main() -> int:
    request = Request(**json.loads(sys.stdin.readline()))

    def show(message: dict[str, Any]) -> None:
        print(json.dumps(message), flush=True)

    try:
        look(request, show)
    except FinetuiError as error:
        show({"error": error.message, "advice": error.advice})
    except Exception as error:
        logging.getLogger(__name__).exception("the look failed")
        show({"error": f"{type(error).__name__}: {error}"[:300], "advice": ""})
    return 0


def look(request: Request, show: Print) -> Ledger | None:
    """Look at the rows and show what is found as it is found; None for rows that are not here. Raises FinetuiError."""

    def say(progress: Progress) -> None:
        shown = {key: value for key, value in asdict(progress).items() if key not in ("reasons", "flags")}
        show({"progress": {**shown, "seen": glimpses(progress.reasons, progress.flags)}})

    data = DataPlan.model_validate(request.data)
    if data.dataset and not request.fetch and not here(wanted := HubRows.of(data)):
        show({"hub": glance(wanted)})
        return None
    ledger = open_ledger(data, request.stage, request.seed, lambda text: show({"notice": text}), say)
    if request.ledger:
        if Path(request.ledger).exists():
            raise FinetuiError(f"{request.ledger} exists already.", "Choose another name.")
        save_ledger(ledger, Path(request.ledger))
        show({"saved": request.ledger})
        return ledger
    held = survey(Path(request.eval_file)) if request.eval_file and Path(request.eval_file).is_file() else None
    show({"report": report(ledger, request, held, [], whole=not request.near)})
    if request.near:
        repeats = [near_duplicates(source.survey, _near(show)) for source in ledger.sources]
        show({"report": report(ledger, request, held, repeats, whole=True)})
    return ledger


def glance(wanted: HubRows) -> dict[str, Any]:
    """What a Hub data set offers, and its first rows with the shapes they have, before anything is fetched."""
    found = listing(wanted)
    rows = first_rows(wanted, GLANCED)
    names = names_of(None)
    shapes: Counter[str] = Counter()
    for row in rows:
        try:
            shapes[read_row(row, names).shape] += 1
        except RowError as error:
            shapes[f"left out: {error}"] += 1
    columns = list(dict.fromkeys(str(name)[:80] for row in rows if isinstance(row, dict) for name in row))
    shown = [json.dumps(row, ensure_ascii=False, default=str)[:4000] for row in rows]
    return {**found, "rows": shown, "shapes": dict(shapes.most_common(4)), "columns": columns[:60]}


def _near(show: Print) -> Callable[[int, int], None]:
    return lambda done, total: show({"progress": {"phase": "near", "done_bytes": done, "total_bytes": total}})


def report(
    ledger: Ledger, request: Request, held: Survey | None, repeats: list[Repeats], *, whole: bool
) -> dict[str, Any]:
    """All that is known of a stage's rows without a tokenizer; `whole` says that nothing more will come."""
    problem: dict[str, str] | None = None
    try:
        check_ledger(ledger)
    except FinetuiError as error:
        problem = {"error": error.message, "advice": error.advice}
    labels = ledger.label_counts()
    found = findings(Look(ledger, repeats, held_file=held, untuned=request.untuned))
    return {
        "files": [file_words(source.survey, source.weight) for source in ledger.sources],
        "totals": ledger.totals(), "usable": len(ledger.used), "training": len(ledger.training()),
        "held_out": len(ledger.evaluation()), "labels": {str(key).lower(): count for key, count in labels.items()},
        "weights": class_weights(labels[True], labels[False]) if request.stage == "kto" else None,
        "findings": [entry.as_json() for entry in found], "content": content_shape(ledger), "problem": problem,
        "whole": whole,
    }  # fmt: skip


def file_words(found: Survey, weight: float = 1.0) -> dict[str, Any]:
    """A file, its kind and shape, and the columns it has."""
    return {
        "file": found.file, "kind": found.kind, "rows": found.total, "blank": found.lines - found.total,
        "weight": weight, "shapes": dict(found.shapes.most_common()), "columns": list(found.keys)[:60],
        "mapping": found.mapping, "parts": mapped_parts(found.keys, found.mapping, found.shapes),
        "repairs": dict(found.repair_counts().most_common(8)),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
