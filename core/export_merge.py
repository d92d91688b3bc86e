"""Merge an adapter into its base: W + scale · B·A in float32, tensor by tensor, written shard by shard.

Nothing but one shard is in memory, so that a 7B merges within a few GiB. The formula and the adapter's names are those
of PEFT (`peft.tuners.lora.layer`), whose own merge is the measure in the tests.
"""

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import save_file

from core.errors import FinetuiError
from core.export_weights import BaseWeights
from core.paths import writing_whole
from core.sources import read_json

SHARD_BYTES = 1 << 30
BLOCK_VALUES = 1 << 25
"""Values worked on at once in float32."""
PREFIX = "base_model.model."
OTHER_METHODS = (
    "use_dora",
    "use_qalora",
    "lora_bias",
    "trainable_token_indices",
    "layer_replication",
    "megatron_config",
)
EXPERT = re.compile(r"(.+\.experts)\.(gate_up|down)_projs\.(\d+)")
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Update:
    """What an adapter adds to a tensor: ``scale · B·A``, or its transpose; for `expert` to one slice of it.

    `experts` is the number of experts whose A and B lie in one pair of tensors, 0 for an ordinary pair.
    """

    a: str
    b: str
    scale: float
    transposed: bool = False
    expert: int | None = None
    experts: int = 0


