"""What this machine trains with: device, backend, number format, optimiser. Decided here and nowhere else. No torch."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

from core import gpu as nvml
from core.config import Resolved, resolve
from core.errors import FinetuiError
from core.fit import cut_adapter
from core.memory import CONTEXT, GIB, LEFT_FREE
from core.paths import expanded
from core.plan import Plan, StagePlan


def gpu_present() -> bool:
    """Whether NVML sees a card, and CUDA_VISIBLE_DEVICES does not hide it."""
    return bool(nvml.visible_card() and nvml.gpus())


def installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def no_bitsandbytes(what: str) -> FinetuiError:
    """The error where `what` needs bitsandbytes and it is not installed."""
    how = "./setup.sh --gpu" if gpu_present() else ".venv/bin/pip install bitsandbytes (60 MB)"
    return FinetuiError(f"{what} bitsandbytes.", f"Run {how}.", exit_code=3)


def make_plan(
    method: str | None, config: Path | None, settings: dict[str, tuple[Any, str]], *, card: int | None = None
) -> Resolved:
    """Resolve a plan and settle it for this machine, or for a `card` of so many bytes.

    Raises FinetuiError.
    """
    return settle(resolve(method, config, settings, gpu_present=card is not None or gpu_present()), card)


def make_paths_absolute(plan: Plan) -> None:
    """Name files and folders from the root on: a run works in a folder of its own, and may be resumed from anywhere."""

    def whole(path: str) -> str:
        return str(expanded(path).absolute())

    for data in [plan.stage(stage).data for stage in plan.training_stages]:
        data.file = data.file and whole(data.file)
        data.files = {whole(name): value for name, value in data.files.items()}
    for section in (plan.evaluate, plan.samples):
        section.file = section.file and whole(section.file)
    if plan.evaluate.tools:
        plan.evaluate.tools = whole(plan.evaluate.tools)
    if plan.model.name and expanded(plan.model.name).is_dir():  # else a name on the Hub
        plan.model.name = whole(plan.model.name)
    if plan.export.base and expanded(plan.export.base).is_dir():
        plan.export.base = whole(plan.export.base)
    if plan.model.chat_template != "auto":
        plan.model.chat_template = whole(plan.model.chat_template)


def settle(resolved: Resolved, card: int | None = None) -> Resolved:
    """Replace every ``auto`` that this machine decides by its value, and note why; make paths absolute.

    `card` imagines an NVIDIA GPU with so many bytes and everything installed for it, whatever this machine has.
    Raises FinetuiError with exit code 3 when the plan needs a GPU that is not there, 2 when it needs a missing package.
    """
    plan = resolved.plan.model_copy(deep=True)
    make_paths_absolute(plan)
    sources = dict(resolved.sources)
    present = card is not None or gpu_present()

    def have(package: str) -> bool:
        return card is not None or installed(package)

    if plan.device == "cuda" and not present:
        raise FinetuiError("The plan asks for a GPU, and none is found.", "`finetui doctor` says why.", exit_code=3)
    wants_cpu = plan.device == "cpu"
    if plan.device == "auto":
        plan.device = "cuda" if present else "cpu"
        sources["device"] = "an NVIDIA GPU was found" if present else "no NVIDIA GPU here"
    cuda = plan.device == "cuda"
    if plan.backend == "unsloth" and not (cuda and have("unsloth")):
        missing = "Unsloth is not installed" if cuda else "Unsloth needs an NVIDIA GPU"
        raise FinetuiError(f"{missing}.", "Use --backend trl, or ./setup.sh --gpu.", exit_code=3)
    if plan.backend == "auto":
        plan.backend = "unsloth" if cuda and have("unsloth") else "trl"
        sources["backend"] = (
            "Unsloth is installed" if plan.backend == "unsloth" else "Unsloth is not installed" if cuda else "no GPU"
        )
    four_bit = plan.model.load_in_4bit or "bnb-4bit" in plan.model.name
    if four_bit and not cuda and not wants_cpu:
        slow = " --device cpu trains it on the CPU, many times slower." if have("bitsandbytes") else ""
        raise FinetuiError(
            f"{plan.model.name} is a 4-bit model, which needs an NVIDIA GPU.",
            f"Use --model-size 135m, or a model in 16 or 32 bit.{slow}",
            exit_code=3,
        )
    if four_bit and not have("bitsandbytes"):
        raise no_bitsandbytes("4-bit weights need")
    for tracker in plan.tracking.report_to:
        if not installed(tracker):
            raise FinetuiError(f"{tracker} is not installed.", f"Run: .venv/bin/pip install {tracker}")
    if plan.model.dtype == "auto":
        plan.model.dtype = "bf16" if cuda else "fp32"
        sources["model.dtype"] = "GPU" if cuda else "CPU: measured twice as fast as bf16"
    for name in plan.training_stages:
        _settle_stage(plan.stage(name), name, sources, cuda=cuda, eight_bit=cuda and have("bitsandbytes"))
    if cuda and card is None:
        _choose_card(plan)
    if cuda:
        _cut_adapter(plan, sources, free_bytes(plan) if card is None else card - CONTEXT - LEFT_FREE)
    return replace(resolved, plan=plan, sources=sources)


def _settle_stage(stage: StagePlan, name: str, sources: dict[str, str], *, cuda: bool, eight_bit: bool) -> None:
    """Optimiser, checkpointing and grouping of one stage."""
    if stage.optim == "auto":
        stage.optim = "adamw_8bit" if eight_bit else "adamw_torch"
        sources[f"{name}.optim"] = "bitsandbytes is installed" if eight_bit else "no bitsandbytes"
    if stage.gradient_checkpointing == "auto":
        stage.gradient_checkpointing = "auto" if cuda else "off"
        told = "decided at the start, by free memory" if cuda else "CPU: memory is there"
        sources[f"{name}.gradient_checkpointing"] = told
    if stage.regroup == "auto":
        given = [key for key in ("batch_size", "gradient_accumulation_steps") if _given(sources, f"{name}.{key}")]
        stage.regroup = "on" if cuda and not given else "off"
        sources[f"{name}.regroup"] = "no GPU" if not cuda else f"{given[0]} was given" if given else "GPU"


def _given(sources: dict[str, str], path: str) -> bool:
    """Whether a person set this value, rather than a preset."""
    return not sources.get(path, "default").startswith(("default", "preset", "size", "the original"))


def _choose_card(plan: Plan) -> None:
    """Raises FinetuiError where the plan names a GPU that is not there."""
    cards = nvml.gpus()
    if plan.gpu is not None and cards and plan.gpu not in [card.index for card in cards]:
        there = ", ".join(f"{card.index} ({card.name or 'unnamed'})" for card in cards)
        raise FinetuiError(f"There is no GPU {plan.gpu}.", f"There is: {there}.", exit_code=3)


def free_bytes(plan: Plan) -> int | None:
    """What PyTorch may take on the plan's card now, CUDA's context and what is left free taken off; None if unknown."""
    card = nvml.sample_of(nvml.gpus(), nvml.visible_card(plan.gpu))
    if card is None or card.memory_free_bytes is None:
        return None
    free = card.memory_free_bytes - CONTEXT - LEFT_FREE
    return min(free, int(plan.memory_limit * GIB)) if plan.memory_limit else free


def _cut_adapter(plan: Plan, sources: dict[str, str], free: int | None) -> None:
    """Cut a preset's adapter on experts to what fits; a rank that a person gave stays."""
    if free is None or _given(sources, "lora.r"):
        return
    first = plan.lora.r
    if cut_adapter(plan, free):
        told = f"cut from {first} so that it fits {free / GIB:.1f} GiB"
        sources |= {"lora.r": told, "lora.alpha": told}
