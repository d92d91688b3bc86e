"""Show and count training examples as they will be trained: ``python -P -m core.train_lens``, started by `core.lens`.

One JSON request a line on stdin, one JSON reply a line on stdout, until stdin ends. Tokenizer, template, rows, mask and
limits are those of training: the same functions are called.
"""

import contextlib
import copy
import gc
import json
import logging
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # tokenizers need no torch, which takes longer to import than all the rest
    sys.modules["torch"] = None  # type: ignore[assignment]
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    gc.disable()  # nothing that is imported is garbage, and looking for some takes a fifth of the time

from core.batches import kto_batches
from core.chat import Template, TemplateError, Tokenised, nothing_left, tokenize_rows
from core.data import Conversation
from core.data_cache import entry
from core.data_finding import Look
from core.data_findings import length_findings
from core.data_ledger import LEFT_OUT, Ledger, save_ledger
from core.data_limits import Limits
from core.data_reader import Reader, Rows
from core.data_shape import PACKED_ROWS, padded_share, token_shape
from core.data_tokens import KEPT_FROM, Growing, Tokens, fill, tokenize, tokens_key
from core.errors import FinetuiError
from core.memory import KEPT_LENGTHS
from core.plan import KTOPlan, Plan, StagePlan
from core.prepare import changes, kto_weights, stage_ledger
from core.sources import DEMO_MODEL, data_sources, model_source
from core.train_segments import segments, token_list, turn_list
from core.train_tokenizer import load_tokenizer

ALL_GONE = "No row is left after tokenising: "
SAMPLE, WRITTEN_BYTES = 1000, 8000
EXACT = 4000
"""Conversations up to which all are tokenised for a count; of more an even sample, unless the cache has them all."""


def main() -> int:
    gc.freeze()  # what was imported stays, and is not looked through again
    gc.enable()
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


@dataclass
class Counted:
    """The rows of a stage that were tokenised: all of them, or a sample that stands for `scale` times as many."""

    ledger: Ledger
    tokens: Tokens
    scale: float
    partners: dict[int, int] | None = None


