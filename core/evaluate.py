"""Answer held-out prompts with the base model and after each stage, and score the tool calls.

``python -P -m core.evaluate RUN evaluate``, run by core.runner after training. Every answer is generated greedily by
the models of this run; answers and scores go into RUN/evaluate, the table into the event ``result``.
"""

import contextlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from core.chat import Template
from core.data import Conversation, read_rows
from core.data_reader import Rows
from core.errors import FinetuiError
from core.paths import writing_whole
from core.plan import Plan
from core.prepare import stage_ledger
from core.runner import EXIT_STOPPED
from core.runs import Run
from core.sources import demo_files, model_source
from core.toolcalls import CallScore, score_tool_call, summarise
from core.train_events import Reporter, Stopped
from core.train_model import load_base, load_tokenizer


def main() -> int:
    """Returns 0 when the report is written, 1 when it failed, EXIT_STOPPED when a stop was asked for."""
    run, stage = Run(Path(sys.argv[1])), sys.argv[2]
    reporter = Reporter(run, stage)
    try:
        evaluate(run, run.plan(), reporter)
        return 0
    except Stopped:
        return EXIT_STOPPED
    except BaseException as error:
        reporter.failure(error)
        logging.getLogger(__name__).exception("the evaluation failed")
        return 1


def held_out_rows(plan: Plan, reporter: Reporter) -> list[Conversation]:
    """The prompts to answer: the plan's file, else the demo's, else the rows held out from the last stage's data.

    Raises FinetuiError when there are none.
    """
    stage = plan.training_stages[-1]
    settings = plan.stage(stage)
    if plan.evaluate.file:
        rows = read_rows(Path(plan.evaluate.file), "sft").used
    elif settings.data.demo:
        rows = read_rows(demo_files()["evaluate"], "sft").used
    elif settings.data.holdout > 0:
        ledger = stage_ledger(settings, stage, reporter.detail)
        rows = [row for row in Rows(ledger).each(ledger.evaluation()) if row.label is not False]
    else:
        raise FinetuiError("There are no held-out prompts to answer.", "Give --eval-file FILE or --split-dataset.")
    unique = {row.prompt_key: row for row in rows if row.prompt}
    return list(unique.values())[: plan.evaluate.max_prompts]


def evaluate(run: Run, plan: Plan, reporter: Reporter) -> None:
    """Write RUN/evaluate/answers-VARIANT.json for base and each stage, then report.json."""
    folder = run.stage_path("evaluate")
    with reporter.phase("load", plan.model.name):
        source = model_source(plan.model, reporter.detail)
        tokenizer, template, _ = load_tokenizer(plan, source)
        rows = held_out_rows(plan, reporter)
        model = load_base(plan, source)
        variants = ["base"]
        if source.adapter:
            model = PeftModel.from_pretrained(model, str(source.adapter), adapter_name="start")
            variants.append("start")
        for stage in plan.training_stages:
            final = str(run.final_model(stage))
            if isinstance(model, PeftModel):
                model.load_adapter(final, adapter_name=stage)
            else:
                model = PeftModel.from_pretrained(model, final, adapter_name=stage)
            variants.append(stage)
        model.eval()
    reporter.event("totals", steps=len(rows) * len(variants), prompts=len(rows), variants=variants)
    expected = [_expected(template, row) for row in rows]
    table = {}
    for number, variant in enumerate(variants):
        with reporter.phase("generate", variant):
            answers = _answers(folder, variant, model, tokenizer, template, rows, plan, reporter, number)
        scores = [score_tool_call(answer, right) for answer, right in zip(answers, expected, strict=True)]
        _store_answers(folder, variant, rows, template, answers, expected, scores)
        table[variant] = _marks(scores)
    report = {"prompts": len(rows), "table": table}
    reporter.event("result", **report)
    with writing_whole(folder / "report.json") as stream:
        json.dump(report, stream, indent=1)


def _expected(template: Template, row: Conversation) -> str:
    """The expected answer as text, tool calls in the form the model was trained on."""
    return str(template.prepared([*row.prompt, row.messages[row.last_assistant]])[-1]["content"])


def _answers(
    folder: Path,
    variant: str,
    model: Any,
    tokenizer: Any,
    template: Template,
    rows: list[Conversation],
    plan: Plan,
    reporter: Reporter,
    number: int,
) -> list[str]:
    """The variant's answers: from its file where an earlier attempt wrote it, else generated."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads((folder / f"answers-{variant}.json").read_text(encoding="utf-8"))
        if len(stored) == len(rows):
            return [entry["answer"] for entry in stored]
    context = model.disable_adapter() if variant == "base" else contextlib.nullcontext()
    if variant != "base":
        model.set_adapter(variant)
    answers: list[str] = []
    with context:
        for start in range(0, len(rows), plan.evaluate.batch_size):
            if reporter.stop_asked:
                raise Stopped
            prompts = [
                template.render(row.prompt, row.tools) for row in rows[start : start + plan.evaluate.batch_size]
            ]
            answers += generate(model, tokenizer, prompts, plan.evaluate.max_new_tokens)
            reporter.event("log", step=number * len(rows) + len(answers), variant=variant)
            reporter.detail(f"{variant}: {len(answers)} of {len(rows)} prompts")
    return answers


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int) -> list[str]:
    """Greedy answers to rendered prompts, batched with padding on the left, without special tokens."""
    tokenizer.padding_side = "left"
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
    output = model.generate(
        **batch,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def _store_answers(
    folder: Path,
    variant: str,
    rows: list[Conversation],
    template: Template,
    answers: list[str],
    expected: list[str],
    scores: list[CallScore],
) -> None:
    entries = [
        {
            "line": row.line,
            "prompt": template.prepared(row.prompt)[-1]["content"],
            "expected": right,
            "answer": answer,
            "format": score.format,
            "tool": score.tool,
            "arguments": score.arguments,
        }
        for row, answer, right, score in zip(rows, answers, expected, scores, strict=True)
    ]
    with writing_whole(folder / f"answers-{variant}.json") as stream:
        json.dump(entries, stream, indent=1, ensure_ascii=False)


def _marks(scores: list[CallScore]) -> dict[str, Any]:
    """Counts with 95 % Wilson intervals, ready for JSON."""
    marks = summarise(scores)
    return {
        name: {"hits": rate.hits, "total": rate.total, "low": round(rate.low, 4), "high": round(rate.high, 4)}
        for name, rate in (
            ("format", marks.format),
            ("tool", marks.tool),
            ("arguments", marks.arguments),
            ("exact", marks.exact),
        )
    }


if __name__ == "__main__":
    sys.exit(main())
