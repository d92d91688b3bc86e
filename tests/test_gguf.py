"""GGUF files: made with llama.cpp's own tools, loaded and asked by llama.cpp; and what is written for Ollama."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Finished, MakeNamed, Refused, finish, wait_until
from tokenizers.normalizers import Lowercase
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

from core import gguf_tools
from core.artefacts import made, read_report
from core.chat import LLAMA2_TEMPLATE, MISTRAL_TEMPLATE, Template
from core.cli import main
from core.errors import FinetuiError
from core.events import EventTail
from core.export_gguf import Progress, _convert_well, convert, misread
from core.ollama import FAMILIES, family_of, modelfile
from core.plan import Plan
from core.reporter import Reporter
from core.runs import Run

needs_tools = pytest.mark.skipif(not gguf_tools.installed(), reason="finetui gguf --install was not run")


@pytest.fixture
def short_run(finished: Finished, short_model: tuple[Path, Path]) -> Run:
    base, adapter = short_model
    return finished(base=base, adapter=adapter, export__check_prompts=3, export__check_tokens=12)


def phases(run: Run, name: str) -> list[str]:
    events = EventTail(run.events_path).read()
    return [e["detail"] for e in events if e["kind"] == "phase" and e["name"] == name and "seconds" not in e]


@needs_tools
def test_files_count_as_made_once_llama_cpp_has_answered_with_them(
    short_run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["gguf", "one", "--quant", "F16", "--quant", "Q8_0", "--quant", "Q4_K_M"]) == 0
    folder, report = short_run.path / "gguf", read_report(short_run, "gguf")
    names = {one: f"SmolLM2-short-sft.{one}.gguf" for one in ("F16", "Q8_0", "Q4_K_M")}
    assert {file.name for file in folder.iterdir()} == {*names.values(), "Modelfile", "report.json"}
    for quantisation, name in names.items():
        entry, file = report["files"][quantisation], folder / name
        assert entry["bytes"] == file.stat().st_size and file.read_bytes()[:4] == b"GGUF" and entry["checked"]
        assert entry["prompts"] == 3 and entry["calls"] == 3 and entry["says"]
    agreement = {one: report["files"][one]["token_agreement"] for one in names}
    assert agreement["F16"] > 0.97 and agreement["Q8_0"] > 0.8, agreement
    assert report["files"]["F16"]["max_logit_difference"] < 1
    written = (folder / "Modelfile").read_text()
    assert f"FROM ./{names['Q4_K_M']}" in written and 'PARAMETER stop "<|im_end|>"' in written
    serve = report["serve"]["llama.cpp"]
    assert serve.startswith("llama-server -m ") and names["Q4_K_M"] in serve
    said = capfd.readouterr().out
    assert "ollama create smollm2-short-sft -f Modelfile" in said and "of the model's tokens" in said
    assert main(["gguf", "one", "--quant", "Q8_0"]) == 0 and "made already" in capfd.readouterr().err
    tokenizer = AutoTokenizer.from_pretrained(short_run.path / "merge" / "merged_16bit")
    assert misread(folder / names["Q8_0"], Template.of(tokenizer), []) == {}
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    cut_otherwise = misread(folder / names["Q8_0"], Template.of(tokenizer), [])
    assert any("1234567" in text for text in cut_otherwise), "and it is noticed when they cut text differently"


@needs_tools
def test_a_kill_while_files_are_made_costs_no_more_than_the_file_at_hand(short_run: Run) -> None:
    assert main(["gguf", "one", "--quant", "Q8_0", "--detach"]) == 0
    wait_until(lambda: phases(short_run, "ask"))
    stage = short_run.state().stage("gguf")
    os.kill(stage.pid or 0, signal.SIGKILL)
    assert finish(short_run) == "failed" and not made(short_run, "gguf")
    assert main(["resume", "one"]) == 0
    assert made(short_run, "gguf") and len(phases(short_run, "convert")) == 1, "the conversion was not done again"
    assert not list((short_run.path / "gguf").glob(".work*"))
    assert not list((short_run.path / "gguf").glob("*F16*")), "what was only needed on the way is gone"


@needs_tools
def test_a_tokenizer_that_llama_cpp_does_not_know_is_told_in_a_sentence(
    named: MakeNamed, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(FinetuiError, match="llama.cpp does not know this tokenizer"):
        convert(tiny_model, tmp_path / "F16.part", 1000, Plan(), Progress(Reporter(named(), "gguf"), 100))


def test_without_the_tools_the_command_that_installs_them_is_named(
    finished: Finished, refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    finished()
    monkeypatch.setenv("FINETUI_CACHE", str(tmp_path / "empty"))
    assert "finetui gguf --install" in refused("gguf", "one", "--quant", "Q4_K_M")
    assert "finetui gguf --install" in refused("upload", "one", "me/x", "--gguf", "Q4_K_M", "--yes")


def test_an_installation_that_fails_leaves_nothing_and_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FINETUI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert main(["gguf", "--install"]) == 2
    assert "did not give llama.cpp's tools" in capsys.readouterr().err
    assert not list((tmp_path / "cache").iterdir())


@needs_tools
@pytest.mark.parametrize("scheme", ["legacy", "first"])
def test_sentencepiece_tokenizers_cut_conversations_alike_in_llama_cpp(
    named: MakeNamed, tmp_path: Path, scheme: str
) -> None:
    """Llama 2 puts a space in front of every stretch of text (legacy), Mistral in front of the first one only."""
    base, file = sentencepiece_model(tmp_path / "spm", scheme), tmp_path / "F16.gguf"
    template = Template.of(AutoTokenizer.from_pretrained(base))
    progress = Progress(Reporter(named(), "gguf"), 100)
    _convert_well(base, file, 1000, Plan(), template, [], progress)
    assert misread(file, template, []) == {}
    assert family_of(template.tokenizer) == "Mistral [INST]"


def sentencepiece_model(folder: Path, scheme: str) -> Path:
    """A tiny Mistral with a SentencePiece tokenizer learnt from this file."""
    folder.mkdir()
    code = f"""
