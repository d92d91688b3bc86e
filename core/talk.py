"""Talk to the models of a run: they live in a child, which streams what they write and ends when it is left.

The child is ``python -P -m core.evaluate_chat RUN``: one JSON object a line in, one out. No torch here.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import IO, Any

from core.children import child_environment, stage_environment
from core.runs import Run
from core.trust import refuse_strangers

Heard = dict[str, Any]


class Talk:
    """A conversation's other side. `heard` is called in a thread of its own with what the child says:

    ``loading`` (text), ``ready`` (variants), ``prompts`` (held-out ones: before, user, tools), ``text`` (id, text),
    ``end`` (id, tokens, seconds, reason: end, length or stopped), ``error`` (id or None, message, advice). Ids grow.
    """

    def __init__(self, run: Run, heard: Callable[[Heard], object]) -> None:
        refuse_strangers(run.path, run.plan)
        self._heard = heard
        self._closed = False
        self._errors = tempfile.TemporaryFile()  # a pipe that nobody drains would hold the child up
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "core.evaluate_chat", str(run.path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            cwd=tempfile.gettempdir(), env={**child_environment(), **stage_environment(run.plan())},
        )  # fmt: skip
        threading.Thread(target=self._listen, name="talk", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._child.pid

    def say(
        self,
        number: int,
        variant: str,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        *,
        max_new_tokens: int,
        temperature: float,
    ) -> None:
        """Have a model answer `messages`; what it writes comes with the id `number`. Several wait for one another."""
        self._send(
            do="say", id=number, variant=variant, messages=messages, tools=tools, max_new_tokens=max_new_tokens,
            temperature=temperature,
        )  # fmt: skip

    def stop(self) -> None:
        """End what is being written, and forget what waits."""
        self._send(do="stop")

    def close(self) -> None:
        """End the child, and with it free the memory of the models."""
        self._closed = True
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            _close(pipe)
        self._errors.close()

    def _send(self, **request: Any) -> None:
        assert self._child.stdin
        with contextlib.suppress(OSError, ValueError):  # a child that has died is told of by the listener
            self._child.stdin.write(json.dumps(request).encode() + b"\n")
            self._child.stdin.flush()

    def _listen(self) -> None:
        assert self._child.stdout
        with contextlib.suppress(OSError, ValueError):
            for line in self._child.stdout:
                if self._closed:
                    return
                with contextlib.suppress(ValueError):
                    self._heard(json.loads(line))
        if not self._closed:
            self._heard(
                {"event": "error", "id": None, "message": "The model's process has ended.", "advice": self._last()}
            )

    def _last(self) -> str:
        """What the child said last on standard error."""
        with contextlib.suppress(OSError, ValueError):
            self._errors.seek(max(self._errors.seek(0, os.SEEK_END) - 4000, 0))
            lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
            return lines[-1][:300] if lines else "It said nothing: the machine may be out of memory."
        return ""


def _close(pipe: IO[bytes] | None) -> None:
    with contextlib.suppress(OSError):
        if pipe:
            pipe.close()
