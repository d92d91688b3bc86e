"""What a stage goes on from: the newest sound checkpoint, and only with the rows and settings it was begun with."""

import json
import shutil
from pathlib import Path
from typing import Any

from core.checkpoints import checkpoints_in, damage, sound_checkpoint, step_of
from core.errors import FinetuiError
from core.plan import StagePlan
from core.reporter import Reporter
from core.runs import Run

ROWS_AND_ORDER = (
    "data.demo", "data.files", "data.dataset", "data.dataset_config", "data.dataset_file", "data.dataset_revision",
    "data.split", "data.columns", "data.holdout", "data.include_undesirable", "data.too_long", "data.duplicates",
    "data.max_rows", "max_length", "max_prompt_length", "seed", "effective_batch",
)  # fmt: skip
"""What a checkpoint cannot be separated from: with another value the steps after it would see other rows."""


def resume_point(run: Run, name: str, reporter: Reporter) -> Path | None:
    """The newest checkpoint of the stage that is as it was saved; newer ones are named with what is wrong and removed.

    None where the stage begins at its beginning.
    """
    folder = run.stage_path(name) / "checkpoints"
    found, wrong = sound_checkpoint(folder)
    if wrong:
        where = f"goes on from {found.name}" if found else "begins at its first step"
        reporter.notice(f"{name.upper()} {where}: {'; '.join(wrong[:3])}.", "warning")
    for other in checkpoints_in(folder):
        if step_of(other) > step_of(found):
            shutil.rmtree(other, ignore_errors=True)
    return found


def sound_base(run: Run, base: str) -> Path:
    """The model that the stage before has left. Raises FinetuiError where it is damaged."""
    folder = run.final_model(base)
    if words := damage(folder):
        raise FinetuiError(
            f"The model that {base.upper()} left is damaged: {words}.",
            f"Delete {folder} and resume: it is made again from its newest checkpoint.",
        )
    return folder


QUIET = ("batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "effective_batch", "data.file")


def settings_of(stage: StagePlan) -> dict[str, Any]:
    """What a stage is begun with, by dotted path."""
    values = stage.model_dump(mode="json")
    data = {f"data.{key}": value for key, value in values.pop("data").items()}
    return {**values, **data, "effective_batch": stage.effective_batch}


def compare_with_start(file: Path, stage: StagePlan, name: str, hashes: dict[str, str], reporter: Reporter) -> None:
    """Refuse to go on with other rows than the stage was begun with, or in another order; say what else has changed.

    `file` is the stage's ``data.json`` from its last start. Raises FinetuiError.
    """
    try:
        before = json.loads(file.read_bytes())
        known, settings = before.get("sha256") or {}, before.get("settings") or {}
        sums, now = set(known.values()), set(hashes.values())
        before_now = [(key, settings[key], value) for key, value in settings_of(stage).items() if key in settings]
    except (OSError, ValueError, AttributeError, TypeError):
        return
    instead = "or start a new run from this one's model (--model-name run:NAME)."
    if sums and now and sums != now:
        changed = next((path for path in hashes if hashes[path] not in sums), next(iter(hashes)))
        raise FinetuiError(
            f"{Path(changed).name} is not what it was when this run was begun: the steps would see other rows.",
            f"Put it back as it was, {instead}",
        )
    for key, old, new in before_now:
        if old != new and key in ROWS_AND_ORDER:
            raise FinetuiError(
                f"{name}.{key} was {old} when this run was begun and is {new} now: the steps would see other rows.",
                f"Set it back in plan.yaml, {instead}",
            )
    others = [f"{name}.{key} {old} → {new}" for key, old, new in before_now if old != new and key not in QUIET]
    if others:
        reporter.notice(f"Changed in the plan since this stage was begun: {', '.join(others[:6])}.")
