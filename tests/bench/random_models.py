"""Models in the presets' shapes with random weights: speed and memory do not depend on them, losses mean nothing.

usage: python tests/bench/random_models.py TOKENIZER_DIR MODELS_DIR [--sizes SIZE ...] [--bits 4 16]

Writes MODELS_DIR/SIZE (4 bit, as the presets' checkpoints on the Hub are: NF4 with nested statistics, embeddings and
head in bf16) and MODELS_DIR/SIZE-16bit. gpt-oss gets the layout of unsloth/gpt-oss-20b-unsloth-bnb-4bit: one linear
module an expert. TOKENIZER_DIR holds any tokenizer of at most 32,768 tokens with a chat template. On disk, in 4 bit:
3b 2.2, 7b 4.1, 13b 7.0, 20b 12.5 GB. Needs bitsandbytes; quick with a GPU.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "135m": {"kind": "Llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
             "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    "3b": {"kind": "Qwen2", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008,
           "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "7b": {"kind": "Mistral", "vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336,
           "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
           "tie_word_embeddings": False, "sliding_window": None},
    "13b": {"kind": "Llama", "vocab_size": 32768, "hidden_size": 5120, "intermediate_size": 13824,
            "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40,
            "tie_word_embeddings": False},
    "20b": {"kind": "GptOss", "num_hidden_layers": 24, "num_local_experts": 32, "router_aux_loss_coef": 0.9},
    "tiny": {"kind": "Llama", "vocab_size": 32768, "hidden_size": 128, "intermediate_size": 256,
             "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "tiny-moe": {"kind": "GptOss", "vocab_size": 32768, "hidden_size": 128, "intermediate_size": 128, "head_dim": 32,
                 "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "num_local_experts": 4},
}  # fmt: skip
QUANTISATION = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_4bit": True, "load_in_8bit": False,
    "_load_in_8bit": False, "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": ["lm_head", "router"], "llm_int8_threshold": 6.0,
}  # fmt: skip
SHARD_BYTES = 4 << 30


def shapes_of(config: Any) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Name, shape and whether it is quantised, of each weight in the order of the layers."""
    import torch
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        stem, _, leaf = name.rpartition(".")
        if stem.endswith(".mlp.experts"):
            projection = leaf.removesuffix("_bias")
            for expert in range(shape[0]):
                each = f"{stem}.{projection}s.{expert}"
                if leaf == projection:  # stored transposed: (experts, in, out)
                    yield f"{each}.weight", (shape[2], shape[1]), True
                else:
                    yield f"{each}.bias", shape[1:], False
        elif stem.endswith(".mlp.router"):
            yield f"{stem}.linear.{leaf}", shape, False
        else:
            plain = leaf != "weight" or len(shape) != 2 or "embed" in name or "lm_head" in name
            yield name, shape, not plain


def tensors(config: Any, bits: int, device: str) -> Iterator[tuple[str, Any]]:
    """The weights as a checkpoint names them, quantised ones with their statistics."""
    import torch

    for name, shape, linear in shapes_of(config):
        if name.endswith("norm.weight"):
            yield name, torch.ones(shape, dtype=torch.bfloat16)
            continue
        spread = 0.0 if name.endswith("bias") else 0.02
        weight = torch.randn(shape, device=device, dtype=torch.bfloat16) * spread
        if not linear or bits == 16:
            yield name, weight.cpu()
            continue
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
        yield name, packed.cpu()
        for key, value in state.as_dict(packed=True).items():
            yield f"{name}.{key}", value.cpu()


def write_model(size: str, tokenizer: Path, folder: Path, bits: int) -> None:
    """The model of `size` into `folder`, in shards with their index; drawn on the GPU where there is one."""
    import torch
    import transformers
    from safetensors.torch import save_file

    values: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **SHAPES[size]}
    if values["kind"] != "GptOss":
        values["max_position_embeddings"] = 32768
    config = getattr(transformers, f"{values.pop('kind')}Config")(**values)
    config.architectures = [f"{SHAPES[size]['kind']}ForCausalLM"]
    config.dtype = "bfloat16"
    folder.mkdir(parents=True, exist_ok=True)
    where: dict[str, str] = {}
    shard: dict[str, Any] = {}
    total, held, number = 0, 0, 1

    def flush() -> None:
        nonlocal shard, held, number
        file = f"model-{number:05}.safetensors"
        save_file(shard, str(folder / file), metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, file))
        shard, held, number = {}, 0, number + 1

    torch.manual_seed(0)
    for name, tensor in tensors(config, bits, "cuda" if torch.cuda.is_available() else "cpu"):
        shard[name] = tensor.contiguous()
        held, total = held + tensor.nbytes, total + tensor.nbytes
        if held > SHARD_BYTES:
            flush()
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    described = config.to_dict() | ({"quantization_config": QUANTISATION} if bits == 4 else {})
    (folder / "config.json").write_text(json.dumps(described, indent=1))
    for file in tokenizer.iterdir():
        shutil.copy(file, folder / file.name)
    print(f"{folder.name}: {total / 1e9:.1f} GB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("models", type=Path)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=[size for size in SHAPES if "tiny" not in size])
    parser.add_argument("--bits", nargs="+", type=int, choices=(4, 16), default=[4])
    options = parser.parse_args()
    for size in options.sizes:
        for bits in [16] if size == "135m" else options.bits:
            name = f"{size}-16bit" if bits == 16 and size != "135m" else size
            write_model(size, options.tokenizer, options.models / name, bits)


if __name__ == "__main__":
    main()
