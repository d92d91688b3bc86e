"""What the commands share: UTF-8, JSON on standard output, the token that leaves the arguments, the app they become."""

import argparse
import contextlib
import json
import os
import sys
from typing import Any

from core.errors import FinetuiError

UTF8 = "PYTHONUTF8"
NO_TERMINAL = ("", "dumb", "unknown")
"""Values of TERM that no control may be sent to."""


def keep_others_out() -> None:
    """What this process and its children make can be written by nobody else, whatever the umask."""
    os.umask(os.umask(0o077) | 0o002)


def speak_utf8() -> None:
    """Start this process over in Python's UTF-8 mode where the locale is of another encoding.

    The libraries under Python take every path for UTF-8, and terminals are; what the locale says is seldom meant.
    """
    if os.name == "posix" and sys.getfilesystemencoding() != "utf-8" and sys.executable and UTF8 not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, UTF8: "1"})


def locale_name() -> str:
    """The locale that this process was given, empty where it has none."""
    given = {name: os.environ.get(name, "") for name in ("LC_ALL", "LC_CTYPE", "LANG")}
    if given["LC_CTYPE"] == "C.UTF-8":  # Python puts it there itself where there is none (PEP 538)
        given["LC_CTYPE"] = ""
    return next(filter(None, given.values()), "")


def need_terminal() -> None:
    """Raises FinetuiError where the app would show nothing that can be read."""
    term = os.environ.get("TERM", "")
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise FinetuiError("The app needs a terminal.", "Without one use the commands: `finetui --help`.")
    if os.name == "posix" and term in NO_TERMINAL:
        raise FinetuiError(
            f"The app needs a terminal that it can draw in; TERM is {term or 'not set'}.",
            "Use the commands: `finetui --help`. Where it is a real one: export TERM=xterm-256color.",
        )
    if os.environ.get("STY") and "utf" not in locale_name().lower():
        raise FinetuiError(
            "The app draws in UTF-8, and this window of screen has another locale.",
            "Start it with `screen -U`, or here: `screen -X utf8 on; export LANG=C.UTF-8`, and re-attach with -U.",
        )


def open_app(*words: str) -> int:
    """The full-screen app, in a process that becomes it: the core does not import the app."""
    need_terminal()
    command = [sys.executable, "-P", "-m", "tui", *words]
    if os.name == "nt":
        import subprocess

        return subprocess.call(command)
    os.execv(sys.executable, command)


def take_token(arguments: argparse.Namespace) -> None:
    """Move ``--hf-token`` into the environment of this process and its children, and out of the arguments."""
    if arguments.hf_token:
        os.environ["HF_TOKEN"] = arguments.hf_token
        arguments.hf_token = None


def print_json(value: Any) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(value, ensure_ascii=False))
