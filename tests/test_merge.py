"""Merging an adapter into its base: against PEFT's own merge, on the architectures that people train."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from core import export_merge
from core.errors import FinetuiError
from core.export_merge import Adapter, plan_merge, write_merged
from core.export_weights import BaseWeights
from core.sources import read_json

RECORDED = Path(__file__).parent / "recorded"
SHAPE = {
    "vocab_size": 120, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def models() -> dict[str, Any]:
    experts = {**SHAPE, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    return {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False)),
        "llama tied": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, head_dim=8)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=120, n_embd=32, n_layer=2, n_head=4)),
        "gpt-oss": lambda: GptOssForCausalLM(GptOssConfig(**experts, pad_token_id=0)),
    }


Build = Callable[..., tuple[Path, Path]]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Saves a random base model and an adapter with random weights; returns both folders."""

    def make(kind: str, shard: str = "50GB", **lora: Any) -> tuple[Path, Path]:
        torch.manual_seed(0)
        model = models()[kind]()
        model.save_pretrained(tmp_path / "base", max_shard_size=shard)
        config = LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, "target_modules": ALL, **lora})
        tuned = get_peft_model(model, config)
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3 if "lora" in name else 0.05)
        tuned.save_pretrained(tmp_path / "adapter")
        return tmp_path / "base", tmp_path / "adapter"

    return make


