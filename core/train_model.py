"""Load the model, with Unsloth or with transformers and PEFT, and put the adapter on."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)  # fmt: skip

from core.chat import Template
from core.errors import FinetuiError
from core.hub import hub_token
from core.plan import Plan, StagePlan
from core.sources import ModelSource
from core.train_tokenizer import unreadable

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Loaded:
    """A model with its LoRA adapter called ``default``, and its tokenizer with the template probed."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    template: Template


def load_model(plan: Plan, source: ModelSource, stage: StagePlan, open_layers: int = 0) -> Any:
    """The model with the adapter on: the source's own, else a new one of the plan's shape.

    With Unsloth `open_layers` of its layers keep their activations where the others are checkpointed.
    """
    torch.manual_seed(plan.lora.seed)
    return _unsloth(plan, source, stage, open_layers) if plan.backend == "unsloth" else _peft(plan, source)


def attention_for_many_lengths() -> None:
    """Keep PyTorch from attention by cuDNN, its first choice on Hopper GPUs, for this process.

    cuDNN makes a plan for every new length of a row, about 0.15 s each, and Unsloth pads each row to what cuDNN likes.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def _peft(plan: Plan, source: ModelSource) -> Any:
    from peft import LoraConfig, PeftModel, get_peft_model

    base = load_base(plan, source)
    if source.adapter:
        return PeftModel.from_pretrained(base, str(source.adapter), is_trainable=True)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=plan.lora.r,
        lora_alpha=plan.lora.alpha,
        lora_dropout=plan.lora.dropout,
        target_modules=plan.lora.target_modules,
        bias="none",
    )
    try:
        return get_peft_model(base, config)
    except ValueError as error:
        raise FinetuiError(
            f"The adapter does not fit this model: {str(error)[:160]}", "Check lora.target_modules."
        ) from error


def load_base(plan: Plan, source: ModelSource) -> Any:
    """The bare model on its device; safetensors only. With transformers, whatever it is trained with, except for what
    `only_unsloth_reads`."""
    config = _config(plan, source)
    if only_unsloth_reads(plan, config):
        return _unsloth_base(plan, source)
    attention_for_many_lengths()
    # set here, for what config.json says of them wins over an argument and may name kernels on the Hub (CVE-2026-4372)
    config._experts_implementation = None
    config._attn_implementation = plan.model.attention if plan.model.attention != "auto" else _attention(config)
    arguments = {**_place(plan, source), "config": config, "dtype": DTYPES[plan.model.dtype], "use_safetensors": True}
    if plan.device == "cuda":
        arguments["device_map"] = {"": 0}
    if plan.model.load_in_4bit and getattr(config, "quantization_config", None) is None:
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPES[plan.model.dtype],
        )
    try:
        return AutoModelForCausalLM.from_pretrained(source.base, **arguments)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        raise unreadable(source, error) from error


def only_unsloth_reads(plan: Plan, config: Any = None, source: ModelSource | None = None) -> bool:
    """Whether it is gpt-oss in 4 bit, each expert a matrix of its own: no class of transformers holds that."""
    if plan.backend != "unsloth" or not plan.model.load_in_4bit:
        return False
    config = config or (_config(plan, source) if source else None)
    return getattr(config, "model_type", "") == "gpt_oss"


def _config(plan: Plan, source: ModelSource) -> Any:
    """The model's configuration. Raises FinetuiError where it cannot be read, or names code on the Hub to be run."""
    try:
        config = AutoConfig.from_pretrained(source.base, **_place(plan, source))
    except Exception as error:
        raise unreadable(source, error) from error
    named = [str(getattr(config, f"_{part}_implementation", None) or "") for part in ("attn", "experts")]
    foreign = next((name for name in named if "/" in name), None)
    if foreign and not plan.model.trust_remote_code:
        raise FinetuiError(
            f"The config.json of {source.base} asks for code from {foreign[:80]}.",
            "If you trust its author: --set model.trust_remote_code=true.",
        )
    return config


