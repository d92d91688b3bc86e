"""What a run does on a disk that is full; to be run where /mnt is a small disk: see test_storage.py. Prints JSON.

unshare -Urm sh -c "mount -t tmpfs -o size=6m none /mnt && python tests/faults/full_disk.py TINY_MODEL"
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

from harness import Place, events, until  # noqa: E402

from core import runner  # noqa: E402
from core.errors import FinetuiError  # noqa: E402
from core.postmortem import post_mortem  # noqa: E402
from core.runs import is_alive, status  # noqa: E402

DISK = Path("/mnt")


def fill(leave: int) -> Path:
    """A file that takes all but `leave` bytes of the disk."""
    ballast = DISK / "ballast"
    with ballast.open("wb", buffering=0) as stream:
        for size in (1 << 16, 1 << 12):
            try:
                while shutil.disk_usage(DISK).free > leave + size:
                    stream.write(b"x" * size)
            except OSError:
                break
    return ballast


def trained_on_a_full_disk(place: Place) -> dict[str, Any]:
    """The disk fills while it trains; the checkpoint does not fit; after that there is room and it is resumed."""
    run = place.run("sft", DISK / "runs", name="full", sft__max_steps=120, sft__save_steps=10, sft__save_total_limit=2)
    runner.start(run)
    until(lambda: run.state().stage("sft").checkpoints)
    ballast = fill(12_000)
    until(lambda: not is_alive(run), 120)
    now = status(run, run.state().end_status)
    card = post_mortem(run, now)
    found = {
        "status": now, "kind": card.cause.kind if card else "", "title": card.title if card else "",
        "checkpoint": bool(run.newest_checkpoint("sft")), "errors": len(run.state().errors),
    }  # fmt: skip
    ballast.unlink()
    runner.resume(run)
    until(lambda: not is_alive(run), 120)
    steps = [step for step, _ in run.state().stage("sft").series["loss"]]
    found |= {"after": run.state().end_status, "steps": len(steps), "sorted": steps == sorted(set(steps))}
    found["lost"] = [event["text"] for event in events(run) if "lines of this log" in str(event.get("text"))]
    shutil.rmtree(run.path)
    return found


def started_on_a_full_disk(place: Place) -> dict[str, Any]:
    """Nothing fits at all: it is said in a sentence, and nothing is left behind."""
    ballast = fill(0)
    try:
        place.run("sft", DISK / "runs", name="none")
        said = ""
    except FinetuiError as error:
        said = error.message
    ballast.unlink()
    return {"said": said, "left": sorted(path.name for path in (DISK / "runs").iterdir())}


def draft_on_a_full_disk() -> dict[str, Any]:
    """The app's draft: the one kept before stays whole."""
    from tui.draft import Draft, load_draft, save_draft

    path = DISK / "draft.json"
    save_draft(Draft(step=1), path)
    ballast = fill(0)
    try:
        save_draft(Draft(step=2, values={"sft.seed": "1" * 6000}), path)
        said = ""
    except OSError as error:
        said = str(error.strerror)
    ballast.unlink()
    kept = load_draft(path)
    return {"said": said, "kept": kept.step if kept else None, "left": sorted(os.listdir(DISK))}


if __name__ == "__main__":
    with Place(DISK, Path(sys.argv[1])) as small:
        found = {"started": started_on_a_full_disk(small), "draft": draft_on_a_full_disk()}
        print(json.dumps(found | {"trained": trained_on_a_full_disk(small)}))
