"""Whose turn it is on a device: a lock for each, held by the run that trains there, its runner and its trainers.

As with a run's own lock the operating system lets go of it when the last holder is gone, however it died. Where there
is no ``flock`` (Windows) every run has its turn at once.
"""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from core.gpu import visible_card
from core.paths import cache_dir

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from core.plan import Plan


def device_of(plan: "Plan") -> str:
    """``cpu``, or the GPU that a run uses: the plan's, else ``gpu-0``, or the first of CUDA_VISIBLE_DEVICES."""
    if plan.device == "cpu":
        return "cpu"
    return f"gpu-{''.join(letter for letter in visible_card(plan.gpu) if letter.isalnum() or letter == '-')}"


def turn_path(device: str) -> Path:
    return cache_dir() / "devices" / f"{device}.lock"


def take_turn(device: str, name: str) -> int | None:
    """The file descriptor that holds the device for the run `name`; None while another run holds it."""
    path = turn_path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
    if fcntl is not None and not _locked(handle):
        os.close(handle)
        return None
    os.ftruncate(handle, 0)
    os.write(handle, name.encode("utf-8", "replace"))
    return handle


def _locked(handle: int) -> bool:
    """Take the lock; tried for a moment, for viewers look at it with a lock of their own."""
    for _ in range(5):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            time.sleep(0.01)
    return False


def in_use(device: str) -> str:
    """The run that trains on the device now, empty for none. Asked with a shared lock, as viewers must."""
    if fcntl is None:
        return ""
    try:
        handle = os.open(turn_path(device), os.O_RDONLY)
    except OSError:
        return ""
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return ""
    except OSError:
        return holder(device) or "another run"
    finally:
        os.close(handle)


def holder(device: str) -> str:
    """The run that took its turn last; empty where nothing can be read."""
    try:
        return turn_path(device).read_text(encoding="utf-8", errors="replace")[:200]
    except OSError:
        return ""