class Adapter:
    """A LoRA adapter as PEFT saves it, read lazily."""

    def __init__(self, folder: Path) -> None:
        """Raises FinetuiError for kinds of adapters that are no plain low-rank sum."""
        self.config = read_json(folder / "adapter_config.json")
        kind = self.config.get("peft_type", "LORA")
        strange = [name for name in OTHER_METHODS if self.config.get(name)]
        if kind != "LORA" or strange:
            raise FinetuiError(
                f"An adapter of the kind {', '.join(strange) or kind} cannot be merged here.",
                "Use it as it is, with PEFT.",
            )
        self._file = safe_open(folder / "adapter_model.safetensors", framework="pt")
        self.keys = list(self._file.keys())
        self.folder = folder

    def tensor(self, key: str) -> torch.Tensor:
        return self._file.get_tensor(key).float()

    def pairs(self) -> dict[str, tuple[str, str, bool]]:
        """Module → keys of A and B, and whether they belong to an embedding."""
        found = {}
        for key in self.keys:
            for a, b, embedding in (
                (".lora_A.weight", ".lora_B.weight", False),
                (".lora_embedding_A", ".lora_embedding_B", True),
            ):
                if key.endswith(a):
                    found[key.removeprefix(PREFIX).removesuffix(a)] = (key, key.removesuffix(a) + b, embedding)
        return found

    def replaced(self) -> dict[str, str]:
        """Tensors that were trained as a whole (``modules_to_save``): name in the base → key."""
        return {
            key.removeprefix(PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.", "."): key
            for key in self.keys
            if ".lora_" not in key
        }

    def scale(self, module: str, rank: int) -> float:
        """``alpha / r``, or ``alpha / √r`` for rsLoRA; each module may have an alpha of its own."""
        patterns = self.config.get("alpha_pattern") or {}
        alpha = patterns.get(get_pattern_key(list(patterns), module), self.config["lora_alpha"])
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def updates_of(adapter: Adapter, base: BaseWeights, config: dict[str, Any]) -> dict[str, list[Update]]:
    """Tensor of the base → what is added to it. Raises FinetuiError naming what of the adapter fits nowhere."""
    found: dict[str, list[Update]] = {}
    tied = bool(config.get("tie_word_embeddings"))
    for module, (a, b, embedding) in adapter.pairs().items():
        rank, out = adapter._file.get_slice(a).get_shape()[0], adapter._file.get_slice(b).get_shape()
        if expert := EXPERT.fullmatch(module):
            name = tensor_name(f"{expert[1]}.{expert[2]}_proj", base)
            update = Update(a, b, adapter.scale(module, rank), transposed=True, expert=int(expert[3]))
        elif module.endswith((".experts", ".experts.base_layer")) and adapter.config.get("target_parameters"):
            name, update = _stacked(adapter, base, config, module, a, b)
        else:
            name = HEAD if module == "lm_head" and tied else tensor_name(f"{module}.weight", base)
            turned = embedding or bool(adapter.config.get("fan_in_fan_out"))
            update = Update(a, b, adapter.scale(module, rank), transposed=turned)
        if name is None:
            raise _misfit(adapter, module, base)
        if not update.experts:
            _check_shape(adapter, base, name, module, update, out[0])
        found.setdefault(name, []).append(update)
    return found


def _misfit(adapter: Adapter, module: str, base: BaseWeights) -> FinetuiError:
    return FinetuiError(
        f"The adapter's {module} fits no tensor of {base.folder.name}.",
        "The base is not the one it was trained on, or stores its weights differently: name another with --merge-base.",
    )


def _check_shape(adapter: Adapter, base: BaseWeights, name: str, module: str, update: Update, out: int) -> None:
    inside = adapter._file.get_slice(update.a).get_shape()[1]
    delta = [inside, out] if update.transposed else [out, inside]
    source = name if name in base.place else _embedding_name(base)
    shape = base.shape(source)[1:] if update.expert is not None else base.shape(source)
    if delta != shape:
        raise FinetuiError(
            f"The adapter's {module} is for a tensor of {delta}, and {base.folder.name} has {shape}.",
            "The base is not the one it was trained on: name the right one with --merge-base.",
        )


def _stacked(
    adapter: Adapter, base: BaseWeights, config: dict[str, Any], module: str, a: str, b: str
) -> tuple[str | None, Update]:
    """An adapter of all experts of a layer at once (PEFT's ``target_parameters``): which of its tensors it fits.

    gpt-oss keeps (expert, in, out), the others (expert, out, in).
    """
    inside, out = adapter._file.get_slice(a).get_shape()[1], adapter._file.get_slice(b).get_shape()[0]
    turned = config.get("model_type") == "gpt_oss"
    layer = module.removesuffix(".base_layer")
    fitting = []
    for parameter in sorted({target.rpartition(".")[2] for target in adapter.config["target_parameters"]}):
        name = tensor_name(f"{layer}.{parameter}", base)
        if name and base.shape(name)[1:] == ([inside, out] if turned else [out, inside]):
            fitting.append(name)
    if len(fitting) != 1:
        return None, Update(a, b, 1.0)
    experts = base.shape(fitting[0])[0]
    rank = adapter._file.get_slice(a).get_shape()[0] // experts
    return fitting[0], Update(a, b, adapter.scale(module, rank), transposed=turned, experts=experts)


def tensor_name(name: str, base: BaseWeights) -> str | None:
    """The base's own name of a tensor: some files leave out the model's outer name, some put one in front."""
    for candidate in (name, name.partition(".")[2], f"model.{name}", f"transformer.{name}"):
        if candidate in base.place:
            return candidate
    return None


def _embedding_name(base: BaseWeights) -> str:
    name = next((name for name in base.names if name.endswith(("embed_tokens.weight", "wte.weight"))), None)
    if name is None:
        raise FinetuiError(f"{base.folder.name} has no embeddings.", "Give another base with --merge-base.")
    return name


def merged_tensor(weight: torch.Tensor, updates: list[Update], adapter: Adapter, dtype: torch.dtype) -> torch.Tensor:
    """`weight` with its updates, worked out in float32 block by block and rounded once to `dtype`."""
    result = torch.empty(weight.shape, dtype=dtype)
    pairs = [(update, adapter.tensor(update.a), adapter.tensor(update.b)) for update in updates]
    if weight.dim() == 3:
        for expert in range(weight.shape[0]):
            _merge_rows(weight[expert], [_of_expert(*pair, expert) for pair in pairs], result[expert])
    else:
        _merge_rows(weight, pairs, result)
    return result


Pair = tuple[Update, torch.Tensor, torch.Tensor]


def _of_expert(update: Update, a: torch.Tensor, b: torch.Tensor, expert: int) -> Pair:
    """The part of a pair that belongs to one expert; A of no rows where it belongs to another."""
    if update.experts:
        a = a.reshape(update.experts, -1, a.shape[-1])[expert]
        return update, a, b.reshape(b.shape[0], -1, update.experts)[..., expert]
    if update.expert == expert:
        return update, a, b
    return update, a[:0], b[:, :0]


def _merge_rows(weight: torch.Tensor, pairs: list[Pair], result: torch.Tensor) -> None:
    """Fill `result` with weight + Σ scale · B·A (or its transpose), a block of rows at a time."""
    rows = max(1, BLOCK_VALUES // weight.shape[1])
    for first in range(0, weight.shape[0], rows):
        block = weight[first : first + rows].float()
        for update, a, b in pairs:
            if a.shape[0]:
                left, right = (a.T, b.T) if update.transposed else (b, a)
                block = block.addmm(left[first : first + rows], right, alpha=update.scale)
        result[first : first + rows] = block.to(result.dtype)


@dataclass(frozen=True)
class MergePlan:
    """Which tensors are written into which shard, and what each is made of."""

    shards: list[list[str]]
    updates: dict[str, list[Update]]
    replaced: dict[str, str]
    untied: bool
    bytes: int


def plan_merge(base: BaseWeights, adapter: Adapter, config: dict[str, Any], dtype: torch.dtype) -> MergePlan:
    """Check that all of the adapter fits and lay out the shards. Nothing is written. Raises FinetuiError."""
    updates, replaced = updates_of(adapter, base, config), {}
    tied = bool(config.get("tie_word_embeddings"))
    for name, key in adapter.replaced().items():
        target = HEAD if name == HEAD and tied else tensor_name(name, base)
        if target is None:
            raise _misfit(adapter, name, base)
        replaced[target] = key
    touched = {*updates, *replaced}
    untied = tied and (HEAD in touched or any(name.endswith(("embed_tokens.weight", "wte.weight")) for name in touched))
    names = [name for name in base.names if not (tied and name == HEAD)]
    if untied:
        names.append(HEAD)
    shards: list[list[str]] = [[]]
    size = total = 0
    for name in names:
        length = math.prod(base.shape(name if name in base.place else _embedding_name(base)))
        length *= (
            dtype.itemsize if base.dtype(name if name in base.place else _embedding_name(base)).is_floating_point else 8
        )
        if size and size + length > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += length
        total += length
    return MergePlan(shards, updates, replaced, untied, total)


def write_merged(
    base: BaseWeights, adapter: Adapter, plan: MergePlan, dtype: torch.dtype, folder: Path,
    progress: Callable[[int, int], None],
) -> None:  # fmt: skip
    """Write the weights and their index into `folder`; shards that are there already are kept.

    `progress` is called with (tensors done, tensors in all) and may raise to stop between two of them.
    """
    places: dict[str, str] = {}
    done, every = 0, sum(len(shard) for shard in plan.shards)
    count = len(plan.shards)
    for number, names in enumerate(plan.shards, 1):
        file = "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
        places |= dict.fromkeys(names, file)
        if not (folder / file).is_file():
            tensors = {}
            for name in names:
                tensors[name] = _tensor(base, adapter, plan, name, dtype)
                done += 1
                progress(done, every)
            _write_shard(folder / file, tensors)
        else:
            done += len(names)
            progress(done, every)
    if count > 1:
        index = {"metadata": {"total_size": plan.bytes}, "weight_map": places}
        with writing_whole(folder / "model.safetensors.index.json") as stream:
            json.dump(index, stream, indent=1)


def _tensor(base: BaseWeights, adapter: Adapter, plan: MergePlan, name: str, dtype: torch.dtype) -> torch.Tensor:
    if name in plan.replaced:
        weight = adapter._file.get_tensor(plan.replaced[name])
    else:
        weight = base.read(name if name in base.place else _embedding_name(base))
    if not weight.is_floating_point():
        return weight
    if name in plan.updates:
        return merged_tensor(weight, plan.updates[name], adapter, dtype)
    return weight.to(dtype).contiguous()


def _write_shard(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Under another name first: a shard that is there is whole."""
    temporary = path.with_name(f".{path.name}.part")
    save_file(tensors, temporary, metadata={"format": "pt"})
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(temporary, path)
