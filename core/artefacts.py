"""What is made of a trained adapter: merged models, GGUF files, an upload. What is wanted, where it lies, how big.

A plan names what is wanted in its section ``export``. What is asked for later (``finetui merge RUN`` and its like, or
the app) is kept beside the plan in ``export.json`` and wins over it; the runner reads it again after every stage.
"""

import hashlib
import json
import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import FinetuiError
from core.paths import writing_whole
from core.stages import EXPORT_STAGES, TRAINING_STAGES

if TYPE_CHECKING:
    from core.plan import ExportPlan, Plan
    from core.runs import Run

REPORT = "report.json"
LINEAGE = "finetui.json"
SMALL_MODEL = 5e8
# Bits a weight takes in a GGUF file of a 7B model; small models take more, for their embeddings are kept finer.
BITS = {"F16": 16.0, "Q8_0": 8.5, "Q5_K_M": 5.7, "Q4_K_M": 4.85}
BITS_SMALL = {"F16": 16.1, "Q8_0": 8.6, "Q5_K_M": 6.7, "Q4_K_M": 6.3}
FOUR_BIT_BYTES = 0.65
"""Bytes a parameter takes in merged_4bit, embeddings in 16 bit included."""


@dataclass(frozen=True)
class Trained:
    """An adapter that a run has trained: the result of a stage, or its checkpoint at `step`."""

    stage: str
    step: int | None
    folder: Path

    @property
    def name(self) -> str:
        """As one writes it: ``sft`` or ``sft/checkpoint-50``."""
        return self.stage if self.step is None else f"{self.stage}/checkpoint-{self.step}"


def trained(run: "Run") -> list[Trained]:
    """Every adapter of the run that is whole: the last stage first, results before checkpoints, newest first."""
    from core.checkpoints import complete_checkpoints

    found = []
    for stage in reversed(TRAINING_STAGES):
        if run.trained(stage):
            found.append(Trained(stage, None, run.final_model(stage)))
        for folder in complete_checkpoints(run.stage_path(stage) / "checkpoints"):
            found.append(Trained(stage, int(folder.name.removeprefix("checkpoint-")), folder))
    return found


def chosen(run: "Run", export: "ExportPlan") -> Trained:
    """The adapter to export. Raises FinetuiError when it is not there."""
    found = trained(run)
    results = [one for one in found if one.step is None]
    if export.checkpoint is None:
        if results:
            return results[0]
        raise FinetuiError(
            f"{run.name} has no finished model.",
            f"Resume it (finetui resume {run.name}), or name a checkpoint: {_names(found)}."
            if found
            else "Train first.",
        )
    wanted = export.checkpoint.strip("/").replace("/checkpoints/", "/").removesuffix("/final_model")
    for one in found:
        if wanted == one.name:
            return one
    raise FinetuiError(f"{run.name} has no {export.checkpoint[:80]!r}.", f"There is: {_names(found) or 'nothing yet'}.")


def _names(found: list[Trained]) -> str:
    return ", ".join(one.name for one in found[:8])


def fingerprint(adapter: Path) -> str:
    """SHA-256 of the adapter's weights."""
    with (adapter / "adapter_model.safetensors").open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# What is wanted -------------------------------------------------------------------------------------------------------


def checked_request(run: "Run", changes: dict[str, Any]) -> "Plan":
    """The run's plan with these changes of its section ``export``. Raises FinetuiError for a wrong value."""
    from core.config import check, flatten

    plan = run.plan()
    values = flatten(plan.model_dump(mode="json"), keep_auto=True)
    if "gguf" in changes:
        changes = {**changes, "gguf": [*plan.export.gguf, *changes["gguf"]]}
    return check(values | {f"export.{key}": value for key, value in changes.items()}, {})


