"""Every failed run opens on a card that says what happened, on what evidence, why, and what one key does about it."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeNamed, MakeRun, finish, wait_until
from hypothesis import given
from hypothesis import strategies as st
from pilots import CONTROLS, HOSTILE, shows
from textual.pilot import Pilot

from core import remedy, runner
from core.checkpoints import write_manifest
from core.clock import boot_id
from core.config import load_plan
from core.errors import FinetuiError
from core.events import RunState
from core.paths import last_lines
from core.postmortem import examined, post_mortem
from core.remedy import sources_in
from core.runs import Run
from core.watch import console, show_end
from tui.app import FinetuiApp
from tui.follow import Follower, Recording
from tui.report import end_words

FAILURES = sorted((Path(__file__).parent / "failures").glob("*.jsonl"))
GPU = [{"index": 0, "memory_used_bytes": used << 28, "memory_total_bytes": 24 << 30} for used in (40, 60, 80, 94)]
OOM = (
    "CUDA out of memory. Tried to allocate 1.17 GiB. GPU 0 has a total capacity of 23.69 GiB of which 310.00 MiB is "
    "free. Including non-PyTorch memory, this process has 23.35 GiB memory in use. Of the allocated memory 22.10 GiB is"
)
SAID = {
    "gpu-memory": ("OutOfMemoryError", OOM, "exit 1", ["1.17 GiB more were wanted", "310.00 MiB were free", "23.69"]),
    "driver-lost": ("AcceleratorError", "CUDA error: unspecified launch failure", "exit 1", ["launch failure"]),
    "driver-lost-ecc": ("RuntimeError", "CUDA error: uncorrectable ECC error encountered", "exit 1", ["ECC"]),
    "token-range": ("AcceleratorError", "CUDA error: device-side assert triggered", "exit 1", ["device-side assert"]),
    "gpu-fault": ("AcceleratorError", "CUDA error: an illegal memory access was encountered", "exit 1", ["illegal"]),
    "disk-full": ("OSError", "[Errno 28] No space left on device: '/runs/x/optimizer.pt'", "exit 1", ["optimizer.pt"]),
    "not-writable": ("OSError", "[Errno 30] Read-only file system: '/runs/x'", "exit 1", ["Read-only"]),
    "shared-memory": ("RuntimeError", "DataLoader worker is killed by signal: Bus error. insufficient shared memory",
                      "exit 1", ["Bus error"]),
    "no-access": ("FinetuiError", "The model meta/x cannot be had: it is gated.", "exit 1", ["gated"]),
    "no-network": ("FinetuiError", "The model a/b cannot be had: the Hub is out of reach.", "exit 1", ["out of reach"]),
    "limits": ("OSError", "[Errno 24] Too many open files", "exit 1", ["Too many open files"]),
    "kernel-killed": ("Killed", "The trainer was ended by SIGKILL.", "SIGKILL", ["for lack of memory"]),
    "refused": ("FinetuiError", "Something new is wrong.", "exit 1", ["Something new"]),
    "diverged": ("FinetuiError", "Ended for an alarm. SFT: the loss is at 9 and was at 1: it diverges. There is no "
                 "checkpoint from before.", "exit 1", ["diverges"]),
}  # fmt: skip


def failed(run: Run, kind: str, stage: str = "sft") -> Run:
    """The log of a run that ended so."""
    name, message, ended, _ = SAID[kind]
    run.events.append("run_start", pid=1)
    run.events.append("stage_start", name=stage)
    run.events.append("totals", stage=stage, steps=120)
    for card in GPU:
        run.events.append("gpu", gpus=[card], rss_bytes=1 << 30, ram_available_bytes=20 << 30)
    run.events.append("log", stage=stage, step=45, loss=1.5)
    run.events.append("error", stage=stage, type=name, message=message, advice="")
    kills = 1 if kind == "kernel-killed" else 0
    run.events.append("stage_end", name=stage, status="failed", exit=ended, log_tail="", oom_kills=kills)
    run.events.append("run_end", status="failed")
    return run


def test_there_are_at_least_twelve_kinds_of_recorded_failures() -> None:
    kinds = {path.stem for path in FAILURES} | {kind.removesuffix("-ecc") for kind in SAID}
    assert len(FAILURES) >= 9 and len(kinds) >= 20


@pytest.mark.parametrize("path", FAILURES, ids=lambda path: path.stem)
def test_a_recorded_failure_is_told_with_evidence_and_a_way_on(path: Path, named: MakeNamed) -> None:
    run = named("sft")
    shutil.copyfile(path, run.events_path)
    state = run.state()
    card = post_mortem(run, state.end_status or "crashed")
    assert card is not None and card.cause.kind == path.stem
    words = dict(card.lines("f"))
    assert card.title.startswith("SFT failed ") and words["cause"] and words["memory"]
    assert path.stem == "vanished" or words["what"]
    assert words.get("advice") or "resumes" in words["remedy"] or "begins the stage again" in words["remedy"]
    assert ("remedy" in words) == (path.stem not in ("model-damaged", "package", "rows-changed"))
    if path.stem in ("native-crash", "package", "model-damaged", "not-finite"):
        assert words["log"]


@pytest.mark.parametrize("kind", SAID)
def test_the_words_of_pytorch_driver_and_system_are_understood(kind: str, named: MakeNamed) -> None:
    card = post_mortem(failed(named("sft"), kind), "failed")
    assert card is not None and card.cause.kind == kind.removesuffix("-ecc")
    assert card.title.startswith("SFT failed at step 45 of 120: ")
    assert all(part in card.what for part in SAID[kind][3])
    assert "of 24.0 GiB at the last look (GPU)" in card.memory_words and card.memory_words[:4] == "▄▆▇█"


WARNED = (
    "/x/unsloth/trainer.py:12: SyntaxWarning: invalid escape sequence '\\d'\n"
    '  pattern = "\\d failed"\n'
    "<string>:3: UserWarning: an error will be raised for this in the next version\n"
    "[RANK 0] Padding-free training is enabled, but the attention is not supported\n"
    "12:00:01 WARNING transformers: this cannot be known\n"
)


@pytest.mark.parametrize(
    ("before", "after", "log"),
    [
        ("ValueError: of the trainer\n", WARNED, ["ValueError: of the trainer"]),
        ("80 rows\nterminate called after throwing 'c10::Oh'\n", WARNED, ["terminate called after throwing 'c10::Oh'"]),
        ("CUDA error: the launch timed out\ntokenised 80 rows\n", WARNED, ["CUDA error: the launch timed out"]),
        ("tokenised 80 rows\n", WARNED, ["tokenised 80 rows"]),
        ("", WARNED, []),
        ("x" * 30_000 + "\n", "KeyError: 'at the end of a long log'\n", ["KeyError: 'at the end of a long log'"]),
        ("", "RuntimeError: " + "several words " * 40, ["RuntimeError: " + "several words " * 20 + "…"]),
    ],
    ids=["traceback", "native", "cuda", "plain", "warnings", "long", "cut"],
)  # fmt: skip
def test_the_evidence_is_what_speaks_of_the_failure_and_no_warning(
    named: MakeNamed, before: str, after: str, log: list[str]
) -> None:
    run = named("sft")
    run.events.append("run_start", pid=1)
    run.events.append("stage_start", name="sft")
    run.log_path.write_text(before + after)
    for told in (before + after, ""):  # as the runner told it, and where it could not, from the log itself
        run.events.append("stage_end", name="sft", status="failed", exit="SIGABRT", log_tail=told[-20_000:])
        card = post_mortem(run, "failed")
        assert card is not None and [text for word, text in card.lines("f") if word == "log"] == log


def test_the_last_words_of_a_log_begin_with_a_whole_line(tmp_path: Path) -> None:
    (file := tmp_path / "train.log").write_text("of the stage before\none two three\nfour five\n")
    assert last_lines(file, 20) == "four five\n" and last_lines(file, 900) == file.read_text()
    assert last_lines(file, 900, since=20) == "one two three\nfour five\n"


def test_a_long_message_is_cut_between_two_words(named: MakeNamed) -> None:
    run = failed(named("sft"), "refused")
    run.events.append("error", stage="sft", type="ValueError", message="a message of many words " * 40, advice="")
    card = post_mortem(run, "failed")
    assert card is not None and len(card.what) < 400
    assert re.search(r" (a|message|of|many|words) … The process", card.what), card.what


HUNGRY = """
import os, pathlib, sys
if "core.train" in sys.orig_argv:
    import transformers.trainer as t
    step, group = t.Trainer.training_step, {group!r}
    def hungry(self, *a, **k):
        if self.state.global_step == 7:
            pathlib.Path(group, "cgroup.procs").write_text(str(os.getpid()))
            held = [bytearray(b"x") * (64 << 20) for _ in range(1000)]
        return step(self, *a, **k)
    t.Trainer.training_step = hungry
