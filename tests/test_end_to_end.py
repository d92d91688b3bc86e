"""Real runs in real processes: the chain, kills and resumes, stop and abort, a closed terminal, failures."""

import contextlib
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import MakeRun, finish, losses, wait_until

from core import runner
from core.errors import FinetuiError
from core.evaluation import HELD_OUT, evaluation_path, read_cases
from core.runs import Run, is_alive, request_stop, status


def command(*words: str) -> subprocess.CompletedProcess[str]:
    """The `finetui` command, run to its end."""
    return subprocess.run([sys.executable, "-P", "-m", "core.cli", *words], capture_output=True, text=True, timeout=300)


def trainer_pid(run: Run, stage: str) -> int | None:
    return run.state().stage(stage).pid


def kill_everything(run: Run, stage: str) -> None:
    """SIGKILL for the runner and its trainer, runner first, so that nobody can tidy up."""
    pids = [run.state().start["pid"], trainer_pid(run, stage)]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(run), 20)


def in_the_middle(run: Run, stage: str) -> bool:
    """Whether the stage has a checkpoint and has logged beyond it."""
    state = run.state().stage(stage)
    return bool(state.checkpoints) and state.step > state.checkpoints[-1] + 2


LONG = {"max_steps": 120, "save_steps": 25, "batch_size": 8, "learning_rate": 2e-3}


def long_settings(*stages: str) -> dict[str, Any]:
    return {f"{stage}__{key}": value for stage in stages for key, value in LONG.items()}


def test_a_chain_killed_twice_ends_with_the_losses_of_an_unbroken_one(make_run: MakeRun) -> None:
    unbroken = make_run("sft-kto", **long_settings("sft", "kto"))
    runner.start(unbroken)
    assert finish(unbroken) == "done"

    broken = make_run("sft-kto", **long_settings("sft", "kto"))
    runner.start(broken)
    for stage in ("sft", "kto"):
        wait_until(lambda stage=stage: in_the_middle(broken, stage))
        kill_everything(broken, stage)
        assert status(broken, broken.state().end_status) == "crashed"
        with pytest.raises(FinetuiError, match="is not running"):
            request_stop(broken)
        runner.resume(broken)
    assert finish(broken) == "done"

    for stage in ("sft", "kto"):
        whole, mended = losses(unbroken, stage), losses(broken, stage)
        assert list(whole) == list(range(1, 121)) and list(mended) == list(whole)
        for step in whole:
            assert mended[step] == pytest.approx(whole[step], abs=2e-6), f"{stage} step {step}"
    starts = [e for e in broken.events_path.read_text().splitlines() if '"resumed_step":' in e and '"totals"' in e]
    assert [json.loads(line)["resumed_step"] > 0 for line in starts] == [False, True, False, True]
    assert broken.state().stage("kto").series["rewards/margins"][-1][1] == pytest.approx(
        unbroken.state().stage("kto").series["rewards/margins"][-1][1], abs=1e-4
    )
    with pytest.raises(FinetuiError, match="is done"):
        runner.resume(broken)


def test_stop_saves_a_checkpoint_and_resume_finishes(make_run: MakeRun) -> None:
    run = make_run("sft", **{**long_settings("sft"), "sft__save_steps": 1000})
    runner.start(run)
    wait_until(lambda: run.state().stage("sft").step >= 3)
    told = command("stop", run.name)
    assert told.returncode == 0 and f"finetui resume {run.name}" in told.stdout
    assert finish(run) == "stopped"
    checkpoint = run.newest_checkpoint("sft")
    assert checkpoint is not None and checkpoint.name == f"checkpoint-{run.state().stage('sft').step}"
    assert not run.stop_path.exists()
    told = command("resume", run.name)
    assert told.returncode == 0, told.stderr
    assert finish(run) == "done" and run.trained("sft")
    assert list(losses(run, "sft")) == list(range(1, 121))


