"""The clock of a run, which never jumps: durations, paces and what is left of a run are told by it.

It starts at the machine's time, or where the run's log ends if that is later, and goes on with the monotonic clock that
all processes share until the machine is restarted. Setting the machine's clock and sleep (WSL2 sets it after one) do
not reach it. The runner starts it, `run_start` and `task_start` tell its zero, and the trainers have that from the
runner's environment.
"""

import contextlib
import os
import platform
import time
from pathlib import Path
from typing import Any

CLOCK_ENV = "FINETUI_CLOCK"
MAX_T = 4e9  # the year 2096; a larger time is no time, and clocks cannot show it


def boot_id() -> str:
    """What names this start of the machine, empty where the system has no such name; clocks do not change it."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def started(seen: float) -> float:
    """The zero of a clock that starts now, for a log whose last event is of the moment `seen`."""
    return max(time.time(), seen if seen < MAX_T - 1e8 else 0.0) - time.monotonic()


def inherited() -> float | None:
    """The zero of the clock that this process was started with, None where it is no run's own."""
    with contextlib.suppress(KeyError, ValueError):
        return float(os.environ[CLOCK_ENV])
    return None


def moment(zero: float | None) -> float:
    """Now on the clock with this zero; without one by the machine's, as what no runner started has none."""
    return time.time() if zero is None else time.monotonic() + zero


def zero_told(start: dict[str, Any]) -> float | None:
    """The zero that the start of a run tells; None where it tells none, or counts on another machine."""
    zero = start.get("clock")
    here = (start.get("boot"), start.get("host")) == (boot_id(), platform.node())
    return zero if here and isinstance(zero, int | float) and 0 <= moment(zero) < MAX_T else None
