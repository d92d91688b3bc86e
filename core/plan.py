"""The plan: the one typed description of every option.

It checks YAML, makes the command line's flags and the wizard's fields, and fills the option table of the README.
Names follow TRL and transformers where they have one, so that a key means what their documentation says.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic.fields import FieldInfo

from core.stages import Method

StageName = Literal["sft", "kto", "evaluate", "merge", "gguf", "upload"]
SaveMethod = Literal["lora", "merged_16bit", "merged_4bit"]
Quantisation = Literal["F16", "Q8_0", "Q5_K_M", "Q4_K_M"]
SIZES = ("135m", "3b", "7b", "13b", "20b")

MAX_SEED = 2**32 - 1  # numpy takes no larger one
LORA_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def option(
    default: Any, help: str, *, flag: str | None = None, unit: str = "", common: bool = False, **bounds: Any
) -> Any:
    """A field of the plan. `common` puts it on the wizard's first page; `flag` names it on the command line."""
    extra: dict[str, Any] = {"flag": flag, "unit": unit, "common": common}
    return Field(default, description=help, json_schema_extra=extra, **bounds)


def _plain(value: Any) -> Any:
    """A value of `extra` as JSON can hold it. YAML reads 2e-7 as a word; TRL wants the number."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        value = float(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if not isinstance(value, str | int | float | None) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{str(value)[:40]!r} is neither a finite number nor a word, a list or a mapping")
    return value


def _switch_word(value: Any) -> Any:
    """YAML 1.1 reads a bare `on` or `off` as a truth value."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch_word)]


class Section(BaseModel):
    """A part of the plan: unknown keys are errors, and assignment is checked."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


class ModelPlan(Section):
    """Which model is trained, and how it is loaded."""

    size: Literal["135m", "3b", "7b", "13b", "20b"] | None = option(
        None, "Model size; picks model, LoRA, batch and accumulation", flag="--model-size", common=True
    )
    name: str = option(
        "", "Hub id, folder, or run:NAME for an earlier run's result", flag="--model-name", common=True
    )
    revision: str | None = option(None, "Branch, tag or commit on the Hub")
    load_in_4bit: bool = option(
        False, "Load the weights in 4 bit, with bitsandbytes (NVIDIA GPU; on a CPU slowly)", flag="--load-in-4bit"
    )
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = option("auto", "Number format; auto: bf16 on a GPU, fp32 on a CPU")
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = option("auto", "Attention implementation")
    chat_template: str = option("auto", "auto: the tokenizer's own, else its family's; or a Jinja file")
    trust_remote_code: bool = option(False, "Run Python code that comes with the model: only if you trust its author")


class LoraPlan(Section):
    """The shape of the adapter; KTO after SFT takes the SFT adapter's shape."""

    r: int = option(
        64, "Rank of the adapter: a higher one learns more and needs more memory", flag="--lora-r", common=True, ge=1,
        le=1024,
    )  # fmt: skip
    alpha: int = option(
        128, "Scale of the adapter: it counts alpha / r times", flag="--lora-alpha", common=True, ge=1, le=4096
    )
    dropout: float = option(0.0, "Dropout inside the adapter; above 0 leaves Unsloth's fast path", ge=0, lt=1)
    target_modules: list[str] = option(LORA_PROJECTIONS, "Projections that get an adapter", min_length=1)
    seed: int = option(3407, "Seed of the adapter's first weights", ge=0, le=MAX_SEED)


