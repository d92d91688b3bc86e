"""The commands: what they print, what they refuse, and that nothing is written when they refuse."""

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Refused, WriteRows, plan, wait_until

from core.cli import main
from core.errors import FinetuiError

pytestmark = pytest.mark.usefixtures("no_gpu")
COMMANDS = ["sft", "kto", "sft-kto", "demo", "plan", "runs", "show", "watch", "stop", "abort", "resume", "delete",
            "check", "doctor"]  # fmt: skip
FLAGS = ["--model-size", "--model-name", "--max-seq-length", "--local-file", "--dataset-name", "--dataset-file",
         "--split-dataset", "--batch-size", "--gradient-accumulation", "--learning-rate", "--num-epochs", "--max-steps",
         "--wandb", "--wandb-project", "--wandb-run-name", "--dry-run", "--resume-from-checkpoint", "--output-dir",
         "--hf-token", "--config", "--set", "--detach", "--json", "--include-undesirable"]  # fmt: skip
KTO_FLAGS = ["--beta", "--two-stage-lr", "--lr-reduction-step", "--lr-reduction-factor", "--kto-values"]


def finetui(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with no terminal."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "core.cli", *words], env={**os.environ, **environment}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


# --- bad input ---

ONE = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "label": true}\n'
BAD_FILES: dict[str, tuple[bytes, str, str]] = {
    "empty": (b"", "sft", "is empty"),
    "not UTF-8": (b"\xe4\xf6\n", "sft", "no usable row for SFT among 1 (1 × not UTF-8 (byte 0xe4))"),
    "binary": (b"\x7fELF\0\0", "sft", "is binary, not UTF-8 text"),
    "gzip": (b"\x1f\x8b\x08aaaa", "sft", "is a gzip file"),
    "UTF-16": (ONE.encode("utf-16"), "sft", "is UTF-16 or binary"),
    "broken JSON": (b'{"a": \n' * 2, "sft", "no usable row for SFT among 2 (2 × broken JSON (Expecting value))"),
    "a broken list": (b'[{"a": 1},\n{"a": }]', "sft", "line 2: broken JSON (Expecting value)"),
    "no usable rows": (b'{"a": 1}\n' * 3, "sft", "has no usable row for SFT among 3"),
    "all true": (ONE.encode() * 3, "kto", "every label is true"),
    "all false": (ONE.replace("true", "false").encode() * 3, "kto", "every label is false"),
    "no labels": (ONE.replace(', "label": true', "").encode(), "kto", "no label, which KTO needs"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_data_file_is_refused_before_a_run_is_made(refused: Refused, tmp_path: Path, name: str) -> None:
    content, method, says = BAD_FILES[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert says in refused(method, "--local-file", path)
    assert says in refused("check", path, "--method", method)
    assert says in refused(method, "--local-file", path, "--dry-run")


def test_a_missing_file_and_a_folder_are_refused(refused: Refused, tmp_path: Path) -> None:
    for words in (("sft", "--local-file"), ("check", "--method", "sft")):
        assert "No such file" in refused(*words, tmp_path / "none.jsonl")
        assert "is a folder" in refused(*words, tmp_path)


def test_paths_from_where_one_stands_are_kept_from_the_root_on(
    said: Callable[..., str], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer works in the folder of its run, and `resume` may be said anywhere."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "own").symlink_to(tiny_model)
    (tmp_path / "rows.jsonl").write_text(ONE)
    (tmp_path / "own.jinja").write_text("{{ messages[0]['content'] }}")
    monkeypatch.chdir(tmp_path)
    words = ("--local-file", "rows.jsonl", "--set", "model.chat_template=own.jinja")
    plan = yaml.safe_load(said("plan", "sft", "--model-name", "models/own", *words))
    assert plan["model"]["name"] == str(tmp_path / "models" / "own")
    assert plan["model"]["chat_template"] == str(tmp_path / "own.jinja")
    assert plan["sft"]["data"]["file"] == str(tmp_path / "rows.jsonl")
    elsewhere = yaml.safe_load(said("plan", "sft", "--model-name", "somebody/own", *words))
    assert elsewhere["model"]["name"] == "somebody/own"


def test_a_column_that_there_is_not_is_refused_with_the_nearest_first(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 1, "frage": "a", "antwort": "b"}\n' * 300 + '{"frage": "a", "antwort": "b", "ton": "c"}\n')
    words = ("--column", "completion=antwort", "--column", "prompt=fragen")
    for command in (
        ("check", path, "--method", "sft"), ("sft", "--local-file", path, "--dry-run"),
        ("data", "sample", path, tmp_path / "out.jsonl"), ("data", "show", path, "--method", "sft"),
    ):  # fmt: skip
        told = refused(*command, *words)
        assert "has no column 'fragen'" in told and "It has frage, id, antwort" in told
    assert main(["check", str(path), "--method", "sft", "--column", "prompt=frage", "--column", "completion=antwort",
                 "--column", "system=ton"]) == 0  # fmt: skip


def test_the_demos_rows_beside_rows_of_ones_own_are_warned_of(
    said: Callable[..., str], refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(ONE * 3)
    monkeypatch.setattr("core.commands.runner.start", lambda run: 1)
    told = said("sft-kto", "--set", f"sft.data.file={path}", "--detach", "--runs-dir", tmp_path / "runs")
    assert "KTO trains on the demo's rows" in told and "--set kto.data.file=FILE" in told
    assert "--set kto.data.file=FILE" in refused("sft-kto", "--local-file", path, "--dry-run")
    words = ("sft-kto", "--set", f"sft.data.file={path}", "--json", "--runs-dir", tmp_path / "runs")
    assert "KTO trains on the demo's rows" in json.loads(said(*words, "--detach"))["notices"][0]
    monkeypatch.setattr("core.commands.follow", lambda run, **how: 0)
    lines = [json.loads(line) for line in said(*words).splitlines()]
    assert [line["kind"] for line in lines] == ["notice"] and "KTO trains on the demo's rows" in lines[0]["text"]


def test_foreign_text_reaches_no_terminal(refused: Refused, said: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "a\x1b[2Jb\u202e.jsonl"
    path.write_text("")
    assert "␛[2Jb" in refused("sft", "--local-file", path)
    path.write_text(ONE + json.dumps({"messages": [], "label": 1}) + "\n" + json.dumps({"\x1b]0;x\x07": 1}) + "\n")
    shown = said("check", path, "--method", "sft")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", shown) and "␛]0;x␇" in shown


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["sft", "--model-size", "8b"], "--model-size: invalid choice: '8b'"),
        (["sft", "--set", "sft.learning_rte=1"], "there is no option 'sft.learning_rte'"),
        (["sft", "--set", "sft.seed"], "has no '='"),
        (["sft", "--learning-rate=-0.001"], "sft.learning_rate: Input should be greater than 0"),
        (["sft", "--learning-rate", "quick"], "sft.learning_rate: Input should be a valid number"),
        (["sft", "--batch-size", "0"], "sft.batch_size: "),
        (["kto", "--batch-size", "1"], "needs a batch of at least 2"),
        (["kto", "--max-seq-length", "512", "--set", "kto.max_prompt_length=600"], "larger than kto.max_length"),
        (["sft", "--split-dataset", "0.9"], "sft.data.holdout: "),
        (["sft", "--max-steps", "0"], "0 steps would train nothing"),
        (["sft", "--seed", "99999999999"], "sft.seed: "),
        (["sft", "--beta", "0.1"], "unrecognized arguments: --beta 0.1"),
        (["plan", "sft", "--beta", "0.1"], "--beta is no option of sft"),
        (["sft-kto", "--learning-rate", "1e-4"], "would give SFT and KTO the same value"),
        (["sft", "--name", "a/b"], "'a/b' cannot name a run"),
        (["sft", "--config", "/none.yaml"], "cannot be read: No such file"),
        (["sft", "--local-file", "a", "--dataset-name", "b/c"], "more than one data source"),
        (["sft", "--set", "sft.data.demo=false"], "no data source is named"),
        (["sft", "--model-name", "nowhere"], "There is no model folder 'nowhere'"),
        (["sft", "--model-name", "./nowhere"], "There is no model folder"),
        (["sft", "--model-name", "run:none"], "There are no runs in"),
        (["sft", "--evaluate", "--local-file", "%rows%"], "There are no held-out prompts"),
        (["sft", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["frobnicate"], "no command 'frobnicate'"),
        (["plan"], "required: method"),
        (["check", "x"], "required: --method"),
        (["show"], "required: RUN"),
        (["show", "none"], "There are no runs in"),
        (["stop", "last"], "There are no runs in"),
        (["sft", "--resume-from-checkpoint", "runs/none/sft/checkpoints/checkpoint-5"], "There are no runs in"),
    ],
)
def test_bad_usage_and_bad_plans_are_refused_in_one_sentence(
    refused: Refused, rows_file: WriteRows, words: list[str], says: str
) -> None:
    assert says in refused(*(str(rows_file()) if word == "%rows%" else word for word in words))


def test_a_plan_that_is_a_list_or_has_an_unknown_key_is_refused_with_its_line(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("- sft\n")
    assert "is a list, not keys with values" in refused("sft", "--config", path)
    path.write_text("sft:\n  bach_size: 3\n")
    message = refused("sft", "--config", path)
    assert f"{path}, line 2: " in message and "Did you mean sft.batch_size?" in message


def test_a_model_folder_without_weights_or_with_pickles_only_is_refused(refused: Refused, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    assert "holds no model (no config.json)" in refused("sft", "--model-name", model)
    (model / "config.json").write_text("{}")
    assert "holds a config.json and no weights" in refused("sft", "--model-name", model)
    (model / "pytorch_model.bin").write_bytes(b"x")
    assert "as pickle only" in refused("sft", "--model-name", model)
    (model / "adapter_config.json").write_text("[]")
    (model / "adapter_model.safetensors").write_bytes(b"x")
    assert "is not a JSON object" in refused("sft", "--model-name", model)
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "/gone"}')
    assert "is gone: /gone" in refused("sft", "--model-name", model)


def test_a_four_bit_model_or_a_gpu_that_is_not_there_ends_with_exit_code_3(refused: Refused) -> None:
    assert "needs an NVIDIA GPU" in refused("sft", "--model-size", "7b", code=3)
    assert "needs an NVIDIA GPU" in refused("plan", "kto", "--model-size", "3b", code=3)
    assert "none is found" in refused("sft", "--device", "cuda", code=3)
    assert "Unsloth needs an NVIDIA GPU" in refused("sft", "--backend", "unsloth", code=3)


def test_a_limit_that_truncates_everything_is_found_by_the_dry_run(rows_file: WriteRows, demo_model_dir: Path) -> None:
    from core.train_dry import dry_run

    flags = {"model.name": str(demo_model_dir), "sft.data.file": str(rows_file()), "sft.max_length": 8, "device": "cpu"}
    with pytest.raises(
        FinetuiError, match=r"No row is left after tokenising: longer than the limit \(limit 8 tokens\)"
    ):
        dry_run(plan(**flags).plan, load=False)


def test_what_the_dry_run_finds_is_said_as_any_other_refusal(
    refused: Refused, tmp_path: Path, rows_file: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"error": "No row is left.", "advice": "Raise max_length.", "exit_code": 3}
    recorder = tmp_path / "python"
    recorder.write_text(f"#!/bin/sh\necho chatter\necho '{json.dumps(found)}'\n")
    recorder.chmod(recorder.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(recorder))
    message = refused("sft", "--local-file", rows_file(), "--dry-run", code=3)
    assert message == "finetui: No row is left.\n  Raise max_length.\n"


# --- what is printed ---


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and f"usage: finetui {command}" in shown and "None" not in shown


def test_the_help_lists_every_command_and_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert [command for command in COMMANDS if not re.search(rf"^\s+{command}\s", shown, re.M)] == []
    with pytest.raises(SystemExit):
        main(["--version"])
    assert re.fullmatch(r"finetui \d+\.\d+\S*\n", capsys.readouterr().out)


@pytest.mark.parametrize("command", ["sft", "kto", "sft-kto", "demo"])
def test_the_flags_people_know_are_there(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    for flag in [*FLAGS, *(KTO_FLAGS if "kto" in command or command == "demo" else [])]:
        assert re.search(rf"(^|[\s,]){flag}\b(?!-)", shown), flag


@pytest.mark.parametrize(
    ("words", "path", "value"),
    [
        (["--max-seq-length", "300"], "sft.max_length", 300),
        (["--gradient-accumulation", "3"], "sft.gradient_accumulation_steps", 3),
        (["--learning-rate", "2e-7"], "sft.learning_rate", 2e-7),
        (["--num-epochs", "0.5"], "sft.num_train_epochs", 0.5),
        (["--split-dataset"], "sft.data.holdout", 0.1),
        (["--split-dataset", "0.2"], "sft.data.holdout", 0.2),
        (["--dataset-name", "a/b", "--dataset-file", "c.jsonl"], "sft.data.dataset_file", "c.jsonl"),
        (["--dataset-name", "a/b"], "sft.data.demo", False),
        (["--include-undesirable"], "sft.data.include_undesirable", True),
        (["--no-include-undesirable"], "sft.data.include_undesirable", False),
        (["--model-name", "a/b"], "model.name", "a/b"),
        (["--wandb-project", "p"], "tracking.project", "p"),
        (["--wandb-run-name", "r"], "tracking.run_name", "r"),
        (["--output-dir", "/tmp/somewhere/mine"], "name", "mine"),
        (["--set", "sft.extra.adam_beta2=0.9", "--set", "sft.weight_decay=1e-2"], "sft.weight_decay", 0.01),
        (["--batch-size", "3", "--set", "sft.batch_size=5"], "sft.batch_size", 5),
    ],
)
def test_a_flag_sets_its_key(said: Callable[..., str], words: list[str], path: str, value: object) -> None:
    found: Any = yaml.safe_load(said("plan", "sft", *words))
    for part in path.split("."):
        found = found[part]
    assert (float(found) if isinstance(value, float) else found) == value


def test_flags_of_sft_kto_set_both_stages_and_kto_has_its_own(said: Callable[..., str]) -> None:
    words = [
        "--batch-size",
        "6",
        "--beta",
        "0.2",
        "--two-stage-lr",
        "--lr-reduction-step",
        "7",
        "--lr-reduction-factor",
        "0.1",
    ]
    found = yaml.safe_load(said("plan", "sft-kto", *words))
    assert found["sft"]["batch_size"] == found["kto"]["batch_size"] == 6
    kto = found["kto"]
    assert (kto["beta"], kto["two_stage_lr"], kto["lr_reduction_step"], kto["lr_reduction_factor"]) == (
        0.2,
        True,
        7,
        0.1,
    )


def test_wandb_is_one_of_the_trackers_when_asked_for_and_none_is_otherwise(
    said: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("wandb", "trackio"):
        (tmp_path / "packages" / name).mkdir(parents=True)
        (tmp_path / "packages" / name / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    assert yaml.safe_load(said("plan", "sft"))["tracking"]["report_to"] == []
    assert yaml.safe_load(said("plan", "sft", "--wandb"))["tracking"]["report_to"] == ["wandb"]
    both = said("plan", "sft", "--wandb", "--set", "tracking.report_to=[trackio]")
    assert yaml.safe_load(both)["tracking"]["report_to"] == ["trackio", "wandb"]


@pytest.mark.parametrize("method", ["sft", "kto", "sft-kto"])
def test_a_printed_plan_is_a_plan(said: Callable[..., str], tmp_path: Path, rows_file: WriteRows, method: str) -> None:
    path = tmp_path / "plan.yaml"
    words = ["--local-file", str(rows_file()), "--note", "a: 'b' # c", "--batch-size", "6", "--lora-r", "7"]
    path.write_text(said("plan", method, *words))
    again = said("plan", method, "--config", path)
    assert yaml.safe_load(again) == yaml.safe_load(path.read_text())
    assert yaml.safe_load(again)["note"] == "a: 'b' # c"
    assert f"# file {path}" in again


def test_the_plan_writes_nothing(said: Callable[..., str], folder: Path) -> None:
    said("plan", "sft-kto")
    assert not folder.exists()


def test_check_counts_and_names_every_row_left_out(said: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(ONE + "\n" + '{"x": 1}\n' + ONE.replace("true", "false") + '{"y": 1}\n' * 2)
    found = json.loads(said("check", path, "--method", "kto", "--json"))
    assert (found["rows"], found["used"], found["labels"]) == (5, 2, {"true": 1, "false": 1})
    assert [(entry["line"], entry["file"]) for entry in found["left_out"]] == [
        (3, str(path)),
        (5, str(path)),
        (6, str(path)),
    ]
    shown = said("check", path, "--method", "kto")
    assert "5 rows (jsonl: messages, 1 blank line)" in shown and "(lines 3, 5, 6)" in shown
    assert "5 rows: 2 can be learned from (1 good answer, 1 bad)." in shown
    assert "3 left out: in no shape that is known." in shown
    assert "2 × no conversation found (the row has: y); 1 × no conversation found (the row has: x)" in shown
    assert "weights: desirable 1, undesirable 1" in shown
    assert json.loads(said("check", path, "--method", "sft", "--include-undesirable", "--json"))["used"] == 2


def test_json_output_holds_any_text(said: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(ONE + '{"\\ud800\\u2028": 1}\n')
    assert json.loads(said("check", path, "--method", "sft", "--json"))["left_out"][0]["line"] == 2


# --- secrets ---

SECRET = "hf_averysecrettoken"


def test_the_hub_token_goes_through_the_environment_and_stands_nowhere_else(
    said: Callable[..., str], tmp_path: Path, folder: Path, rows_file: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter that a run is started with is replaced by one that notes how it was called."""
    recorder, seen = tmp_path / "python", tmp_path / "seen"
    seen.mkdir()
    recorder.write_text(
        f'#!/bin/sh\nenv > {seen}/env\nprintf "%s\\n" "$0" "$@" > {seen}/argv.new\nmv {seen}/argv.new {seen}/argv\n'
    )
    recorder.chmod(recorder.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(sys, "executable", str(recorder))
    words = ["--hf-token", SECRET, "--local-file", rows_file()]
    assert SECRET not in said("sft", *words, "--detach", "--name", "secret")
    assert SECRET not in said("plan", "sft", *words)
    wait_until((seen / "argv").exists, 20)
    assert "core.runner" in (seen / "argv").read_text() and SECRET not in (seen / "argv").read_text()
    assert f"HF_TOKEN={SECRET}" in (seen / "env").read_text()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"plan.yaml", "events.jsonl", "train.log"} <= {path.name for path in files}
    assert [path for path in files if SECRET in path.read_text()] == []


def test_no_secret_stands_in_a_child_of_the_dry_run(
    refused: Refused, tmp_path: Path, rows_file: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = tmp_path / "python"
    recorder.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/argv\necho no word >&2\n')
    recorder.chmod(recorder.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(sys, "executable", str(recorder))
    refused("sft", "--local-file", rows_file(), "--hf-token", SECRET, "--dry-run", code=1)
    assert "core.train_dry" in (tmp_path / "argv").read_text() and SECRET not in (tmp_path / "argv").read_text()


# --- in a process of its own ---


def test_errors_are_two_lines_and_an_exit_code(tmp_path: Path) -> None:
    done = finetui("check", str(tmp_path / "none.jsonl"), "--method", "sft")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"finetui: {tmp_path / 'none.jsonl'} cannot be read: No such file or directory.\n"
        "  Check the path and its permissions.\n"
    )


def test_without_a_terminal_the_app_is_refused_with_a_hint() -> None:
    done = finetui()
    assert done.returncode == 2 and "The app needs a terminal" in done.stderr and "finetui --help" in done.stderr


def test_a_terminal_that_knows_ascii_only_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "rows ü.jsonl"
    path.write_text(ONE + '{"ü": 1}\n')
    done = finetui("check", str(path), "--method", "sft", PYTHONIOENCODING="ascii", PYTHONUTF8="0", NO_COLOR="1")
    assert done.returncode == 0 and done.stderr == "" and "2 rows (jsonl" in done.stdout


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(ONE + '{"x": 1}\n' * 20_000)
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "core.cli", "check", str(path), "--method", "sft", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout and child.stderr
    child.stdout.read(10)
    child.stdout.close()
    assert child.stderr.read() == ""
    assert child.wait() == 0
    child.stderr.close()


def test_a_length_limit_that_no_row_fits_is_refused_before_a_run_is_made(
    tiny_model: Path, rows_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sft", "--model-name", str(tiny_model), "--local-file", str(rows_file()), "--max-seq-length", "8"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "max_length of 8 tokens leaves no row" in said and "Raise sft.max_length" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flag", ["--local-file", "--dataset-name", "--model-name"])
def test_an_empty_source_is_refused_and_starts_no_demo(refused: Any, flag: str) -> None:
    assert f"{flag} is empty." in refused("sft", flag, "", "--dry-run")


def test_a_command_that_is_nearly_right_is_named(refused: Refused) -> None:
    assert "There is no command 'chek'" in (text := refused("chek", "x")) and "Did you mean check?" in text
    assert "is no name on the Hub" in refused("sft", "--dataset-name", "/tmp/new")


def test_the_folder_of_runs_may_stand_before_the_command(
    said: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUI_RUNS", str(tmp_path / "others"))
    assert f"No runs in {tmp_path / 'mine'}." in said("--runs-dir", tmp_path / "mine", "runs")
    monkeypatch.setattr("core.cli.open_app", lambda: print(os.environ["FINETUI_RUNS"]) or 0)
    assert said("--runs-dir", tmp_path / "mine").strip() == str(tmp_path / "mine")
