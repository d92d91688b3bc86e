"""Evaluation: which prompts are answered, by which models, what is kept and resumed, what it says of a run."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeRun, Refused, WriteRows, default_rows, good, wait_until
from safetensors.torch import load_file, save_file
from test_training import Stage

from core import train
from core.artefacts import stage_done
from core.cli import main
from core.data import read_rows
from core.errors import FinetuiError
from core.evaluate import Answerer, evaluate
from core.evaluation import HELD_OUT, Threshold, ask, evaluation_path, evaluations, name_of, read_cases, read_report
from core.heldout import held_out, prompts_of
from core.plan import EvaluatePlan
from core.result_commands import judged
from core.runs import Run, is_alive, summary
from core.train_events import Reporter, Stopped

HELD = {"sft__data__holdout": 0.3, "kto__data__holdout": 0.3}


def again(run: Run, name: str = "", **options: Any) -> dict[str, Any]:
    """An evaluation in this process."""
    if options:
        ask(run, EvaluatePlan(**{"max_new_tokens": 8, **options}), name)
    return evaluate(run, run.plan(), Reporter(run, "evaluate"), name)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every prompt that is answered from here on."""
    answered: list[str] = []
    plain = Answerer.answers

    def answers(self: Answerer, prompts: list[str], *args: Any) -> Any:
        answered.extend(prompts)
        return plain(self, prompts, *args)

    monkeypatch.setattr(Answerer, "answers", answers)
    return answered


def test_base_and_every_stage_answer_and_nothing_is_answered_twice(chain: Run, counted: list[str]) -> None:
    report = again(chain)
    assert report["variants"] == ["base", "sft", "kto"] and report["prompts"] == 3
    assert all(report["table"][name]["tool"]["total"] == 3 for name in report["variants"])
    assert report["by_tool"]["set_timer"]["kto"]["exact"]["total"] == 3
    assert [(change["from"], change["to"]) for change in report["changes"]] == [("base", "sft"), ("sft", "kto")]
    folder = evaluation_path(chain, HELD_OUT)
    rows = read_cases(folder)
    assert all(row["expected"].startswith("tool_call: set_timer\narguments:") for row in rows)
    assert {name for row in rows for name in row["answers"]} == {"base", "sft", "kto"}
    assert read_report(folder) == report and stage_done(chain, "evaluate")
    assert len(counted) == 9
    second = again(chain)
    assert len(counted) == 9 and second["table"] == report["table"] and read_cases(folder) == rows
    results = [event for event in events(chain) if event["kind"] == "result"]
    assert [bool(event.get("partial")) for event in results[:3]] == [True, True, False]
    markdown = (folder / "report.md").read_text()
    assert "| after KTO |" in markdown and "## Failing cases" in markdown and str(chain.path) not in markdown


def events(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.events_path.read_text().splitlines()]


def test_what_was_answered_before_a_stop_is_kept(chain: Run, counted: list[str]) -> None:
    whole = again(chain, "whole", batch_size=1)
    answered = len(counted)
    chain.stop_path.touch()
    ask(chain, EvaluatePlan(max_new_tokens=8, batch_size=1), "part")
    reporter = Reporter(chain, "evaluate")
    chain.stop_path.unlink()
    plain = reporter.detail
    reporter.detail = lambda text: (plain(text), text.startswith("sft: 2") and chain.stop_path.touch())  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        evaluate(chain, chain.plan(), reporter, "part")
    chain.stop_path.unlink()
    assert len(counted) == answered + 5
    file = evaluation_path(chain, "part") / "answers-sft.jsonl"
    file.write_bytes(file.read_bytes()[:-20])  # the machine went down in the middle of a line
    report = evaluate(chain, chain.plan(), Reporter(chain, "evaluate"), "part")
    assert len(counted) == 2 * answered + 1
    assert report["table"] == whole["table"]


def test_answers_of_other_weights_or_another_temperature_are_made_anew(chain: Run, counted: list[str]) -> None:
    again(chain, "one", temperature=0.0)
    again(chain, "one", temperature=0.7)
    assert len(counted) == 18
    again(chain, "one", temperature=0.7)
    assert len(counted) == 18
    weights = chain.final_model("kto") / "adapter_model.safetensors"
    os.utime(weights)
    again(chain, "one", temperature=0.7)
    assert len(counted) == 18, "the same weights, copied or moved, give the same answers"
    save_file({name: tensor + 1e-3 for name, tensor in load_file(weights).items()}, weights)
    again(chain, "one", temperature=0.7)
    assert len(counted) == 21


def test_an_answer_that_ended_by_itself_holds_for_a_larger_limit_and_a_cut_one_does_not(
    chain: Run, counted: list[str]
) -> None:
    first = again(chain, "one", max_new_tokens=1)
    assert first["cut"] == {"base": 3, "sft": 3, "kto": 3}
    again(chain, "one", max_new_tokens=2)
    assert len(counted) == 18


