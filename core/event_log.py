"""The event log of a run as runner and trainer write it: whole lines, whatever the disk does. See `core.events`."""

import contextlib
import errno
import json
import math
import os
from pathlib import Path
from typing import Any

from core import clock
from core.secrets import redact

NO_LINK = getattr(os, "O_NOFOLLOW", 0)
"""A run folder may come from a stranger: nothing is written through a link in it."""
FULL = (errno.ENOSPC, errno.EDQUOT)
RESERVE_BYTES = 256 * 1024
LAST_WORDS = ("error", "stage_end", "run_end", "task_end")
MAX_TEXT = 20_000


class EventLog:
    """Appends whole lines to `path`; safe to use from several processes at once (one ``write`` each, O_APPEND).

    `zero` is that of the run's clock (`core.clock`); None goes by the machine's.
    """

    def __init__(self, path: Path, zero: float | None = None) -> None:
        self.path, self.zero = path, zero
        self.whole = False

    def append(self, kind: str, **fields: Any) -> None:
        """Write one event now. Non-finite numbers become null and are counted in ``nonfinite``; long text is cut."""
        counted = [0]
        event = {"t": round(clock.moment(self.zero), 3), "kind": kind}
        event |= {key: _plain(value, counted) for key, value in fields.items()}
        if counted[0]:
            event["nonfinite"] = counted[0]
        line = json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n"
        if not self.whole:
            line = self._mended() + line
        try:
            self._write(line)
        except OSError as error:
            if error.errno not in FULL or kind not in LAST_WORDS or not self._use_reserve():
                raise
            self._write(b"\n" + line)

    def _write(self, line: bytes) -> None:
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | NO_LINK, 0o600)
        self.whole = False
        try:
            self.whole = os.write(handle, line) == len(line)
        finally:
            os.close(handle)
        if not self.whole:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    @property
    def reserve(self) -> Path:
        """A file that gives its place on a full disk to the last words of a run."""
        return self.path.with_name(".reserve")

    def keep_reserve(self) -> None:
        """Make the reserve anew, if there is room for it."""
        with contextlib.suppress(OSError):
            handle = os.open(self.reserve, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | NO_LINK, 0o600)
            try:
                os.write(handle, os.urandom(RESERVE_BYTES))  # zeros would take no place on some file systems
            finally:
                os.close(handle)

    def _use_reserve(self) -> bool:
        try:
            self.reserve.unlink()
        except OSError:
            return False
        return True

    def _mended(self) -> bytes:
        """What ends a torn last line, so that the next event does not become part of it."""
        with contextlib.suppress(OSError), self.path.open("rb") as stream:
            stream.seek(-1, os.SEEK_END)
            return b"" if stream.read(1) == b"\n" else b"\n"
        return b""


def _plain(value: Any, counted: list[int]) -> Any:
    """`value` as JSON can hold it."""
    if isinstance(value, bool | int | None):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        counted[0] += 1
        return None
    if isinstance(value, str):
        value = redact(value)
        return value if len(value) <= MAX_TEXT else value[: MAX_TEXT // 2] + " … " + value[-MAX_TEXT // 2 :]
    if isinstance(value, dict):
        return {str(key): _plain(item, counted) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, counted) for item in value]
    if hasattr(value, "item"):
        return _plain(value.item(), counted)
    return str(value)