def ask_for(run: "Run", plan: "Plan") -> None:
    """Keep what `plan` wants exported with the run, and tell its viewers. A runner that is alive will find it."""
    from core.config import REQUEST

    with writing_whole(run.path / REQUEST) as stream:
        stream.write(plan.export.model_dump_json(indent=1) + "\n")
    run.events.append("stages", stages=plan.stages, ahead=[name for name in plan.stages if not stage_done(run, name)])


# What is made ---------------------------------------------------------------------------------------------------------


def merged_folder(run: "Run", form: str = "merged_16bit") -> Path:
    return run.stage_path("merge") / form


def output_of(run: "Run", stage: str) -> Path:
    """The file or folder that a finished stage is known by."""
    if stage in TRAINING_STAGES:
        return run.final_model(stage)
    if stage == "merge":
        forms = run.plan().export.merged_forms
        return merged_folder(run, forms[-1] if forms else "merged_16bit")
    return run.stage_path(stage)


def read_report(run: "Run", stage: str) -> dict[str, Any]:
    """What the stage said of its work; empty where it has not said anything that can be read."""
    try:
        found = json.loads((run.stage_path(stage) / REPORT).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_report(run: "Run", stage: str, report: dict[str, Any]) -> None:
    with writing_whole(run.stage_path(stage) / REPORT) as stream:
        json.dump(report, stream, indent=1, ensure_ascii=False)


def stage_done(run: "Run", stage: str) -> bool:
    """Whether the stage's output is there, whole."""
    if stage == "evaluate":
        from core.evaluation import HELD_OUT, evaluation_path, read_report

        report = read_report(evaluation_path(run, HELD_OUT))
        return bool(report and report.get("complete"))  # one of a run that was stopped is not the stage's
    return run.trained(stage) if stage in TRAINING_STAGES else made(run, stage)


def made(run: "Run", stage: str, export: "ExportPlan | None" = None) -> bool:
    """Whether all that the run's plan, or `export`, wants of a stage is there, whole, made of the adapter chosen."""
    assert stage in EXPORT_STAGES
    try:
        export = export or run.plan().export
        adapter = fingerprint(chosen(run, export).folder)
    except (FinetuiError, OSError):
        return False
    report = read_report(run, stage)
    if report.get("adapter") != adapter:
        return False
    if stage == "upload":
        return bool(report.get("commit")) and report.get("wanted") == upload_wish(export)
    if stage == "gguf":
        return all(gguf_whole(run, report, quantisation) for quantisation in export.gguf)
    return report.get("wanted_base") == export.base and all(merge_whole(run, report, f) for f in export.merged_forms)


def there(run: "Run", export: "ExportPlan") -> set[str]:
    """Which merged forms and GGUF files of those that `export` wants are made already."""

    def done(stage: str, **only: Any) -> bool:
        return made(run, stage, export.model_copy(update=only))

    forms = {form for form in export.merged_forms if done("merge", save_method=form)}
    return forms | {one for one in export.gguf if done("gguf", gguf=[one])}


def merge_whole(run: "Run", report: dict[str, Any], form: str) -> bool:
    """Whether a merged model is there whole, and was checked."""
    from core.checkpoints import is_complete

    return bool(report.get("forms", {}).get(form, {}).get("checked")) and is_complete(merged_folder(run, form))


def gguf_whole(run: "Run", report: dict[str, Any], quantisation: str) -> bool:
    """Whether this GGUF file is there at its size, and has spoken."""
    entry = report.get("files", {}).get(quantisation, {})
    try:
        return bool(entry["checked"]) and (run.stage_path("gguf") / entry["name"]).stat().st_size == entry["bytes"]
    except (KeyError, OSError, TypeError):
        return False


def upload_wish(export: "ExportPlan") -> dict[str, Any]:
    """What tells one upload from another."""
    return {"repository": export.upload, "form": export.uploaded_form, "gguf": sorted(export.gguf)}


def plain_name(plan: "Plan") -> str:
    """What the exported model is called: the base without owner and quantisation, and the method."""
    base = plan.model.name.rstrip("/").rsplit("/", 1)[-1].removeprefix("run:")
    for suffix in ("-unsloth-bnb-4bit", "-bnb-4bit"):
        base = base.removesuffix(suffix)
    safe = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in base)
    return f"{safe.strip('.-') or 'model'}-{plan.method}"


