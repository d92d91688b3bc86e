"""Hostile input: text, names, archives, YAML, weights, links, a stranger's run folder; tokens, which are nowhere."""

import io
import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import MakeNamed, MakeRun, finish, wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pilots import CONTROLS
from rich.console import Console

from core import gguf_tools, runner
from core.children import ON_END_ENV, runner_environment, stage_environment
from core.cli import main
from core.config import read_yaml
from core.errors import FinetuiError
from core.events import RunState
from core.notes import Note, write_note
from core.paths import cache_dir
from core.plan import Plan
from core.runs import Run, delete_run, find_run, list_runs, summary, take_lock
from core.sources import model_source
from core.text import clean
from core.trust import TRUST_ENV, refuse_strangers, remember_trust
from core.watch import line_of, runs_table, show_end, show_run

HOSTILE = st.text(st.characters(codec="utf-8"), max_size=60) | st.sampled_from([
    "\x1b]52;c;ZXZpbA==\x07", "\x1b[2J\x1b[31m", "\x9b31m", "\x1bP+q544e\x1b\\", "\u202eevil\u2066", "[/red]", "[INST]",
    "\x1b_Gf=100;AAAA\x1b\\", "\r\x1b[K", "\x08" * 40, "\x00", "\ud800", "\U000e0041",
])  # fmt: skip
FIELDS = "name stage text advice message type detail method model note base output exit log_tail device holder path"
KINDS = [
    "created", "run_start", "stage_start", "phase", "totals", "log", "eval", "checkpoint", "notice", "error",
    "stage_end", "artefact", "waiting", "stages", "task_start", "sample", "run_end",
]  # fmt: skip
EVENTS = st.lists(
    st.builds(
        lambda kind, more: {"t": 1.0, "kind": kind, "step": 1, **more},
        st.sampled_from(KINDS), st.dictionaries(st.sampled_from(FIELDS.split()), HOSTILE, max_size=6),
    ), max_size=8,
)  # fmt: skip


def printed(deed: Callable[[Console], object]) -> str:
    out = io.StringIO()
    deed(Console(file=out, force_terminal=False, width=100))
    return out.getvalue()


@given(HOSTILE, st.integers(1, 80), st.booleans())
def test_no_text_keeps_a_character_that_a_terminal_acts_on(text: str, limit: int, newlines: bool) -> None:
    shown = clean(text, limit, newlines=newlines)
    assert not CONTROLS.findall(shown.replace("\n", "") if newlines else shown)
    shown.encode("utf-8")


@given(EVENTS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=60)
def test_no_byte_of_a_log_reaches_the_terminal_as_a_control(tmp_path: Path, events: list[dict[str, Any]]) -> None:
    run = Run(tmp_path / "evil")
    run.path.mkdir(exist_ok=True)
    run.plan_path.write_text("method: sft\n")
    text = "".join(json.dumps(event) + "\n" for event in events)
    run.events_path.write_bytes(text.encode("utf-8", "surrogatepass"))
    state = RunState()
    shown = ""
    for event in events:
        state.fold(event)
        shown += clean(line_of(event, state))
    shown += printed(lambda out: show_run(out, run)) + printed(lambda out: show_end(out, run, run.state(), "failed"))
    shown += printed(lambda out: out.print(runs_table([summary(run)])))
    assert not CONTROLS.findall(shown.replace("\n", ""))


