"""Look at training examples through the tokenizer without importing it: a child that stays warm does the reading.

The child is ``python -P -m core.train_lens``: one JSON object a line in, one out. It never goes to the network; what is
not on this machine is said to be missing. No torch here.
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

from core.children import CHILD_ENV, child_environment, stage_environment
from core.config import Resolved, save_plan
from core.errors import FinetuiError
from core.paths import scratch
from core.plan import Plan
from core.secrets import without_secrets

Reply = dict[str, Any]
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


class Lens:
    """Answers questions about examples in a thread of its own, the newest of each slot; earlier ones are dropped.

    `answer` is called in that thread with slot and reply. A reply has ``key`` as asked, and either figures or
    ``error`` and ``advice``. The child starts with the first question and ends with `close`, or when this process does.
    """

    def __init__(self, answer: Callable[[str, Reply], object]) -> None:
        self._answer = answer
        self._wants: dict[str, Reply] = {}
        self._change = threading.Condition()
        self._closed = False
        self._child: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._thread: threading.Thread | None = None

    @property
    def pid(self) -> int | None:
        """The child's process id; None before the first question and after the end."""
        return self._child.pid if self._child else None

    def show(self, slot: str, key: str, plan: Plan, stage: str, at: int, *, ids: bool = False) -> None:
        """Ask for usable row `at` (from 0) of a stage, as it will be trained; with `ids` token by token."""
        request = {"do": "show", "key": key, "plan": plan.model_dump(mode="json"), "stage": stage, "at": at, "ids": ids}
        self.ask(slot, request)

    def count(self, slot: str, key: str, plan: Plan, stage: str) -> None:
        """Ask for the examples and tokens of a stage; of many rows an even sample is tokenised."""
        self.ask(slot, {"do": "count", "key": key, "plan": plan.model_dump(mode="json"), "stage": stage})

    def limit(self, slot: str, key: str, plan: Plan, stage: str, at: int) -> None:
        """Ask what a limit of `at` tokens would do to a stage's rows."""
        self.ask(slot, {"do": "limit", "key": key, "plan": plan.model_dump(mode="json"), "stage": stage, "at": at})

    def close(self) -> None:
        """End the child and the thread."""
        with self._change:
            self._closed = True
            self._wants = {}
            self._change.notify_all()
            self._end_child()

    def ask(self, slot: str, request: Reply) -> None:
        """Ask anything that the child understands: what it is told by `core.train_lens`."""
        with self._change:
            if self._closed:
                return
            self._wants[slot] = request
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="lens", daemon=True)
                self._thread.start()
            self._change.notify_all()

    def _serve(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._closed or self._wants)
                if self._closed:
                    return
                slot = min(self._wants, key=lambda name: self._wants[name]["do"] != "show")
                request = self._wants.pop(slot)
            try:
                reply = self._ask(request)
            except (OSError, ValueError):
                reply = self._death()
            if self._closed:
                return
            self._answer(slot, {**reply, "key": request["key"]})

    def _ask(self, request: Reply) -> Reply:
        child = self._living()
        assert child.stdin and child.stdout
        child.stdin.write(json.dumps(request).encode() + b"\n")
        child.stdin.flush()
        return json.loads(child.stdout.readline())

    def _living(self) -> subprocess.Popen[bytes]:
        with self._change:
            if self._closed:
                raise OSError("closed")
            if self._child is None or self._child.poll() is not None:
                self._end_child()
                self._errors = tempfile.TemporaryFile()  # a pipe that nobody drains would hold the child up
                self._child = subprocess.Popen(
                    [sys.executable, "-P", "-m", "core.train_lens"],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
                    cwd=tempfile.gettempdir(), env={**CHILD_ENV, **without_secrets(), **OFFLINE},
                )  # fmt: skip
            return self._child

    def _death(self) -> Reply:
        """What the child said last."""
        last = ""
        with self._change, contextlib.suppress(OSError, ValueError):
            if self._errors:
                self._errors.seek(max(self._errors.seek(0, os.SEEK_END) - 4000, 0))
                last = (self._errors.read().decode("utf-8", "replace").strip().splitlines() or [""])[-1]
            self._end_child()
        return {"error": "The tokenizer's process died.", "advice": last[:300] or "It said nothing."}

    def _end_child(self) -> None:
        child, self._child = self._child, None
        if child:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                with contextlib.suppress(OSError):
                    if pipe:
                        pipe.close()
        if self._errors:
            self._errors.close()
            self._errors = None


