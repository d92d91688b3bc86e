"""A run folder may come from a stranger: what is refused before anything of it is run or written. No torch."""

import contextlib
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from core.errors import FinetuiError
from core.paths import cache_dir, writing_whole

if TYPE_CHECKING:
    from core.plan import Plan
    from core.runs import Run

TRUST_ENV = "FINETUI_TRUST_REMOTE_CODE"


def _mark(run: "Run") -> Path:
    name = hashlib.sha256(str(run.path.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return cache_dir() / "trusted" / name


def remember_trust(run: "Run", plan: "Plan") -> None:
    """Keep, outside of the run, that the person on this machine has allowed its model's own code."""
    if plan.model.trust_remote_code:
        with writing_whole(_mark(run)) as stream:
            stream.write(_model(plan))


def _model(plan: "Plan") -> str:
    return f"{plan.model.name}@{plan.model.revision or ''}\n"


def refuse_strangers(run: "Run") -> None:
    """Refuse a run whose folder leads elsewhere, or that wants to run code that nobody on this machine has allowed.

    Raises FinetuiError.
    """
    for path in _links(run.path):
        raise FinetuiError(
            f"{path.relative_to(run.path)} in {run.name} is a link to another place: nothing is written through it.",
            "Put the file or folder itself there.",
        )
    plan = run.plan()
    if not plan.model.trust_remote_code or os.environ.get(TRUST_ENV):
        return
    known = ""
    with contextlib.suppress(OSError):
        known = _mark(run).read_text(encoding="utf-8")
    if known != _model(plan):
        raise FinetuiError(
            f"{run.name} was not made here, and its plan runs Python code that comes with the model {plan.model.name}.",
            f"If you trust that code: set {TRUST_ENV}=1 for this once.",
        )


def _links(folder: Path, depth: int = 3) -> list[Path]:
    """Links inside `folder`, as far down as runs write."""
    found: list[Path] = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink():
                found.append(Path(entry.path))
            elif depth > 1 and entry.is_dir(follow_symlinks=False):
                found += _links(Path(entry.path), depth - 1)
    return found
