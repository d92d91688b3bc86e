"""``python -P -m tui [--runs-dir DIR]``: the app in this terminal. Exit code 2 without one that it can draw in."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from core.console import need_terminal
from core.errors import FinetuiError
from core.paths import runs_dir
from core.runs import Run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the app until it is left; returns the exit code."""
    parser = argparse.ArgumentParser(prog="finetui", description="The full-screen app.")
    parser.add_argument("--runs-dir", metavar="DIR", help="folder of the runs (default: ./runs or $FINETUI_RUNS)")
    parser.add_argument("--watch", metavar="PATH", help="open this run's directory or recorded log at once")
    parser.add_argument("--chat", metavar="PATH", help="talk to the model of this run's directory at once")
    arguments = parser.parse_args(argv)
    try:
        need_terminal()
    except FinetuiError as error:
        print(f"finetui: {error.message}\n  {error.advice}", file=sys.stderr)
        return error.exit_code
    folder = runs_dir(arguments.runs_dir)
    os.environ["FINETUI_RUNS"] = str(folder)

    from tui.app import FinetuiApp
    from tui.follow import recording

    watch = recording(Path(arguments.watch)) if arguments.watch else None
    app = FinetuiApp(folder, watch, Run(Path(arguments.chat)) if arguments.chat else None)
    app.run()
    return app.return_code or 0


if __name__ == "__main__":
    sys.exit(main())