"""
LIMITS = {
    "/sys/fs/cgroup": {"memory.max": str(1200 << 20), "memory.swap.max": "0"},
    "/sys/fs/cgroup/memory": dict.fromkeys(("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"), str(1200 << 20)),
}


@pytest.fixture
def small_memory() -> Iterator[Path]:
    """A control group whose processes may have 1.2 GiB together."""
    root = next((root for root in LIMITS if Path(root, "cgroup.procs").exists()), "")
    if not root or not os.access(root, os.W_OK):
        pytest.skip("no control group can be made here (it takes root)")
    group = Path(root, f"finetui-test-{os.getpid()}")
    group.mkdir()
    try:
        if not (group / next(iter(LIMITS[root]))).exists():
            pytest.skip("control groups have no limit of memory here")
        for name, value in LIMITS[root].items():
            if (group / name).exists():
                (group / name).write_text(value)
        yield group
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text(), 20)
        group.rmdir()


def test_a_trainer_that_the_kernel_killed_for_lack_of_memory_is_told_so(
    small_memory: Path, make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(HUNGRY.replace("{group!r}", repr(str(small_memory))))
    root = Path(__file__).resolve().parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}{os.pathsep}{root}")
    run = make_run(sft__max_steps=9, sft__save_steps=3)
    runner.start(run)
    assert finish(run) == "failed"
    card = post_mortem(run, "failed")
    assert card and card.cause.kind == "kernel-killed" and "The kernel ended 1 process for lack of memory" in card.what
    assert card.title == "SFT failed at step 7 of 9: the kernel ended it: memory ran out" and card.resumes_at == 6
    assert card.remedy and "sft.batch_size 4 → 2" in card.remedy.words


def test_a_restart_of_the_machine_is_told_from_a_death_without_a_word(named: MakeNamed) -> None:
    for boot, kind in ((boot_id(), "vanished"), ("another", "restarted"), (None, "vanished")):
        run = named(f"run-{kind}-{boot}"[:40])
        run.events.append("run_start", pid=1, boot=boot)
        run.events.append("stage_start", name="sft")
        run.events.append("log", stage="sft", step=3, loss=1.0)
        card = post_mortem(run, "crashed")
        assert card is not None and card.cause.kind == (kind if boot_id() else "vanished")
    for status in ("done", "stopped", "aborted", "running"):
        assert post_mortem(run, status) is None


def test_less_memory_keeps_the_rows_of_a_step(named: MakeNamed) -> None:
    run = failed(named("sft", sft__batch_size=12, sft__gradient_accumulation_steps=2, sft__regroup="on"), "gpu-memory")
    before = sources_in(run.plan_path.read_text())
    card = post_mortem(run, "failed")
    assert card is not None and card.remedy is not None
    assert card.remedy.changes == {
        "sft.batch_size": 6, "sft.gradient_accumulation_steps": 4, "sft.regroup": "off"
    }  # fmt: skip
    assert (
        "sft.batch_size 12 → 6" in dict(card.lines("f"))["remedy"]
        and "begins the stage again" in dict(card.lines("f"))["remedy"]
    )
    (run.stage_path("sft")).mkdir()
    (run.stage_path("sft") / "batch.json").write_text('{"batch_size": 24}')
    remedy.apply(run, card.remedy)
    stage = run.plan().sft
    assert (stage.batch_size, stage.effective_batch) == (6, 24)
    assert not (run.stage_path("sft") / "batch.json").exists(), "what did not fit is forgotten"
    after = sources_in(run.plan_path.read_text())
    assert {key for key in after if after[key] != before[key]} == set(card.remedy.changes)
    assert after["sft.batch_size"] == "remedy; was 12"


def test_the_last_resort_is_to_compute_activations_twice_and_then_there_is_none(named: MakeNamed) -> None:
    one = {"sft__batch_size": 1, "sft__gradient_accumulation_steps": 1}
    first = post_mortem(failed(named("a", **one, sft__gradient_checkpointing="off"), "gpu-memory"), "failed")
    assert first and first.remedy and first.remedy.changes == {"sft.gradient_checkpointing": "on"}
    second = post_mortem(failed(named("b", **one, sft__gradient_checkpointing="on"), "gpu-memory"), "failed")
    assert second and second.remedy is None and second.cause.advice


def test_a_lower_rate_goes_on_from_the_newest_checkpoint_that_is_whole(named: MakeNamed) -> None:
    run = named("sft", sft__learning_rate=3e-3)
    shutil.copyfile(next(path for path in FAILURES if path.stem == "not-finite"), run.events_path)
    for step, whole in ((4, True), (8, True), (12, False)):
        folder = run.stage_path("sft") / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "adapter").write_text("x")
        if whole:
            write_manifest(folder)
    card = post_mortem(run, "failed")
    assert card and card.remedy and card.remedy.changes == {"sft.learning_rate": 1e-3} and card.resumes_at == 8
    remedy.apply(run, card.remedy)
    assert load_plan(run.plan_path).sft.learning_rate == 1e-3
    assert "sft.learning_rate 0.003 → 0.001" in run.state().notices[-1]["text"]


def test_the_command_line_prints_the_card_and_resumes_with_the_remedy(
    named: MakeNamed, monkeypatch: pytest.MonkeyPatch, said: Any, refused: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = failed(named("hot", sft__batch_size=4), "gpu-memory")
    show_end(console(), run, run.state(), "failed")
    shown = capsys.readouterr().out
    assert "✘ SFT failed at step 45 of 120: the GPU's memory ran out" in shown
    assert "remedy  finetui resume --fix hot: sets sft.batch_size 4 → 2" in shown
    monkeypatch.setattr(runner, "resume", lambda run: 1)
    monkeypatch.setattr("core.commands.follow", lambda *_, **__: 0)
    assert "started" in said("resume", "--fix", "hot")
    assert run.plan().sft.batch_size == 2
    failed(named("cold"), "token-range")
    assert "Take tokenizer and model from the same place" in refused("resume", "--fix", "cold")
    whole = named("whole")
    whole.events.append("run_end", status="done")
    assert "has not failed" in refused("resume", "--fix", "whole")


@pytest.mark.usefixtures("own_cache_and_no_gpu")
async def test_the_dashboard_opens_on_the_card_and_f_applies_it(
    named: MakeNamed, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = failed(named("hot", sft__batch_size=4), "gpu-memory")
    resumed: list[str] = []
    monkeypatch.setattr("tui.dashboard.runner.resume", lambda run: resumed.append(run.name))
    app = FinetuiApp(watch=run)
    async with app.run_test(size=(100, 30)) as pilot:
        assert isinstance(pilot, Pilot)
        await shows(pilot, "SFT failed at step 45 of 120", "1.17 GiB more were wanted", "f sets sft.batch_size 4 → 2")
        await pilot.press("f")
        wait_until(lambda: resumed)
    assert resumed == ["hot"] and run.plan().sft.batch_size == 2


def test_a_recording_shows_the_card_and_offers_no_key(tmp_path: Path) -> None:
    file = tmp_path / "stranger.jsonl"
    shutil.copyfile(FAILURES[0], file)
    snapshot = Follower(Recording(tmp_path, file)).read()
    assert snapshot is not None and snapshot.card is not None
    assert "✘" in end_words(snapshot).plain and "resumes" not in end_words(snapshot).plain


def test_hostile_words_reach_no_card(named: MakeNamed) -> None:
    run = failed(named("sft"), "refused")
    run.events.append("error", stage="sft", type=HOSTILE, message=HOSTILE, advice=HOSTILE)
    run.events.append("stage_end", name="sft", status="failed", exit=HOSTILE, log_tail=HOSTILE)
    card = post_mortem(run, "failed")
    assert card and not CONTROLS.findall(card.title + "".join(text for _, text in card.lines("f")))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
KINDS = ["run_start", "stage_start", "totals", "log", "gpu", "notice", "error", "stage_end", "run_end"]
KEYS = (
    "name stage step steps gpus rss_bytes ram_available_bytes message type advice exit log_tail oom_kills alarm text "
    "boot traceback"
).split()


@given(
    st.lists(st.tuples(st.sampled_from(KINDS), st.dictionaries(st.sampled_from(KEYS), JSON, max_size=6)), max_size=8)
)
def test_no_log_of_a_stranger_breaks_the_card(tmp_path_factory: pytest.TempPathFactory, events: list[Any]) -> None:
    run = Run(tmp_path_factory.mktemp("stranger"))
    run.events_path.write_text("".join(json.dumps({"t": 1.0, "kind": kind, **more}) + "\n" for kind, more in events))
    for status in ("failed", "crashed"):
        card = examined(run, status)
        assert card is not None, "it is always told that something happened"
        assert not CONTROLS.findall(card.title + "".join(text for _, text in card.lines("f")))
    assert isinstance(run.state(), RunState)


def test_a_living_run_is_not_changed(named: MakeNamed, monkeypatch: pytest.MonkeyPatch) -> None:
    run = named("one")
    monkeypatch.setattr("core.remedy.is_alive", lambda run: True)
    with pytest.raises(FinetuiError, match="is running already"):
        remedy.apply(run, remedy.Remedy("", {"sft.batch_size": 2}))
