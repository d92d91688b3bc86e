"""Workers for large files: processes of our own that answer requests in order and end when their parent does.

A worker is ``python -P -m core.data_worker``. Requests and replies are msgpack with their length before them, so that
nothing a file holds is ever run, and a worker whose parent was killed reads the end of its input and goes.
"""

import contextlib
import os
import struct
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from typing import IO, Any

import msgspec

from core.errors import FinetuiError
from core.secrets import without_secrets

_pack, _unpack = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder().decode
AHEAD = 2
"""Requests a worker may be ahead of what was taken: what bounds the memory of replies that wait."""


def write_message(stream: IO[bytes], message: Any) -> None:
    body = _pack(message)
    stream.write(struct.pack("<I", len(body)))
    stream.write(body)
    stream.flush()


def read_message(stream: IO[bytes]) -> Any:
    """The next message; None at the end of the stream."""
    head = stream.read(4)
    if len(head) < 4:
        return None
    body = stream.read(struct.unpack("<I", head)[0])
    return _unpack(body)


def worker_count() -> int:
    """Workers worth having here: one for each core, four at most, for each takes some 40 MB."""
    return max(1, min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))


class Workers:
    """Some workers, as a context: leaving it kills them at once."""

    def __init__(self, count: int) -> None:
        self._errors = tempfile.TemporaryFile()
        self._children = [
            subprocess.Popen(
                [sys.executable, "-P", "-m", "core.data_worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, cwd=tempfile.gettempdir(),
                env=without_secrets(),
            )
            for _ in range(count)
        ]  # fmt: skip
        self._change = threading.Condition()
        self._closed = self._died = False
        self._waiting: deque[tuple[int, Any]] = deque()
        self._done: dict[int, Any] = {}
        self._taken = 0

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        with self._change:
            self._closed = True
            self._change.notify_all()
        for child in self._children:
            child.kill()
        for child in self._children:
            child.wait()
            for pipe in (child.stdin, child.stdout):
                with contextlib.suppress(OSError):
                    if pipe:
                        pipe.close()
        self._errors.close()

    def replies(self, requests: Iterable[Any]) -> Iterator[Any]:
        """The reply to each request, in order. Raises FinetuiError when a worker died."""
        self._waiting = deque(enumerate(requests))
        count, self._taken, self._done, self._died = len(self._waiting), 0, {}, False
        for child in self._children:
            threading.Thread(target=self._serve, args=(child,), daemon=True).start()
        while self._taken < count:
            with self._change:
                self._change.wait_for(lambda: self._taken in self._done or self._died)
                if self._died:
                    raise FinetuiError("A process that reads the data died.", self._last_words(), exit_code=1)
                reply = self._done.pop(self._taken)
                self._taken += 1
                self._change.notify_all()
            yield reply

    def _serve(self, child: subprocess.Popen[bytes]) -> None:
        """Hand requests to one worker until there are none, in a thread of its own."""
        assert child.stdin and child.stdout
        while (taken := self._next()) is not None:
            number, request = taken
            try:
                write_message(child.stdin, request)
                reply = read_message(child.stdout)
            except (OSError, ValueError):
                reply = None
            with self._change:
                self._died = self._died or reply is None
                self._done[number] = reply
                self._change.notify_all()

    def _next(self) -> tuple[int, Any] | None:
        """The next request that is not too far ahead of what was taken; None at the end."""

        def free() -> bool:
            ahead = len(self._children) * AHEAD
            return self._closed or not self._waiting or self._waiting[0][0] < self._taken + ahead

        with self._change:
            self._change.wait_for(free)
            return None if self._closed or not self._waiting else self._waiting.popleft()

    def _last_words(self) -> str:
        self._errors.seek(max(self._errors.seek(0, os.SEEK_END) - 4000, 0))
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return (lines[-1][:300] if lines else "It said nothing; perhaps memory ran out.")
