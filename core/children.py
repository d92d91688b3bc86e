"""What our child processes find in their environment before they import anything. No torch."""

import os
from typing import TYPE_CHECKING

from core import gpu
from core.secrets import hub_environment, tracker_environment

if TYPE_CHECKING:
    from core.plan import Plan

LOCK_ENV = "FINETUI_LOCK_FD"
ON_END_ENV = "FINETUI_ON_END"
"""A shell command for the run's end. It travels in the environment alone, since it may hold a secret (a webhook's
address): no file of the run has it, no trainer sees it, and a later `finetui resume` needs it set again."""
CHILD_ENV = {
    "PYTHONFAULTHANDLER": "1",  # a crash in native code leaves the line of Python in train.log
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    "PYTHONUTF8": "1",  # what libraries print, read and write is UTF-8 in every locale
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # counts as nvidia-smi and NVML do
    "UNSLOTH_MOE_STACKED_LORA": "0",  # TRL's KTO copies an adapter by its parameters' names, which stacking hides
    # Threads that spin while they wait starve each other when anything else runs: 4 times slower on two busy cores.
    # Sleeping costs a fifth of the pace on idle ones; spinning a little (GOMP_SPINCOUNT) halves it on busy ones.
    "OMP_WAIT_POLICY": "PASSIVE",
}


def child_environment() -> dict[str, str]:
    """What every child that may ask the Hub starts with; of the person's secrets it has those of the Hub alone."""
    return {**CHILD_ENV, **hub_environment()}


def runner_environment() -> dict[str, str]:
    """What a run's runner starts with: what its stages may need, and all there is where the person's own command
    waits for the run's end."""
    return {**child_environment(), **(os.environ if os.environ.get(ON_END_ENV) else tracker_environment())}


def stage_environment(plan: "Plan") -> dict[str, str]:
    """What a stage's process must find in its environment before it imports anything: its backend, its GPU, and what
    its trackers need."""
    chosen: dict[str, str] = {"FINETUI_BACKEND": plan.backend, **tracker_environment(plan.tracking.report_to)}
    if plan.device == "cuda":  # one card: with several in sight transformers would spread a batch over them
        chosen["CUDA_VISIBLE_DEVICES"] = gpu.visible_card(plan.gpu)
    given = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys()
    # In WSL2 such segments end in "CUDA driver error: unknown error" (pytorch/pytorch#192330).
    if plan.device == "cuda" and not given and not gpu.in_wsl():
        chosen["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    return chosen
