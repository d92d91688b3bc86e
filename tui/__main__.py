"""``python -P -m tui [--runs-dir DIR]``: the app in this terminal. Exit code 2 without one."""

import argparse
import os
import sys
from collections.abc import Sequence

from core.paths import runs_dir


def main(argv: Sequence[str] | None = None) -> int:
    """Run the app until it is left; returns the exit code."""
    parser = argparse.ArgumentParser(prog="finetui", description="The full-screen app.")
    parser.add_argument("--runs-dir", metavar="DIR", help="folder of the runs (default: ./runs or $FINETUI_RUNS)")
    arguments = parser.parse_args(argv)
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        print("finetui: The app needs a terminal.", file=sys.stderr)
        print("  Without one use the commands: `finetui --help`.", file=sys.stderr)
        return 2
    folder = runs_dir(arguments.runs_dir)
    os.environ["FINETUI_RUNS"] = str(folder)

    from tui.app import FinetuiApp

    app = FinetuiApp(folder)
    app.run()
    return app.return_code or 0


if __name__ == "__main__":
    sys.exit(main())
