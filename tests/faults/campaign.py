"""The campaign against our own promises: real runs whose viewers, trainers and runners are killed at random moments.

    python tests/faults/campaign.py --seed 1 --kills 50 --viewers 20 --stop-seconds 60

Each broken run is resumed until it is done and must end with the losses of the unbroken run of the same plan. Prints a
table and exits with 1 where a promise was broken. Half a minute for each two kills on two cores.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import psutil  # noqa: E402
from harness import Place, end, events, losses, until  # noqa: E402
from viewers import Viewers  # noqa: E402

from core import runner  # noqa: E402
from core.checkpoints import MANIFEST  # noqa: E402
from core.errors import FinetuiError  # noqa: E402
from core.paths import TORN, cache_dir  # noqa: E402
from core.postmortem import post_mortem  # noqa: E402
from core.runs import Run, is_alive, status  # noqa: E402

STEPS = 60
PLAN = {"max_steps": STEPS, "save_steps": 10, "batch_size": 8}
MOMENTS = ("loading", "a step", "writing a checkpoint", "between the stages", "saving the model", "merging")
SIGNALS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM)
TARGETS = ("trainer", "runner", "both")
VIEWER_DEATHS = ("SIGHUP", "SIGKILL", "closed pty", "SIGSTOP")
LITTER = (".final_model.new", ".*.tmp", "stop", "abort")


@dataclass
class Trial:
    """One kill: what died how and when, and what was wrong afterwards."""

    target: str
    how: str
    moment: str
    terminal: str = ""
    wrong: list[str] = field(default_factory=list)


def command(*words: str) -> list[str]:
    return [sys.executable, "-P", "-m", "core.cli", *words]


class Campaign:
    """Kills, resumes and compares; `trials` holds what came of it."""

    def __init__(self, place: Place, seed: int) -> None:
        self.place, self.random = place, random.Random(seed)
        self.trials: list[Trial] = []
        self.reference: Run | None = None
        self.moments: tuple[str, ...] = MOMENTS
        self.moments_of_plain = MOMENTS[:-1]
        self.method = "sft-kto"

    def new_run(self) -> Run:
        stages = {f"{stage}__{key}": value for stage in self.method.split("-") for key, value in PLAN.items()}
        if merged := self.method == "sft-kto" and self.random.random() < 0.3:
            stages |= {"export__save_method": "merged_16bit", "export__check_prompts": 0}
        run = self.place.run(self.method, name=f"run-{len(self.place.runs)}", **stages)
        self.moments = MOMENTS if merged else self.moments_of_plain
        return run

    def unbroken(self) -> Run:
        """The run that every other is compared with, made once."""
        if self.reference is None:
            self.reference = self.new_run()
            runner.start(self.reference)
            until(lambda: not is_alive(self.reference), 300)  # type: ignore[arg-type]
            assert self.reference.state().end_status == "done", self.reference.log_path.read_text()[-3000:]
        return self.reference

    # --- moments ---

    def reach(self, run: Run, moment: str) -> bool:
        """Wait for the moment; False where the run ended before it came."""
        jitter = self.random.random()
        conditions: dict[str, Callable[[], object]] = {
            "loading": lambda: run.state().current is not None,
            "a step": self._at_step(run, self.random.randrange(1, STEPS * len(self.method.split("-")))),
            "writing a checkpoint": lambda: _unfinished(run),
            "between the stages": lambda: run.state().stage("sft").state == "done",
            "saving the model": lambda: list(run.path.glob("*/.final_model.new")),
            "merging": lambda: run.state().stage("merge").state == "running",
        }
        found = until(lambda: not is_alive(run) or conditions[moment](), 300)
        if found is True and not is_alive(run):
            return False
        time.sleep({"loading": 6.0, "merging": 4.0, "between the stages": 0.3}.get(moment, 0.02) * jitter)
        return is_alive(run)

    @staticmethod
    def _at_step(run: Run, wanted: int) -> Callable[[], object]:
        def reached() -> bool:
            stages = {stage.name: stage.step for stage in run.state().stages}
            return stages.get("sft", 0) + stages.get("kto", 0) >= wanted

        return reached

    # --- trainers and runners ---

    def break_run(self, kills: int) -> None:
        """One run, killed up to `kills` times and resumed until it is done."""
        unbroken = self.unbroken()
        run = self.new_run()
        runner.start(run)
        done: list[Trial] = []
        for _ in range(kills):
            moment = self.random.choice(self.moments)
            if not self.reach(run, moment):
                break
            trial = Trial(self.random.choice(TARGETS), self.random.choice(SIGNALS).name, moment)
            done.append(trial)
            self.kill(run, trial)
            self.look(run, trial)
            if run.state().end_status != "done":
                self.resume_twice(run, trial)
        self.trials += done
        until(lambda: not is_alive(run), 300)
        if run.state().end_status != "done":
            runner.resume(run)
            until(lambda: not is_alive(run), 300)
        wrong = self.compare(run, unbroken)
        if done:
            done[-1].wrong += wrong

    def kill(self, run: Run, trial: Trial) -> None:
        state = run.state()
        stage = state.current
        pids = {"runner": state.start.get("pid"), "trainer": stage.pid if stage else None}
        number = signal.Signals[trial.how]
        for name in ("runner", "trainer") if trial.target == "both" else (trial.target,):
            if pid := pids[name]:
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue

    def look(self, run: Run, trial: Trial) -> None:
        """The status must be right at once, and a trainer without its runner must not be resumed beside."""
        state = run.state()
        runner_pid, stage = state.start.get("pid"), state.current
        if trial.target == "runner" and trial.how != "SIGTERM":
            until(lambda: not _lives(runner_pid), 20)
            if stage and stage.pid and _lives(stage.pid) and is_alive(run):
                try:
                    runner.resume(run)
                    trial.wrong.append("resumed beside its living trainer")
                except FinetuiError:
                    pass
                if self.random.random() < 0.5:
                    os.kill(stage.pid, signal.SIGKILL)
        until(lambda: not is_alive(run), 300)
        now = status(run, run.state().end_status)
        if now not in ("failed", "crashed", "stopped", "done"):
            trial.wrong.append(f"status {now} after the end")
        if now in ("failed", "crashed") and post_mortem(run, now) is None:
            trial.wrong.append("no card")
        if trial.how == "SIGTERM" and now in ("failed", "crashed") and trial.moment != "merging":
            trial.wrong.append(f"{now} after SIGTERM")

    def resume_twice(self, run: Run, trial: Trial) -> None:
        """Two resumes at the same moment: exactly one may start."""
        words = command("resume", "--detach", run.name, "--runs-dir", str(run.path.parent))
        before = _starts_and_ends(run).count("run_start")
        both = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in "ab"]
        said = [one.communicate(timeout=120)[0] for one in both]
        codes = sorted(one.returncode for one in both)
        if codes != [0, 2] and not (codes == [0, 0] and _one_after_the_other(run, before)):
            trial.wrong.append(f"two resumes ended with {codes}: {' / '.join(said)[-300:]}")
        starts = [event["pid"] for event in events(run) if event["kind"] == "run_start"]
        if len([pid for pid in starts if _lives(pid)]) > 1:
            trial.wrong.append("two runners")

    def compare(self, run: Run, unbroken: Run) -> list[str]:
        """What differs from the unbroken run, and what was left lying about."""
        wrong = []
        if run.state().end_status != "done":
            return [f"ended as {run.state().end_status or 'crashed'}"]
        for stage in self.method.split("-"):
            whole, mended = losses(unbroken, stage), losses(run, stage)
            if list(mended) != list(whole):
                wrong.append(f"{stage}: other steps were logged")
            elif worst := [step for step in whole if abs(whole[step] - mended[step]) > 2e-6]:
                wrong.append(f"{stage}: the loss differs from step {worst[0]}")
        litter = [path.name for pattern in LITTER for path in run.path.rglob(pattern)]
        if litter:
            wrong.append(f"left behind: {litter[0]}")
        try:
            until(lambda: not any(map(_lives, _pids_of(run))), 20)
        except AssertionError:
            wrong.append("processes left")
        return wrong

    # --- viewers ---

    def kill_viewers(self, count: int, at_once: int = 10) -> None:
        """One run with ten viewers at a time, `count` of which die; it must not notice."""
        unbroken = self.unbroken()
        run = self.new_run()
        runner.start(run)
        done: list[Trial] = []
        with Viewers(self.random) as viewers:
            while len(done) < count and is_alive(run):
                while len(viewers.living) < at_once:
                    viewers.any(run)
                time.sleep(self.random.random() * 0.5)
                viewer = viewers.take()
                trial = Trial(viewer.program, self.random.choice(VIEWER_DEATHS), _phase(run), terminal=viewer.terminal)
                done.append(trial)
                if wrong := viewer.end(trial.how):
                    trial.wrong.append(wrong)
        until(lambda: not is_alive(run), 300)
        done[-1].wrong += self._undisturbed(run, unbroken)
        self.trials += done

    def _undisturbed(self, run: Run, unbroken: Run) -> list[str]:
        starts = [event for event in events(run) if event["kind"] == "run_start"]
        wrong = self.compare(run, unbroken) + (["it was started again"] if len(starts) != 1 else [])
        shown = subprocess.run(command("show", run.name, "--runs-dir", str(run.path.parent)),
                               capture_output=True, text=True, check=False)  # fmt: skip
        return wrong + ([] if "done" in shown.stdout else ["a later viewer does not find it done"])

    def stop_viewers(self, seconds: float) -> None:
        """Viewers that are stopped while it trains and go on later must show how it is by then."""
        unbroken = self.unbroken()
        run = self.new_run()
        runner.start(run)
        with Viewers(self.random) as viewers:
            started = [viewers.start(run, program, read=True, controlling=own)
                       for program in ("app", "watch") for own in (True, False)]  # fmt: skip
            until(lambda: run.state().stage("sft").step >= 1 and all(viewer.seen for viewer in started), 300)
            done = [Trial(viewer.program, f"{seconds:g} s stop", _phase(run), terminal=viewer.terminal)
                    for viewer in started]  # fmt: skip
            for viewer in started:
                viewer.process.send_signal(signal.SIGSTOP)
            time.sleep(seconds)
            until(lambda: not is_alive(run), 300)
            before = [len(viewer.seen) for viewer in started]
            for viewer in started:
                viewer.process.send_signal(signal.SIGCONT)
            for viewer, trial, at in zip(started, done, before, strict=True):
                try:
                    until(lambda viewer=viewer, at=at: b"done" in viewer.seen[at:], 30)
                    if viewer.program == "watch" and viewer.process.wait(30) != 0:
                        trial.wrong.append("it ended with an error")
                except (AssertionError, subprocess.TimeoutExpired):
                    trial.wrong.append("it did not catch up")
        done[-1].wrong += self._undisturbed(run, unbroken)
        self.trials += done

    # --- what is left for ever ---

    def litter(self) -> list[str]:
        """Temporary files of dead writers in the cache and among the system's, once one more run has gone through."""
        run = self.new_run()
        runner.start(run)
        until(lambda: not is_alive(run), 300)
        places = (cache_dir(), Path(tempfile.gettempdir()))
        return sorted(str(path) for place in places for path in place.rglob(f".*{TORN}"))


