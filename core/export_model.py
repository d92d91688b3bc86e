"""The stage ``merge``: the adapter merged into its base, with tokenizer, template, licence and lineage beside it.

Everything is written into a folder of another name, checked there against the trained model, and renamed.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from core import export_answers as answers
from core.artefacts import (
    FOUR_BIT_BYTES,
    LINEAGE,
    Trained,
    chosen,
    fingerprint,
    merge_whole,
    merged_folder,
    read_report,
    write_report,
)
from core.backend import installed, no_bitsandbytes
from core.bases import BaseModel, base_config, copy_legal, fetch_base, find_base, licence_of, public_name
from core.chat import Template
from core.checkpoints import write_manifest
from core.errors import FinetuiError
from core.export_merge import Adapter, MergePlan, plan_merge, write_merged
from core.export_weights import BaseWeights
from core.lineage import lineage_of
from core.paths import TORN, nearest, writing_whole
from core.plan import Plan
from core.reporter import Reporter, Stopped
from core.runs import Run
from core.sources import ModelSource, model_source
from core.train_fit import out_of_memory
from core.train_tokenizer import load_tokenizer

LEAST_AGREEMENT = 0.9
"""Below it a merged model that was trained on the very weights it is merged into is broken."""
WORRYING_AGREEMENT = 0.8
SPARE_BYTES = 1 << 28


def merge_stage(run: Run, plan: Plan, reporter: Reporter) -> None:
    """Make every merged form the plan wants that is not there yet. Raises FinetuiError, Stopped."""
    trained = chosen(run, plan.export)
    adapter = fingerprint(trained.folder)
    report = read_report(run, "merge")
    if report.get("adapter") != adapter or report.get("wanted_base") != plan.export.base:
        report = {"adapter": adapter, "from": trained.name, "wanted_base": plan.export.base, "forms": {}}
    if not merge_whole(run, report, "merged_16bit"):
        report["forms"].pop("merged_16bit", None)
        _merge_16bit(run, plan, trained, report, reporter)
    if "merged_4bit" in plan.export.merged_forms and not merge_whole(run, report, "merged_4bit"):
        _pack_4bit(run, plan, report, reporter)


def _merge_16bit(run: Run, plan: Plan, trained: Trained, report: dict[str, Any], reporter: Reporter) -> None:
    with reporter.phase("prepare", trained.name):
        base = find_base(plan, reporter.detail)
        _room_to_fetch(base, plan, run)
        folder, commit = fetch_base(base, reporter.detail)
        weights, adapter, config = BaseWeights(folder), Adapter(trained.folder), base_config(folder)
        dtype = sixteen_bit(weights, config)
        layout = plan_merge(weights, adapter, config, dtype)
        target = merged_folder(run)
        fresh = _scratch(target, f"{report['adapter']} {folder} {dtype}")
        room_on_disk(run.path, layout.bytes - sum(file.stat().st_size for file in fresh.glob("*.safetensors")))
        tokenizer, template, _ = load_tokenizer(plan, ModelSource(str(folder), _tokenizer_folder(run, trained)))
        questions = answers.questions(plan, template, reporter.detail)
        parameters = sum(int(torch.tensor(weights.shape(name)).prod()) for name in weights.names)
    steps = sum(len(shard) for shard in layout.shards)
    reporter.event("totals", steps=steps + 2 * len(questions) * _weight(steps))
    with reporter.phase("merge", f"{len(layout.updates)} of {steps} tensors change"):
        said = 0

        def progress(done: int, every: int) -> None:
            nonlocal said
            if reporter.stop_asked:
                raise Stopped
            if done * 50 // every > said or done == every:
                said = done * 50 // every
                reporter.event("log", step=done)

        write_merged(weights, adapter, layout, dtype, fresh, progress)
    peak = psutil.Process().memory_info().rss
    with reporter.phase("save"):
        _write_rest(fresh, folder, config, layout, dtype, tokenizer)
        licence = licence_of(public_name(plan, base.place), folder)
        lineage = lineage_of(run, plan, trained, report["adapter"])
        lineage["base"] = {"name": public_name(plan, base.place), "commit": commit, "licence": licence}
        lineage["weights"] = {"form": "merged_16bit", "dtype": str(dtype).removeprefix("torch."),
                              "from_4bit": base.quantised}  # fmt: skip
    source = model_source(plan.model, reporter.detail)
    with reporter.phase("check", f"{len(questions)} prompts"):
        found = check_merge(plan, source, trained, fresh, questions, tokenizer, parameters, base, steps, reporter)
        lineage["check"] = found
        _judge(found, plan, source, base, reporter)
    with writing_whole(fresh / LINEAGE) as stream:
        json.dump(lineage, stream, indent=1, ensure_ascii=False)
    _put(fresh, target)
    report["forms"]["merged_16bit"] = {"checked": True, "bytes": layout.bytes, "rss_bytes": peak, **found}
    report |= {"base": lineage["base"], "parameters": parameters}
    write_report(run, "merge", report)
    reporter.event("artefact", what="merged_16bit", path=_inside(run, target), bytes=layout.bytes, check=found)


def sixteen_bit(weights: BaseWeights, config: dict[str, Any]) -> torch.dtype:
    """The base's own 16-bit format, else bfloat16."""
    named = str(config.get("dtype") or config.get("torch_dtype") or "")
    if named in ("float16", "bfloat16"):
        return getattr(torch, named)
    kinds = [weights.dtype(name) for name in weights.names]
    return torch.float16 if kinds.count(torch.float16) > len(kinds) / 2 else torch.bfloat16


