"""Answer held-out prompts with the base model and with what a run made of it, and score the answers.

``python -P -m core.evaluate RUN evaluate [NAME]``, run by core.runner: at the end of a run, or for `finetui eval`.
Answers are kept as they come and are not generated twice; the table goes into the event ``result`` while it grows, and
everything into RUN/evaluate/NAME (see core.evaluation).
"""

import gc
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    gc.disable()  # nothing that is imported is garbage, and looking for some takes a fifth of the time

from core.chat import Template, TemplateError
from core.errors import FinetuiError
from core.evaluate_model import Answerer, in_batches
from core.evaluation import HELD_OUT, Store, evaluation_path, options_of, report_of
from core.evaluation_report import write_report
from core.heldout import Prompt, held_out
from core.plan import EvaluatePlan, Plan
from core.runner import EXIT_STOPPED
from core.runs import Run
from core.scores import Expected, Marks, expected_of, mean_loss, rates, score
from core.secrets import guard_output
from core.tools import Tool, read_tools
from core.train_events import Reporter, Stopped
from core.train_fit import cap_memory
from core.variants import Variant

LEAST_TOKENS, MOST_TOKENS, TOKENS_WITHOUT_EXPECTED = 32, 1024, 256


def main() -> int:
    """Returns 0 when the report is written, 1 when it failed, EXIT_STOPPED when a stop was asked for."""
    gc.freeze()  # what was imported stays, and is not looked through again
    gc.enable()
    guard_output()
    run, stage = Run(Path(sys.argv[1])), sys.argv[2]
    reporter = Reporter(run, stage)
    try:
        evaluate(run, run.plan(), reporter, sys.argv[3] if len(sys.argv) > 3 else "")
        return 0
    except Stopped:
        return EXIT_STOPPED
    except BaseException as error:
        reporter.failure(error, "The answers so far are kept: start it again and it goes on.")
        logging.getLogger(__name__).exception("the evaluation failed")
        return 1


@dataclass
class Case:
    """One prompt made ready: rendered, its tokens, what is expected of it, the tools it may call."""

    prompt: Prompt
    text: str
    prompt_ids: list[int] = field(default_factory=list)
    answer_ids: list[int] = field(default_factory=list)
    rejected_ids: list[int] = field(default_factory=list)
    expected: Expected = Expected(None)
    tools: dict[str, Tool] = field(default_factory=dict)


def evaluate(run: Run, plan: Plan, reporter: Reporter, name: str = "") -> dict[str, Any]:
    """Answer, score and write the evaluation `name`; without a name the one the plan asks for. Returns the report."""
    folder = evaluation_path(run, name or HELD_OUT)
    options = options_of(folder) if name else plan.evaluate
    file = Path(options.file) if options.file else None
    tools = read_tools(Path(options.tools)) if options.tools else {}
    cap_memory(plan, reporter)
    with reporter.phase("load", plan.model.name):
        answerer = Answerer.load(run, plan, reporter.detail)
        held = held_out(plan, file, options.max_prompts, reporter.detail)
        tools = tools or held.tools
        cases, left_out = prepared(answerer, held.prompts, tools)
        limit = options.max_new_tokens or needed_tokens(cases)
        cases = list(_that_fit(cases, left_out, answerer.context_length, limit))
    if not cases:
        said = "; ".join(f"{count:,} × {reason}" for reason, count in left_out.most_common(2))
        raise FinetuiError(f"No held-out prompt can be answered: {said}.", "Give others with --file.")
    work = Work(answerer, cases, options, limit, folder, reporter)
    reporter.event(
        "totals", steps=len(cases) * len(answerer.variants) * (1 + work.with_loss), prompts=len(cases),
        variants=[variant.name for variant in answerer.variants],
    )  # fmt: skip
    facts = {
        "name": name or HELD_OUT, "source": held.source, "notes": held.notes, "left_out": dict(left_out),
        "complete": {variant.name for variant in answerer.variants} >= set(plan.training_stages),
        "settings": {
            "max_new_tokens": limit, "temperature": options.temperature, "ignore_arguments": options.ignore_arguments,
            "tools": sorted(tools), "max_prompts": options.max_prompts, "chosen": options.model_dump(mode="json"),
        },
    }  # fmt: skip
    for number, variant in enumerate(answerer.variants):
        with reporter.phase("generate", variant.name):
            work.answer(number, variant)
            reporter.event("result", **work.result(facts), partial=variant != answerer.variants[-1] or work.with_loss)
    if work.with_loss:
        for number, variant in enumerate(answerer.variants):
            with reporter.phase("loss", variant.name):
                work.measure(len(answerer.variants) + number, variant)
        reporter.event("result", **work.result(facts))
    report = report_of(facts, work.rows(), [variant.name for variant in answerer.variants], work.seconds)
    write_report(folder, report, work.rows())
    return report