def merge(base: Path, adapter: Path, target: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Merge as the product does, with the configuration beside it."""
    config = read_json(base / "config.json")
    weights, low_rank = BaseWeights(base), Adapter(adapter)
    plan = plan_merge(weights, low_rank, config, dtype)
    target.mkdir()
    write_merged(weights, low_rank, plan, dtype, target, lambda done, every: None)
    config |= {"tie_word_embeddings": False} if plan.untied else {}
    (target / "config.json").write_text(json.dumps(config))
    return target


TOKENS = torch.arange(3, 43).reshape(2, 20)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=TOKENS).logits


def loaded(folder: Path, adapter: Path | None = None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapter)) if adapter else model


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("llama", {}),
        ("llama tied", {}),
        ("mistral", {}),
        ("qwen2", {}),
        ("llama", {"use_rslora": True, "r": 9}),
        ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 32}}),
        ("llama tied", {"target_modules": ["q_proj", "lm_head"]}),
        ("llama tied", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("llama", {"target_modules": ["v_proj", "embed_tokens", "lm_head"]}),
        ("llama", {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        ("gpt-oss", {"target_modules": ["q_proj", "o_proj"]}),
        ("gpt-oss", {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    ],
    ids=str,
)
def test_the_merged_model_computes_what_base_and_adapter_compute(
    build: Build, tmp_path: Path, kind: str, lora: dict[str, Any]
) -> None:
    base, adapter = build(kind, **lora)
    merged = logits(loaded(merge(base, adapter, tmp_path / "merged")))
    separate = loaded(base, adapter)
    plain, tuned = logits(loaded(base)), logits(separate)
    assert (tuned - plain).abs().max() > 0.05, "the adapter does something"
    torch.testing.assert_close(merged, tuned, atol=2e-5, rtol=1e-4)
    if kind == "llama tied" and lora:  # PEFT warns of its own merge here: it changes embeddings and head together
        return
    torch.testing.assert_close(merged, logits(separate.merge_and_unload()), atol=2e-5, rtol=1e-4)


def test_sixteen_bit_weights_are_the_exact_sum_rounded_once(build: Build, tmp_path: Path) -> None:
    base, adapter = build("llama")
    exact = load_file(merge(base, adapter, tmp_path / "exact") / "model.safetensors")
    for dtype in (torch.bfloat16, torch.float16):
        rounded = load_file(merge(base, adapter, tmp_path / str(dtype), dtype) / "model.safetensors")
        assert rounded.keys() == exact.keys()
        assert all(torch.equal(rounded[name], exact[name].to(dtype)) for name in exact)


def test_many_shards_in_and_out_give_the_same_weights_and_one_killed_between_two_goes_on(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = build("llama", shard="20KB", target_modules=["q_proj", "down_proj"])
    assert len(list(base.glob("*.safetensors"))) > 3
    whole = load_file(merge(base, adapter, tmp_path / "whole") / "model.safetensors")
    assert not (tmp_path / "whole" / "model.safetensors.index.json").exists()
    monkeypatch.setattr(export_merge, "SHARD_BYTES", 30_000)
    monkeypatch.setattr(export_merge, "BLOCK_VALUES", 100)
    weights, low_rank, target = BaseWeights(base), Adapter(adapter), tmp_path / "sharded"
    plan = plan_merge(weights, low_rank, read_json(base / "config.json"), torch.float32)
    assert len(plan.shards) > 2
    target.mkdir()

    class Killed(Exception):
        pass

    def stop(done: int, every: int) -> None:
        if done == len(plan.shards[0]) + 1:
            raise Killed

    with pytest.raises(Killed):
        write_merged(weights, low_rank, plan, torch.float32, target, stop)
    kept = {file: file.stat().st_mtime_ns for file in target.glob("model-*.safetensors")}
    assert len(kept) == 1
    write_merged(weights, low_rank, plan, torch.float32, target, lambda done, every: None)
    assert all(file.stat().st_mtime_ns == before for file, before in kept.items()), "a whole shard is kept"
    assert not list(target.glob(".*"))
    index = json.loads((target / "model.safetensors.index.json").read_text())
    parts = {file.name: load_file(file) for file in target.glob("*.safetensors")}
    assert {name: file for file, tensors in parts.items() for name in tensors} == index["weight_map"]
    together = {name: tensor for tensors in parts.values() for name, tensor in tensors.items()}
    assert together.keys() == whole.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(together[name], tensor, atol=1e-6, rtol=1e-6)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())


def test_four_bit_weights_are_unpacked_as_bitsandbytes_does_it(tmp_path: Path) -> None:
    """`recorded/nf4.safetensors` was packed and unpacked by bitsandbytes 0.50.2."""
    recorded = load_file(RECORDED / "nf4.safetensors")
    save_file(recorded, tmp_path / "model.safetensors")
    weights = BaseWeights(tmp_path)
    assert weights.packed == {"double.weight", "single.weight", "odd.weight"}
    for name in ("double", "single", "odd"):
        expected = recorded[f"{name}.expected"]
        assert weights.shape(f"{name}.weight") == list(expected.shape)
        assert weights.dtype(f"{name}.weight") == expected.dtype
        unpacked = weights.read(f"{name}.weight")
        assert unpacked.dtype == torch.float32
        torch.testing.assert_close(unpacked, expected.float(), atol=1e-6, rtol=1e-2 if expected.itemsize == 2 else 1e-5)
    assert not any("quant" in name or "absmax" in name for name in weights.names)


def test_an_expert_of_its_own_is_merged_into_its_slice_only(build: Build, tmp_path: Path) -> None:
    """The names that per-expert linear layers give: gate_up_projs.N and down_projs.N."""
    base, adapter = build("gpt-oss", target_modules=["q_proj"])
    torch.manual_seed(1)
    a, b = torch.randn(4, 32), torch.randn(64, 4)
    tensors = load_file(adapter / "adapter_model.safetensors")
    layer = "base_model.model.model.layers.1.mlp.experts.gate_up_projs.2"
    save_file(
        tensors | {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}, adapter / "adapter_model.safetensors"
    )
    before = load_file(base / "model.safetensors")
    after = load_file(merge(base, adapter, tmp_path / "merged") / "model.safetensors")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    change = after[name] - before[name]
    torch.testing.assert_close(change[2], 2 * (b @ a).T, atol=1e-5, rtol=1e-5)
    assert not change[[0, 1, 3]].any()


def misfit(base: Path, adapter: Path) -> FinetuiError:
    with pytest.raises(FinetuiError) as found:
        plan_merge(BaseWeights(base), Adapter(adapter), read_json(base / "config.json"), torch.bfloat16)
    assert found.value.advice
    return found.value


def test_another_base_an_unknown_module_and_other_kinds_of_adapters_are_refused(build: Build, tmp_path: Path) -> None:
    base, adapter = build("llama")
    wider = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "hidden_size": 64}))
    wider.save_pretrained(tmp_path / "wider")
    assert "is for a tensor of [" in misfit(tmp_path / "wider", adapter).message
    shallow = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": 1}))
    shallow.save_pretrained(tmp_path / "shallow")
    assert "fits no tensor" in misfit(tmp_path / "shallow", adapter).message
    config = json.loads((adapter / "adapter_config.json").read_text())
    for change in ({"use_dora": True}, {"peft_type": "LOHA"}, {"lora_bias": True}):
        (adapter / "adapter_config.json").write_text(json.dumps(config | change))
        assert "cannot be merged" in misfit(base, adapter).message


@pytest.mark.parametrize("damage", ["cut", "long", "garbage", "missing shard", "index", "escape"])
def test_broken_bases_are_told_in_a_sentence(build: Build, tmp_path: Path, damage: str) -> None:
    base, adapter = build("llama", shard="20KB" if damage in ("missing shard", "index", "escape") else "50GB")
    file = sorted(base.glob("*.safetensors"))[0]
    index = base / "model.safetensors.index.json"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-7])
    elif damage == "long":
        file.write_bytes(file.read_bytes() + b"more")
    elif damage == "garbage":
        file.write_bytes(b"\xff" * 300)
    elif damage == "missing shard":
        file.unlink()
    elif damage == "index":
        index.write_text('{"weight_map": 5}')
    else:
        index.write_text(json.dumps({"weight_map": {"x": "../../secret.safetensors"}}))
    assert misfit(base, adapter).message


def test_quantised_bases_of_other_kinds_are_refused_by_name(tmp_path: Path, build: Build) -> None:
    base, adapter = build("llama")
    save_file({"w_blocks": torch.zeros(4, dtype=torch.uint8)}, base / "model.safetensors")
    assert "(w_blocks)" in misfit(base, adapter).message
    save_file({"w": torch.zeros(4, dtype=torch.float8_e4m3fn)}, base / "model.safetensors")
    assert "F8_E4M3" in misfit(base, adapter).message


def test_scale_is_alpha_over_r_or_its_root(build: Build) -> None:
    _, adapter = build("llama", lora_alpha=16, r=4)
    assert Adapter(adapter).scale("model.layers.0.self_attn.q_proj", 4) == 4
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"use_rslora": True}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert Adapter(adapter).scale("model.layers.0.self_attn.q_proj", 4) == 16 / math.sqrt(4)


def test_smollm2_merged_gives_the_answers_and_logits_of_base_and_adapter(demo_model_dir: Path, tmp_path: Path) -> None:
    """The real small model, in float32 on both sides: its own greedy answer, token by token."""
    from exports import save_adapter
    from transformers import AutoTokenizer

    save_adapter(demo_model_dir, tmp_path / "adapter", target_modules=ALL, r=16, lora_alpha=32)
    folder = merge(demo_model_dir, tmp_path / "adapter", tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(demo_model_dir)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 12 + 34?"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    merged, separate, plain = loaded(folder), loaded(demo_model_dir, tmp_path / "adapter"), loaded(demo_model_dir)
    answers = [
        model.eval().generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=2)[0].tolist()
        for model in (merged, separate)
    ]
    assert answers[0] == answers[1]
    with torch.no_grad():
        one, other, before = (model(input_ids=torch.tensor([answers[0]])).logits for model in (merged, separate, plain))
    assert (other - before).abs().max() > 0.5, "the adapter does something"
    torch.testing.assert_close(one, other, atol=2e-3, rtol=1e-3)
