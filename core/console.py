"""What the commands share: JSON on standard output, the token that leaves the arguments, the app they may become."""

import argparse
import contextlib
import json
import os
import sys
from typing import Any

from core.errors import FinetuiError


def open_app(*words: str) -> int:
    """The full-screen app, in a process that becomes it: the core does not import the app."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise FinetuiError("The app needs a terminal.", "Without one use the commands: `finetui --help`.")
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