def room_on_disk(place: Path, needed: float) -> None:
    """Refuse, before a byte is written, what the disk cannot hold. Raises FinetuiError."""
    free = shutil.disk_usage(place).free
    if needed + SPARE_BYTES > free:
        raise FinetuiError(
            f"{needed / 2**30:.1f} GiB are needed in {place}, and {free / 2**30:.1f} are free.",
            "Free some space, then resume.",
            exit_code=3,
        )


def _room_to_fetch(base: BaseModel, plan: Plan, run: Run) -> None:
    """The 16-bit weights are a download of their own: into the Hub's cache, before what is merged goes into the run."""
    from core.artefacts import parameters_of

    if base.here is None and (parameters := parameters_of(plan, None)):
        from huggingface_hub.constants import HF_HUB_CACHE

        cache = Path(HF_HUB_CACHE)
        place = nearest(cache)
        shared = os.stat(place).st_dev == os.stat(run.path).st_dev
        room_on_disk(place, 2 * parameters * (2 if shared else 1))


def _tokenizer_folder(run: Run, trained: Trained) -> Path | None:
    """Where the trained tokenizer lies: checkpoints have none of their own."""
    places = [trained.folder, *(run.final_model(stage) for stage in ("kto", "sft"))]
    return next((place for place in places if (place / "tokenizer_config.json").is_file()), None)


def _scratch(target: Path, mark: str) -> Path:
    """The folder beside `target` that is written into: what an attempt at the same merge left there is kept."""
    fresh = target.with_name(f".{target.name}.new")
    marker = fresh.with_name(f"{fresh.name}.mark")
    if not (fresh.is_dir() and marker.is_file() and marker.read_text(encoding="utf-8") == mark):
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        with writing_whole(marker) as stream:
            stream.write(mark)
    for torn in fresh.glob(".*.part"):
        torn.unlink()
    return fresh


def _put(fresh: Path, target: Path) -> None:
    """Give a finished folder its name, in place of an older one."""
    write_manifest(fresh)
    old = target.with_name(f".{target.name}.{os.getpid()}.old{TORN}")
    if target.exists():
        os.replace(target, old)
    os.replace(fresh, target)
    shutil.rmtree(old, ignore_errors=True)
    fresh.with_name(f"{fresh.name}.mark").unlink(missing_ok=True)


def _inside(run: Run, path: Path) -> str:
    return str(path.relative_to(run.path))


def _write_rest(
    target: Path, base: Path, config: dict[str, Any], layout: MergePlan, dtype: torch.dtype, tokenizer: Any
) -> None:
    """Configuration, tokenizer with its template, generation settings, SentencePiece model and licence."""
    ours = {
        key: value
        for key, value in config.items()
        if key not in ("quantization_config", "torch_dtype", "_name_or_path")
        and not key.endswith(("attn_implementation", "experts_implementation", "_implementation_internal"))
    }
    ours["dtype"] = str(dtype).removeprefix("torch.")
    if layout.untied:
        ours["tie_word_embeddings"] = False
    tokenizer.save_pretrained(str(target))
    _write_json(target / "config.json", ours)
    _write_json(target / "generation_config.json", _generation(base, ours, tokenizer))
    for name in ("tokenizer.model",):  # the converter to GGUF reads it where the family has one
        if (base / name).is_file() and not (target / name).exists():
            shutil.copyfile(base / name, target / name)
    copy_legal(base, target)


