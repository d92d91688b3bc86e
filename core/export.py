"""One export stage in a process of its own: ``python -P -m core.export RUN merge|gguf|upload``. Run by core.runner."""

import gc
import logging
import sys
from pathlib import Path

from core.plan import Plan
from core.reporter import Reporter, Stopped
from core.runner import EXIT_STOPPED
from core.runs import Run
from core.secrets import guard_output


def main() -> int:
    """Returns 0 when the stage is done, 1 when it failed, EXIT_STOPPED when a stop was asked for."""
    guard_output()
    run, stage = Run(Path(sys.argv[1])), sys.argv[2]
    reporter = Reporter(run, stage)
    try:
        export(run, run.plan(), stage, reporter)
        return 0
    except Stopped:
        return EXIT_STOPPED
    except BaseException as error:
        reporter.failure(error)
        logging.getLogger(__name__).exception("the stage failed")
        return 1


def export(run: Run, plan: Plan, stage: str, reporter: Reporter) -> None:
    if stage == "merge":
        from core.export_model import merge_stage as make
    elif stage == "gguf":
        from core.export_gguf import gguf_stage as make
    else:
        from core.export_upload import upload_stage as make
    gc.freeze()  # what was imported stays, and is not looked through again
    gc.enable()
    make(run, plan, reporter)


if __name__ == "__main__":
    gc.disable()  # nothing that is imported is garbage, and looking for some takes a fifth of the time
    sys.exit(main())