class DataPlan(Section):
    """Where the rows of a stage come from. Exactly one of `file` (with or without `files`), `dataset` or `demo`."""

    file: str | None = option(
        None, "Local JSONL, JSON, CSV, Parquet or text file", flag="--local-file", common=True
    )
    files: dict[str, float] = option(
        {}, "More files, each with its weight: 2 shows its rows twice an epoch, 0.5 every second one", flag="--add-file"
    )
    dataset: str | None = option(None, "Data set on the Hub, OWNER/NAME", flag="--dataset-name", common=True)
    dataset_config: str | None = option(None, "Configuration of the Hub data set", flag="--dataset-config")
    dataset_file: str | None = option(None, "File inside the Hub data set", flag="--dataset-file")
    dataset_revision: str | None = option(
        None, "Branch, tag or commit of the Hub data set", flag="--dataset-revision"
    )
    split: str = option("train", "Split of the Hub data set", flag="--dataset-split")
    columns: dict[str, str] = option(
        {}, "Which column is what, where it is not found out: prompt=question, completion=reply", flag="--column"
    )
    demo: bool = option(False, "The demo's own rows, made on this machine")
    holdout: float = option(
        0.0, "Share of prompts held out of training, to measure the loss on", flag="--split-dataset",
        common=True, ge=0, le=0.5,
    )  # fmt: skip
    include_undesirable: bool = option(
        False, "SFT: also learn answers whose label is false", flag="--include-undesirable"
    )
    too_long: Literal["drop", "cut", "refuse"] = option(
        "drop", "Rows over max_length: leave out, cut from the left, or refuse to start", flag="--too-long"
    )
    duplicates: Literal["keep", "drop"] = option(
        "keep", "Rows that repeat an earlier one word for word", flag="--duplicates"
    )
    max_rows: int | None = option(None, "Use only the first N usable rows", flag="--max-rows", ge=1)

    @field_validator("files")
    @classmethod
    def weights_make_sense(cls, value: dict[str, float]) -> dict[str, float]:
        for name, weight in value.items():
            if not 0 < weight <= 100:
                raise ValueError(f"the weight of {name} is {weight:g}, and must be above 0 and at most 100")
        return value

    @field_validator("columns")
    @classmethod
    def parts_are_known(cls, value: dict[str, str]) -> dict[str, str]:
        from core.data_rows import COLUMNS

        for part in value:
            if part not in COLUMNS:
                raise ValueError(f"{part!r} is nothing a column can be; there are {', '.join(COLUMNS)}")
        return value


class StagePlan(Section):
    """What SFT and KTO share. Keys that TRL knows have TRL's names."""

    data: DataPlan = Field(default_factory=DataPlan, description="Rows of this stage")
    batch_size: int = option(
        4, "Examples per forward pass: fewer need less memory", flag="--batch-size", unit="examples", common=True, ge=1
    )
    gradient_accumulation_steps: int = option(
        1, "Forward passes per optimiser step", flag="--gradient-accumulation", common=True, ge=1
    )
    regroup: Switch = option(
        "auto", "On a GPU: micro-batches as large as memory allows, steps kept; auto: unless batch_size was given"
    )
    learning_rate: float = option(
        2e-4, "Peak learning rate: how large the steps are", flag="--learning-rate", common=True, gt=0, le=1
    )
    num_train_epochs: float = option(3, "Passes over the data", flag="--num-epochs", unit="epochs", common=True, gt=0)
    max_steps: int = option(
        -1, "End after N optimiser steps, whatever the epochs; -1: by epochs", flag="--max-steps", unit="steps",
        common=True, ge=-1,
    )  # fmt: skip
    max_length: int = option(
        2048, "Longest row in tokens; longer ones are left out or cut (data.too_long)", flag="--max-seq-length",
        unit="tokens", common=True, ge=8,
    )  # fmt: skip
    warmup_ratio: float = option(0.1, "Share of the steps in which the learning rate climbs", common=True, ge=0, lt=1)
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup", "polynomial"] = option(
        "cosine", "How the rate falls after warm-up"
    )
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm", ge=0)
    weight_decay: float = option(0.0, "Decoupled weight decay", ge=0)
    optim: Literal["auto", "adamw_8bit", "adamw_torch", "adamw_torch_fused", "paged_adamw_8bit"] = option(
        "auto", "Optimiser; auto: adamw_8bit where bitsandbytes runs, else adamw_torch"
    )
    gradient_checkpointing: Switch = option(
        "auto", "Recompute activations to save memory; auto: on a GPU only in as many layers as memory needs"
    )
    logging_steps: int = option(5, "Log every N steps", unit="steps", ge=1)
    save_steps: int = option(
        50, "Checkpoint every N steps: a stopped run goes on from the newest", flag="--save-steps", unit="steps",
        common=True, ge=1,
    )  # fmt: skip
    save_total_limit: int = option(3, "Checkpoints kept", ge=1)
    eval_steps: int | None = option(None, "Evaluate held-out rows every N steps; default: at each checkpoint", ge=1)
    early_stopping_patience: int | None = option(
        None, "Stop once the held-out loss has not fallen in N evaluations", flag="--early-stopping-patience", ge=1
    )
    early_stopping_threshold: float = option(0.0, "What the held-out loss must fall by to count", ge=0)
    load_best_model_at_end: bool = option(
        False, "The final model is the checkpoint with the lowest held-out loss", flag="--load-best-model-at-end"
    )
    on_alarm: Literal["warn", "stop"] = option(
        "warn", "Loss not finite or diverging: say so, or end the stage with its best checkpoint", flag="--on-alarm"
    )
    seed: int = option(42, "Seed of data order and dropout", flag="--seed", ge=0, le=MAX_SEED)
    extra: dict[str, Any] = option({}, "More arguments for TRL's SFTConfig or KTOConfig, checked by name")

    @property
    def effective_batch(self) -> int:
        """Examples per optimiser step."""
        return self.batch_size * self.gradient_accumulation_steps

    @field_validator("max_steps")
    @classmethod
    def not_zero_steps(cls, value: int) -> int:
        if value == 0:
            raise ValueError("0 steps would train nothing; use -1 to go by epochs")
        return value

    @model_validator(mode="after")
    def held_out_rows_to_judge_by(self) -> "StagePlan":
        if not self.data.holdout and (self.early_stopping_patience or self.load_best_model_at_end):
            raise ValueError("the best checkpoint is told by held-out rows, and data.holdout is 0 (--split-dataset)")
        return self

    @field_validator("extra")
    @classmethod
    def plain_extra(cls, value: dict[str, Any]) -> dict[str, Any]:
        return {key: _plain(item) for key, item in value.items()}