def _generation(base: Path, config: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The base's generation settings; the token that ended the trained turns ends an answer too."""
    file = base / "generation_config.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    ends = found.get("eos_token_id", config.get("eos_token_id"))
    ends = ends if isinstance(ends, list) else [ends]
    ends = list(dict.fromkeys(token for token in [*ends, tokenizer.eos_token_id] if token is not None))
    found["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    if found.get("pad_token_id") is None:
        found["pad_token_id"] = tokenizer.pad_token_id
    found.setdefault("bos_token_id", tokenizer.bos_token_id)
    return {key: value for key, value in found.items() if value is not None}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with writing_whole(path) as stream:
        json.dump(content, stream, indent=2, ensure_ascii=False)
        stream.write("\n")


# The check ------------------------------------------------------------------------------------------------------------


def check_merge(
    plan: Plan, source: ModelSource, trained: Trained, folder: Path, asked: list[answers.Question], tokenizer: Any,
    parameters: int, base: BaseModel, step: int, reporter: Reporter,
) -> dict[str, Any]:  # fmt: skip
    """Ask the trained model and the merged one the same; the figures, or why there are none."""
    packed = plan.model.load_in_4bit or base.quantised
    elsewhere = "its own base and adapter" if base.place != base.trained_on else "base and adapter"
    reference = "4-bit base and adapter" if packed else elsewhere
    if not asked:
        return {"skipped": "no prompts were wanted"}
    if why := answers.room_for(parameters, plan.device):
        return {"skipped": why, "reference": reference}
    try:
        replies, expected = _trained_answers(plan, source, trained, asked, tokenizer, step, reporter)
    except Stopped:
        raise
    except Exception as error:  # a form that only its own trainer loads, or no memory: the merge is none the worse
        answers.forget()
        return {"skipped": f"the trained model cannot be asked ({' '.join(str(error).split())[:160]})"}
    weight = _weight(step)
    try:
        begun = step + len(asked) * weight
        seen = _logits_of(folder, plan.device, asked, replies, reporter, "merged model", begun, weight)
    except Exception as error:
        if not out_of_memory(error):
            raise
        error.__traceback__ = None  # its frames hold the model
        answers.forget()
        return {"skipped": "memory ran out while the merged model was asked", "reference": reference}
    return {"reference": reference, **answers.compare(asked, replies, expected, seen).as_json()}


def _logits_of(
    folder: Path, device: str, asked: list[answers.Question], replies: list[list[int]], reporter: Reporter, whose: str,
    step: int, weight: int = 1,
) -> list[torch.Tensor]:  # fmt: skip
    """The exported model's logits before each token of another's replies; progress from `step` on."""
    model = answers.exported_model(folder, device)
    seen = []
    for number, (question, reply) in enumerate(zip(asked, replies, strict=True), 1):
        seen.append(answers.forced(model, question.ids, reply))
        _step(reporter, step + number * weight, f"{whose}: {number} of {len(asked)} prompts")
    del model
    answers.forget()
    return seen


def _trained_answers(
    plan: Plan, source: ModelSource, trained: Trained, asked: list[answers.Question], tokenizer: Any, step: int,
    reporter: Reporter,
) -> tuple[list[list[int]], list[torch.Tensor]]:  # fmt: skip
    """Greedy answers of the model as it was trained, and the logits before each of their tokens."""
    model = answers.trained_model(plan, source, trained)
    found = _answers_of(model, tokenizer, plan, asked, reporter, "trained model", step, _weight(step))
    del model
    answers.forget()
    return found


def _answers_of(
    model: Any, tokenizer: Any, plan: Plan, asked: list[answers.Question], reporter: Reporter, whose: str,
    step: int = 0, weight: int = 1,
) -> tuple[list[list[int]], list[torch.Tensor]]:  # fmt: skip
    """Greedy answers and the logits before each of their tokens; progress from `step` on, `weight` units a prompt."""
    ends = answers.ends_of(tokenizer, getattr(getattr(model, "base_model", None), "model", model))
    replies, logits = [], []
    for number, question in enumerate(asked, 1):
        replies.append(answers.greedy(model, question.ids, plan.export.check_tokens, ends))
        logits.append(answers.forced(model, question.ids, replies[-1]))
        _step(reporter, step + number * weight, f"{whose}: {number} of {len(asked)} prompts")
    return replies, logits


def _weight(tensors: int) -> int:
    """Units of progress that a prompt counts for, a tensor being one: so many that both take about as long."""
    return max(1, tensors // 16)


def _step(reporter: Reporter, step: int, detail: str) -> None:
    if reporter.stop_asked:
        raise Stopped
    reporter.event("log", step=step)
    reporter.detail(detail)


def _judge(found: dict[str, Any], plan: Plan, source: ModelSource, base: BaseModel, reporter: Reporter) -> None:
    """Say what the check found. Raises FinetuiError for a merge that is broken."""
    if "skipped" in found:
        reporter.notice(f"The merged model was not compared with the trained one: {found['skipped']}.", "warning")
        return
    share = found["token_agreement"]
    words = (
        f"The merged model gives {100 * share:.1f} % of the trained model's tokens, {found['same_answers']} of "
        f"{found['prompts']} answers whole (largest logit difference {found['max_logit_difference']:.3g}, "
        f"mean KL {found['mean_kl']:.2g})."
    )
    exact = found["reference"] == "base and adapter"
    if exact and share < LEAST_AGREEMENT:
        raise FinetuiError(words, "The base may not be the one it was trained on; nothing was kept.", exit_code=1)
    if not exact:
        packed = found["reference"].startswith("4-bit")
        how = "trained on 4-bit weights and merged into 16-bit ones" if packed else ""
        words += f" It was {how or 'merged into other weights than it was trained on'}: that is the difference."
    reporter.notice(words, "warning" if share < WORRYING_AGREEMENT else "info")


# 4 bit ----------------------------------------------------------------------------------------------------------------


def _pack_4bit(run: Run, plan: Plan, report: dict[str, Any], reporter: Reporter) -> None:
    """The merged model packed by bitsandbytes, read back and asked the same as the merged one. Raises FinetuiError."""
    if not installed("bitsandbytes"):
        raise no_bitsandbytes("merged_4bit needs")
    source, target = merged_folder(run), merged_folder(run, "merged_4bit")
    with reporter.phase("pack", "4 bit"):
        room_on_disk(run.path, FOUR_BIT_BYTES * report["parameters"])
        fresh = _scratch(target, report["adapter"])
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
        _save_packed(source, fresh, config, reporter)
        for file in source.iterdir():
            if file.is_file() and not (fresh / file.name).exists() and "safetensors" not in file.name:
                shutil.copyfile(file, fresh / file.name)
        (fresh / "finetui-manifest.json").unlink(missing_ok=True)
    found = _check_4bit(plan, source, fresh, report["parameters"], reporter)
    lineage = json.loads((fresh / LINEAGE).read_text(encoding="utf-8"))
    lineage["weights"] |= {"form": "merged_4bit", "dtype": "nf4"}
    lineage["check"] = found
    _write_json(fresh / LINEAGE, lineage)
    size = sum(file.stat().st_size for file in fresh.glob("*.safetensors"))
    _put(fresh, target)
    report["forms"]["merged_4bit"] = {"checked": True, "bytes": size, **found}
    write_report(run, "merge", report)
    reporter.event("artefact", what="merged_4bit", path=_inside(run, target), bytes=size, check=found)


def _save_packed(source: Path, target: Path, config: BitsAndBytesConfig, reporter: Reporter) -> None:
    """Pack on the GPU where there is one and it has room, else on the CPU, which takes longer."""
    for place in (0, "cpu") if torch.cuda.is_available() else ("cpu",):
        try:
            model = AutoModelForCausalLM.from_pretrained(
                str(source), quantization_config=config, device_map={"": place}, use_safetensors=True, dtype="auto"
            )
            model.save_pretrained(str(target))
            del model
            return
        except Exception as error:
            if place == "cpu" or not out_of_memory(error):
                raise
            error.__traceback__ = None  # its frames hold the model
            reporter.notice("GPU memory ran out while packing: it is done on the CPU.", "warning")
        finally:
            answers.forget()


def _check_4bit(plan: Plan, merged: Path, packed: Path, parameters: int, reporter: Reporter) -> dict[str, Any]:
    """How far the packed model, read back, gives the merged one's answers."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if why := answers.room_for(parameters, device):
        reporter.notice(f"merged_4bit was not compared with merged_16bit: {why}.", "warning")
        return {"skipped": why, "reference": "merged_16bit"}
    tokenizer = AutoTokenizer.from_pretrained(str(merged))
    asked = answers.questions(plan, Template.of(tokenizer), reporter.detail)
    reporter.event("totals", steps=2 * len(asked))
    with reporter.phase("check", f"4 bit, {len(asked)} prompts"):
        try:
            model = answers.exported_model(merged, device)
            replies, expected = _answers_of(model, tokenizer, plan, asked, reporter, "merged model")
            del model
            answers.forget()
            seen = _logits_of(packed, device, asked, replies, reporter, "4-bit model", len(asked))
        except Exception as error:
            if not out_of_memory(error):
                raise
            error.__traceback__ = None  # its frames hold the model
            answers.forget()
            reporter.notice("merged_4bit was not compared with merged_16bit: memory ran out.", "warning")
            return {"skipped": "memory ran out", "reference": "merged_16bit"}
    found = {"reference": "merged_16bit", **answers.compare(asked, replies, expected, seen).as_json()}
    share = found["token_agreement"]
    words = (
        f"merged_4bit gives {100 * share:.1f} % of merged_16bit's tokens, {found['same_answers']} of "
        f"{found['prompts']} answers whole (mean KL {found['mean_kl']:.2g})."
    )
    reporter.notice(words, "warning" if share < WORRYING_AGREEMENT else "info")
    return found
