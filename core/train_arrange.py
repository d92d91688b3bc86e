"""How a stage's rows go through this GPU: what the planner decides from the rows, the model's shape and free memory."""

import json
import math
import random
from dataclasses import dataclass, replace
from pathlib import Path

from core.batches import kto_batches
from core.fit import Arrangement, arrange, keep_arrangement, kept_arrangement, planned_arrangement
from core.memory import Estimate, Lengths, estimate, shape_in
from core.plan import KTOPlan, Plan
from core.prepare import StageData
from core.sources import ModelSource, model_folder
from core.train_events import Reporter

UNSLOTH_PADS = {"gpt_oss", "gemma2"}
"""Families for which Unsloth pads batches, whatever is asked (its PADDING_FREE_BLOCKLIST)."""
PADDING_FREE_TOKENS = 8192
"""Up to so many tokens end to end plain attention with a mask is cheaper than padding."""


@dataclass
class Fitting:
    """A stage with its rows tokenised, before its model is loaded."""

    plan: Plan
    name: str
    source: ModelSource
    data: StageData

    def arrangement(self, folder: Path, cap: int | None, reporter: Reporter) -> Arrangement:
        """What the run has kept, else the quickest under `cap` bytes, told and kept; without a GPU the plan's own."""
        stage = self.plan.stage(self.name)
        if cap is None:
            return kept_arrangement(folder, stage) or planned_arrangement(stage)
        if kept := kept_arrangement(folder, stage):
            return kept
        place = model_folder(self.source)
        shape = shape_in(place, self.plan.model.size)
        found = arrange(self.plan, self.name, shape, self.lengths, self.largest, cap, place, padded=self.padded)
        keep_arrangement(folder, found)
        words = f"{found.batch_size} rows at once, {stage.effective_batch // found.batch_size} times a step"
        reporter.event("arrangement", batch_size=found.batch_size, open_layers=found.open_layers,
                       checkpointing=found.checkpointing, why=found.why, cap_bytes=cap)  # fmt: skip
        if found.batch_size != stage.batch_size or found.open_layers or "more than fits" in found.why:
            reporter.notice(f"{words}: {found.why}.")
        return found

    def estimate(self, found: Arrangement, size: int) -> Estimate | None:
        """What the arrangement should need at its highest with `size` rows at once; None where it cannot be told."""
        place = model_folder(self.source)
        shape = shape_in(place, self.plan.model.size)
        found = found if size == found.batch_size else replace(found, batch_size=size, open_layers=0)
        stage = found.applied(self.plan.stage(self.name))
        plan = self.plan.model_copy(update={self.name: stage})
        if shape is None:
            return None
        return estimate(
            plan, self.name, shape, self.lengths, folder=place, open_layers=found.open_layers, padded=self.padded,
            tokens=self.largest(found.batch_size),
        )  # fmt: skip

    @property
    def lengths(self) -> Lengths:
        held = self.data.held_out.examples if self.data.held_out else None
        training = self.data.training.examples
        return Lengths.of(training.lengths.tolist(), held.lengths.tolist() if held else [])

    @property
    def padded(self) -> bool:
        """Whether SFT's batches will be padded, as far as can be told before the model is loaded."""
        switch = getattr(self.plan.stage(self.name), "padding_free", "off")
        if switch != "auto":
            return switch == "off"
        if self.plan.backend == "unsloth":
            place = model_folder(self.source)
            return place is not None and _family(place) in UNSLOTH_PADS
        stage = self.plan.stage(self.name)
        return sum(self.lengths.training[: stage.batch_size]) > PADDING_FREE_TOKENS

    def largest(self, size: int) -> int:
        """Tokens of the largest micro-batch of `size` rows that the run will make, padding counted.

        For SFT from shuffles like the run's (whose own is drawn when it begins), for KTO from the batches themselves.
        """
        stage, examples = self.plan.stage(self.name), self.data.training.examples
        lengths = examples.lengths.tolist()
        steps = stage.max_steps * stage.effective_batch / len(lengths)
        passes = steps if stage.max_steps > 0 else stage.num_train_epochs
        most = 0
        for epoch in range(max(1, min(4, math.ceil(passes)))):
            if isinstance(stage, KTOPlan):
                labels, prompts = examples.labels.tolist(), examples.prompt_keys.tolist()
                parts = stage.effective_batch // size
                batches = kto_batches(
                    labels, prompts, stage.effective_batch, stage.seed, epoch, lengths=lengths, parts=parts
                )
            else:
                order = list(range(len(lengths)))
                random.Random(f"{stage.seed}-{epoch}").shuffle(order)
                batches = [order[start : start + size] for start in range(0, len(order), size)]
            padded = self.padded or isinstance(stage, KTOPlan)
            for batch in batches:
                found = [lengths[row] for row in batch]
                most = max(most, max(found) * len(found) if padded else sum(found))
        return most


def _family(folder: Path) -> str:
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