class SFTPlan(StagePlan):
    """Supervised fine-tuning: loss on assistant turns only."""

    padding_free: Switch = option(
        "auto", "Lay the rows of a batch end to end instead of padding; auto: where attention keeps them apart"
    )


class KTOPlan(StagePlan):
    """Kahneman-Tversky optimisation (arXiv 2402.01306): rows labelled good or bad."""

    learning_rate: float = option(
        5e-6, "Peak learning rate: how large the steps are", flag="--learning-rate", common=True, gt=0, le=1
    )
    values: Literal["measured", "original"] = option(
        "measured", "Rate and beta: values measured to move a LoRA, or the original's", flag="--kto-values", common=True
    )
    beta: float = option(
        0.1, "How strongly the model is held to its reference, the model before KTO", flag="--beta", common=True, gt=0
    )
    desirable_weight: float | None = option(None, "Weight of good rows; default: from the label counts", gt=0)
    undesirable_weight: float | None = option(None, "Weight of bad rows; default: from the label counts", gt=0)
    max_prompt_length: int = option(2048, "Longest prompt", unit="tokens", ge=4)
    two_stage_lr: bool = option(False, "Multiply the rate by a factor from a step on", flag="--two-stage-lr")
    lr_reduction_step: int = option(50, "First step of the second rate", flag="--lr-reduction-step", unit="steps", ge=1)
    lr_reduction_factor: float = option(0.5, "Factor of the second rate", flag="--lr-reduction-factor", gt=0, le=1)
    sign_correction: bool = option(
        False, "KTO-S (experimental): sign-corrected reference point", flag="--sign-correction"
    )

    @field_validator("batch_size")
    @classmethod
    def pairs_need_two(cls, value: int) -> int:
        if value < 2:
            raise ValueError("KTO compares each row with its neighbour in the batch and needs a batch of at least 2")
        return value


class SamplesPlan(Section):
    """A few prompts answered while a stage trains, so that people can read what it learns."""

    every: int | None = option(
        None, "Answer a few prompts every N steps of training; default: off", flag="--sample-every", unit="steps", ge=1
    )
    file: str | None = option(None, "Rows whose prompts are answered; default: some held out, else trained ones")
    count: int = option(3, "Prompts answered", unit="prompts", ge=1)
    max_new_tokens: int = option(80, "Longest answer", unit="tokens", ge=1)


class EvaluatePlan(Section):
    """Held-out prompts answered by the base and after each stage; at the end of a run, or with `finetui eval`."""

    enabled: bool = option(False, "Answer held-out prompts at the end and score them", flag="--evaluate")
    file: str | None = option(None, "Held-out rows; the last assistant turn is the expected answer", flag="--eval-file")
    tools: str | None = option(None, "JSON file of tools: calls are checked against their schemas", flag="--eval-tools")
    ignore_arguments: list[str] = option([], "Names of arguments that are not compared with the expected ones")
    max_prompts: int = option(100, "Prompts answered", unit="prompts", ge=1)
    max_new_tokens: int | None = option(
        None, "Longest answer; default: what the expected ones need", unit="tokens", ge=1
    )
    batch_size: int = option(20, "Prompts answered at once", unit="prompts", ge=1)
    temperature: float = option(0.0, "0: the likeliest token each time; above: drawn, from a fixed seed", ge=0, le=5)
    loss: Switch = option("auto", "Loss on the expected answers; auto: where they are not all tool calls")


