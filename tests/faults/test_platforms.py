"""Hard places to run in: a dumb terminal, a home that cannot be written, no network and an empty cache, WSL2."""

import os
import pty
import re
import select
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import MakeNamed

from core import doctor, gpu
from core.runs import Run, take_lock

ROOT = Path(__file__).resolve().parents[2]


def finetui(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in an environment with nothing but what is given."""
    bare = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "core.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, env=bare | environment, timeout=120, check=False)


def in_a_sentence(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode in (0, 1, 2, 3), done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    if done.returncode:
        assert done.stderr.startswith("finetui: ") and len(done.stderr.splitlines()) <= 3
    return done.stdout + done.stderr


@pytest.mark.parametrize("words", [
    ["runs"], ["plan", "sft"], ["check", "{rows}", "--method", "kto"],
    ["sft", "--model-name", "{model}", "--local-file", "{rows}", "--dry-run"],
    ["data", "clean", "{rows}", "{rows}.better"],
], ids=lambda words: " ".join(words[:2]))  # fmt: skip
def test_a_home_that_cannot_be_written_stops_nothing_that_needs_no_home(
    words: list[str], tiny_model: Path, rows_file: Callable[..., Path], tmp_path: Path
) -> None:
    filled = [word.format(rows=rows_file(), model=tiny_model) for word in words]
    done = finetui(*filled, HOME="/proc/1/fdinfo", FINETUI_RUNS=str(tmp_path / "runs"))
    in_a_sentence(done)
    assert done.returncode == 0 or words[0] == "runs", done.stderr


@pytest.mark.parametrize("words", [
    ["sft", "--model-name", "somebody/some-model", "--local-file", "{rows}", "--dry-run"],
    ["sft", "--model-name", "{model}", "--dataset-name", "somebody/some-rows", "--dry-run"],
    ["data", "look", "somebody/some-rows"],
], ids=["model", "rows", "look"])  # fmt: skip
def test_without_network_and_cache_it_is_said_in_a_sentence_what_cannot_be_had(
    words: list[str], tiny_model: Path, rows_file: Callable[..., Path], tmp_path: Path
) -> None:
    filled = [word.format(rows=rows_file(), model=tiny_model) for word in words]
    done = finetui(*filled, HOME=str(tmp_path), FINETUI_RUNS=str(tmp_path / "runs"), HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and "somebody/some-" in in_a_sentence(done)


SETPRIV = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=+dac_read_search",
           "--ambient-caps=+dac_read_search"]  # fmt: skip
"""Another user, who may read what is root's (Python often lies in a home) and write nothing of it."""


def can_become_another() -> bool:
    return bool(shutil.which("setpriv")) and subprocess.run([*SETPRIV, "true"], check=False).returncode == 0


@pytest.mark.skipif(not can_become_another(), reason="only root can become another user")
def test_an_ordinary_user_with_a_home_that_cannot_be_written_trains_and_looks(
    tiny_model: Path, rows_file: Callable[..., Path], tmp_path: Path
) -> None:
    work, home = tmp_path / "work", tmp_path / "home"
    for folder, mode in ((work, 0o755), (home, 0o555)):
        folder.mkdir(mode=mode)
        os.chown(folder, 65534, 65534)
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8",
                   "OMP_NUM_THREADS": "1", "TERM": "xterm-256color"}  # fmt: skip
    python = [*SETPRIV, sys.executable, "-P", "-m"]
    plan = ["sft", "--name", "own", "--model-name", str(tiny_model), "--local-file", str(rows_file()), "--max-steps",
            "3", "--set", "device=cpu"]  # fmt: skip
    for words in (plan, ["report", "own"]):
        done = subprocess.run(
            [*python, "core.cli", *words], capture_output=True, text=True, env=environment, cwd=work, check=False
        )
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    run = Run(work / "runs" / "own")
    assert run.trained("sft") and (run.path / "report.html").exists() and list(home.iterdir()) == []
    assert run.path.stat().st_mode & 0o077 == 0
    assert {path.stat().st_uid for path in (run.path, *run.path.rglob("*"))} == {65534}
    shown = [*python, "core.cli", "watch", "own", "--runs-dir", str(run.path.parent)]
    assert b"done" in in_pty(command=shown, environment=environment)


def in_pty(
    *words: str, command: list[str] | None = None, environment: dict[str, str] | None = None, **more: str
) -> bytes:
    """What a command writes to a terminal."""
    master, slave = pty.openpty()
    command = command or [sys.executable, "-P", "-m", "core.cli", *words]
    environment = environment or {**os.environ, **more}
    child = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    seen = b""
    while select.select([master], [], [], 60)[0]:
        try:
            part = os.read(master, 65536)
        except OSError:
            break
        if not part:
            break
        seen += part
    else:
        child.kill()
    child.wait(60)
    os.close(master)
    return seen