import io, sentencepiece
model = io.BytesIO()
lines = open({__file__!r}, encoding="utf-8").read().splitlines()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines), model_writer=model, vocab_size=700, model_type="bpe", byte_fallback=True,
    split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    allow_whitespace_only_pieces=True)
open({str(folder / "tokenizer.model")!r}, "wb").write(model.getvalue())
from transformers import AutoTokenizer
AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})
"""
    (folder / "config.json").write_text('{"model_type": "mistral", "architectures": ["MistralForCausalLM"]}')
    words = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 2048}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **words}))
    environment = gguf_tools.environment(gguf_tools.tools_folder())
    subprocess.run([sys.executable, "-P", "-c", code], env=environment, check=True, capture_output=True)
    made_of = json.loads((folder / "tokenizer.json").read_text())
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    legacy = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, replace]}
    first = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    made_of |= {"normalizer": legacy, "pre_tokenizer": None} if scheme == "legacy" else {
        "normalizer": None, "pre_tokenizer": first}  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(made_of))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": MISTRAL_TEMPLATE, **words}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    shape = MistralConfig(
        vocab_size=700, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=2048, sliding_window=None,
    )  # fmt: skip
    MistralForCausalLM(shape).save_pretrained(folder)
    return folder


# Ollama --------------------------------------------------------------------------------------------------------------


def test_a_family_is_known_by_what_its_template_writes_not_by_a_name(tokenizer: Any) -> None:
    assert family_of(tokenizer) == "ChatML"
    for template, family in ((MISTRAL_TEMPLATE, "Mistral [INST]"), (LLAMA2_TEMPLATE, "Llama 2 [INST]")):
        other = with_template(tokenizer, template)
        assert family_of(other) == family
        text = modelfile("m.gguf", other, 4096, "m")
        assert f'TEMPLATE """{FAMILIES[family].go}"""' in text and 'PARAMETER stop "</s>"' in text
    assert family_of(with_template(tokenizer, "{{ messages[0]['content'] }}")) == ""
    assert family_of(with_template(tokenizer, "{{ raise_exception('no') }}")) == ""


def with_template(tokenizer: Any, template: str) -> Any:
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template, other.bos_token, other.eos_token = template, "<s>", "</s>"
    return other


def test_the_modelfile_says_what_the_template_says_by_itself(tokenizer: Any) -> None:
    text = modelfile("SmolLM2.Q4_K_M.gguf", tokenizer, 2048, "SmolLM2")
    assert text.splitlines()[1] == "FROM ./SmolLM2.Q4_K_M.gguf"
    assert 'SYSTEM """You are a helpful AI assistant named SmolLM, trained by Hugging Face"""' in text
    assert "PARAMETER num_ctx 2048" in text and "ollama create smollm2 -f Modelfile" in text
    plain = modelfile("m.gguf", with_template(tokenizer, "{{ messages[0]['content'] }}"), 2048, "m")
    assert "TEMPLATE" not in plain.replace("# No TEMPLATE", "") and 'PARAMETER stop "</s>"' in plain