class ExportPlan(Section):
    """What is made of the trained adapter, stage by stage after training: a merged model, GGUF files, an upload."""

    save_method: SaveMethod | None = option(
        None,
        "Form that is kept: the adapter alone or merged into the model; default: lora, for an upload merged_16bit",
        flag="--save-method",
        common=True,
    )
    base: str | None = option(
        None,
        "16-bit weights to merge into: Hub id, folder, or dequantised (the run's own 4-bit ones); default: known ones",
        flag="--merge-base",
    )
    checkpoint: str | None = option(
        None, "Stage or checkpoint to export, such as sft or kto/checkpoint-50; default: the last stage's result"
    )
    gguf: list[Quantisation] = option(
        [], "GGUF files to make, for llama.cpp and Ollama; default: none", flag="--gguf", common=True
    )
    check_prompts: int = option(
        8, "Prompts that merged model and GGUF files must answer as trained", unit="prompts", ge=0, le=1000
    )
    check_tokens: int = option(48, "Longest answer of that check", unit="tokens", ge=1, le=4096)
    upload: str | None = option(None, "Repository on the Hub, OWNER/NAME", flag="--upload", common=True)
    private: bool = option(False, "A repository made for the upload is private", flag="--private")

    @property
    def merged_forms(self) -> list[str]:
        """``merged_16bit``, ``merged_4bit`` or both: GGUF files and 4-bit weights are made from the 16-bit ones."""
        if self.save_method == "merged_4bit":
            return ["merged_16bit", "merged_4bit"]
        wanted = self.save_method == "merged_16bit" or self.gguf or (self.upload and self.save_method is None)
        return ["merged_16bit"] if wanted else []

    @property
    def uploaded_form(self) -> str:
        """The form that an upload takes."""
        return self.save_method or "merged_16bit"

    @property
    def stages(self) -> list[str]:
        """The stages after training that make all this, in order."""
        wanted = {"merge": self.merged_forms, "gguf": self.gguf, "upload": self.upload}
        return [stage for stage, what in wanted.items() if what]

    @field_validator("gguf", mode="before")
    @classmethod
    def each_once(cls, value: Any) -> Any:
        """Quantisations in any case, one by one or with commas, each once."""
        given = [value] if isinstance(value, str) else value
        if not isinstance(given, list):
            return value
        return list(dict.fromkeys(word.strip().upper() for item in given for word in str(item).split(",") if word))

    @field_validator("upload")
    @classmethod
    def a_repository(cls, value: str | None) -> str | None:
        if value and not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", value, re.ASCII):
            raise ValueError("a repository is OWNER/NAME, of letters, digits, '.', '_' and '-'")
        if value and (len(value) > 96 or ".." in value or "--" in value or value.endswith((".", "-", ".git"))):
            raise ValueError("the Hub allows 96 characters, no '--' or '..', and no '.', '-' or '.git' at the end")
        return value or None


class TrackingPlan(Section):
    """Trackers outside finetui. Off unless asked; keys come from the environment only."""

    report_to: list[Literal["wandb", "tensorboard", "trackio"]] = option([], "Trackers", flag="--report-to")
    project: str | None = option(None, "Project name at the tracker", flag="--wandb-project")
    run_name: str | None = option(None, "Run name at the tracker; default: the run's own", flag="--wandb-run-name")