def test_a_stopped_run_is_evaluated_with_its_newest_checkpoint(make_run: MakeRun) -> None:
    run = make_run("sft-kto", sft__max_steps=4, evaluate__max_new_tokens=4, **HELD)
    with pytest.raises(FinetuiError, match="no model yet"):
        again(run)
    Stage(run, "sft").trainer.train()
    report = again(run)
    assert report["variants"] == ["base", "sft-4"] and not report["complete"]
    assert not stage_done(run, "evaluate"), "the run's own evaluation is still to come"


def test_the_loss_is_the_one_training_measures(make_run: MakeRun) -> None:
    run = make_run("sft", sft__data__holdout=0.3, sft__max_steps=2, sft__batch_size=20, evaluate__loss="on")
    stage = Stage(run, "sft")
    stage.trainer.train()
    train.save_final(stage.loaded, run.final_model("sft"))
    report = again(run, "loss", loss="on", max_new_tokens=2)
    expected = next(entry["eval_loss"] for entry in reversed(stage.trainer.state.log_history) if "eval_loss" in entry)
    assert report["losses"]["sft"]["mean"] == pytest.approx(expected, abs=2e-3)
    assert report["losses"]["sft"]["mean"] < report["losses"]["base"]["mean"]


def test_of_good_and_bad_answers_to_one_prompt_the_likelier_is_told(chain: Run) -> None:
    report = again(chain, "both", loss="on")
    assert report["table"]["kto"]["preferred"]["total"] == 3


def test_memory_that_runs_out_halves_the_batch(chain: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    plain = Answerer.answers

    def answers(self: Answerer, prompts: list[str], *args: Any) -> Any:
        if len(prompts) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return plain(self, prompts, *args)

    monkeypatch.setattr(Answerer, "answers", answers)
    assert again(chain)["prompts"] == 3
    assert any("1 prompts are answered at once" in notice["text"] for notice in chain.state().notices)


def test_an_answer_ends_with_its_turn_and_keeps_the_marks_of_a_call(chain: Run) -> None:
    answerer = Answerer.load(chain, chain.plan(), print)
    end = answerer.tokenizer.eos_token_id
    answerer.tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]"]})
    ids = answerer.tokenizer("[TOOL_CALLS] [{}] é", add_special_tokens=False)["input_ids"]
    assert answerer.decoded([*ids, end, *ids]) == "[TOOL_CALLS] [{}] é"
    assert end in answerer.stop_tokens


# --- which prompts ---


def test_no_prompt_that_a_stage_was_trained_on_is_answered(make_run: MakeRun) -> None:
    plan = make_run("sft-kto", **HELD).plan()
    asked = {prompt.key for prompt in held_out(plan, None, 100).prompts}
    from core.prepare import prepare
    from core.sources import model_source
    from core.train_tokenizer import load_tokenizer

    _, template, _ = load_tokenizer(plan, model_source(plan.model, print))
    seen = {
        example.row.prompt_key
        for stage in ("sft", "kto")
        for example in prepare(plan.stage(stage), stage, template, print).training.examples
    }
    assert asked and not asked & seen


def test_sft_and_kto_hold_out_the_same_prompts_of_one_file(make_run: MakeRun, rows_file: WriteRows) -> None:
    rows = [good(f"prompt {number}", number % 3 > 0) for number in range(300)]
    path = str(rows_file(rows, "many.jsonl"))
    plan = make_run("sft-kto", sft__data__file=path, kto__data__file=path, **HELD).plan()
    found = held_out(plan, None, 1000)
    assert 50 <= len(found.prompts) <= 60, "of the sixty good prompts that KTO holds out SFT has trained on hardly any"


def test_rows_that_training_never_read_are_not_held_out(make_run: MakeRun) -> None:
    plan = make_run("sft", sft__data__max_rows=12, sft__data__holdout=0.3).plan()
    lines = {prompt.line for prompt in held_out(plan, None, 100).prompts}
    used = {row.line for row in read_rows(Path(plan.sft.data.file or ""), "sft", max_rows=12).used}
    assert lines and lines <= used


def test_every_prompt_trained_on_by_the_other_stage_is_refused(make_run: MakeRun) -> None:
    plan = make_run("sft-kto", kto__data__holdout=0.3).plan()
    with pytest.raises(FinetuiError, match="trained on by another stage"):
        held_out(plan, None, 10)


