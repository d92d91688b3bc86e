"""Where a plan's model and rows really lie: a folder, the Hub, the demo, an earlier run. No torch.

Hub downloads happen here, in whatever process asks; `hub_file` and `demo_model` keep what they fetched in a cache.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import FinetuiError
from core.paths import cache_dir, expanded, runs_dir
from core.plan import DataPlan, ModelPlan, Plan

DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
Notify = Callable[[str], None]


@dataclass(frozen=True)
class ModelSource:
    """What to load: `base` is a folder or Hub id; `adapter` a folder whose LoRA goes on top, or None."""

    base: str
    adapter: Path | None = None

    @property
    def local(self) -> bool:
        return Path(self.base).is_dir()


def model_source(model: ModelPlan, notify: Notify, *, fetch: bool = True) -> ModelSource:
    """Find the model of a plan. With `fetch` False nothing is downloaded or converted.

    Raises FinetuiError for a folder without safetensors weights, an unknown run, or a name that is neither.
    """
    name = model.name
    if name == DEMO_MODEL and not model.revision:
        from core.smollm import FOLDER_NAME, demo_model

        folder = cache_dir() / FOLDER_NAME
        return ModelSource(str(demo_model(cache_dir(), notify) if fetch else folder))
    if name.startswith("run:"):
        name = str(_run_output(name.removeprefix("run:")))
    folder = expanded(name)
    if folder.is_dir():
        return _folder_source(folder.absolute())
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or not all(name.split("/")):
        raise FinetuiError(
            f"There is no model folder {name!r}." if name else "No model is named.",
            "Give a Hub id as OWNER/NAME, a folder, or run:NAME.",
        )
    return ModelSource(name)


def _run_output(reference: str) -> Path:
    from core.runs import find_run

    run = find_run(runs_dir(), reference)
    finished = [stage for stage in ("kto", "sft") if run.trained(stage)]
    if not finished:
        raise FinetuiError(f"Run {run.name} has no finished model.", f"Resume it: finetui resume {run.name}.")
    return run.final_model(finished[0])


def _folder_source(folder: Path) -> ModelSource:
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        if not (folder / "adapter_model.safetensors").is_file():
            raise FinetuiError(f"{folder} holds an adapter without adapter_model.safetensors.", "Save it again.")
        base = str(read_json(adapter).get("base_model_name_or_path") or "")
        if Path(base).is_dir() or (base.count("/") == 1 and not base.startswith("/")):
            return ModelSource(base, folder)
        raise FinetuiError(f"The base model of the adapter {folder} is gone: {base or 'not named'}.", "Put it back.")
    if not (folder / "config.json").is_file():
        raise FinetuiError(f"{folder} holds no model (no config.json).", "Give a folder saved by save_pretrained.")
    if any(folder.glob("*.safetensors")):
        return ModelSource(str(folder))
    if any(file.suffix in PICKLES for file in folder.iterdir()):
        raise FinetuiError(
            f"{folder} has its weights as pickle only, which can run code when read.",
            "Convert it to safetensors first.",
        )
    raise FinetuiError(f"{folder} holds a config.json and no weights.", "Put its *.safetensors files beside it.")


def model_folder(source: ModelSource) -> Path | None:
    """The folder of the base model on this machine; None while it is not here."""
    if source.local:
        return Path(source.base)
    if source.base.startswith("/"):
        return None
    import huggingface_hub

    try:
        found = huggingface_hub.try_to_load_from_cache(source.base, "config.json")
    except Exception:  # a name that the Hub's client refuses; preflight has the word about it
        return None
    return Path(found).parent if isinstance(found, str) else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises FinetuiError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FinetuiError(f"{path} cannot be read as JSON.", "Download or save it again.") from error
    if not isinstance(found, dict):
        raise FinetuiError(f"{path} is not a JSON object.", "Download or save it again.")
    return found


def data_sources(data: DataPlan, stage: str, notify: Notify) -> list[tuple[Path, float]]:
    """The files of a stage's rows with the weight of each; fetched where they are on the Hub, made where the demo's.

    Raises FinetuiError when no source or more than one is named.
    """
    named = [bool(data.file or data.files), bool(data.dataset), data.demo]
    if sum(named) != 1:
        raise FinetuiError(
            f"{stage}: {'no' if not any(named) else 'more than one'} data source is named.",
            "Give --local-file FILE, or --dataset-name OWNER/NAME with --dataset-file FILE.",
        )
    if data.demo:
        files = demo_files()
        return [(files[stage], 1.0)]
    if data.dataset:
        from core.data_hub import HubRows, fetch, here

        wanted = HubRows.of(data)
        return [(path, 1.0) for path in here(wanted) or fetch(wanted, notify)]
    local = {**({data.file: 1.0} if data.file else {}), **data.files}
    return [(expanded(name).absolute(), weight) for name, weight in local.items()]


def data_files(data: DataPlan, stage: str, notify: Notify) -> list[Path]:
    """The files of `data_sources` without their weights."""
    return [path for path, _ in data_sources(data, stage, notify)]


def demo_files() -> dict[str, Path]:
    """The demo's files by what they are for: sft, kto, evaluate, tuning, tools. Made once in the cache."""
    from core.demo import write_demo_data

    files = write_demo_data(cache_dir() / "demo")
    return {"sft": files.sft, "kto": files.kto, "evaluate": files.heldout, "tuning": files.tuning, "tools": files.tools}


INSTRUCTED = re.compile(r"(?<![a-z])(instruct|chat|it|gpt-oss)(?![a-z])")
"""What models tuned to answer are called: …-Instruct, …-Chat, …-it."""


def is_untuned(plan: Plan) -> bool:
    """Whether KTO would start from a base model, which was tuned neither here nor by those who made it."""
    name = plan.model.name
    tuned = name.startswith("run:") or (Path(name) / "adapter_config.json").is_file()
    return plan.method == "kto" and not tuned and not INSTRUCTED.search(Path(name).name.lower())