@pytest.mark.parametrize("term", ["dumb", ""])
def test_a_dumb_terminal_is_sent_no_control(term: str, named: MakeNamed) -> None:
    run: Run = named("ended")
    run.events.append("run_start", pid=1)
    run.events.append("stage_start", name="sft")
    run.events.append("log", stage="sft", step=1, loss=1.0)
    run.events.append("run_end", status="done")
    for words in (["watch", "ended"], ["show", "ended"], ["runs"]):
        seen = in_pty(*words, "--runs-dir", str(run.path.parent), TERM=term, PYTHONPATH=str(ROOT))
        assert b"done" in seen and not re.search(rb"\x1b\[[0-9;]*[A-HJKSTfhl]|\x1b\]", seen), seen


@pytest.mark.parametrize("term", ["dumb", ""])
def test_the_app_tells_a_terminal_it_cannot_draw_in_what_to_do_and_sends_it_no_control(term: str) -> None:
    for command in ([sys.executable, "-P", "-m", "core.cli"], [sys.executable, "-P", "-m", "tui"]):
        seen = in_pty(command=command, environment={**os.environ, "TERM": term, "PYTHONPATH": str(ROOT)})
        assert seen.startswith(b"finetui: The app needs a terminal that it can draw in; TERM is ")
        assert b"export TERM=" in seen and b"\x1b" not in seen


def test_a_window_of_screen_that_is_not_utf8_is_told_how_to_be() -> None:
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG"))}
    seen = in_pty(environment={**bare, "TERM": "screen", "STY": "1.pts", "PYTHONPATH": str(ROOT)})
    assert b"screen -U" in seen and b"\x1b" not in seen


@pytest.fixture
def latin1(tmp_path: Path) -> dict[str, str]:
    """The environment of a locale that is not UTF-8."""
    words = ["localedef", "-i", "tr_TR", "-f", "ISO-8859-9", str(tmp_path / "tr_TR.ISO-8859-9")]
    if not shutil.which("localedef") or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("no locale can be made here (on Debian: apt install locales)")
    return {"LOCPATH": str(tmp_path), "LC_ALL": "tr_TR.ISO-8859-9", "LANG": ""}


def test_in_a_locale_that_is_not_utf8_files_are_found_and_text_is_whole(
    latin1: dict[str, str], tiny_model: Path, rows_file: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The tokenizer's library takes paths for UTF-8, whatever the locale says."""
    model = tmp_path / "ağaç" / "木"
    shutil.copytree(tiny_model, model)
    words = ["check", str(rows_file()), "--method", "sft", "--model-name", "ağaç/木", "--max-seq-length", "100"]
    monkeypatch.chdir(tmp_path)
    done = finetui(*words, FINETUI_RUNS=str(tmp_path / "runs"), HOME=str(tmp_path), **latin1)
    assert done.returncode == 0 and "· 20 answers are labelled false" in in_a_sentence(done)
    assert "20 rows fit, 0 are cut" in done.stdout


# --- WSL2 ---


@pytest.fixture
def wsl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    release = tmp_path / "osrelease"
    release.write_text("5.15.167.4-microsoft-standard-WSL2\n")
    monkeypatch.setattr(gpu, "OSRELEASE", release)


@pytest.mark.usefixtures("wsl")
def test_under_wsl_memory_is_not_pinned_and_a_windows_disk_is_warned_of(
    named: MakeNamed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from core import train

    plan = named("one").plan()
    plan.device = "cuda"
    assert train.arguments(plan, plan.sft, tmp_path, "x")["dataloader_pin_memory"] is False
    monkeypatch.setattr(gpu, "OSRELEASE", tmp_path / "none")
    assert train.arguments(plan, plan.sft, tmp_path, "x")["dataloader_pin_memory"] is True


@pytest.mark.usefixtures("wsl")
def test_a_run_on_a_windows_disk_is_warned_of_before_it_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "_disk_kind", lambda folder: "9p")
    assert "Windows" in doctor.windows_disk(tmp_path) or "/mnt/c" in doctor.windows_disk(tmp_path)
    monkeypatch.setattr(doctor, "_disk_kind", lambda folder: "ext4")
    assert doctor.windows_disk(tmp_path) == ""


def test_a_watcher_whose_terminal_is_gone_without_a_signal_ends(named: MakeNamed) -> None:
    run = named("living")
    run.events.append("run_start", pid=1)
    run.events.append("stage_start", name="sft")
    lock = take_lock(run)
    master, slave = pty.openpty()
    watcher = subprocess.Popen(
        [sys.executable, "-P", "-m", "core.cli", "watch", "living", "--runs-dir", str(run.path.parent)],
        stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    os.close(slave)
    try:
        seen = b""
        while b"SFT" not in seen:
            seen += os.read(master, 65536)
        os.close(master)
        watcher.wait(30)
    finally:
        watcher.kill()
        watcher.wait()
        os.close(lock)