# How big --------------------------------------------------------------------------------------------------------------


def tensors_of(file: Path) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file: name → dtype, shape, data_offsets. Raises FinetuiError for a broken one."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > 100_000_000:
                raise ValueError("its header is too long")
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise FinetuiError(
            f"{file} is no safetensors file: {str(error)[:80]}.", "Download or save it again."
        ) from error
    if file.stat().st_size != 8 + length + end:
        raise FinetuiError(f"{file} is cut off or has something behind its end.", "Download or save it again.")
    return header


def parameters_in(folder: Path) -> int:
    """Parameters of the safetensors weights in `folder`; two to a byte where they are packed in 4 bit."""
    total = 0
    for file in folder.glob("*.safetensors"):
        header = tensors_of(file)
        for name, entry in header.items():
            count = 1
            for size in entry["shape"]:
                count *= size
            if entry["dtype"] == "U8":
                count = 2 * count if any(other.startswith(f"{name}.quant_state") for other in header) else 0
            elif any(name.endswith(end) for end in (".absmax", "quant_map", ".nested_absmax")):
                count = 0
            total += count
    return total


def parameters_of(plan: "Plan", folder: Path | None) -> int | None:
    """Parameters of the plan's model: counted where it is here, known for the presets, else None."""
    from core.config import size_presets

    if folder is not None:
        try:
            if found := parameters_in(folder):
                return found
        except (FinetuiError, OSError):
            pass
    preset = size_presets().get(plan.model.size or "")
    if preset and preset["model"]["name"] == plan.model.name:
        return int(float(preset["about"]["parameters"]))
    return None


def gguf_bytes(parameters: int, quantisation: str) -> int:
    """About how big a GGUF file will be."""
    return round(parameters * (BITS if parameters > SMALL_MODEL else BITS_SMALL)[quantisation] / 8)


def bytes_needed(
    export: "ExportPlan", parameters: int, *, base_here: bool, have: Collection[str] = ()
) -> dict[str, int]:
    """Bytes that the export stages put on the disk, by what they are for; an upload takes none.

    `base_here`: whether the 16-bit weights to merge into are on this machine already; `have`: what is made already.
    """
    needed: dict[str, int] = {}
    forms = [form for form in export.merged_forms if form not in have]
    if "merged_16bit" in forms:
        if not base_here:
            needed["16-bit base"] = 2 * parameters
        needed["merged model"] = 2 * parameters
    if "merged_4bit" in forms:
        needed["merged 4-bit model"] = round(FOUR_BIT_BYTES * parameters)
    if quantisations := [one for one in export.gguf if one not in have]:
        files = {"F16", *quantisations}  # the others are made from it
        needed["GGUF files"] = sum(gguf_bytes(parameters, quantisation) for quantisation in files)
    return needed


def seconds_expected(export: "ExportPlan", parameters: int, *, cuda: bool) -> dict[str, float]:
    """About how long each export stage will take, without downloads; rates as tests/bench/artefacts.py measured them
    on two cores for SmolLM2-135M, the check's share by parameters and tokens."""
    answers = export.check_prompts * export.check_tokens
    speaking = 4 + answers * parameters * (2e-12 if cuda else 4e-10)
    expected = {
        "merge": 8 + parameters * 2e-8 * len(export.merged_forms) + 2 * speaking * len(export.merged_forms),
        "gguf": 8
        + parameters * 4e-8
        + speaking
        + len(export.gguf) * (parameters * 3e-8 + 4e-10 * answers * parameters),
        "upload": 5 + parameters * 2e-7,
    }
    return {stage: round(expected[stage], 1) for stage in export.stages}
