"""The small real model: its files, its tokenizer, and that it speaks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from core.smollm import REQUIRED_FILES, demo_model


@pytest.fixture(scope="module")
def tokenizer(demo_model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model_dir)


def test_the_folder_is_whole_and_says_where_it_came_from(demo_model_dir: Path) -> None:
    assert all((demo_model_dir / name).is_file() for name in REQUIRED_FILES)
    assert "Apache-2.0" in (demo_model_dir / "SOURCE.txt").read_text(encoding="utf-8")
    config = json.loads((demo_model_dir / "config.json").read_text(encoding="utf-8"))
    assert (config["hidden_size"], config["num_hidden_layers"], config["num_key_value_heads"]) == (576, 30, 3)


def test_a_second_call_makes_nothing(demo_model_dir: Path) -> None:
    lines: list[str] = []
    assert demo_model(demo_model_dir.parent, lines.append) == demo_model_dir
    assert lines == []


def test_it_knows_the_capital_of_france(demo_model_dir: Path, tokenizer: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo_model_dir, dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    new_ids = output[0][inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(new_ids) == "The capital of France is Paris.<|im_end|>"
    assert model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_special_tokens_are_those_of_chatml(tokenizer: Any) -> None:
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.pad_token_id == 2
    assert tokenizer("<|im_start|>user\nhi<|im_end|>")["input_ids"].count(2) == 1


def test_numbers_are_split_into_digits(tokenizer: Any) -> None:
    assert tokenizer.tokenize("12345") == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize(
    "text",
    [
        "a    b  ",
        "  lead",
        "x\n\n\n\ty\r\n",
        "naïve café, 日本語, 🎉, e\u0301",
        "1 + 2,345.6",
        " .  , ! 's n't",
        "\x00\u200b",
    ],
)
def test_texts_come_back_as_they_were(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_template_opens_the_answer_and_adds_its_system_prompt_only_where_none_is(tokenizer: Any) -> None:
    user = {"role": "user", "content": "Hi"}
    plain = tokenizer.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
    assert "named SmolLM" in plain
    assert plain.endswith("<|im_end|>\n<|im_start|>assistant\n")
    own = tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."}, user], tokenize=False)
    assert own == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
