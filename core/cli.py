"""The commands without the app: ``finetui sft|kto|sft-kto|demo``, ``runs|show|watch|stop|abort|resume|delete RUN``,
``merge|gguf|upload RUN``, ``check``, ``data``, ``doctor``, ``fit`` and ``plan``.

This module owns standard error and exit codes: 0 done, 1 the run failed, 2 bad usage, plan or data, 3 no device or no
room, 4 an evaluation below what was asked of it, 130 interrupted.
"""

import argparse
import io
import os
import sys
from collections.abc import Sequence

from core.console import keep_others_out, open_app, speak_utf8
from core.errors import FinetuiError
from core.flags import build_parser
from core.stages import EXPORT_STAGES, METHODS

RESULT_COMMANDS = {"eval": "evaluate", "chat": "chat", "compare": "compare", "report": "report"}


def main(argv: Sequence[str] | None = None) -> int:
    """The ``finetui`` command. Returns the exit code."""
    if argv is None:
        speak_utf8()
        keep_others_out()
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # foreign text, and terminals that are not UTF-8
    try:
        if not words:
            return open_app()
        arguments = build_parser().parse_args(words)
        return _dispatch(arguments)
    except FinetuiError as error:
        from core.text import clean

        print(f"finetui: {clean(error.message)}", file=sys.stderr)
        if error.advice:
            print(f"  {clean(error.advice)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(arguments: argparse.Namespace) -> int:
    name = arguments.command
    if arguments.every_runs_dir:
        from core.paths import runs_dir

        os.environ["FINETUI_RUNS"] = str(runs_dir(arguments.every_runs_dir))
    if name is None:
        return open_app()
    if name in ("check", "data"):
        from core import data_commands

        return int(getattr(data_commands, arguments.deed if name == "data" else "check")(arguments))
    from core import commands

    if name in (*METHODS, "demo"):
        return commands.train(arguments, "sft-kto" if name == "demo" else name, demo=name == "demo")
    if name in EXPORT_STAGES:
        from core import commands_export

        return int(getattr(commands_export, name)(arguments))
    if name == "plan":
        print(commands.resolved(arguments, arguments.method).as_yaml(), end="")
        return 0
    if name in RESULT_COMMANDS:
        from core import result_commands

        return int(getattr(result_commands, RESULT_COMMANDS[name])(arguments))
    return int(getattr(commands, name)(arguments))


if __name__ == "__main__":
    sys.exit(main())