def test_what_the_run_it_started_from_was_trained_on_is_not_answered_either(chain: Run, make_run: MakeRun) -> None:
    before = {prompt.key for prompt in held_out(chain.plan(), None, 100).prompts}
    same = make_run("kto", model__name="run:chain", kto__data__holdout=0.3).plan()
    assert {prompt.key for prompt in held_out(same, None, 100).prompts} == before
    other = make_run("kto", model__name="run:chain", kto__data__holdout=0.3, kto__seed=7).plan()
    assert {prompt.key for prompt in held_out(other, None, 100).prompts} < before
    runs_path = chain.path.rename(chain.path.with_name("gone"))
    assert len(held_out(other, None, 100).prompts) == 3, "nobody can tell any more"
    assert runs_path.is_dir()


def test_fewer_prompts_are_part_of_more(make_run: MakeRun, rows_file: WriteRows) -> None:
    path = rows_file([good(f"prompt {number}") for number in range(50)], "prompts.jsonl")
    plan = make_run("sft").plan()
    some, more = (held_out(plan, path, count).prompts for count in (10, 30))
    assert len(some) == 10 and {p.line for p in some} < {p.line for p in more}
    assert [prompt.line for prompt in more] == sorted(prompt.line for prompt in more)


def test_a_files_prompts_that_were_trained_on_are_told(make_run: MakeRun, rows_file: WriteRows) -> None:
    path = rows_file([*default_rows()[:5], good("new")], "prompts.jsonl")
    plan = make_run("sft").plan()
    assert "5 of the file's prompts were trained on" in held_out(plan, path, 10).notes[0]
    Path(plan.sft.data.file or "").unlink()
    assert "cannot be read any more" in held_out(plan, path, 10).notes[0]


def test_a_file_may_hold_prompts_alone_answers_and_bad_answers(rows_file: WriteRows) -> None:
    tools = [{"name": "set_timer", "parameters": {"type": "object"}}]
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}], "tools": json.dumps(tools)},
        {"prompt": "Bye"},
        good("both", True, "yes"), good("both", False, "no"), good("bad", False),
        {"messages": []}, {"nothing": 1}, 5,
    ]  # fmt: skip
    found = prompts_of(rows_file(rows, "prompts.jsonl"))
    assert [prompt.expected and prompt.expected["content"] for prompt in found.prompts] == [None, None, "yes"]
    assert found.prompts[2].rejected and found.prompts[2].rejected["content"] == "no"
    assert list(found.prompts[0].schemas) == ["set_timer"]
    assert sum(int(note.split()[2]) for note in found.notes) == 4


def test_a_file_without_a_prompt_is_refused(rows_file: WriteRows) -> None:
    with pytest.raises(FinetuiError, match="no prompt that can be answered"):
        prompts_of(rows_file([{"nothing": 1}], "prompts.jsonl"))


# --- the command ---


def told_of(run: Run) -> dict[str, Any]:
    """What the history tells of a run, but for the stage that was last."""
    return {key: value for key, value in summary(run).items() if key not in ("stage", "step", "total_steps")}


