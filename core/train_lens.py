"""Show and count training examples as they will be trained: ``python -P -m core.train_lens``, started by `core.lens`.

One JSON request a line on stdin, one JSON reply a line on stdout, until stdin ends. Tokenizer, template, rows, mask and
limits are those of training: the same functions are called.
"""

import contextlib
import json
import logging
import os
import sys
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

from core.chat import Template, TemplateError, Tokenised, tokenize_rows
from core.data import Conversation, Rows, holdout_split, read_rows
from core.errors import FinetuiError
from core.memory import KEPT_LENGTHS
from core.plan import KTOPlan, Plan, StagePlan
from core.sources import DEMO_MODEL, data_files, model_source
from core.train_model import load_tokenizer

SAMPLE = 1000
MAX_TOKENS_SHOWN = 8000
MAX_CHARACTERS = 40_000
Segment = tuple[str, bool, bool]


def main() -> int:
    words, desk = sys.stdout, Desk()
    if hasattr(os, "nice"):
        os.nice(10)
    for line in sys.stdin:
        with contextlib.redirect_stdout(sys.stderr):
            try:
                reply = desk.reply(json.loads(line))
            except FinetuiError as error:
                reply = {"error": error.message, "advice": error.advice}
            except Exception as error:
                logging.getLogger(__name__).exception("the lens failed")
                reply = {"error": f"{type(error).__name__}: {error}"[:300], "advice": ""}
        print(json.dumps(reply), file=words, flush=True)
    return 0


class Desk:
    """The newest tokenizer and the newest rows of each stage, kept between questions."""

    def __init__(self) -> None:
        self._template: tuple[str, Template, str] | None = None
        self._rows: dict[str, tuple[list[Any], list[Rows]]] = {}

    def reply(self, request: dict[str, Any]) -> dict[str, Any]:
        plan = Plan.model_validate(request["plan"])
        template, origin = self.template(plan)
        name = request["stage"]
        used = [row for rows in self.rows(plan, name) for row in rows.used]
        if request["do"] == "count":
            return counted(template, plan.stage(name), name, used)
        at = max(0, min(request["at"], len(used) - 1))
        return {
            **shown(template, plan.stage(name), name, used[at]), "at": at, "of": len(used), "origin": origin,
            "notices": template.notices(used),
        }  # fmt: skip

    def template(self, plan: Plan) -> tuple[Template, str]:
        """The model's template and where it comes from. Raises FinetuiError when it is not on this machine."""
        key = plan.model.model_dump_json()
        if self._template is None or self._template[0] != key:
            source = model_source(plan.model, lambda text: None, fetch=False)
            missing = FinetuiError(
                f"The tokenizer of {plan.model.name} is not on this machine yet.",
                "It comes when the run starts, or with a dry run on the review page.",
            )
            if plan.model.name == DEMO_MODEL and not source.local:
                raise missing
            try:
                _, template, origin = load_tokenizer(plan, source)
            except FinetuiError as error:
                raise missing if "cannot be had" in error.message else error from error
            self._template = key, template, origin
        return self._template[1], self._template[2]

    def rows(self, plan: Plan, name: str) -> list[Rows]:
        data = plan.stage(name).data
        try:
            paths = data_files(data, name, lambda text: None)
        except FinetuiError as error:
            if not data.dataset:
                raise
            raise FinetuiError(
                f"The data set {data.dataset} is not on this machine yet.", "It is fetched when the run starts."
            ) from error
        key: list[Any] = [data.include_undesirable, data.max_rows, *(_stamp(path) for path in paths)]
        if name not in self._rows or self._rows[name][0] != key:
            found = [
                read_rows(path, name, include_undesirable=data.include_undesirable, max_rows=data.max_rows)
                for path in paths
            ]
            self._rows[name] = key, found
        return self._rows[name][1]


def _stamp(path: Path) -> tuple[str, int, int]:
    """Path, time and size of a file: rows are read again when one of them changes."""
    with contextlib.suppress(OSError):
        found = path.stat()
        return str(path), found.st_mtime_ns, found.st_size
    return str(path), 0, 0


