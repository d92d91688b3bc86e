"""What this machine trains with: device, backend, number format, optimiser. Decided here and nowhere else. No torch."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

from core import gpu as nvml
from core.config import Resolved, resolve
from core.errors import FinetuiError


def gpu_present() -> bool:
    """Whether NVML sees a card."""
    return bool(nvml.gpus())


def installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def make_plan(
    method: str | None, config: Path | None, settings: dict[str, tuple[Any, str]], *, gpu: bool | None = None
) -> Resolved:
    """Resolve a plan, make its files' paths absolute, and settle it for this machine. Raises FinetuiError."""
    found = resolve(method, config, settings, gpu_present=gpu_present() if gpu is None else gpu)
    sections: list[Any] = [found.plan.stage(stage).data for stage in found.plan.training_stages]
    for section in [*sections, found.plan.evaluate]:
        if section.file:
            section.file = str(Path(section.file).expanduser().absolute())
        if getattr(section, "files", None):
            section.files = {str(Path(name).expanduser().absolute()): value for name, value in section.files.items()}
    return settle(found)


def settle(resolved: Resolved) -> Resolved:
    """Replace every ``auto`` that this machine decides by its value, and note why.

    Raises FinetuiError with exit code 3 when the plan needs a GPU that is not there, 2 when it needs a missing package.
    """
    plan = resolved.plan.model_copy(deep=True)
    sources = dict(resolved.sources)
    present = gpu_present()
    if plan.device == "cuda" and not present:
        raise FinetuiError("The plan asks for a GPU, and none is found.", "`finetui doctor` says why.", exit_code=3)
    if plan.device == "auto":
        plan.device = "cuda" if present else "cpu"
        sources["device"] = "an NVIDIA GPU was found" if present else "no NVIDIA GPU here"
    cuda = plan.device == "cuda"
    if plan.backend == "unsloth" and not (cuda and installed("unsloth")):
        missing = "Unsloth is not installed" if cuda else "Unsloth needs an NVIDIA GPU"
        raise FinetuiError(f"{missing}.", "Use --backend trl, or ./setup.sh --gpu.", exit_code=3)
    if plan.backend == "auto":
        plan.backend = "unsloth" if cuda and installed("unsloth") else "trl"
        sources["backend"] = (
            "Unsloth is installed" if plan.backend == "unsloth" else "Unsloth is not installed" if cuda else "no GPU"
        )
    four_bit = plan.model.load_in_4bit or "bnb-4bit" in plan.model.name
    if four_bit and not cuda:
        raise FinetuiError(
            f"{plan.model.name} is a 4-bit model, which needs an NVIDIA GPU.",
            "Use --model-size 135m, or a model in 16 or 32 bit.",
            exit_code=3,
        )
    if four_bit and not installed("bitsandbytes"):
        raise FinetuiError("4-bit weights need bitsandbytes.", "Run ./setup.sh --gpu.", exit_code=3)
    for tracker in plan.tracking.report_to:
        if not installed(tracker):
            raise FinetuiError(f"{tracker} is not installed.", f"Run: .venv/bin/pip install {tracker}")
    if plan.model.dtype == "auto":
        plan.model.dtype = "bf16" if cuda else "fp32"
        sources["model.dtype"] = "GPU" if cuda else "CPU: measured twice as fast as bf16"
    for name in plan.training_stages:
        stage = plan.stage(name)
        if stage.optim == "auto":
            stage.optim = "adamw_8bit" if cuda and installed("bitsandbytes") else "adamw_torch"
            sources[f"{name}.optim"] = "bitsandbytes is installed" if stage.optim == "adamw_8bit" else "no bitsandbytes"
        if stage.gradient_checkpointing == "auto":
            stage.gradient_checkpointing = "on" if cuda else "off"
            sources[f"{name}.gradient_checkpointing"] = "GPU: saves memory" if cuda else "CPU: memory is there"
    return replace(resolved, plan=plan, sources=sources)
