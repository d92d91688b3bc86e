"""The machine's clock jumps under real runs, their trainers and their viewers.

    python tests/faults/clock_jumps.py

A few lines of C before the C library move the time of day of all of them at once, and of nothing else: libfaketime
0.9.10 would do it too, but has Python's `time.sleep` fail where the monotonic clock is left alone. Needs Linux and a C
compiler.

Jumps while a run trains, between its stop and its resumption, while another waits for its turn and while results are
merged. Prints a table and exits with 1 where something told of a run was wrong. Two minutes on two cores.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

from harness import Place, events, losses, until  # noqa: E402

from core import runner  # noqa: E402
from core.runs import Run, is_alive, request_stop, summary  # noqa: E402

COMPILER = shutil.which("cc") if sys.platform == "linux" else None
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
static long jump(void) {
    long seconds = 0;
    const char *path = getenv("CLOCK_JUMP_FILE");
    FILE *file = path ? fopen(path, "r") : NULL;
    if (file) { if (fscanf(file, "%ld", &seconds) != 1) seconds = 0; fclose(file); }
    return seconds;
}
int clock_gettime(clockid_t id, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(id, at);
    if (!failed && id == CLOCK_REALTIME) at->tv_sec += jump();
    return failed;
}
int gettimeofday(struct timeval *at, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec, at->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
"""
JUMPS = {"an hour back": -3600, "a day back": -86_400, "a day on": 86_400}
STEPS = 400
SLACK_S = 3.0
VIEWER = """
import json, sys, time
from pathlib import Path
from core.runs import Digest, Run
from tui.follow import Follower
run = Run(Path(sys.argv[1]))
digest, follower = Digest(run), Follower(run)
while True:
    shown, head = follower.read(), digest.read()
    told = {"up": time.monotonic(), "wall": time.time(), "status": head["status"], "took": head["duration_s"],
            "left": head["left_s"]}
    if shown:
        told |= {"shown": shown.status, "shown_took": shown.took_s,
                 "phase": shown.taken - shown.phase_started if shown.live and shown.phase_started else None}
    print(json.dumps(told), flush=True)
    if len(sys.argv) > 2 or head["status"] not in ("running", "stopping"):
        break
    time.sleep(0.2)
"""


@dataclass
class Trial:
    """One jump at one moment: what was wrong in what was told."""

    moment: str
    jump: str
    wrong: list[str] = field(default_factory=list)

    def check(self, sound: bool, words: str) -> None:
        if not sound and words not in self.wrong:
            self.wrong.append(words)


class Clock:
    """The clock of all processes that are started while it is in force; `set` moves it under living ones."""

    def __init__(self, folder: Path) -> None:
        self.file, self.library = folder / "clock", folder / "clock.so"
        self.set(0)
        source = self.library.with_suffix(".c")
        source.write_text(SHIM)
        build = [str(COMPILER), "-shared", "-fPIC", "-O2", "-o", str(self.library), str(source), "-ldl"]
        subprocess.run(build, check=True)

    def set(self, seconds: int) -> None:
        other = self.file.with_suffix(".new")
        other.write_text(str(seconds))
        other.replace(self.file)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        given = {"LD_PRELOAD": str(self.library), "CLOCK_JUMP_FILE": str(self.file)}
        os.environ.update(given)
        try:
            yield
        finally:
            for name in given:
                os.environ.pop(name, None)


def viewer(run: Run, *once: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-P", "-c", VIEWER, str(run.path), *once], stdout=subprocess.PIPE, text=True
    )


def judge(trial: Trial, told: str, who: str, elapsed_s: float) -> None:
    """What a viewer told of a run that lived all the while and began `elapsed_s` ago at most."""
    lines = [json.loads(line) for line in told.splitlines()]
    trial.check(bool(lines), f"{who} told nothing")
    before = 0.0
    for line in lines:
        trial.check(line["status"] != "crashed" and line.get("shown") != "crashed", f"{who}: a living run crashed")
        for key in ("took", "shown_took", "phase"):
            if (seconds := line.get(key)) is not None:
                trial.check(-0.01 <= seconds <= elapsed_s + SLACK_S, f"{who}: {key} {seconds:.0f} of {elapsed_s:.0f} s")
        trial.check((line["took"] or 0) >= before - 0.2, f"{who}: took went back to {line['took']}")
        before = line["took"] or 0
        if line["left"] is not None:
            trial.check(0 <= line["left"] < 600, f"{who}: {line['left']:.0f} s left")


def judge_log(trial: Trial, run: Run) -> None:
    moments = [event["t"] for event in events(run) if event["kind"] not in ("created", "stages", "notice")]
    backwards = [after - before for before, after in zip(moments, moments[1:], strict=False) if after < before - 1]
    trial.check(not backwards, f"the log goes back {backwards[:2]}")
    gaps = [after - before for before, after in zip(moments, moments[1:], strict=False) if after > before + 3000]
    trial.check(len(gaps) <= 1, f"the log leaps {gaps[:2]}")


