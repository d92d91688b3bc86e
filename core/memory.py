"""What a plan needs of the GPU's memory, item by item, before anything is loaded. No torch.

What follows from shapes (weights, adapter, gradients, optimiser) is counted. What a step needs on top is linear in the
tokens of its micro-batch; the coefficients were fitted to some 300 steps of real trainers in the presets' shapes
(tests/bench/gpu_probe.py measures them anywhere; an H200 with torch 2.11 and Unsloth 2026.10.9 gave these).
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.plan import KTOPlan, Plan, StagePlan

GIB = 1 << 30
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a parameter in 4 bit: the code, its block's 8-bit maximum, and that maximum's own statistics (QLoRA, arXiv
2305.14314, section 3)."""
MLP = ("gate_proj", "up_proj", "down_proj")
KEPT_LENGTHS = 512


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes; `query` and `key_value` are the widths of the projections, `experts` 0 where it has none."""

    hidden: int
    intermediate: int
    layers: int
    query: int
    key_value: int
    vocabulary: int
    tied: bool = False
    experts: int = 0
    experts_per_token: int = 0

    @property
    def linear_parameters(self) -> int:
        """Of the projections, which 4-bit models hold in 4 bit."""
        attention = 2 * self.hidden * (self.query + self.key_value)
        return self.layers * (attention + 3 * self.hidden * self.intermediate * max(self.experts, 1))

    @property
    def other_parameters(self) -> int:
        """Of embeddings, head and norms, which stay in 16 bit."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + (2 * self.layers + 1) * self.hidden

    @property
    def widest(self) -> int:
        """Parameters that a 4-bit layer unpacks at once: its largest projection, or all of its experts."""
        return self.hidden * self.intermediate * (3 * self.experts or 1)

    def adapter_parameters(self, targets: Iterable[str], r: int) -> int | None:
        """Of a LoRA of rank `r` on the named projections; None where one of them is not known."""
        hidden, wide = self.hidden, self.intermediate
        each = {
            "q_proj": hidden + self.query, "k_proj": hidden + self.key_value, "v_proj": hidden + self.key_value,
            "o_proj": self.query + hidden, "gate_proj": hidden + wide, "up_proj": hidden + wide,
            "down_proj": wide + hidden,
        }  # fmt: skip
        chosen = set(targets)
        if not chosen <= set(each):
            return None
        total = sum(each[name] for name in chosen if name not in MLP)
        if self.experts:  # an expert's gate and up are one projection
            fused = hidden + 2 * wide if chosen & {"gate_proj", "up_proj"} else 0
            total += self.experts * (fused + (wide + hidden if "down_proj" in chosen else 0))
        else:
            total += sum(each[name] for name in chosen if name in MLP)
        return self.layers * r * total


SHAPES = {
    "135m": Shape(576, 1536, 30, 576, 192, 49152, tied=True),
    "3b": Shape(2048, 11008, 36, 2048, 256, 151936, tied=True),
    "7b": Shape(4096, 14336, 32, 4096, 1024, 32768),
    "13b": Shape(5120, 13824, 40, 5120, 5120, 32000),
    "20b": Shape(2880, 2880, 24, 4096, 512, 201088, experts=32, experts_per_token=4),
}
"""Of the presets' models, for the time before their config.json is here."""


