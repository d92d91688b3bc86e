"""Does the stage fit the GPU? One step and one evaluation on the longest rows, before the first real step.

What PyTorch may take is capped below what is free, so that too much is an error that can be handled: WSL2 would spill
into RAM without a word, and another program's memory is not ours to crowd.
"""

import contextlib
import copy
import gc
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback

from core.errors import FinetuiError
from core.fit import smaller_batches
from core.plan import Plan, StagePlan
from core.train_data import row_lengths
from core.train_events import Reporter

GIB = 1 << 30
LEFT_FREE = GIB // 2
"""Of the free memory, left to the growing CUDA context, to libraries that allocate past PyTorch, to the desktop."""
MARGIN = 0.03
"""Share of the cap that the measured step must leave: real batches fragment memory more than one."""


class Refit(Exception):
    """Only `size` rows fit at once: the stage must be started again with that micro-batch."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


@dataclass(frozen=True)
class Measured:
    """Bytes at the peak of a step on the longest rows (allocated, and reserved with what the allocator keeps)."""

    allocated: int
    reserved: int


def out_of_memory(error: BaseException) -> bool:
    """Whether an error, or what it came from, says that the GPU's memory ran out."""
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen)
        if isinstance(seen, torch.cuda.OutOfMemoryError) or "CUDA out of memory" in text or "ALLOC_FAILED" in text:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def cap_memory(plan: Plan, reporter: Reporter) -> int | None:
    """Keep PyTorch below what is free now, and below the plan's `memory_limit`; the cap in bytes, None on a CPU."""
    if plan.device != "cuda":
        return None
    free, total = torch.cuda.mem_get_info()
    cap = free - LEFT_FREE
    if plan.memory_limit:
        cap = min(cap, int(plan.memory_limit * GIB))
    if cap <= 0:
        raise FinetuiError(
            f"Only {free / GIB:.1f} GiB of the GPU's {total / GIB:.1f} are free.",
            "Another program holds the rest: `nvidia-smi` names it.",
            exit_code=3,
        )
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total))
    reporter.event("memory", cap_bytes=cap, free_bytes=free, total_bytes=total)
    return cap


class FitCallback(TrainerCallback):
    """Looks before the first step, once the trainer has made the model ready (gradient checkpointing above all)."""

    def __init__(self, trainer: Any, stage: StagePlan, cap: int, reporter: Reporter) -> None:
        self.trainer, self.stage, self.cap, self.reporter = trainer, stage, cap, reporter

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        with self.reporter.phase("preflight", "one step on the longest rows"):
            try:
                preflight(self.trainer, self.stage, self.cap, self.reporter)
            except Refit:
                raise
            except Exception as error:  # a look must not be what ends a run: the first step tells what is wrong
                logging.getLogger(__name__).exception("the look at the longest rows failed")
                text = f"The look at the longest rows failed ({type(error).__name__}); training starts without it."
                self.reporter.notice(text, "warning", "See train.log.")


def preflight(trainer: Any, stage: StagePlan, cap: int, reporter: Reporter) -> None:
    """One step and one evaluation on the longest rows, with ever smaller micro-batches until they fit under `cap`.

    Writes a `preflight` event. Raises Refit when a smaller micro-batch than the plan's is the largest that fits; where
    not even the smallest does, it warns and lets the run try. Weights, gradients and random states stay as they were.
    """
    begun = time.monotonic()
    loaded = torch.cuda.memory_allocated()  # 0 without a GPU, as the peaks are
    for size in [stage.batch_size, *smaller_batches(stage)]:
        found = measured(trainer, stage, size)
        if found is None or found.allocated > cap * (1 - MARGIN):
            needed = "more than there is" if found is None else f"{found.allocated / GIB:.1f} GiB"
            reporter.detail(f"{size} rows at once take {needed}")
            continue
        reporter.event(
            "preflight", batch_size=size, loaded_bytes=loaded, allocated_bytes=found.allocated,
            reserved_bytes=found.reserved, cap_bytes=cap, seconds=round(time.monotonic() - begun, 1),
        )  # fmt: skip
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # what is logged from here on is the training's own peak
        if size < stage.batch_size:
            raise Refit(size)
        return
    reporter.notice(
        f"{size} of the longest rows at once did not fit into the {cap / GIB:.1f} GiB this run may take.",
        "warning",
        f"It goes on, and may run out of memory at a long row: lower {reporter.stage}.max_length or lora.r then.",
    )
    if size < stage.batch_size:
        raise Refit(size)


def measured(trainer: Any, stage: StagePlan, size: int) -> Measured | None:
    """The peak of a step and of an evaluation with `size` of the longest rows; None where memory ran out."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        one_step(trainer, stage, size)
    except Exception as error:
        if not out_of_memory(error):
            raise
        error.__traceback__ = None  # its frames hold the tensors of the step
        return None
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    return Measured(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())


def one_step(trainer: Any, stage: StagePlan, size: int) -> None:
    """A training step without the optimiser's part, and an evaluation, on `size` of the longest rows."""
    model = trainer.model
    with as_it_was(trainer):
        state = optimiser_state(model, stage)
        trainer.current_gradient_accumulation_steps = stage.gradient_accumulation_steps  # the loop sets it at each step
        trainer.training_step(model, longest_batch(trainer.get_train_dataloader(), trainer.train_dataset, size))
        if trainer.eval_dataset is not None:
            held_out = longest_batch(trainer.get_eval_dataloader(), trainer.eval_dataset, max(size, 2))
            model.eval()
            trainer.prediction_step(model, held_out, prediction_loss_only=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        del state


COUNTERS = ("_metrics", "_total_train_tokens", "tokens_seen")
"""What TRL's trainers, and ours, add up from log to log."""


@contextlib.contextmanager
def as_it_was(trainer: Any) -> Iterator[None]:
    """Undo what a step leaves behind: gradients, the mode, counters, the states of the random generators."""
    model = trainer.model
    counted = {name: copy.deepcopy(getattr(trainer, name)) for name in COUNTERS if hasattr(trainer, name)}
    training, states = model.training, (torch.get_rng_state(), torch.cuda.get_rng_state_all())
    model.train()
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)
        model.train(training)
        for name, value in counted.items():
            setattr(trainer, name, value)
        torch.set_rng_state(states[0])
        torch.cuda.set_rng_state_all(states[1])


def optimiser_state(model: Any, stage: StagePlan) -> torch.Tensor:
    """As many bytes as the optimiser will hold beside weights and gradients."""
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return torch.empty(count * (2 if "8bit" in stage.optim else 8), dtype=torch.uint8, device=model.device)


def longest_batch(loader: Any, dataset: Any, size: int) -> Any:
    """A batch of the longest rows, collated as the trainer does."""
    columns = [name for name in ("input_ids", "prompt_ids", "completion_ids") if name in dataset.column_names]
    lengths = row_lengths(dataset, columns)
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    return loader.collate_fn([dataset[index] for index in order[:size]])