def _one_after_the_other(run: Run, before: int) -> bool:
    """Whether the second of two starts came after the end of the first, which had nothing left to do and was quick."""
    until(lambda: _starts_and_ends(run).count("run_start") == before + 2, 20)
    *_, between, _ = "".join(_starts_and_ends(run)).split("run_start")
    return "run_end" in between


def _starts_and_ends(run: Run) -> list[str]:
    return [event["kind"] for event in events(run) if event["kind"] in ("run_start", "run_end")]


def _unfinished(run: Run) -> bool:
    return any(not (folder / MANIFEST).exists() for folder in run.path.glob("*/checkpoints/checkpoint-*"))


def _phase(run: Run) -> str:
    stage = run.state().current
    return f"{stage.name}: {stage.phase}" if stage else "starting"


def _lives(pid: int | None) -> bool:
    try:
        return bool(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _pids_of(run: Run) -> set[int]:
    return {event["pid"] for event in events(run) if event["kind"] in ("run_start", "stage_start") and event.get("pid")}


def table(trials: list[Trial]) -> str:
    """What died how and when, viewers in what terminal, how often, and how often a promise was broken."""

    def key(trial: Trial) -> tuple[str, str, str]:
        return trial.target, trial.how, trial.terminal or trial.moment

    counts, broken = Counter(map(key, trials)), Counter(key(trial) for trial in trials if trial.wrong)
    lines = [f"{'died':<8} {'by':<11} {'while, or in what terminal':<26} {'times':>5} {'broken':>6}"]
    lines += [f"{a:<8} {b:<11} {c:<26} {counts[a, b, c]:>5} {broken[a, b, c]:>6}" for a, b, c in sorted(counts)]
    return "\n".join([*lines, f"{'in all':<47} {len(trials):>5} {sum(broken.values()):>6}"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=50, help="of trainers and runners")
    parser.add_argument("--viewers", type=int, default=20, help="deaths of viewers")
    parser.add_argument("--stop-seconds", type=float, default=0, help="four viewers are stopped for so long")
    parser.add_argument("--minutes", type=float, default=600, help="stop beginning new runs after so long")
    arguments = parser.parse_args()
    begun = time.monotonic()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup every viewer would ignore it
    with Place() as place:
        (place.folder / "tmp").mkdir()
        os.environ |= {"FINETUI_CACHE": str(place.folder / "cache"), "TMPDIR": str(place.folder / "tmp")}
        tempfile.tempdir = None
        campaign = Campaign(place, arguments.seed)
        if arguments.stop_seconds:
            campaign.stop_viewers(arguments.stop_seconds)
        while (viewed := sum(bool(t.terminal) for t in campaign.trials)) < arguments.viewers:
            campaign.kill_viewers(min(30, arguments.viewers - viewed))
        while (killed := sum(not t.terminal for t in campaign.trials)) < arguments.kills:
            if time.monotonic() - begun > 60 * arguments.minutes:
                break
            try:
                campaign.break_run(min(4, arguments.kills - killed))
            except (AssertionError, FinetuiError, OSError) as error:
                campaign.trials.append(Trial("?", "?", "?", [f"{type(error).__name__}: {error}"]))
            for run in place.runs:
                end(run)
            broken = sum(bool(trial.wrong) for trial in campaign.trials)
            print(f"{len(campaign.trials)} deaths, {broken} broken, {time.monotonic() - begun:.0f} s", flush=True)
        left = campaign.litter()
    print(table(campaign.trials))
    for trial in campaign.trials:
        for words in trial.wrong:
            print(f"! {trial.target} {trial.how} {trial.moment}: {words}")
    print(*(f"! left behind: {path}" for path in left), sep="\n", end="\n" if left else "")
    print(f"seed {arguments.seed}, {time.monotonic() - begun:.0f} s")
    return 1 if left or any(trial.wrong for trial in campaign.trials) else 0


if __name__ == "__main__":
    sys.exit(main())