def shape_of(config: dict[str, Any]) -> Shape | None:
    """The shape that a config.json tells; None where it is not one of a plain decoder."""
    try:
        heads = int(config["num_attention_heads"])
        each = int(config.get("head_dim") or config["hidden_size"] // heads)
        keys = int(config.get("num_key_value_heads") or heads)
        sizes = [int(config[key]) for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")]
        experts = [int(config.get(key) or 0) for key in ("num_local_experts", "num_experts_per_tok")]
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    if min(*sizes, heads, each, keys) <= 0 or (experts[0] and config.get("model_type") != "gpt_oss"):
        return None
    hidden, wide, layers, vocabulary = sizes
    tied = bool(config.get("tie_word_embeddings"))
    return Shape(hidden, wide, layers, heads * each, keys * each, vocabulary, tied, *experts)


def shape_in(folder: Path | None, size: str | None) -> Shape | None:
    """The shape of the model in `folder`, else of the preset of this size; None where neither is known."""
    if folder is None:
        return SHAPES.get(size or "")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return shape_of(config) if isinstance(config, dict) else None


def weight_bytes(shape: Shape, plan: Plan, folder: Path | None = None) -> int:
    """Bytes of the base model once it is loaded: of its files where they hold 4 bit already, else counted."""
    width = 4 if plan.model.dtype == "fp32" else 2
    if not (plan.model.load_in_4bit or "bnb-4bit" in plan.model.name):
        return width * (shape.linear_parameters + shape.other_parameters)
    if folder and (stored := _stored_in_4bit(folder)):
        return stored
    return round(NF4_BYTES * shape.linear_parameters + width * shape.other_parameters)


def _stored_in_4bit(folder: Path) -> int:
    """Bytes of the weights in `folder` where they are quantised there; 0 where not."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict) or not config.get("quantization_config"):
            return 0
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    except (OSError, ValueError, RecursionError):
        return 0


@dataclass(frozen=True)
class Lengths:
    """Tokens of a stage's longest rows, longest first, at most `KEPT_LENGTHS`; of training and of held-out rows."""

    training: Sequence[int]
    held_out: Sequence[int] = ()

    @classmethod
    def of(cls, training: Iterable[int], held_out: Iterable[int] = ()) -> "Lengths":
        """The longest of all rows' lengths."""
        longest = [sorted(lengths, reverse=True)[:KEPT_LENGTHS] for lengths in (training, held_out)]
        return cls(*longest)

    @classmethod
    def at_most(cls, stage: StagePlan) -> "Lengths":
        """Every row as long as the plan allows: what is known before the rows are."""
        held = [stage.max_length] * KEPT_LENGTHS if stage.data.holdout else []
        return cls([stage.max_length] * KEPT_LENGTHS, held)


@dataclass(frozen=True)
class Cost:
    """Bytes a token of a micro-batch takes at a step's peak, by what it is multiplied with; see `estimate`.

    `hidden`, `wide`, `heads`: one layer's backward, checkpointed; `evaluation` the same without gradients (hidden,
    wide); `logits`, `logits_evaluation`: whole logits a token, 0 where they are made in chunks; `open_hidden`,
    `open_wide`: what a layer keeps that is not checkpointed; `slack`: share that the allocator holds beyond.
    """

    hidden: float
    wide: float
    heads: float
    evaluation: tuple[float, float]
    open_hidden: float
    open_wide: float
    logits: float = 0.0
    logits_evaluation: float = 0.0
    slack: float = 0.04


COSTS = {
    ("unsloth", "sft"): Cost(18.1, 6.0, 2.4, (9.2, 6.2), 14.6, 3.7),
    ("unsloth", "kto"): Cost(18.1, 11.6, 2.4, (15.2, 6.2), 16.8, 3.7, slack=0.09),
    ("trl", "sft"): Cost(24.5, 8.0, 3.2, (9.2, 6.2), 40.0, 14.0, 15.7, 4.5, slack=0.13),
    ("trl", "kto"): Cost(24.5, 12.0, 3.2, (15.2, 6.2), 40.0, 14.0, 21.5, 12.9, slack=0.13),
}
EXPERTS = {
    "sft": Cost(18.1, 31.5, 2.4, (9.2, 12.4), 17.4, 3.8, slack=0.05),
    "kto": Cost(18.1, 31.5, 2.4, (15.2, 12.4), 17.4, 3.8, slack=0.1),
}
"""Of gpt-oss with Unsloth: SFT from two batches, KTO from one (2 rows of 1,664 tokens)."""
CONTEXT = 820 << 20
"""CUDA's context with the kernels' code: 0.66 GiB when the model is loaded, 0.82 after some steps (H200)."""


LEFT_FREE = GIB // 2
"""Of the free memory, left to the growing CUDA context, to libraries that allocate past PyTorch, to the desktop."""


@dataclass(frozen=True)
class Estimate:
    """Bytes by item, of a stage's highest moment; `total` is their sum, `allocated` PyTorch's part without slack."""

    items: dict[str, int] = field(default_factory=dict)
    rows: int = 0
    tokens: int = 0
    open_layers: int = 0

    @property
    def total(self) -> int:
        return sum(self.items.values())

    @property
    def allocated(self) -> int:
        return self.total - self.items.get("CUDA context", 0) - self.items.get("fragmentation", 0)


def micro_batch_tokens(stage: StagePlan, lengths: Sequence[int], rows: int, *, padded: bool) -> int:
    """Tokens of a forward pass over the `rows` longest rows, padding counted where there is padding."""
    chosen = lengths[:rows]
    if not chosen:
        return 0
    return len(chosen) * chosen[0] if padded or isinstance(stage, KTOPlan) else sum(chosen)


def estimate(
    plan: Plan, name: str, shape: Shape, lengths: Lengths, *, folder: Path | None = None, open_layers: int = 0,
    padded: bool = False, tokens: int | None = None,
) -> Estimate | None:  # fmt: skip
    """What stage `name` needs on a GPU, with `open_layers` layers not checkpointed; None for projections not known.

    `padded` says that SFT's batches are; `tokens` is the largest micro-batch's size where it is known better than from
    the longest rows. The peak is that of a training step (at the loss, or in a layer's backward pass) or of an
    evaluation, whichever is higher.
    """
    stage, cost = plan.stage(name), _cost(plan, name, shape)
    parameters = shape.adapter_parameters(plan.lora.target_modules, plan.lora.r)
    if parameters is None:
        return None
    rows = stage.batch_size
    if tokens is None:
        tokens = micro_batch_tokens(stage, lengths.training, rows, padded=padded)
    held = micro_batch_tokens(stage, lengths.held_out, max(rows, 2), padded=padded)
    four_bit = plan.model.load_in_4bit or "bnb-4bit" in plan.model.name
    unpacked = 2 * shape.widest if four_bit else 0
    wide = shape.intermediate * max(shape.experts_per_token, 1)
    if stage.gradient_checkpointing == "off":
        open_layers = shape.layers
    gradients = 4 * parameters
    # between open layers stand checkpointed ones: when the first of those goes back, one open layer has gone already
    held_open = open_layers - (0 < open_layers < shape.layers)
    kept = round(tokens * held_open * (cost.open_hidden * shape.hidden + cost.open_wide * wide))
    layer = round(tokens * (cost.hidden * shape.hidden + cost.wide * wide + cost.heads * _heads(shape))) + unpacked
    passes = round(tokens * 5.6 * wide) if name == "kto" and plan.backend == "unsloth" and not shape.experts else 0
    chunk = round(2 * shape.vocabulary * min(tokens, _chunk_rows(shape)))
    logits = round(tokens * cost.logits * shape.vocabulary) or chunk
    carried = gradients if stage.gradient_accumulation_steps > 1 else 0
    if open_layers:  # going back, gradients grow while what was kept shrinks: whichever moment takes more
        gradients = max(carried or gradients // shape.layers, gradients - kept)
    if open_layers == shape.layers:
        layer = passes = 0
    backward, loss = gradients + layer, carried + logits
    evaluation = round(held * (cost.evaluation[0] * shape.hidden + cost.evaluation[1] * wide)) + unpacked
    evaluation = max(evaluation, round(held * cost.logits_evaluation * shape.vocabulary)) if held else 0
    step = max(backward, loss) + kept
    buffers = 4 * tokens * shape.hidden if plan.backend == "unsloth" and open_layers < shape.layers else 0
    buffers += 0 if shape.experts else unpacked  # one more, kept from layer to layer; experts are unpacked anew
    persistent = {
        "weights": weight_bytes(shape, plan, folder) + (50 << 20),
        "adapter": 4 * parameters,
        "reference adapter": 4 * parameters if name == "kto" else 0,
        "gradients": gradients if backward >= loss else carried,
        "optimiser": optimiser_bytes(stage, parameters),
        "activations": (layer - passes if backward >= loss else 0) + kept + buffers,
        "logits": logits if loss > backward else 0,
        "KTO's extra passes": passes if backward >= loss else 0,
        "evaluation": max(evaluation - step, 0),
        "CUDA context": CONTEXT,
    }  # fmt: skip
    persistent["fragmentation"] = round(cost.slack * max(step, evaluation)) + (60 << 20)
    return Estimate(persistent, rows, tokens, open_layers)


CPU_PROCESS = 550 << 20
"""Python with PyTorch and the training stack, before a model is loaded."""
CPU_COSTS = {"sft": (40.0, 24.0, 16.0), "kto": (40.0, 24.0, 22.0)}
"""Bytes a token and layer in fp32 (of the hidden and of the feed-forward size) and a token's logit; SmolLM2-135M."""


def estimate_cpu(plan: Plan, name: str, shape: Shape, lengths: Lengths) -> Estimate | None:
    """What stage `name` needs of RAM in fp32 on a CPU, nothing recomputed; None for projections not known."""
    stage = plan.stage(name)
    parameters = shape.adapter_parameters(plan.lora.target_modules, plan.lora.r)
    if parameters is None:
        return None
    tokens = micro_batch_tokens(stage, lengths.training, stage.batch_size, padded=False)
    hidden, wide, logit = CPU_COSTS[name]
    items = {
        "weights": weight_bytes(shape, plan),
        "adapter": 4 * parameters * (2 if name == "kto" else 1),
        "gradients": 4 * parameters,
        "optimiser": 8 * parameters,
        "activations": round(tokens * shape.layers * (hidden * shape.hidden + wide * shape.intermediate)),
        "logits": round(tokens * logit * shape.vocabulary),
        "process": CPU_PROCESS,
    }
    return Estimate(items, stage.batch_size, tokens)


def _cost(plan: Plan, name: str, shape: Shape) -> Cost:
    if plan.backend != "unsloth":
        return COSTS["trl", name]
    return EXPERTS[name] if shape.experts else COSTS["unsloth", name]


def _heads(shape: Shape) -> int:
    return shape.query + 2 * shape.key_value


def _chunk_rows(shape: Shape) -> int:
    """Rows of logits that Unsloth makes at once: about 155 million logits, a power of two, at most 4,096 rows."""
    return min(1 << max((155_600_000 // shape.vocabulary).bit_length() - 1, 9), 4096)


def optimiser_bytes(stage: StagePlan, parameters: int) -> int:
    """Bytes of AdamW's two moments: a byte each in 8 bit, four each in fp32; paged ones lie in RAM when it is tight."""
    return parameters * (2 if "8bit" in stage.optim else 8)


def open_layer_bytes(plan: Plan, name: str, shape: Shape, tokens: int) -> int:
    """What one layer keeps for its backward pass when it is not checkpointed, for a micro-batch of `tokens`."""
    cost = _cost(plan, name, shape)
    wide = shape.intermediate * max(shape.experts_per_token, 1)
    return round(tokens * (cost.open_hidden * shape.hidden + cost.open_wide * wide))
