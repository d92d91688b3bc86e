"""Does the stage fit the GPU? One step and one evaluation on the largest batch, before the first real step.

What PyTorch may take is capped below what is free, so that too much is an error that can be handled: WSL2 would spill
into RAM without a word, and another program's memory is not ours to crowd.
"""

import contextlib
import copy
import gc
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback

from core import gpu
from core.errors import FinetuiError
from core.fit import Arrangement, smaller_batches
from core.memory import GIB, LEFT_FREE, Estimate, optimiser_bytes
from core.plan import Plan, StagePlan
from core.train_events import Reporter

LOOK = "one step on the longest rows, whose kernels are compiled first"
MARGIN = 0.03
"""Share of the cap that the measured step must leave: real batches fragment memory more than one."""


Estimated = Callable[[int], Estimate | None]
"""What was expected for a micro-batch of so many rows."""


class Refit(Exception):
    """The stage does not fit: it must be started again as `to` says."""

    def __init__(self, to: Arrangement) -> None:
        super().__init__(to)
        self.to = to


@dataclass(frozen=True)
class Measured:
    """Bytes at the peak of a step and an evaluation (allocated; reserved with what the allocator keeps)."""

    allocated: int
    reserved: int
    tokens: int
    """Of the largest forward pass, padding included."""


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

    def __init__(
        self, trainer: Any, stage: StagePlan, cap: int, reporter: Reporter, open_layers: int = 0,
        estimated: Estimated | None = None,
    ) -> None:  # fmt: skip
        self.trainer, self.stage, self.cap, self.reporter = trainer, stage, cap, reporter
        self.open_layers, self.estimated = open_layers, estimated

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        with self.reporter.phase("preflight", LOOK):
            try:
                preflight(self.trainer, self.stage, self.cap, self.reporter, self.open_layers, self.estimated)
            except Refit:
                raise
            except Exception as error:  # a look must not be what ends a run: the first step tells what is wrong
                logging.getLogger(__name__).exception("the look at the longest rows failed")
                text = f"The look at the longest rows failed ({type(error).__name__}); training starts without it."
                self.reporter.notice(text, "warning", "See train.log.")


def preflight(
    trainer: Any, stage: StagePlan, cap: int, reporter: Reporter, open_layers: int = 0,
    estimated: Estimated | None = None,
) -> None:  # fmt: skip
    """One step and one evaluation on the largest batch of the run, with ever smaller micro-batches until they fit.

    What must fit is what PyTorch allocates, under `cap` bytes. Writes a `preflight` event with what was `estimated`
    for so many rows.
    Raises Refit when something smaller is the largest that fits: fewer open layers first, then fewer rows; where not
    even the smallest does, it warns and lets the run try. Weights, gradients and random states stay as they were.
    """
    begun = time.monotonic()
    loaded = torch.cuda.memory_allocated()  # 0 without a GPU, as the peaks are
    for size in [stage.batch_size, *smaller_batches(stage)]:
        found = measured(trainer, stage, size)
        if found is None or found.allocated > cap * (1 - MARGIN):
            needed = "more than there is" if found is None else f"{found.allocated / GIB:.1f} GiB"
            reporter.detail(f"{size} rows at once take {needed}")
            if open_layers and size == stage.batch_size:
                raise Refit(Arrangement(size, open_layers // 2 if open_layers >= 4 else 0))
            continue
        known = estimated(size) if estimated else None
        reporter.event(
            "preflight", batch_size=size, tokens=found.tokens, open_layers=open_layers, loaded_bytes=loaded,
            allocated_bytes=found.allocated, reserved_bytes=found.reserved, cap_bytes=cap,
            context_bytes=context_bytes(), estimated_bytes=known.total if known else None,
            estimated_items=known.items if known else None, seconds=round(time.monotonic() - begun, 1),
        )  # fmt: skip
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # what is logged from here on is the training's own peak
        if size < stage.batch_size:
            raise Refit(Arrangement(size))
        return
    reporter.notice(
        f"{size} of the longest rows at once did not fit into the {cap / GIB:.1f} GiB this run may take.",
        "warning",
        f"It goes on, and may run out of memory at a long row: lower {reporter.stage}.max_length or lora.r then.",
    )
    if size < stage.batch_size:
        raise Refit(Arrangement(size))


def context_bytes() -> int | None:
    """What this process holds on the GPU beside PyTorch's memory; None where the driver does not say."""
    samples = gpu.gpus([os.getpid()]) if torch.cuda.is_available() else []
    held = [sample.own_memory_bytes for sample in samples if sample.own_memory_bytes]
    return held[0] - torch.cuda.memory_reserved() if held else None


def measured(trainer: Any, stage: StagePlan, size: int) -> Measured | None:
    """The peak of a step and of an evaluation with at most `size` rows; None where memory ran out."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        tokens = one_step(trainer, stage, size)
    except Exception as error:
        if not out_of_memory(error):
            raise
        error.__traceback__ = None  # its frames hold the tensors of the step
        return None
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    return Measured(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), tokens)


def one_step(trainer: Any, stage: StagePlan, size: int) -> int:
    """A training step without the optimiser's part, and an evaluation; the tokens of the step's batch.

    Where gradients accumulate the batch goes through twice: the second time meets the gradients of the first.
    """
    model = trainer.model
    with as_it_was(trainer):
        state = optimiser_state(model, stage)
        trainer.current_gradient_accumulation_steps = stage.gradient_accumulation_steps  # the loop sets it at each step
        padded = not getattr(trainer.args, "padding_free", False)
        loader, passes = trainer.get_train_dataloader(), passes_of(trainer)
        batch = largest_batch(loader, trainer.train_dataset, size, padded=padded, passes=passes)
        tokens = int(batch["input_ids"].numel())
        for _ in range(min(stage.gradient_accumulation_steps, 2)):
            trainer.training_step(model, dict(batch))
        if trainer.eval_dataset is not None:
            model.zero_grad(set_to_none=True)
            model.eval()
            loader = trainer.get_eval_dataloader()
            held_out = largest_batch(loader, trainer.eval_dataset, max(size, 2), padded=padded)
            trainer.prediction_step(model, held_out, prediction_loss_only=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        del state
    return tokens


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
    return torch.empty(optimiser_bytes(stage, count), dtype=torch.uint8, device=model.device)


def passes_of(trainer: Any) -> int:
    """How many times the run goes over its rows, begun ones counted; 4 at most, which show what batches grow to."""
    arguments, rows = trainer.args, max(len(trainer.train_dataset), 1)
    step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    passes = arguments.max_steps * step / rows if arguments.max_steps > 0 else arguments.num_train_epochs
    return max(1, min(4, math.ceil(passes)))


def largest_batch(loader: Any, dataset: Any, size: int, *, padded: bool, passes: int = 1) -> Any:
    """The batch with the most tokens, padding counted, that `loader` makes in the first `passes`, collated.

    The order of rows is fixed beforehand by the seed. Of that batch at most the `size` longest rows are taken.
    """
    from core.train_data import row_lengths  # with it comes pandas, which an evaluation has no use for

    lengths = row_lengths(dataset)
    most: list[int] = []
    tokens = -1
    for number in range(passes):
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(number)
        for batch in loader.batch_sampler:
            rows = sorted(batch, key=lengths.__getitem__, reverse=True)[:size]
            found = lengths[rows[0]] * len(rows) if padded else sum(lengths[row] for row in rows)
            if found > tokens:
                most, tokens = rows, found
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(0)
    return loader.collate_fn([dataset[row] for row in most])
