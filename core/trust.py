"""A run folder may come from a stranger: what is refused before anything of it is run or written. No torch."""

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from core.errors import FinetuiError
from core.paths import cache_dir, writing_whole

if TYPE_CHECKING:
    from core.plan import Plan

TRUST_ENV = "FINETUI_TRUST_REMOTE_CODE"


def _mark(folder: Path) -> Path:
    name = hashlib.sha256(str(folder.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return cache_dir() / "trusted" / name


def remember_trust(folder: Path, plan: "Plan") -> None:
    """Keep, outside of the run's folder, that the person on this machine has allowed its model's own code."""
    if plan.model.trust_remote_code:
        with writing_whole(_mark(folder)) as stream:
            stream.write(_model(plan))


def _model(plan: "Plan") -> str:
    return f"{plan.model.name}@{plan.model.revision or ''}\n"


def refuse_strangers(folder: Path, read_plan: "Callable[[], Plan]") -> None:
    """Refuse a run whose folder leads elsewhere, or that wants to run code that nobody on this machine has allowed.

    The plan is read when the folder is known to be what it seems. Raises FinetuiError.
    """
    for path in _links(folder):
        raise FinetuiError(
            f"{path.relative_to(folder)} in {folder.name} is a link to another place: nothing is written through it.",
            "Put the file or folder itself there.",
        )
    plan = read_plan()
    if not plan.model.trust_remote_code or os.environ.get(TRUST_ENV):
        return
    known = ""
    with contextlib.suppress(OSError):
        known = _mark(folder).read_text(encoding="utf-8")
    if known != _model(plan):
        raise FinetuiError(
            f"{folder.name} was not made here, and its plan runs Python code of the model {plan.model.name}.",
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