def test_abort_ends_the_trainers_whole_process_group(make_run: MakeRun) -> None:
    run = make_run("sft", **{**long_settings("sft"), "sft__max_steps": 400}, sft__extra={"dataloader_num_workers": 1})
    runner.start(run)
    wait_until(lambda: run.state().stage("sft").step >= 3)
    trainer = psutil.Process(trainer_pid(run, "sft"))
    family = [trainer, *wait_until(lambda: trainer.children(recursive=True))]
    assert command("abort", run.name).returncode == 0
    assert finish(run) == "aborted"
    assert not [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def test_a_trainer_whose_runner_was_killed_is_alive_and_cannot_be_resumed_twice(make_run: MakeRun) -> None:
    run = make_run("sft", **{**long_settings("sft"), "sft__max_steps": 400})
    runner.start(run)
    wait_until(lambda: run.state().stage("sft").step >= 3)
    os.kill(run.state().start["pid"], signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(run.state().start["pid"]) or _is_zombie(run.state().start["pid"]))
    assert is_alive(run)
    with pytest.raises(FinetuiError, match="running already"):
        runner.resume(run)
    runner.abort(run)
    wait_until(lambda: not is_alive(run), 60)
    assert run.state().end_status == "aborted"


def _is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_closed_terminal_changes_nothing(tiny_model: Path, rows_file: Any, tmp_path: Path) -> None:
    """The command is followed in a real pty whose master is then closed: SIGHUP reaches the viewer, not the run."""
    settings = [f"--set={key.replace('__', '.')}={value}" for key, value in long_settings("sft").items()]
    words = ["--model-name", str(tiny_model), "--local-file", str(rows_file()), "--name", "hung-up", "--lora-r", "8"]
    words += ["--set=sft.logging_steps=1", *settings]
    pid, master = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-P", "-m", "core.cli", "sft", *words])
    hung_up = Run(tmp_path / "runs" / "hung-up")
    shown = b""

    def training() -> bool:
        nonlocal shown
        with contextlib.suppress(OSError):
            shown += os.read(master, 65536)
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), shown.decode()
        return hung_up.state().stage("sft").step >= 3

    wait_until(training)
    os.close(master)
    os.waitpid(pid, 0)
    assert is_alive(hung_up) and "hung-up" in shown.decode()
    assert finish(hung_up) == "done"
    assert list(losses(hung_up, "sft")) == list(range(1, 121))
    followed = command("watch", "hung-up")
    assert followed.returncode == 0 and "done" in followed.stdout and "\x1b" not in followed.stdout