class Desk:
    """The newest tokenizer, and the newest rows and counts of each stage, kept between questions."""

    def __init__(self) -> None:
        self._template: tuple[str, Template, str] | None = None
        self._ledgers: dict[str, tuple[list[Any], Ledger]] = {}
        self._counted: dict[str, tuple[list[Any], Counted]] = {}

    def reply(self, request: dict[str, Any]) -> dict[str, Any]:
        plan = Plan.model_validate(request["plan"])
        template, origin = self.template(plan)
        name = request["stage"]
        stage = plan.stage(name)
        ledger = self.ledger(stage, name)
        if request["do"] == "count":
            saved = request.get("ledger", "")
            found = self.counted(stage, name, template, ledger, exact=bool(request.get("exact") or saved))
            return count_words(found, stage, name, saved)
        if request["do"] == "limit":
            found = self.counted(stage, name, template, ledger)
            return limit_words(found, Limits.of(stage, name), request["at"])
        used = ledger.used
        at = place_of(ledger, request["line"]) if "line" in request else request["at"]
        at = max(0, min(at, len(used) - 1))
        rest = {"at": at, "of": len(used), "origin": origin, "notices": changes(template, ledger)}
        limits, ids = Limits.of(stage, name), bool(request.get("ids"))
        if "line" in request and (reply := unused(ledger, request["line"], template, limits, ids=ids)):
            return {**reply, **rest, "held_out": False, "unused": True}
        number = int(used[at])
        reply = shown(template, limits, Rows(ledger)[number], ids=ids)
        if name == "kto":
            reply["partner"] = self.partner(stage, name, template, ledger, number)
        return {**reply, **rest, "held_out": bool(ledger.held_out[number])}

    def template(self, plan: Plan) -> tuple[Template, str]:
        """The model's template and where it comes from. Raises FinetuiError when it is not on this machine."""
        key = plan.model.model_dump_json()
        if self._template is None or self._template[0] != key:
            source = model_source(plan.model, lambda text: None, fetch=False)
            missing = FinetuiError(
                f"The tokenizer of {plan.model.name} is not on this machine yet.",
                "It comes when a run starts, or with a dry run: --dry-run, in the app d on the review page.",
            )
            if plan.model.name == DEMO_MODEL and not source.local:
                raise missing
            if plan.model.trust_remote_code and sys.modules.get("torch", self) is None:
                del sys.modules["torch"]  # the tokenizer's own code may want it
            try:
                _, template, origin = load_tokenizer(plan, source)
            except FinetuiError as error:
                raise missing if "cannot be had" in error.message else error from error
            self._template = key, template, origin
            self._counted.clear()
        return self._template[1], self._template[2]

    def ledger(self, stage: StagePlan, name: str) -> Ledger:
        data = stage.data
        try:
            paths = [path for path, _ in data_sources(data, name, lambda text: None)]
        except FinetuiError as error:
            if not data.dataset:
                raise
            raise FinetuiError(
                f"The data set {data.dataset} is not on this machine yet.", "It is fetched when the run starts."
            ) from error
        key = [data.model_dump_json(), stage.seed, *(_stamp(path) for path in paths)]
        if name not in self._ledgers or self._ledgers[name][0] != key:
            self._ledgers[name] = key, stage_ledger(stage, name, lambda text: None)
            self._counted.pop(name, None)
        return self._ledgers[name][1]

    def counted(
        self, stage: StagePlan, name: str, template: Template, ledger: Ledger, *, exact: bool = False
    ) -> Counted:
        """The rows of a stage in tokens, before any limit; with `exact` all of them, however many."""
        which = ledger.used
        whole = exact or len(which) <= EXACT or (len(which) >= KEPT_FROM and entry(tokens_key(ledger, which, template)))
        key = [id(ledger), bool(whole)]
        if name not in self._counted or self._counted[name][0] != key:
            if whole:
                found = Counted(ledger, tokenize(ledger, template), 1.0)
            else:
                training = ledger.training()
                sample = training[:: -(-len(training) // SAMPLE)]
                growing = Growing()
                fill(growing, ledger, sample, template, None)
                shard = growing.close()
                assert shard is not None
                found = Counted(ledger, Tokens(sample, [shard]), len(training) / len(sample))
            self._counted[name] = key, found
        return self._counted[name][1]

    def partner(
        self, stage: StagePlan, name: str, template: Template, ledger: Ledger, number: int
    ) -> dict[str, Any] | None:
        """The row whose completion stands in for this one's in the KL term, in the first epoch. None while unknown."""
        if len(ledger.used) > EXACT and name not in self._counted:
            return None
        found = self.counted(stage, name, template, ledger)
        if found.scale != 1:
            return None
        if found.partners is None:
            found.partners = partners_of(entered(found, Limits.of(stage, name)), stage)
        if number not in found.partners:
            return None
        other = Rows(ledger)[found.partners[number]]
        tokens = template.tokenize(other.messages, other.tools, only_last=True)
        ids = [token for token, trained in zip(tokens.input_ids, tokens.trained, strict=True) if trained]
        text = template.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return {"line": other.line, "file": other.file, "label": other.label, "text": text[:4000], "tokens": len(ids)}


def _stamp(path: Path) -> tuple[str, int, int]:
    """Path, time and size of a file: rows are read again when one of them changes."""
    with contextlib.suppress(OSError):
        found = path.stat()
        return str(path), found.st_mtime_ns, found.st_size
    return str(path), 0, 0


def place_of(ledger: Ledger, place: list[Any]) -> int:
    """Which of the usable conversations stands at (file, line), or comes next."""
    import numpy

    file, line = str(place[0]), int(place[1])
    numbers = [number for number, source in enumerate(ledger.sources) if source.survey.file == file] or [0]
    mine = ledger.file_of == numbers[0]
    lines = numpy.concatenate([source.survey["line"][source.survey["row"]] for source in ledger.sources])
    behind = numpy.flatnonzero(mine & (lines >= line))
    return int(numpy.searchsorted(ledger.used, behind[0])) if len(behind) else len(ledger.used)


def unused(
    ledger: Ledger, place: list[Any], template: Template, limits: Limits, *, ids: bool = False
) -> dict[str, Any] | None:
    """The row at (file, line) where none of it is used: in tokens, or as it is written where it makes no conversation.

    None for a row that is used and for a line that has none.
    """
    import numpy

    sources = [source.survey for source in ledger.sources]
    number = next((at for at, survey in enumerate(sources) if survey.file == str(place[0])), 0)
    survey, start = sources[number], sum(survey.conversations for survey in sources[:number])
    row = int(numpy.searchsorted(survey["line"], int(place[1])))
    if row >= survey.total or int(survey["line"][row]) != int(place[1]):
        return None
    mine = start + numpy.flatnonzero(survey["row"] == row)
    if (ledger.fate[mine] != LEFT_OUT).any():
        return None
    if len(mine):
        why = ledger.reasons[int(ledger.reason[mine[0]])]
        return {**shown(template, limits, Rows(ledger)[int(mine[0])], ids=ids), "left_out": why}
    reader = Reader(survey)
    written = reader.text(row)[:WRITTEN_BYTES].decode("utf-8", "replace")
    reader.close()
    return {
        "file": survey.file, "line": int(place[1]), "label": None, "cut": 0, "tokens": 0, "trained": 0, "turns": [],
        "segments": [(written, False, False, 0)], "left_out": survey.reasons[int(survey["reason"][row])],
    }  # fmt: skip


def entered(found: Counted, limits: Limits) -> Ledger:
    """A copy of the ledger in which tokens and limits are entered."""
    ledger = copy.copy(found.ledger)
    for name in ("fate", "reason", "held_out", "times", "tokens", "trained", "cut", "answer_cut"):
        setattr(ledger, name, getattr(ledger, name).copy())
    ledger.reasons = list(ledger.reasons)
    found.tokens.enter(ledger, limits)
    return ledger


def first_epoch(ledger: Ledger, stage: StagePlan) -> list[list[int]]:
    """The conversations of every micro-batch of KTO's first epoch, as they stand in it."""
    which = ledger.training()
    labels = (ledger.labels[which] == 1).tolist()
    keys, lengths = ledger.prompt_keys[which].tolist(), (ledger.tokens[which] - ledger.cut[which]).tolist()
    parts = stage.gradient_accumulation_steps
    batches = kto_batches(labels, keys, stage.effective_batch, stage.seed, lengths=lengths, parts=parts)
    return [which[batch].tolist() for batch in batches]


def partners_of(ledger: Ledger, stage: StagePlan) -> dict[int, int]:
    """For each conversation the one before it in its batch of the first epoch, as the KTO collator pairs them."""
    found: dict[int, int] = {}
    for batch in first_epoch(ledger, stage):
        for number, before in zip(batch, [batch[-1], *batch[:-1]], strict=True):
            found.setdefault(number, before)
    return found


def shown(template: Template, limits: Limits, row: Conversation, *, ids: bool = False) -> dict[str, Any]:
    """A row as tokens: what is trained, what is cut, and why it is left out if it is."""
    reply: dict[str, Any] = {"file": row.file, "line": row.line, "label": row.label, "cut": 0, "left_out": ""}
    tokens = Tokenised([], [])
    try:
        ledger = tokenize_rows(
            template, [row], limits.method, max_length=limits.max_length,
            max_prompt_length=limits.max_prompt_length, too_long=limits.too_long,
        )  # fmt: skip
        tokens = ledger.examples[0].tokens
        reply["cut"] = sum(over for _, over in ledger.cut)
    except FinetuiError as refused:
        reply["left_out"] = refused.message.removeprefix(ALL_GONE)
        try:
            tokens = template.tokenize(row.messages, row.tools, only_last=limits.method == "kto")
        except TemplateError as error:
            reply["left_out"] = str(error)
    learnt = sum(label != -100 for label in tokens.labels)
    turns = turn_list(template, row, tokens, reply["cut"])
    parts = segments(template, tokens, [turn["start"] for turn in turns])
    reply |= {"tokens": len(tokens.input_ids), "trained": learnt, "segments": parts, "turns": turns}
    if ids:
        reply |= {"input_ids": tokens.input_ids, "labels": tokens.labels, "pieces": token_list(template, tokens)}
    return reply


def count_words(found: Counted, stage: StagePlan, name: str, saved: str = "") -> dict[str, Any]:
    """Examples and tokens of a pass over the training rows, their shape, and what the limits do to them.

    With `saved` every row with its fate is written to that file.
    """
    import numpy

    limits = Limits.of(stage, name)
    ledger = entered(found, limits)
    if saved:
        save_ledger(ledger, Path(saved))
    training = ledger.training()
    kept = training if found.scale == 1 else found.tokens.which[ledger.fate[found.tokens.which] != 2]
    if not len(kept):
        raise nothing_left({ledger.reasons[n] for n in set(ledger.reason[found.tokens.which].tolist())} - {""}, limits)

    def scaled(value: Any) -> int:
        return round(float(value) * found.scale)

    lengths = ledger.tokens[kept] - ledger.cut[kept]
    longest = numpy.sort(lengths)[::-1].repeat(round(found.scale))[:KEPT_LENGTHS]
    labels = ledger.label_counts()
    shape = token_shape(found.tokens.lengths(), limits, stage.batch_size, found.scale)
    if name == "kto" and found.scale == 1 and len(training) <= PACKED_ROWS:
        shape["padded"] = padded_share([ledger.tokens[b] - ledger.cut[b] for b in first_epoch(ledger, stage)])
    gone = ledger.reason[found.tokens.which]
    reasons = {ledger.reasons[number]: scaled((gone == number).sum()) for number in set(gone.tolist()) - {0}}
    return {
        "longest_rows": longest.tolist(), "examples": scaled(len(kept)), "held_out": len(ledger.evaluation()),
        "tokens": scaled(lengths.sum()), "trained_tokens": scaled(ledger.trained[kept].sum()),
        "longest": int(lengths.max()), "left_out": reasons, "cut": scaled((ledger.cut > 0).sum()),
        "sampled": len(found.tokens.which),
        "rows": len(found.tokens.which) if found.scale == 1 else len(found.ledger.training()),
        "exact": found.scale == 1,
        "totals": ledger.totals() if found.scale == 1 else None,
        "labels": {str(label).lower(): many for label, many in labels.items()},
        "weights": kto_weights(stage, labels) if isinstance(stage, KTOPlan) else None,
        "shape": {**shape, "padding_free": getattr(stage, "padding_free", "off")},
        "findings": [told.as_json() for told in length_findings(Look(ledger, max_length=limits.max_length))],
    }  # fmt: skip


def limit_words(found: Counted, limits: Limits, at: int) -> dict[str, Any]:
    """What another limit would do."""
    prompt = limits.max_prompt_length
    there = replace(limits, max_length=at, max_prompt_length=min(prompt, at) if prompt else prompt)
    told = found.tokens.lengths().at_limit(there)
    scaled = {key: value if key == "longest" else round(value * found.scale) for key, value in told.items()}
    return {"limit": scaled, "at": at, "exact": found.scale == 1}


if __name__ == "__main__":
    sys.exit(main())