class Plan(Section):
    """A whole run: a list of stages, each starting from the output of the one before."""

    method: Method = option("sft", "What is trained")
    name: str | None = option(None, "Name of the run; default: date, method and size", flag="--name")
    note: str = option("", "A line of your own, shown in the history", flag="--note")
    backend: Literal["auto", "unsloth", "trl"] = option(
        "auto", "auto: Unsloth with an NVIDIA GPU and Unsloth installed, else TRL and PEFT", flag="--backend"
    )
    device: Literal["auto", "cuda", "cpu"] = option("auto", "auto: the GPU if there is one", flag="--device")
    memory_limit: float | None = option(
        None, "GPU memory this run may take; default: what is free, less 0.5", flag="--memory-limit", unit="GiB", gt=0
    )
    gpu: int | None = option(None, "Which GPU, as nvidia-smi counts; default: the first", flag="--gpu", ge=0, le=1023)
    wait_gpu: bool = option(False, "Start once no other run of yours trains on this device", flag="--wait-gpu")
    model: ModelPlan = Field(default_factory=ModelPlan, description="The model")
    lora: LoraPlan = Field(default_factory=LoraPlan, description="The adapter")
    sft: SFTPlan = Field(default_factory=SFTPlan, description="Stage SFT")
    kto: KTOPlan = Field(default_factory=KTOPlan, description="Stage KTO")
    samples: SamplesPlan = Field(default_factory=SamplesPlan, description="Samples while training")
    evaluate: EvaluatePlan = Field(default_factory=EvaluatePlan, description="Evaluation after training")
    export: ExportPlan = Field(default_factory=ExportPlan, description="What is made of the result")
    tracking: TrackingPlan = Field(default_factory=TrackingPlan, description="External trackers")

    @property
    def training_stages(self) -> list[str]:
        """``["sft"]``, ``["kto"]`` or both, in order."""
        return self.method.split("-")

    @property
    def stages(self) -> list[str]:
        """Every stage of the run, in order: training, evaluation, and what is made of the result."""
        return [*self.training_stages, *(["evaluate"] if self.evaluate.enabled else []), *self.export.stages]

    def stage(self, name: str) -> SFTPlan | KTOPlan:
        """The settings of a training stage."""
        return self.kto if name == "kto" else self.sft

    @model_validator(mode="after")
    def lengths_agree(self) -> "Plan":
        if "kto" in self.training_stages and self.kto.max_prompt_length > self.kto.max_length:
            raise ValueError("kto.max_prompt_length is larger than kto.max_length: no room would be left for an answer")
        return self


@dataclass(frozen=True)
class Option:
    """One leaf of the plan as the command line, the wizard and the documentation see it."""

    path: str
    field: FieldInfo
    help: str
    unit: str
    flag: str | None
    common: bool

    @property
    def kind(self) -> type:
        """``bool``, ``int``, ``float``, ``str``, ``list`` or ``dict``."""
        members = [member for member in _members(self.field.annotation) if member is not type(None)]
        first = get_origin(members[0]) or members[0]
        return first if isinstance(first, type) else str

    @property
    def choices(self) -> tuple[str, ...]:
        """The words a literal option, or a list of such words, takes; empty for the others."""
        found: list[str] = []
        members = _members(self.field.annotation)
        for member in [*members, *(word for one in members if get_origin(one) is list for word in get_args(one))]:
            if get_origin(member) is Literal:
                found.extend(str(word) for word in get_args(member))
        return tuple(found)

    @property
    def default(self) -> Any:
        return self.field.get_default(call_default_factory=True)


def _members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone; a Literal counts as ``str``."""
    if get_origin(annotation) in (Union, UnionType):
        return get_args(annotation)
    return (annotation,)


def options(section: type[Section] = Plan, prefix: str = "") -> Iterator[Option]:
    """Every leaf option of the plan, depth first, with its dotted path."""
    for name, field in section.model_fields.items():
        path = f"{prefix}{name}"
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            yield from options(annotation, f"{path}.")
            continue
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        flag = extra.get("flag")
        yield Option(
            path=path,
            field=field,
            help=field.description or "",
            unit=str(extra.get("unit", "")),
            flag=str(flag) if flag else None,
            common=bool(extra.get("common")),
        )


def option_table() -> str:
    """The options as the Markdown table of the README: ``python -m core.plan`` prints it."""
    lines = ["| key | flag | default | what it does |", "|---|---|---|---|"]
    for entry in options():
        section, key = entry.path.split(".", 1) if "." in entry.path else ("", entry.path)
        if section == "kto" and key in SHARED_KEYS:
            continue
        path = f"STAGE.{key}" if section == "sft" and key in SHARED_KEYS else entry.path
        default = "" if entry.default in (None, "", [], {}) else str(entry.default).replace("'", "")
        unit = [entry.unit] if entry.unit and entry.unit not in entry.help.lower() else []
        notes = [", ".join(entry.choices)] if entry.choices else unit
        text = f"{entry.help} ({notes[0]})" if notes else entry.help
        lines.append(f"| `{path}` | {f'`{entry.flag}`' if entry.flag else ''} | {default} | {text} |")
    return "\n".join(lines)


SHARED_KEYS = {entry.path[4:] for entry in options() if entry.path.startswith("sft.")} & {
    entry.path[4:] for entry in options() if entry.path.startswith("kto.")
}


if __name__ == "__main__":
    print(option_table())
