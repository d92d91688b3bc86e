"""Where an exported model comes from, fit for the public: no local path, no host or user name. No torch."""

import hashlib
import importlib.metadata
import json
import os
import platform
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core import __version__, gpu
from core.artefacts import Trained
from core.bases import public_name
from core.errors import FinetuiError
from core.paths import expanded
from core.plan import KTOPlan, Plan, StagePlan
from core.prepare import kto_weights
from core.sources import data_files
from core.stages import TRAINING_STAGES

if TYPE_CHECKING:
    from core.runs import Run

PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "unsloth", "bitsandbytes", "safetensors")
SETTINGS = (
    "learning_rate", "num_train_epochs", "max_steps", "batch_size", "gradient_accumulation_steps", "max_length",
    "lr_scheduler_type", "warmup_ratio", "weight_decay", "max_grad_norm", "optim", "seed",
)  # fmt: skip
COUNTED = (
    "rows",
    "examples",
    "held_out",
    "left_out",
    "left_out_reasons",
    "repaired",
    "cut",
    "tokens",
    "trained_tokens",
)


def lineage_of(run: "Run", plan: Plan, trained: Trained, adapter: str) -> dict[str, Any]:
    """How the adapter `trained`, whose weights have the SHA-256 `adapter`, came about. What is not known is None."""
    state = run.state()
    last = TRAINING_STAGES.index(trained.stage)
    stages = [name for name in plan.training_stages if TRAINING_STAGES.index(name) <= last]
    return {
        "finetui": __version__,
        "made": time.strftime("%Y-%m-%d"),
        "method": "-".join(stages),
        "trained_on": {
            "name": trained_on(plan),
            "revision": plan.model.revision,
            "bits": 4 if plan.model.load_in_4bit or "bnb-4bit" in plan.model.name else None,
            "dtype": plan.model.dtype,
        },
        "adapter": {"from": trained.name, "sha256": adapter, **_lora(trained.folder)},
        "stages": [_stage(run, plan, name, state.stage(name), trained) for name in stages],
        "hardware": hardware(plan),
        "versions": versions(),
    }


def trained_on(plan: Plan) -> str:
    """The model that was trained, as it may be named in public."""
    name = plan.model.name
    if not name.startswith("run:"):
        return public_name(plan, str(expanded(name).absolute()) if expanded(name).is_dir() else name)
    from core.sources import model_source

    try:
        return public_name(plan, model_source(plan.model, lambda text: None, fetch=False).base)
    except FinetuiError:
        return "the result of an earlier run"


def _lora(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    targets = config.get("target_modules")
    return {
        "r": config.get("r"), "alpha": config.get("lora_alpha"), "rslora": bool(config.get("use_rslora")),
        "target_modules": sorted(targets) if isinstance(targets, list) else targets,
    }  # fmt: skip


def _stage(run: "Run", plan: Plan, name: str, state: Any, trained: Trained) -> dict[str, Any]:
    """One training stage: settings, rows, steps and duration."""
    settings = plan.stage(name)
    length = "num_train_epochs" if settings.max_steps > 0 else "max_steps"  # the other one decides
    chosen = {key: getattr(settings, key) for key in SETTINGS if key != length}
    data = stage_data(run, name)
    if isinstance(settings, KTOPlan):
        chosen |= {"beta": settings.beta, "sign_correction": settings.sign_correction, **_weights(settings, data)}
    seconds = state.phase_seconds.get("train")
    taken = max([state.step, *state.checkpoints]) or state.total_steps  # fewer than planned where it stopped early
    return {
        "name": name,
        "steps": trained.step if trained.step is not None and trained.stage == name else taken or None,
        "seconds": round(seconds, 1) if seconds else None,
        "settings": chosen,
        "data": {"name": data_name(settings), "files": data.get("sha256") or None, **_counts(data)},
    }


def _weights(settings: KTOPlan, data: dict[str, Any]) -> dict[str, float]:
    """The weights of good and bad rows that KTO trained with; none where the rows' labels are not known."""
    labels = data.get("labels")
    known = labels if isinstance(labels, dict) else {}
    counts: Counter[bool | None] = Counter({True: known.get("true", 0), False: known.get("false", 0)})
    if not (counts[True] and counts[False]):
        return {}
    desirable, undesirable = kto_weights(settings, counts)
    return {"desirable_weight": round(desirable, 4), "undesirable_weight": round(undesirable, 4)}


def stage_data(run: "Run", name: str) -> dict[str, Any]:
    """What the trainer said of its rows; empty where it said nothing that can be read."""
    try:
        found = json.loads((run.stage_path(name) / "data.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _counts(data: dict[str, Any]) -> dict[str, Any]:
    return {key: data.get(key) for key in COUNTED} | {"labels": data.get("labels")}


def data_name(settings: StagePlan) -> str:
    """The rows as they may be named in public: a Hub data set, the demo's, or the file's name without the way there."""
    if settings.data.demo:
        return "finetui's demo rows (tool calls, made by rule)"
    if settings.data.file:
        return Path(settings.data.file).name
    return " ".join(part for part in (settings.data.dataset, settings.data.dataset_file) if part)


def file_hashes(settings: StagePlan, name: str) -> dict[str, str]:
    """SHA-256 of each file of a stage's rows, by the file's name."""
    found = {}
    for path in data_files(settings.data, name, lambda text: None):
        with path.open("rb") as stream:
            found[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def hardware(plan: Plan) -> str:
    """The device that trains here, in words."""
    if plan.device == "cuda" and (card := gpu.sample_of(gpu.gpus(), gpu.visible_card(plan.gpu))):
        return card.name or "NVIDIA GPU"
    return f"CPU ({os.cpu_count()} cores, {platform.machine()})"


def versions() -> dict[str, str]:
    """Packages that matter for the result, as installed here."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