def _place(plan: Plan, source: ModelSource) -> dict[str, Any]:
    """Where a model's files are read, and whether their code may run."""
    place: dict[str, Any] = {"token": hub_token(), "trust_remote_code": plan.model.trust_remote_code}
    if plan.model.revision and not source.local:
        place["revision"] = plan.model.revision
    return place


def _attention(config: Any) -> str:
    """PyTorch's own attention, or "eager" for the families that it cannot serve."""
    family = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return "sdpa" if getattr(family, "_supports_sdpa", True) else "eager"


def _unsloth_base(plan: Plan, source: ModelSource) -> Any:
    from core.train_attention import import_unsloth

    os.environ["UNSLOTH_RETURN_LOGITS"] = "1"  # else its models keep them to themselves
    import_unsloth()
    from unsloth import FastLanguageModel

    longest = max(plan.stage(stage).max_length for stage in plan.training_stages)
    model = _from_unsloth(plan, source, longest)
    FastLanguageModel.for_inference(model)
    return model


def _from_unsloth(plan: Plan, source: ModelSource, max_length: int) -> Any:
    from unsloth import FastLanguageModel

    _config(plan, source)  # refused where it names foreign code
    attention_for_many_lengths()
    try:
        return FastLanguageModel.from_pretrained(
            source.base,
            max_seq_length=max_length,
            dtype=DTYPES[plan.model.dtype],
            load_in_4bit=plan.model.load_in_4bit,
            **_place(plan, source),
        )[0]
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        raise unreadable(source, error) from error


def _unsloth(plan: Plan, source: ModelSource, stage: StagePlan, open_layers: int) -> Any:
    from unsloth import FastLanguageModel

    checkpointing: dict[str, Any] = {"use_gradient_checkpointing": False}
    if stage.gradient_checkpointing == "on":
        checkpointing = {"use_gradient_checkpointing": "unsloth", "checkpoint_skip_layers": open_layers}
    model = _from_unsloth(plan, source, stage.max_length)
    shape = _adapter_shape(plan, source.adapter)
    model = FastLanguageModel.get_peft_model(model, random_state=plan.lora.seed, bias="none", **checkpointing, **shape)
    if source.adapter:
        load_adapter_weights(model, source.adapter)
    return model


def _adapter_shape(plan: Plan, adapter: Path | None) -> dict[str, Any]:
    """LoRA's shape: from the adapter that is continued, else from the plan."""
    if adapter is None:
        return {
            "r": plan.lora.r,
            "lora_alpha": plan.lora.alpha,
            "lora_dropout": plan.lora.dropout,
            "target_modules": plan.lora.target_modules,
        }
    from peft import LoraConfig

    config = LoraConfig.from_pretrained(str(adapter))
    targets = config.target_modules
    return {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": sorted(targets) if isinstance(targets, set) else targets,
    }


@contextlib.contextmanager
def adapter_kept(model: Any) -> Iterator[None]:
    """Undo what TRL does to a 4-bit model when a trainer is made: it rounds the adapter to bf16.

    In bf16 the small steps of KTO vanish, and the policy would differ from its reference before the first one.
    """
    weights = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.data = weights[name]


def load_adapter_weights(model: Any, folder: Path) -> None:
    """Put the weights saved in `folder` into the adapter ``default`` of a PEFT model. Raises when any is missing."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    outcome = set_peft_model_state_dict(
        model, load_file(str(folder / "adapter_model.safetensors")), adapter_name="default"
    )
    missing = [name for name in outcome.missing_keys if ".default." in name and "lora_" in name]
    if missing or outcome.unexpected_keys:
        raise FinetuiError(
            f"The adapter in {folder} does not fit the model ({len(missing)} weights missing, "
            f"{len(outcome.unexpected_keys)} too many).",
            "It was made with another base or LoRA shape.",
        )