def while_it_trains(place: Place, clock: Clock, name: str, reference: dict[int, float]) -> list[Trial]:
    """Two jumps: under a living run and its viewer, and between its stop and its resumption."""
    living, resting = Trial("a run that trains", name), Trial("between stop and resume", name)
    clock.set(0)
    run = place.run("sft", name=f"train-{name.replace(' ', '-')}", sft__max_steps=STEPS, sft__save_steps=50)
    begun = time.monotonic()
    runner.start(run)
    early = viewer(run)
    until(lambda: run.state().stages and run.state().stage("sft").step >= 20, 120)
    clock.set(JUMPS[name])
    at = run.state().stage("sft").step
    until(lambda: run.state().stage("sft").step >= at + 40, 120)
    late = viewer(run, "once").communicate(timeout=60)[0]
    living.check(is_alive(run), "it ended too early to be looked at: raise STEPS")
    request_stop(run)
    until(lambda: not is_alive(run), 60)
    worked = time.monotonic() - begun
    judge(living, early.communicate(timeout=60)[0], "a viewer from before", worked)
    judge(living, late, "a viewer from after", worked)
    living.check(run.state().end_status == "stopped", f"it ended as {run.state().end_status}")
    judge_log(living, run)

    clock.set(-JUMPS[name])
    rested = summary(run)["duration_s"]
    resting.check(0 < rested <= worked + SLACK_S, f"after the stop: {rested:.0f} of {worked:.0f} s")
    begun = time.monotonic()
    runner.resume(run)
    again = viewer(run)
    until(lambda: not is_alive(run), 180)
    worked += time.monotonic() - begun
    judge(resting, again.communicate(timeout=60)[0], "a viewer", worked)
    resting.check(summary(run)["status"] == "done", f"it ended as {summary(run)['status']}")
    resting.check(summary(run)["duration_s"] <= worked + SLACK_S, f"took {summary(run)['duration_s']:.0f} s")
    found = losses(run, "sft")
    apart = [step for step in reference if abs(found.get(step, 1e9) - reference[step]) > 1e-6]
    resting.check(not apart, f"other losses from step {apart[:1]}")
    judge_log(resting, run)
    return [living, resting]


def while_it_waits_and_merges(place: Place, clock: Clock, name: str) -> list[Trial]:
    """Under a run that waits for its turn, and under the one that it waits for, which merges its result."""
    waiting, merging = Trial("a run that waits", name), Trial("a merge", name)
    clock.set(0)
    words = name.replace(" ", "-")
    first = place.run("sft", name=f"first-{words}", sft__max_steps=150, export__save_method="merged_16bit",
                      export__check_prompts=0)  # fmt: skip
    second = place.run("sft", name=f"second-{words}", wait_gpu=True, sft__max_steps=5)
    begun = time.monotonic()
    runner.start(first)
    until(lambda: first.state().stages and first.state().stage("sft").step > 2, 120)
    runner.start(second)
    until(lambda: second.state().waiting_for, 60)
    clock.set(JUMPS[name])
    told = viewer(second, "once").communicate(timeout=60)[0]
    judge(waiting, told, "a viewer", time.monotonic() - begun)
    waiting.check(second.state().waiting_for is not None or not is_alive(first), "it trains beside the other")
    until(lambda: first.state().stage("merge").state != "waiting", 120)
    clock.set(-JUMPS[name])
    told = viewer(first, "once").communicate(timeout=60)[0]
    judge(merging, told, "a viewer", time.monotonic() - begun)
    until(lambda: not is_alive(first) and not is_alive(second), 180)
    worked = time.monotonic() - begun
    for trial, run in ((waiting, second), (merging, first)):
        trial.check(summary(run)["status"] == "done", f"it ended as {summary(run)['status']}")
        trial.check(0 < summary(run)["duration_s"] <= worked + SLACK_S, f"took {summary(run)['duration_s']:.0f} s")
        judge_log(trial, run)
    ended, start = first.state().stage("sft").ended, second.state().stage("sft").started
    waiting.check(bool(ended and start), "it never trained")
    return [waiting, merging]


def table(trials: list[Trial]) -> str:
    lines = [f"{'moment':<26}{'the clock goes':<16}wrong"]
    lines += [f"{one.moment:<26}{one.jump:<16}{'; '.join(one.wrong) or '–'}" for one in trials]
    return "\n".join(lines)


def campaign(place: Place) -> list[Trial]:
    os.environ["FINETUI_CACHE"] = str(place.folder / "cache")
    unbroken = place.run("sft", name="unbroken", sft__max_steps=STEPS, sft__save_steps=50)
    runner.start(unbroken)
    until(lambda: not is_alive(unbroken), 300)
    clock, found = Clock(place.folder), []
    with clock.in_force():
        for name in JUMPS:
            found += while_it_trains(place, clock, name, losses(unbroken, "sft"))
            found += while_it_waits_and_merges(place, clock, name)
    return found


if __name__ == "__main__":
    if COMPILER is None:
        sys.exit("Needs Linux and a C compiler.")
    with Place() as here:
        trials = campaign(here)
    print(table(trials))
    sys.exit(any(trial.wrong for trial in trials))