def test_a_failed_stage_leaves_type_message_advice_and_log(make_run: MakeRun, tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "broken-model"
    shutil.copytree(tiny_model, model)
    run = make_run("sft", model__name=str(model))
    (model / "model.safetensors").write_bytes(b"not a model")
    runner.start(run)
    assert finish(run) == "failed"
    state = run.state()
    assert state.errors[-1]["type"] == "FinetuiError" and str(model) in state.errors[-1]["message"]
    assert state.errors[-1]["advice"]
    assert state.stage("sft").exit == "exit 1"
    ends = [json.loads(line) for line in run.events_path.read_text().splitlines() if '"stage_end"' in line]
    assert "Traceback" in ends[-1]["log_tail"]
    shown = command("show", run.name)
    assert str(model) in shown.stdout and "Traceback" not in shown.stdout
    assert command("watch", run.name).returncode == 1
    shutil.copy(tiny_model / "model.safetensors", model / "model.safetensors")
    assert command("resume", run.name).returncode == 0
    assert run.state().end_status == "done"


def test_a_killed_trainer_is_explained(make_run: MakeRun) -> None:
    run = make_run("sft", **long_settings("sft"))
    runner.start(run)
    wait_until(lambda: run.state().stage("sft").step >= 3)
    os.kill(trainer_pid(run, "sft") or 0, signal.SIGKILL)
    assert finish(run) == "failed"
    error = run.state().errors[-1]
    assert "SIGKILL" in error["message"] and "batch_size" in error["advice"]


def test_sigterm_to_the_runner_saves_a_checkpoint(make_run: MakeRun) -> None:
    run = make_run("sft", **{**long_settings("sft"), "sft__save_steps": 1000})
    runner.start(run)
    wait_until(lambda: run.state().stage("sft").step >= 3)
    os.kill(run.state().start["pid"], signal.SIGTERM)
    assert finish(run) == "stopped"
    assert run.newest_checkpoint("sft") is not None


def test_a_core_folder_where_the_user_stands_does_not_shadow_ours(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("sft", sft__max_steps=2)
    for name in ("core", "tui"):
        (run.path / name).mkdir()
        (run.path / name / "__init__.py").write_text("raise SystemExit('not ours')")
    runner.start(run)
    assert finish(run) == "done"


def test_the_chain_answers_held_out_prompts_at_its_end(make_run: MakeRun, rows_file: Any) -> None:
    run = make_run(
        "sft-kto", sft__max_steps=2, kto__max_steps=2, sft__data__holdout=0.2, kto__data__holdout=0.2,
        evaluate__enabled=True, evaluate__max_new_tokens=8, evaluate__max_prompts=3,
    )  # fmt: skip
    runner.start(run)
    assert finish(run) == "done"
    state = run.state()
    assert list(state.result["table"]) == ["base", "sft", "kto"]
    assert state.result["table"]["kto"]["tool"]["total"] == state.result["prompts"] >= 1
    cases = read_cases(evaluation_path(run, HELD_OUT))
    assert all(case["expected"].startswith("tool_call: set_timer") for case in cases)
    assert state.stage("sft").series["eval_loss"]
    adapter = json.loads((run.final_model("kto") / "adapter_config.json").read_text())
    assert adapter["r"] == 8
    held, trained = evaluated_and_trained(run)
    assert held and not held & trained


def evaluated_and_trained(run: Run) -> tuple[set[str], set[str]]:
    """Prompts of the evaluation, and prompts of the KTO training rows."""
    from core.data import holdout_split, read_rows

    settings = run.plan().kto
    used = read_rows(Path(settings.data.file or ""), "kto").used
    training, _ = holdout_split(used, settings.data.holdout, settings.seed)
    answered = read_cases(evaluation_path(run, HELD_OUT))
    return {case["prompt"] for case in answered}, {row.prompt[-1]["content"] for row in training}


def test_a_later_run_starts_from_an_earlier_ones_result(make_run: MakeRun) -> None:
    first = make_run("sft", sft__max_steps=4)
    runner.start(first)
    assert finish(first) == "done"
    second = make_run("kto", model__name=f"run:{first.name}", kto__max_steps=2)
    runner.start(second)
    assert finish(second) == "done"
    first_log = second.state().stage("kto").series
    assert first_log["rewards/chosen"][0] == (1, 0.0) and first_log["kl"][0] == (1, 0.0)


def test_detached_json_names_the_run_and_dry_run_makes_none(tiny_model: Path, rows_file: Any, tmp_path: Path) -> None:
    words = ["sft", "--model-name", str(tiny_model), "--local-file", str(rows_file()), "--max-steps=2", "--lora-r=4"]
    dry = command(*words, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "20 examples" in dry.stdout and "Nothing was started" in dry.stdout and "nothing to download" in dry.stdout
    assert "disk: about" in dry.stdout and "checkpoints and result" in dry.stdout
    loaded = command(*words, "--dry-run=load", "--json")
    assert json.loads(loaded.stdout)["stages"]["loaded"]["trainable"] > 0
    assert not (tmp_path / "runs").exists()
    started = command(*words, "--detach", "--json")
    run = Run(Path(json.loads(started.stdout)["path"]))
    assert finish(run) == "done"
    events = [json.loads(line) for line in command("watch", run.name, "--json").stdout.splitlines()]
    assert events[0]["v"] == 1 and events[-1] == {**events[-1], "kind": "run_end", "status": "done"}


def test_a_runner_killed_after_its_last_stage_is_finished_by_a_resume(make_run: MakeRun) -> None:
    run = make_run("sft", sft__max_steps=2)
    runner.start(run)
    assert finish(run) == "done"
    lines = run.events_path.read_text().splitlines(keepends=True)
    assert '"run_end"' in lines[-1]
    run.events_path.write_text("".join(lines[:-1]))
    assert status(run, run.state().end_status) == "crashed"
    runner.resume(run)
    assert finish(run) == "done"
    assert len([line for line in run.events_path.read_text().splitlines() if '"stage_start"' in line]) == 1
