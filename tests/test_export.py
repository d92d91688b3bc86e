"""What is made of a run's result by its runner: merged models, from any checkpoint, after a kill, while it trains."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Finished, MakeRun, Refused, finish, good, wait_until
from exports import save_adapter
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from core import runner
from core.artefacts import ask_for, checked_request, made, read_report, there, trained
from core.backend import installed
from core.checkpoints import is_complete, write_manifest
from core.cli import main
from core.commands_export import begin, check_export
from core.config import resolve, save_plan
from core.errors import FinetuiError
from core.events import EventTail
from core.export_model import merge_stage
from core.lineage import lineage_of
from core.reporter import Reporter
from core.runs import Run, is_alive, request_stop


def merged(run: Run) -> Path:
    return run.path / "merge" / "merged_16bit"


def kinds(run: Run, kind: str) -> list[dict[str, Any]]:
    return [event for event in EventTail(run.events_path).read() if event["kind"] == kind]


@torch.no_grad()
def logits(model: Any, tokens: list[int]) -> torch.Tensor:
    return model.eval()(input_ids=torch.tensor([tokens])).logits


def test_a_merged_model_stands_on_its_own_and_answers_as_base_and_adapter(
    finished: Finished, tiny_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = finished()
    assert main(["merge", "one"]) == 0
    folder = merged(run)
    assert is_complete(folder) and not list(folder.parent.glob(".*"))
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "finetui.json"} <= names
    assert not any(name.startswith("adapter") or name.endswith((".bin", ".pt")) for name in names)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template
    alone = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, str(run.final_model("sft")))
    tokens = tokenizer("Set a timer for 5 minutes")["input_ids"]
    assert (logits(alone, tokens) - logits(tuned, tokens)).abs().max() < 0.05, "they differ by rounding to 16 bit only"
    check = read_report(run, "merge")["forms"]["merged_16bit"]
    assert check["prompts"] == 2 and check["token_agreement"] > 0.9 and check["reference"] == "base and adapter"
    lineage = json.loads((folder / "finetui.json").read_text())
    assert lineage["base"]["name"] == "tiny-llama" and lineage["stages"][0]["data"]["left_out"] == 2
    assert str(run.path.parent) not in json.dumps(lineage) and lineage["check"]["tokens"] == check["tokens"]
    capfd.readouterr()
    assert main(["merge", "one"]) == 0
    assert "made already" in capfd.readouterr().err


@pytest.mark.parametrize("asked_of", ["trained_model", "exported_model"])
def test_memory_that_runs_out_at_the_check_leaves_the_merge_made_and_says_so(
    finished: Finished, monkeypatch: pytest.MonkeyPatch, asked_of: str
) -> None:
    def full(*args: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    run = finished()
    monkeypatch.setattr(f"core.export_model.answers.{asked_of}", full)
    merge_stage(run, run.plan(), Reporter(run, "merge"))
    assert made(run, "merge") and is_complete(merged(run))
    check = read_report(run, "merge")["forms"]["merged_16bit"]
    assert "memory" in check["skipped"] and "token_agreement" not in check
    assert "was not compared with the trained one" in kinds(run, "notice")[-1]["text"]


def test_any_checkpoint_can_be_merged_and_an_unknown_one_is_refused(
    finished: Finished, tiny_model: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished()
    checkpoint = run.stage_path("sft") / "checkpoints" / "checkpoint-4"
    save_adapter(tiny_model, checkpoint, seed=7)
    for file in checkpoint.glob("tokenizer*"):
        file.unlink()
    write_manifest(checkpoint)
    capsys.readouterr()
    assert [one.name for one in trained(run)] == ["sft", "sft/checkpoint-4"]
    assert "There is: sft, sft/checkpoint-4" in refused("merge", "one", "--checkpoint", "sft/checkpoint-5")
    assert main(["merge", "one"]) == 0
    of_result = load_file(merged(run) / "model.safetensors")
    assert main(["merge", "one", "--checkpoint", "sft/checkpoint-4"]) == 0
    of_checkpoint = load_file(merged(run) / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(of_result[name], of_checkpoint[name])
    lineage = json.loads((merged(run) / "finetui.json").read_text())
    assert lineage["adapter"]["from"] == "sft/checkpoint-4" and lineage["stages"][0]["steps"] == 4
    assert (merged(run) / "tokenizer.json").is_file(), "a checkpoint has none of its own"


def test_what_is_asked_for_during_an_evaluation_is_made_after_it_and_nothing_else(
    finished: Finished, rows_file: Callable[..., Path]
) -> None:
    run = finished()
    ask_for(run, checked_request(run, {"upload": "me/earlier"}))
    prompts = rows_file([good("Set a timer for 3 minutes")], "prompts.jsonl")
    assert main(["eval", "one", "--file", str(prompts), "--detach"]) == 0
    wait_until(lambda: run.state().task)
    assert main(["merge", "one"]) == 0
    assert made(run, "merge") and run.state().stage("evaluate").state == "done"
    assert finish(run) == "done" and "upload" not in run.plan().stages


def test_a_merge_that_is_killed_goes_on_and_leaves_nothing_behind(finished: Finished) -> None:
    run = finished()
    assert main(["merge", "one", "--detach"]) == 0
    started = wait_until(lambda: [event for event in kinds(run, "stage_start") if event["name"] == "merge"])
    wait_until(lambda: [event for event in kinds(run, "phase") if event.get("stage") == "merge"])
    os.kill(started[0]["pid"], signal.SIGKILL)
    assert finish(run) == "failed"
    error = run.state().errors[-1]
    assert error["stage"] == "merge" and "SIGKILL" in error["message"] and "batch_size" not in error["advice"]
    assert not made(run, "merge") and not merged(run).exists()
    assert main(["resume", "one"]) == 0
    assert is_complete(merged(run)) and not list(merged(run).parent.glob(".*"))


def test_a_stop_during_the_export_is_heard_and_resumed(finished: Finished) -> None:
    run = finished(export__check_prompts=40, export__check_tokens=200)
    assert main(["merge", "one", "--detach"]) == 0
    wait_until(lambda: kinds(run, "stage_start")[1:])
    request_stop(run)
    assert finish(run) == "stopped"
    assert not merged(run).exists() and run.state().end_status == "stopped"


def test_what_is_asked_of_a_run_that_trains_is_made_when_it_has_trained(make_run: MakeRun) -> None:
    run = make_run(export__check_prompts=1, export__check_tokens=2)
    runner.start(run)
    plan = checked_request(run, {"save_method": "merged_16bit"})
    assert check_export(run, plan)
    begin(run, plan)
    assert is_alive(run)
    assert finish(run) == "done"
    assert run.trained("sft") and is_complete(merged(run))
    assert [stage.name for stage in run.state().stages] == ["sft", "merge"]
    hashes = json.loads((run.stage_path("sft") / "data.json").read_text())["sha256"]
    lineage = json.loads((merged(run) / "finetui.json").read_text())
    assert lineage["stages"][0]["data"]["files"] == hashes and len(hashes["rows.jsonl"]) == 64


def test_a_run_without_a_finished_model_has_nothing_to_export(make_run: MakeRun, refused: Refused) -> None:
    run = make_run(name="young")
    for command in (["merge", "young"], ["upload", "young", "me/x", "--yes"]):
        assert "no finished model" in refused(*command)
    assert not (run.path / "export.json").exists()


def test_four_bits_need_bitsandbytes(
    finished: Finished, refused: Refused, no_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished()
    monkeypatch.setattr("core.backend.installed", lambda package: package != "bitsandbytes")
    assert "merged_4bit needs bitsandbytes" in refused("merge", "one", "--save-method", "merged_4bit", code=3)
    assert "4-bit weights need bitsandbytes" in refused("sft", "--model-size", "7b", "--device", "cpu", code=3)


def test_the_disk_is_looked_at_before_anything_is_written(
    finished: Finished, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished()
    usage = shutil.disk_usage("/")
    monkeypatch.setattr("core.outlook.shutil.disk_usage", lambda place: usage._replace(free=1000))
    assert "are free in" in refused("merge", "one", code=3)


def test_a_request_that_was_broken_by_hand_is_told(finished: Finished, refused: Refused) -> None:
    run = finished()
    (run.path / "export.json").write_text('{"gguf": ["Q9"]}')
    assert "export.json cannot be used: gguf.0" in refused("merge", "one")


def test_how_far_another_base_is_from_the_one_it_was_trained_on_is_said(
    finished: Finished, tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = finished()
    other = shutil.copytree(tiny_model, tmp_path / "other")
    torch.manual_seed(3)
    weights = load_file(other / "model.safetensors")
    changed = {name: torch.randn_like(tensor) if "mlp" in name else tensor for name, tensor in weights.items()}
    save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
    assert main(["merge", "one", "--merge-base", str(other)]) == 0
    assert "merged into other weights than it was trained on" in capfd.readouterr().out
    check = read_report(run, "merge")["forms"]["merged_16bit"]
    assert check["token_agreement"] < 0.9 and check["reference"] == "its own base and adapter"


def test_the_lineage_tells_the_steps_that_were_taken_and_what_ended_them(finished: Finished) -> None:
    run = finished()
    run.events.append("checkpoint", stage="sft", step=4, path="sft/checkpoints/checkpoint-4")
    found = lineage_of(run, run.plan(), trained(run)[0], "ab")["stages"][0]
    assert found["steps"] == 4, "six were planned, it stopped early"
    assert found["settings"]["num_train_epochs"] == 3 and "max_steps" not in found["settings"]
    short = finished(name="two", sft__max_steps=6)
    told = lineage_of(short, short.plan(), trained(short)[0], "ab")["stages"][0]
    assert told["steps"] == 6 and told["settings"]["max_steps"] == 6 and "num_train_epochs" not in told["settings"]


def test_what_is_made_is_known_by_what_is_asked_for_and_takes_no_more_disk(finished: Finished) -> None:
    run = finished()
    asked = checked_request(run, {"save_method": "merged_16bit"})
    assert "merge" in check_export(run, asked)[0] and "merged model" in check_export(run, asked)[-1]
    assert main(["merge", "one"]) == 0
    assert there(run, asked.export) == {"merged_16bit"}
    lines = check_export(run, asked)
    assert "all of that is made already" in lines[0] and not any("Disk" in line for line in lines)
    earlier = checked_request(run, {"save_method": "merged_16bit", "base": str(run.final_model("sft"))})
    assert not made(run, "merge", earlier.export), "another base was asked for now"


# Four bits -----------------------------------------------------------------------------------------------------------

NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # fmt: skip


def packed(folder: Path, target: Path) -> dict[str, torch.Tensor]:
    """Pack a model's projections in NF4 as bitsandbytes stores them; returns the values they stand for."""
    shutil.copytree(folder, target)
    tensors, values = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "proj" not in name:
            tensors[name] = values[name] = weight
            continue
        blocks = weight.reshape(-1, 64)
        scales = blocks.abs().amax(1)
        codes = (blocks / scales[:, None]).unsqueeze(-1).sub(torch.tensor(NF4)).abs().argmin(-1).to(torch.uint8)
        values[name] = (torch.tensor(NF4)[codes.int()] * scales[:, None]).view(weight.shape)
        halves = codes.flatten()
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(weight.shape)}
        tensors |= {
            name: ((halves[::2] << 4) | halves[1::2])[:, None], f"{name}.absmax": scales,
            f"{name}.quant_map": torch.tensor(NF4),
            f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
        }  # fmt: skip
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (target / "config.json").write_text(json.dumps(config))
    return values


