"""The models a run has made, told from its folders. No torch."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from core.artefacts import fingerprint
from core.errors import FinetuiError
from core.plan import Plan
from core.runs import Run


@dataclass(frozen=True)
class Variant:
    """One of a run's models: ``base``, ``start`` (the adapter it began with), a stage, or ``STAGE-STEP``."""

    name: str
    folder: Path | None = None

    @property
    def identity(self) -> str:
        """What differs once the weights do, and stays where the run is moved or copied."""
        if self.folder is None:
            return self.name
        with contextlib.suppress(OSError):
            return f"{self.folder.name} {fingerprint(self.folder)}"
        return str(self.folder)


def variants_of(run: Run, plan: Plan, start: Path | None = None) -> list[Variant]:
    """The base, then the adapter it began with, then what the run made; of a stage not done, its newest checkpoint.

    Raises FinetuiError when it has made nothing yet.
    """
    found = [Variant("base")] + ([Variant("start", start)] if start else [])
    begun = len(found)
    for stage in plan.training_stages:
        if run.trained(stage):
            found.append(Variant(stage, run.final_model(stage)))
        elif checkpoint := run.newest_checkpoint(stage):
            found.append(Variant(f"{stage}-{checkpoint.name.removeprefix('checkpoint-')}", checkpoint))
    if len(found) == begun:
        raise FinetuiError(
            f"{run.name} has no model yet: no stage is done and there is no checkpoint.",
            f"`finetui resume {run.name}` goes on with it.",
        )
    return found