def limits(stage: StagePlan) -> dict[str, Any]:
    """The length limits of a stage as `tokenize_rows` takes them."""
    found: dict[str, Any] = {"max_length": stage.max_length, "too_long": stage.data.too_long}
    if isinstance(stage, KTOPlan):
        found["max_prompt_length"] = stage.max_prompt_length
    return found


def shown(template: Template, stage: StagePlan, name: str, row: Conversation) -> dict[str, Any]:
    """A row as tokens: what is trained, what is cut, and why it is left out if it is."""
    reply: dict[str, Any] = {"file": row.file, "line": row.line, "label": row.label, "cut": 0, "left_out": ""}
    tokens = Tokenised([], [])
    try:
        ledger = tokenize_rows(template, [row], name, **limits(stage))
        tokens = ledger.examples[0].tokens
        reply["cut"] = sum(over for _, over in ledger.cut)
    except FinetuiError as refused:
        reply["left_out"] = refused.message
        try:
            tokens = template.tokenize(row.messages, row.tools, only_last=name == "kto")
        except TemplateError as error:
            reply["left_out"] = str(error)
    learnt = sum(label != -100 for label in tokens.labels)
    return {**reply, "tokens": len(tokens.input_ids), "trained": learnt, "segments": segments(template, tokens)}


def segments(template: Template, tokens: Tokenised) -> list[Segment]:
    """The tokens as (text, trained, special) in stretches of one kind, each special token by itself."""
    ids, labels = tokens.input_ids[:MAX_TOKENS_SHOWN], tokens.labels[:MAX_TOKENS_SHOWN]
    special = template.end_tokens
    stretches: list[tuple[int, bool, bool]] = []
    kinds = [(label != -100, token in special, token in special and index) for index, (token, label) in
             enumerate(zip(ids, labels, strict=True))]  # fmt: skip
    end = 0
    for (trained, marked, _), group in groupby(kinds):
        end += len(list(group))
        stretches.append((end, trained, marked))
    found: list[Segment] = []
    start, before, left = 0, "", MAX_CHARACTERS
    for end, trained, marked in stretches:
        text = template.tokenizer.decode(ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if not marked and start and len(stretches) < 200:  # some decoders drop the blank before a word that comes first
            before = template.tokenizer.decode(ids[:start], clean_up_tokenization_spaces=False)
            whole = template.tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
            text = whole[len(before) :] if whole.startswith(before) else text
        found.append((text[:left], trained, marked))
        left -= len(text)
        start = end
        if left <= 0:
            break
    if start < len(tokens.input_ids) or left < 0:
        found.append((f" … ({len(tokens.input_ids):,} tokens in all)", False, False))
    return found


def counted(template: Template, stage: StagePlan, name: str, used: list[Conversation]) -> dict[str, Any]:
    """Examples and tokens of a pass over the training rows, from an even sample of them where they are many."""
    training, held_out = holdout_split(used, stage.data.holdout, stage.seed)
    step = -(-len(training) // SAMPLE)
    sample = training[:: max(step, 1)]
    ledger = tokenize_rows(template, sample, name, **limits(stage))
    share = len(training) / len(sample)
    lengths = sorted((len(example.tokens.input_ids) for example in ledger.examples), reverse=True)
    return {
        "longest_rows": [length for length in lengths for _ in range(round(share))][:KEPT_LENGTHS],
        "examples": round(len(ledger.examples) * share),
        "held_out": len(held_out),
        "tokens": round(ledger.tokens * share),
        "trained_tokens": round(ledger.trained_tokens * share),
        "longest": max(len(example.tokens.input_ids) for example in ledger.examples),
        "left_out": dict(Counter(reason for _, reason in ledger.left_out).most_common(5)),
        "cut": len(ledger.cut),
        "sampled": len(sample),
        "rows": len(training),
    }


if __name__ == "__main__":
    sys.exit(main())