def test_a_run_trained_in_four_bits_is_merged_where_there_is_no_card(
    finished: Finished, tiny_model: Path, tmp_path: Path, refused: Refused, no_gpu: None
) -> None:
    values = packed(tiny_model, tmp_path / "packed")
    run = finished()
    changed = resolve("sft", run.plan_path, {"model.name": (str(tmp_path / "packed"), "t"), "device": ("cuda", "t"),
                                             "model.load_in_4bit": (True, "t"), "model.dtype": ("bf16", "t")},
                      gpu_present=False)  # fmt: skip
    save_plan(changed, run.plan_path)
    assert "its 16-bit weights are not known here" in refused("merge", "one")
    assert "is not packed in 4 bit" not in refused("merge", "one", "--merge-base", str(tmp_path / "nowhere"))
    adapter = load_file(run.final_model("sft") / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.mlp.up_proj"
    delta = 2 * adapter[f"{key}.lora_B.weight"] @ adapter[f"{key}.lora_A.weight"]
    name = "model.layers.1.mlp.up_proj.weight"
    plain = load_file(tiny_model / "model.safetensors")
    for base, weight in (("dequantised", values[name]), (str(tiny_model), plain[name])):
        assert main(["merge", "one", "--merge-base", base]) == 0
        found = load_file(merged(run) / "model.safetensors")
        assert torch.equal(found[name], (weight + delta).bfloat16())
        assert not any("absmax" in one for one in found)
        config = json.loads((merged(run) / "config.json").read_text())
        assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    report = read_report(run, "merge")["forms"]["merged_16bit"]
    assert "no GPU" in report["skipped"] and report["reference"] == "4-bit base and adapter"
    assert any("was not compared" in str(notice["text"]) for notice in run.state().notices)


@pytest.mark.skipif(not installed("bitsandbytes"), reason="bitsandbytes is not installed")
def test_the_merged_model_is_packed_read_back_and_compared_on_a_cpu(
    finished: Finished, capfd: pytest.CaptureFixture[str], no_gpu: None
) -> None:
    run = finished()
    assert main(["merge", "one", "--save-method", "merged_4bit"]) == 0
    folder = run.path / "merge" / "merged_4bit"
    assert is_complete(folder) and is_complete(merged(run)) and (folder / "tokenizer_config.json").is_file()
    check = read_report(run, "merge")["forms"]["merged_4bit"]
    assert check["reference"] == "merged_16bit" and check["prompts"] == 2
    assert check["max_logit_difference"] > 0, "packed weights are others"
    assert "of merged_16bit's tokens" in capfd.readouterr().out
    alone = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(merged(run), dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(folder)("Set a timer for 5 minutes")["input_ids"]
    difference = (logits(alone, tokens) - logits(whole, tokens)).abs().max()
    assert 0 < difference < logits(whole, tokens).std(), "another number format, not another model"
    assert json.loads((folder / "finetui.json").read_text())["weights"]["form"] == "merged_4bit"
    assert made(run, "merge")


@pytest.mark.skipif(not installed("bitsandbytes"), reason="bitsandbytes is not installed")
def test_training_in_four_bits_on_a_cpu_says_how_far_the_merged_model_is_from_it(make_run: MakeRun) -> None:
    run = make_run(model__load_in_4bit=True, sft__max_steps=2, export__save_method="merged_16bit",
                   export__check_prompts=3, export__check_tokens=6)  # fmt: skip
    runner.start(run)
    assert finish(run) == "done"
    check = read_report(run, "merge")["forms"]["merged_16bit"]
    assert check["reference"] == "4-bit base and adapter" and check["max_logit_difference"] > 0.01
    told = [str(notice["text"]) for notice in run.state().notices]
    assert any("trained on 4-bit weights and merged into 16-bit ones: that is the difference" in text for text in told)


def test_a_wish_is_added_to_earlier_ones_and_each_quantisation_counts_once(finished: Finished) -> None:
    run = finished()
    ask_for(run, checked_request(run, {"gguf": ["Q8_0", "F16"]}))
    plan = checked_request(run, {"gguf": ["q8_0,q4_k_m"], "upload": "me/x"})
    assert plan.export.gguf == ["Q8_0", "F16", "Q4_K_M"] and plan.stages == ["sft", "merge", "gguf", "upload"]
    with pytest.raises(FinetuiError, match="export.gguf"):
        checked_request(run, {"gguf": ["Q3"]})