@given(text=HOSTILE)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=30)
def test_no_argument_of_the_command_line_comes_back_as_a_control(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    if text.startswith("-") or "\x00" in text:
        return
    for words in (
        ["show", text],
        ["sft", "--dry-run", "--set", text],
        ["sft", "--dry-run", "--local-file", f"no-such-{text}"],
        ["check", text, "--method", "sft"],
    ):
        try:
            code = main(words)
        except SystemExit as ended:
            code = int(ended.code or 0)
        said = capsys.readouterr()
        assert code in (0, 2) and not CONTROLS.findall((said.out + said.err).replace("\n", ""))


def test_a_home_that_nobody_has_is_part_of_a_name(refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "~nobody-here/rows.jsonl" in refused("check", "~nobody-here/rows.jsonl", "--method", "sft")
    refused("sft", "--model-name", "~nobody-here/model", "--local-file", "~nobody-here/x")
    for name in ("HOME", "FINETUI_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    with pytest.raises(FinetuiError, match="has no home folder"):
        cache_dir()


# --- paths ---

AWAY = ["../outside", "..", "/etc/passwd", "a/../../outside", "~/x", "..\\outside", "a/b/c", "%2e%2e/x"]


@pytest.mark.parametrize("name", AWAY)
def test_no_name_leads_out_of_the_folder_of_runs(name: str, named: MakeNamed, folder: Path, refused: Any) -> None:
    named("inside")
    with pytest.raises(FinetuiError):
        find_run(folder, name)
    refused("delete", "--yes", name)
    refused("resume", name)
    with pytest.raises(FinetuiError, match="cannot name a run"):
        named(name)


@pytest.mark.parametrize("name", AWAY[:6])
def test_no_data_set_or_stage_leads_out_of_its_folder(name: str, named: MakeNamed, refused: Any) -> None:
    assert named("one").stage_path(name).parent == named("two").path.parent / "one"
    refused("sft", "--dataset-name", name, "--dry-run")


def test_a_member_of_the_demo_models_archive_is_taken_by_name_alone() -> None:
    from core.smollm import GGUF_MEMBER

    assert ".." not in GGUF_MEMBER and not GGUF_MEMBER.startswith("/")


# --- what would run code ---


@pytest.mark.parametrize("text", [
    "note: !!python/object/apply:os.system ['touch {mark}']", "!!python/object/new:os.system ['touch {mark}']",
    "note: !!python/name:os.system", "a: &a [*a]", "note: !!python/module:os",
])  # fmt: skip
def test_yaml_builds_no_objects(text: str, tmp_path: Path, refused: Any) -> None:
    mark = tmp_path / "ran"
    file = tmp_path / "plan.yaml"
    file.write_text(text.format(mark=mark))
    with pytest.raises(FinetuiError):
        read_yaml(file)
    refused("sft", "--config", file, "--dry-run")
    assert not mark.exists()


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


def test_weights_as_pickle_are_refused_unread(tiny_model: Path, tmp_path: Path) -> None:
    folder, mark = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    plan = Plan.model_validate({"model": {"name": str(folder)}})
    with pytest.raises(FinetuiError, match="pickle only, which can run code"):
        model_source(plan.model, print)
    assert not mark.exists()


def test_a_pickle_in_a_strangers_checkpoint_is_not_run(make_run: MakeRun, tmp_path: Path) -> None:
    """Its manifest is sound, so that it is resumed from; PyTorch reads tensors only."""
    from test_training import Stage

    from core.checkpoints import write_manifest

    run = make_run("sft", sft__max_steps=4)
    Stage(run, "sft").trainer.train()
    checkpoint = run.newest_checkpoint("sft")
    assert checkpoint is not None
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        if (checkpoint / name).exists():
            (checkpoint / name).write_bytes(pickle.dumps(Bomb(tmp_path / f"ran-{name}")))
    write_manifest(checkpoint)
    again = Stage(run, "sft")
    with pytest.raises(Exception, match=r"[Ww]eights.only|magic|invalid|Unsupported"):
        again.trainer.train(resume_from_checkpoint=str(checkpoint))
    assert not list(tmp_path.glob("ran-*"))


def test_code_that_comes_with_a_model_is_not_run(tiny_model: Path, tmp_path: Path, make_run: MakeRun) -> None:
    from core.train_tokenizer import load_tokenizer

    folder, mark = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(tiny_model, folder)
    code = f"import os; os.mkdir({str(mark)!r})\nclass C: pass\n"
    for module in ("configuration_evil", "tokenization_evil", "modeling_evil"):
        (folder / f"{module}.py").write_text(code)
    config = json.loads((folder / "config.json").read_text()) | {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.C"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    words = json.loads((folder / "tokenizer_config.json").read_text())
    words |= {"auto_map": {"AutoTokenizer": ["tokenization_evil.C", None]}, "tokenizer_class": "C"}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    run = make_run("sft", model__name=str(folder))
    with pytest.raises(FinetuiError, match="comes with its own Python code|cannot be read"):
        load_tokenizer(run.plan(), model_source(run.plan().model, print))
    assert not mark.exists()


def test_a_models_configuration_chooses_no_code(tiny_model: Path, tmp_path: Path, make_run: MakeRun) -> None:
    """The words by which CVE-2026-4372 and CVE-2026-5241 had code fetched and run."""
    from core.train_model import load_base

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    plain = json.loads((folder / "config.json").read_text())
    run = make_run("sft", model__name=str(folder))
    source = model_source(run.plan().model, print)
    keys = ("_attn_implementation_internal", "_attn_implementation", "_experts_implementation", "trust_remote_code")
    (folder / "config.json").write_text(json.dumps(plain | dict.fromkeys(keys, "evil/code")))
    with pytest.raises(FinetuiError, match="asks for code from evil/code"):
        load_base(run.plan(), source)
    chosen = {"_attn_implementation": "eager", "_experts_implementation": "deepgemm"}
    (folder / "config.json").write_text(json.dumps(plain | chosen))
    config = load_base(run.plan(), source).config
    assert config._attn_implementation == "sdpa" and config._experts_implementation != "deepgemm"


# --- a run folder from a stranger ---


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    file = tmp_path / "victim"
    file.write_text("untouched")
    return file


@pytest.mark.parametrize("name", ["events.jsonl", "train.log", "lock", "sft", "note.json"])
def test_nothing_is_written_through_a_link_in_a_run(name: str, named: MakeNamed, victim: Path) -> None:
    run = named()
    (run.path / name).unlink(missing_ok=True)
    (run.path / name).symlink_to(victim)
    with pytest.raises(FinetuiError, match=f"{re.escape(name)} in one is a link to another place"):
        runner.start(run)
    if name == "events.jsonl":
        with pytest.raises(OSError):
            run.events.append("note")
    if name == "lock":
        with pytest.raises(FinetuiError):
            take_lock(run)
    assert victim.read_text() == "untouched"


def test_a_linked_run_is_neither_listed_nor_deleted(named: MakeNamed, folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.move(named("one").path, outside)
    (folder / "one").symlink_to(outside)
    assert list_runs(folder) == []
    with pytest.raises(FinetuiError, match="is a link"):
        delete_run(Run(folder / "one"))
    inside = named("two")
    (inside.path / "sft").symlink_to(outside)
    delete_run(inside)
    assert (outside / "plan.yaml").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["events.jsonl", "train.log", "plan.yaml"])
def test_a_pipe_in_place_of_a_file_holds_no_viewer(name: str, named: MakeNamed) -> None:
    from core.postmortem import examined
    from tui.follow import Follower, LogTail

    run = named()
    (run.path / name).unlink(missing_ok=True)
    os.mkfifo(run.path / name)
    assert summary(run)["status"] == "crashed"
    assert Follower(run).read() is not None and LogTail(run.log_path).read() == []
    examined(run, "crashed")
    if name == "plan.yaml":
        with pytest.raises(FinetuiError):
            run.plan()


def test_a_strangers_run_may_not_run_its_models_code(
    named: MakeNamed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUI_CACHE", str(tmp_path / "cache"))
    own = named("own", model__name="some/model", model__trust_remote_code=True)
    refuse_strangers(own.path, own.plan)
    received = own.path.with_name("received")
    shutil.copytree(own.path, received)
    for deed in (lambda: runner.start(Run(received)), lambda: runner.start(Run(received), "evaluate", "x")):
        with pytest.raises(FinetuiError, match="was not made here, and its plan runs Python code") as caught:
            deed()
        assert TRUST_ENV in caught.value.advice
    own.plan_path.write_text(own.plan_path.read_text().replace("some/model", "evil/model"))
    with pytest.raises(FinetuiError, match="evil/model"):
        refuse_strangers(own.path, own.plan)
    monkeypatch.setenv(TRUST_ENV, "1")
    refuse_strangers(received, Run(received).plan)
    remember_trust(own.path, Plan())
    assert len(list((tmp_path / "cache" / "trusted").iterdir())) == 1


# --- secrets ---

TOKENS = {"HF_TOKEN": "hf_FAKEfakeFAKEfakeFAKEfakeFAKEfake01", "WANDB_API_KEY": "f4k3" * 10}
OTHERS = {
    "AWS_SECRET_ACCESS_KEY": "fakefake" * 5, "OPENAI_API_KEY": "other" * 5, "PGPASSWORD": "fake-password",
    "DATABASE_URL": "postgres://me:FakePass1@db.example/x", "HTTPS_PROXY": "http://me:FakePass2@127.0.0.1:1",
}  # fmt: skip
"""Of what else a person's environment may hold, a trainer needs the proxy alone."""


def holds_token(text: str) -> bool:
    return any(token in text for token in (*TOKENS.values(), *OTHERS.values(), "FakePass"))


def test_a_tracker_that_is_asked_for_finds_its_key_and_the_command_at_the_end_finds_everything(
    named: MakeNamed, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**TOKENS, **OTHERS, "LD_LIBRARY_PATH": "/opt/lib", "HF_HOME": "/data/hf"}.items():
        monkeypatch.setenv(name, value)
    plain, tracked = named("plain").plan(), named("tracked", tracking__report_to=["wandb"]).plan()
    assert "WANDB_API_KEY" not in stage_environment(plain)
    assert stage_environment(tracked)["WANDB_API_KEY"] == TOKENS["WANDB_API_KEY"]
    bare = runner_environment()
    assert {**TOKENS, "HTTPS_PROXY": OTHERS["HTTPS_PROXY"], "LD_LIBRARY_PATH": "/opt/lib"}.items() <= bare.items()
    assert bare["HF_HOME"] == "/data/hf" and not OTHERS.keys() - {"HTTPS_PROXY"} & bare.keys()
    monkeypatch.setenv(ON_END_ENV, "notify")
    assert OTHERS.items() <= runner_environment().items()


def test_no_token_is_in_any_file_process_list_or_crash_report_of_a_run(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run dies of an error whose message holds the token that a trainer has, and the names of what else it has."""
    for name, value in TOKENS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FINETUI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FINETUI_ON_END", f"echo {TOKENS['HF_TOKEN']} >/dev/null")
    site = tmp_path / "site"
    site.mkdir()
    for name, value in OTHERS.items():
        monkeypatch.setenv(name, value)
    (site / "sitecustomize.py").write_text(
        f"import os, sys\nNAMES = {set(OTHERS) | set(TOKENS)}\n"
        "if 'core.train' in sys.orig_argv:\n"
        "    import transformers.trainer as t\n"
        "    def step(self, *a, **k):\n"
        "        raise RuntimeError('401 for ' + os.environ['HF_TOKEN'] + f', {sorted(os.environ.keys() & NAMES)}')\n"
        "    t.Trainer.training_step = step\n"
    )
    root = str(Path(__file__).resolve().parents[2])
    monkeypatch.setenv("PYTHONPATH", f"{site}{os.pathsep}{root}")
    run = make_run("sft")
    runner.start(run)
    wait_until(lambda: run.state().stage("sft").pid)
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        assert not holds_token(" ".join(process.cmdline()))
    assert finish(run) == "failed"
    assert run.state().errors[-1]["message"] == "401 for ‹secret›, ['HF_TOKEN', 'HTTPS_PROXY']"
    assert main(["report", run.name, "--runs-dir", str(run.path.parent)]) == 0
    searched = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(searched) > 8
    assert [path for path in searched if holds_token(path.read_bytes().decode("latin-1"))] == []


def test_passwords_in_addresses_and_tokens_in_a_note_are_written_nowhere(
    named: MakeNamed, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, token = "http://alice:S3cretPass@proxy.example:3128", "sk-proj-FAKEfakeFAKEfakeFAKE"
    run = named(note=f"made with {token} through {proxy}")
    run.events.append("error", message=f"ProxyError: {proxy} refused; ftp://:S3cretPass@x; see https://x.example/a:b@c")
    write_note(run.path, Note(f"{token} {proxy}"))
    written = "".join(path.read_text() for path in run.path.iterdir())
    assert "S3cretPass" not in written and token not in written
    assert "http://‹secret›@proxy.example:3128" in written and "https://x.example/a:b@c" in written
    for name, value in {**TOKENS, "HTTPS_PROXY": proxy, "FINETUI_ON_END": "curl x", "OPENAI_API_KEY": token}.items():
        monkeypatch.setenv(name, value)
    bare = gguf_tools.environment(Path("tools"))
    assert bare["PATH"] and not {*TOKENS, "HTTPS_PROXY", "FINETUI_ON_END", "OPENAI_API_KEY"} & bare.keys()


def test_a_run_and_all_in_it_are_for_its_owner_alone(named: MakeNamed) -> None:
    run = named()
    os.close(take_lock(run))
    assert run.path.stat().st_mode & 0o077 == 0
    for file in (run.events_path, run.lock_path, run.plan_path):
        assert file.stat().st_mode & 0o077 == 0, file.name


def test_a_line_longer_than_any_event_is_passed_over_and_what_stands_around_it_is_read(tmp_path: Path) -> None:
    from core.events import EventTail

    def event(number: int, text: str = "") -> bytes:
        return json.dumps({"t": 1.0, "kind": "notice", "number": number, "text": text}).encode() + b"\n"

    path = tmp_path / "events.jsonl"
    path.write_bytes(
        event(1) + b"z" * 5_000_000 + b"\n" + event(2) + event(3, "y" * 3_000_000) + event(4) + b"w" * 300_000
    )
    for limit in (100_000, 1_500_000, 8_000_000):
        tail, found = EventTail(path), []
        while (events := tail.read(limit)) or tail.offset < 8_000_000:
            found += [one["number"] for one in events]
        assert found == [1, 2, 4] and tail.broken_lines == 2
        with path.open("ab") as log:
            log.write(b"\n" + event(5))
        assert [one["number"] for _ in range(6) for one in tail.read(limit)] == [5]
        os.truncate(path, path.stat().st_size - 1 - len(event(5)))


def test_a_guarded_process_prints_no_token_whoever_prints_it(tmp_path: Path) -> None:
    import subprocess

    code = (
        "import logging, os, sys, warnings\n"
        "early = logging.getLogger('early'); early.addHandler(logging.StreamHandler())\n"
        "logging.getLogger('last').addHandler(logging._StderrHandler())\n"
        "from core.secrets import guard_output\n"
        "guard_output(); token = os.environ['HF_TOKEN']\n"
        "print(token); early.error(token); logging.getLogger('last').error(token); logging.error(token)\n"
        "sys.stderr.writelines([token]); warnings.warn(token); print(sys.stdout.isatty(), sys.stdout.encoding)\n"
        "raise RuntimeError(token)\n"
    )
    environment = {**os.environ, **TOKENS, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    said = done.stdout + done.stderr
    assert "RuntimeError" in said and said.count("‹secret›") >= 6 and not holds_token(said)