def command(*words: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-P", "-m", "core.cli", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, timeout=300)


def test_eval_on_a_finished_run_leaves_the_run_as_it_was(chain: Run, rows_file: WriteRows) -> None:
    before = told_of(chain)
    path = rows_file([good("Set a timer for 3 minutes", answer="no call")], "some prompts.jsonl")
    told = command("eval", chain.name, "--file", path, "--fail-under", "exact=50%", "--fail-under", "base.decision=0")
    assert told.returncode == 4, told.stderr
    assert "exact of kto is 0.000 (0 of 1), under 0.5" in told.stdout and "after SFT" in told.stdout
    assert told_of(chain) == before and chain.state().task == "" and not chain.stop_path.exists()
    assert [event["kind"] for event in events(chain)][-1] == "task_end"
    [(folder, report)] = evaluations(chain)
    assert folder.name == name_of(path) and report["losses"]["kto"]["tokens"] > 0


def test_the_report_is_printed_as_one_object_for_scripts(chain: Run, capsys: pytest.CaptureFixture[str]) -> None:
    report = again(chain)
    capsys.readouterr()
    assert judged(chain, report, [Threshold.parse("kto.exact=0")], as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == {**report, "fail_under": []}
    assert judged(chain, report, [Threshold.parse("format=1")], as_json=True) == 4
    assert "format of kto" in json.loads(capsys.readouterr().out)["fail_under"][0]


def test_an_evaluation_that_fails_says_why_and_the_run_stays_done(chain: Run) -> None:
    weights = chain.final_model("kto") / "adapter_model.safetensors"
    weights.write_bytes(b"x" * weights.stat().st_size)
    told = command("eval", chain.name)
    assert told.returncode == 1 and told.stderr.startswith("finetui: ") and "Traceback" not in told.stderr
    assert summary(chain)["status"] == "done"
    assert chain.state().stage("evaluate").state == "failed"


@pytest.mark.parametrize("ended", ["stopped", "failed"])
def test_an_earlier_report_is_not_judged_where_the_new_evaluation_did_not_end(
    chain: Run, ended: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even where a later stage of the run is done."""
    evaluate(chain, chain.plan(), Reporter(chain, "evaluate"))
    chain.events.append("stage_start", name="gguf")
    chain.events.append("stage_end", name="gguf", status="done")

    def started(run: Run, name: str, options: Any) -> None:
        run.events.append("task_start", name="evaluate", pid=1)
        run.events.append("stage_start", name="evaluate")
        run.events.append("stage_end", name="evaluate", status=ended)
        run.events.append("task_end", status=ended)

    monkeypatch.setattr("core.result_commands.start", started)
    assert main(["eval", chain.name, "--fail-under", "format=0"]) == 1
    out, err = capsys.readouterr()
    assert "held-out prompts" not in out and ("goes on" in out if ended == "stopped" else "finetui: " in err)
    assert main(["eval", chain.name]) == (0 if ended == "stopped" else 1), "stopping it was the person's own wish"


def test_a_detached_evaluation_is_stopped_like_a_run_and_goes_on_where_it_was(
    chain: Run, said: Callable[..., str], counted: list[str]
) -> None:
    words = ["eval", chain.name, "--max-new-tokens", 250, "--batch-size", 1, "--temperature", 1]
    assert command(*words, "--detach").returncode == 0
    wait_until(lambda: chain.state().stage("evaluate").step >= 1)
    assert "finetui eval chain goes on" in said("stop", chain.name).replace("\n", " ")
    wait_until(lambda: not is_alive(chain))
    assert chain.state().stage("evaluate").state == "stopped" and summary(chain)["status"] == "done"
    kept = sum('"answer"' in path.read_text() for path in evaluation_path(chain, HELD_OUT).glob("answers-*"))
    lines = [path.read_text().count('"answer"') for path in evaluation_path(chain, HELD_OUT).glob("answers-*")]
    assert kept >= 1 and sum(lines) < 9
    evaluate(chain, chain.plan(), Reporter(chain, "evaluate"), HELD_OUT)
    assert len(counted) == 9 - sum(lines)


def test_an_evaluation_that_is_killed_leaves_a_run_that_is_done(chain: Run) -> None:
    """Even where the log after the run's end is longer than what the history reads of it."""
    chain.events.append("task_start", name="evaluate", pid=1)
    chain.events.append("stage_start", name="evaluate")
    for _ in range(3000):
        chain.events.append("log", stage="evaluate", step=1, variant="base")
    assert chain.state().end_status == "done" and summary(chain, tail_bytes=20_000)["status"] == "done"


def test_eval_refuses_what_cannot_be_before_anything_starts(
    refused: Refused, chain: Run, make_run: MakeRun, rows_file: WriteRows, tmp_path: Path
) -> None:
    assert "names no metric" in refused("eval", chain.name, "--fail-under", "beauty=1")
    assert "no share" in refused("eval", chain.name, "--fail-under", "exact=1.5")
    assert "has no model 'dpo'" in refused("eval", chain.name, "--fail-under", "dpo.exact=0.5")
    assert "cannot be read" in refused("eval", chain.name, "--file", tmp_path / "none.jsonl")
    assert "cannot be read" in refused("eval", chain.name, "--tools", tmp_path / "none.json")
    assert "max_prompts" in refused("eval", chain.name, "--max-prompts", 0)
    assert "no model yet" in refused("eval", make_run("sft", name="empty").name)


@pytest.mark.parametrize(
    ("text", "report", "said"),
    [
        ("exact=0.5", {"exact": (1, 2)}, ""), ("exact=0.51", {"exact": (1, 2)}, "under 0.51"),
        ("sft.tool=100%", {"tool": (2, 2)}, ""), ("schema=0", {"exact": (1, 2)}, "was not measured"),
    ],
)  # fmt: skip
def test_thresholds(text: str, report: dict[str, tuple[int, int]], said: str) -> None:
    table = {name: {"hits": hits, "total": total} for name, (hits, total) in report.items()}
    missed = Threshold.parse(text).missed({"variants": ["base", "sft"], "table": {"base": {}, "sft": table}})
    assert said in missed and bool(said) is bool(missed)


def test_a_report_that_is_broken_is_none(chain: Run) -> None:
    folder = evaluation_path(chain, "x")
    folder.mkdir(parents=True)
    for content in ("", "[", "[]", '{"table": 5}', '{"table": {"a": {"b": {}}}, "variants": []}', "[" * 100_000):
        (folder / "report.json").write_text(content)
        assert read_report(folder) is None and evaluations(chain) == []
    (folder / "cases.jsonl").write_text('{"answers": 5}\n[]\n{"answers": {"a": {"marks": {}}}}\n{"torn')
    assert len(read_cases(folder)) == 1