def prepared(answerer: Answerer, prompts: list[Prompt], tools: dict[str, Tool]) -> tuple[list[Case], Counter[str]]:
    """Every prompt as a case; what the template refuses is counted by reason."""
    template, cases, left_out = answerer.template, [], Counter[str]()
    for prompt in prompts:
        try:
            case = Case(prompt, template.render(prompt.messages, prompt.tools), tools=prompt.schemas | tools)
            if prompt.expected is not None:
                case.prompt_ids, case.answer_ids = _tokens(template, prompt, prompt.expected)
                text = answerer.decoded(case.answer_ids)
                case.expected = expected_of(text, prompt.expected.get("tool_calls"))
            else:
                case.prompt_ids = template.tokenizer(case.text, add_special_tokens=False)["input_ids"]
            if prompt.expected is not None and prompt.rejected is not None:
                _, case.rejected_ids = _tokens(template, prompt, prompt.rejected)
        except TemplateError as error:
            left_out[str(error)] += 1
        else:
            cases.append(case)
    return cases, left_out


def _tokens(template: Template, prompt: Prompt, answer: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Tokens of the prompt and of the answer, as training has them. Raises TemplateError."""
    found = template.tokenize([*prompt.messages, answer], prompt.tools, only_last=True)
    if not any(found.trained):
        raise TemplateError("the expected answer renders to nothing")
    first = found.trained.index(True)
    return found.input_ids[:first], [i for i, learnt in zip(found.input_ids, found.trained, strict=True) if learnt]


def needed_tokens(cases: list[Case]) -> int:
    """A limit that leaves room for answers a quarter longer than the longest expected one."""
    longest = max((len(case.answer_ids) for case in cases), default=0)
    return max(LEAST_TOKENS, min(MOST_TOKENS, longest * 5 // 4 + 8)) if longest else TOKENS_WITHOUT_EXPECTED


def _that_fit(cases: list[Case], left_out: Counter[str], context: int | None, limit: int) -> Iterator[Case]:
    for case in cases:
        if context and len(case.prompt_ids) + max(limit, len(case.answer_ids), len(case.rejected_ids)) > context:
            left_out["longer than the model's context"] += 1
        else:
            yield case


class Work:
    """The answers of every variant, kept in files as they come, and the marks they earn."""

    def __init__(
        self, answerer: Answerer, cases: list[Case], options: EvaluatePlan, limit: int, folder: Path, reporter: Reporter
    ) -> None:
        self.answerer, self.cases, self.options, self.limit = answerer, cases, options, limit
        self.folder, self.reporter = folder, reporter
        self.stores: dict[str, Store] = {}
        self.seconds: dict[str, float] = {}
        answered = [case for case in cases if case.expected.text is not None]
        plain = any(not case.expected.calls for case in answered)
        self.with_loss = bool(answered) and (options.loss == "on" or (options.loss == "auto" and plain))

    def answer(self, number: int, variant: Variant) -> None:
        """The variant's answers: those an earlier attempt wrote, else generated, long prompts last."""
        store = self._store(variant)
        missing = [case for case in self.cases if not store.has_answer(case.text, self.limit)]
        missing.sort(key=lambda case: len(case.prompt_ids))
        done, begun = len(self.cases) - len(missing), time.monotonic()

        def batch(places: range) -> None:
            self._halt()
            chosen = [missing[place] for place in places]
            found = self.answerer.answers([c.text for c in chosen], self.limit, self.options.temperature)
            for case, answer in zip(chosen, found, strict=True):
                store.keep(case.text, answer=answer.text, tokens=answer.tokens, cut=answer.cut, limit=self.limit)
            count = done + places.stop
            self.reporter.event("log", step=number * len(self.cases) + count, variant=variant.name)
            self.reporter.detail(f"{variant.name}: {count} of {len(self.cases)} prompts")

        with self.answerer.using(variant):
            in_batches(len(missing), self.options.batch_size, batch, self._say_smaller)
        self.seconds[variant.name] = round(time.monotonic() - begun, 1)

    def measure(self, number: int, variant: Variant) -> None:
        """The variant's loss on the expected answers, and on the bad ones to the same prompts."""
        store = self._store(variant)
        with self.answerer.using(variant):
            for place, case in enumerate(self.cases, 1):
                self._halt()
                for key, ids in (("loss", case.answer_ids), ("rejected_loss", case.rejected_ids)):
                    if ids and key not in store.entry(case.text):
                        store.keep(
                            case.text, **{key: self.answerer.loss(case.prompt_ids, ids), f"{key}_tokens": len(ids)}
                        )
                if place % self.options.batch_size == 0 or place == len(self.cases):
                    self.reporter.event("log", step=number * len(self.cases) + place, variant=variant.name)
                    self.reporter.detail(f"{variant.name}: {place} of {len(self.cases)} expected answers")

    def _store(self, variant: Variant) -> Store:
        if variant.name not in self.stores:
            settings = {"model": variant.identity, "temperature": self.options.temperature}
            self.stores[variant.name] = Store(self.folder / f"answers-{variant.name}.jsonl", settings)
        return self.stores[variant.name]

    def _halt(self) -> None:
        if self.reporter.stop_asked:
            raise Stopped

    def _say_smaller(self, size: int) -> None:
        self.reporter.notice(f"GPU memory ran out: from here on {size} prompts are answered at once.", "warning")

    def rows(self) -> list[dict[str, Any]]:
        """What is known of every case: the prompt, what was expected, each variant's answer with its marks."""
        return [
            {
                "file": Path(case.prompt.file).name, "line": case.prompt.line,
                "prompt": str(self.answerer.template.prepared(case.prompt.messages)[-1]["content"]),
                "expected": case.expected.text, "tool": case.expected.tool,
                "answers": {
                    name: self._judged(case, store.entry(case.text))
                    for name, store in self.stores.items()
                    if "answer" in store.entry(case.text)
                },
            }
            for case in self.cases
        ]  # fmt: skip

    def _judged(self, case: Case, entry: dict[str, Any]) -> dict[str, Any]:
        marks: Marks = score(entry["answer"], case.expected, case.tools, self.options.ignore_arguments)
        found = {"answer": entry["answer"], "tokens": entry["tokens"], "cut": entry["cut"], "marks": marks}
        if "loss" in entry:
            found |= {"loss": entry["loss"], "loss_tokens": entry["loss_tokens"]}
        if "rejected_loss" in entry and "loss" in entry:
            good, bad = (entry[key] / entry[f"{key}_tokens"] for key in ("loss", "rejected_loss"))
            marks["preferred"] = good < bad
        return found

    def result(self, facts: dict[str, Any]) -> dict[str, Any]:
        """The table so far, as viewers get it."""
        rows = self.rows()
        table, losses = {}, {}
        for name in self.stores:
            answers = [row["answers"][name] for row in rows if name in row["answers"]]
            table[name] = rates(answer["marks"] for answer in answers)
            losses[name] = mean_loss([(a["loss"], a["loss_tokens"]) for a in answers if "loss" in a])
        return {
            "name": facts["name"], "source": facts["source"], "prompts": len(self.cases), "table": table,
            "losses": {name: loss for name, loss in losses.items() if loss},
        }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