class Looks:
    """Looks into the rows of stages, each in a child (`core.data_look`): a new one ends the one before it at once.

    `heard` is called in a thread with slot, key as asked and message: ``progress``, ``report``, ``hub``, ``notice``, or
    ``error`` and ``advice``. Nothing is heard of a look that was ended.
    """

    def __init__(self, heard: Callable[[str, str, Reply], object]) -> None:
        self._heard = heard
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._asked: dict[str, Reply] = {}
        self._change = threading.Lock()
        self._closed = False

    def look(self, slot: str, key: str, request: Reply) -> None:
        """Look at what `request` (see core.data_look.Request) names."""
        with self._change:
            self._end(slot)
            self._asked[slot] = request
        threading.Thread(target=self._look, args=(slot, key, request), name="look", daemon=True).start()

    def _start(self, slot: str, request: Reply) -> "subprocess.Popen[bytes] | None":
        """A child for the slot; None where it is not wanted any more. Raises OSError."""
        with self._change:
            if self._closed or self._asked.get(slot) is not request:
                return None
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", "core.data_look"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, cwd=tempfile.gettempdir(), env=child_environment(),
            )  # fmt: skip
            self._children[slot] = child
            return child

    def end(self, slot: str) -> None:
        with self._change:
            self._end(slot)

    def close(self) -> None:
        """End every look."""
        with self._change:
            self._closed = True
            for slot in list(self._children):
                self._end(slot)

    def _end(self, slot: str) -> None:
        self._asked.pop(slot, None)
        child = self._children.pop(slot, None)
        if child:
            child.kill()

    def _look(self, slot: str, key: str, request: Reply) -> None:
        try:
            child = self._start(slot, request)
        except OSError as error:
            self._heard(slot, key, {"error": f"The rows cannot be looked at: {error.strerror}.", "advice": ""})
            return
        if child is None:
            return
        told = False
        with contextlib.suppress(OSError, ValueError):
            assert child.stdin and child.stdout
            child.stdin.write(json.dumps(request).encode() + b"\n")
            child.stdin.close()
            for line in child.stdout:
                message = json.loads(line)
                told = told or "progress" not in message
                if self._children.get(slot) is child:
                    self._heard(slot, key, message)
        child.wait()
        if child.stdout:
            child.stdout.close()
        if not told and self._children.get(slot) is child:
            self._heard(slot, key, {"error": "The process that reads the rows died.", "advice": "Try it once more."})


def ask_once(request: Reply) -> Reply:
    """Ask a lens of its own one question and wait for the answer. Raises FinetuiError with what it found wrong."""
    found: list[Reply] = []
    answered = threading.Event()

    def take(slot: str, reply: Reply) -> None:
        found.append(reply)
        answered.set()

    lens = Lens(take)
    try:
        lens.ask("once", {"key": "", **request})
        answered.wait()
    finally:
        lens.close()
    if "error" in found[0]:
        raise FinetuiError(found[0]["error"], found[0]["advice"])
    return found[0]


class DryRun:
    """The dry run of a plan in a child: rows are tokenised and counted, no model is loaded, no run is made."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._ended = False

    def text(self, plan: Resolved) -> list[str]:
        """Its lines; waits for the child. Raises FinetuiError with what the dry run found wrong."""
        with scratch() as folder:
            save_plan(plan, folder / "plan.yaml")
            with self._lock:
                if self._ended:
                    return []
                self._child = subprocess.Popen(
                    [sys.executable, "-P", "-m", "core.train_dry", str(folder), "data"], cwd=folder, text=True,
                    stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
                    errors="replace", env={**child_environment(), **stage_environment(plan.plan)},
                )  # fmt: skip
            said, errors = self._child.communicate()
        try:
            report = json.loads(said.strip().splitlines()[-1])
        except (ValueError, IndexError):
            last = (errors.strip().splitlines() or ["No word from it."])[-1][:300]
            raise FinetuiError("The dry run died.", last, exit_code=1) from None
        if "error" in report:
            raise FinetuiError(report["error"], report["advice"])
        return report["text"]

    def end(self) -> None:
        """Kill the child."""
        with self._lock:
            self._ended = True
            if self._child:
                self._child.kill()
