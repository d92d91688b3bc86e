"""What a plan needs of memory: counted, estimated, arranged, and said. The figures are of real steps on an H200."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeRun
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training import Stage

from core.backend import make_plan, settle
from core.budget import Place, preset_needs, verdicts
from core.cli import main
from core.config import resolve
from core.errors import FinetuiError
from core.fit import arrange, batch_sizes, with_batch
from core.memory import GIB, SHAPES, Lengths, estimate, shape_in, shape_of, weight_bytes
from core.plan import Plan
from core.train_arrange import Fitting
from core.train_data import row_lengths
from core.train_events import Reporter
from core.train_fit import largest_batch

# size, stage, settings, rows, tokens a row, GiB that PyTorch had reserved: tests/bench/gpu_probe.py, H200, Unsloth
# 2026.10.9, torch 2.11. The open ones keep every layer's activations.
MEASURED = [
    ("135m", "sft", {}, 24, 1024, 1.03), ("135m", "kto", {}, 16, 1664, 1.26),
    ("3b", "sft", {}, 12, 512, 3.35), ("3b", "sft", {}, 24, 1024, 5.33), ("3b", "kto", {}, 16, 512, 4.30),
    ("3b", "kto", {}, 8, 4096, 8.67), ("3b", "sft", {"model.load_in_4bit": False, "model.name": "x/y"}, 6, 1664, 7.62),
    ("3b", "sft", {"sft.gradient_checkpointing": "off"}, 2, 2048, 13.01),
    ("7b", "sft", {}, 6, 512, 6.31), ("7b", "sft", {}, 12, 2048, 10.04), ("7b", "kto", {}, 4, 512, 6.84),
    ("7b", "kto", {}, 16, 1664, 13.69), ("7b", "sft", {"sft.gradient_checkpointing": "off"}, 6, 512, 16.96),
    ("7b", "kto", {"kto.gradient_checkpointing": "off"}, 4, 1664, 31.03),
    ("7b", "sft", {"backend": "trl"}, 6, 1664, 10.51), ("7b", "kto", {"backend": "trl"}, 8, 1664, 15.30),
    ("13b", "sft", {}, 4, 512, 9.92), ("13b", "sft", {}, 12, 2048, 14.59), ("13b", "kto", {}, 8, 4096, 19.96),
    ("20b", "sft", {"lora.r": 8}, 1, 512, 14.62),
]  # fmt: skip


# The largest batch of whole runs through the product (tests/bench/gpu_memory.py, H200, PyTorch held to 22 GiB): size,
# stage, rank, rows at once, tokens, layers left open, GiB of the process. The last ones (tests/bench/gpu_speed.py) with
# attention in one call a layer, the others with a call a row, which kept two bytes a token and head's value more.
RUNS = [
    ("3b", "sft", 32, 24, 8232, 11, 10.07), ("3b", "kto", 32, 16, 24360, 2, 9.87),
    ("7b", "sft", 64, 24, 8057, 12, 17.69), ("7b", "kto", 64, 32, 49860, 0, 19.97),
    ("7b", "kto", 64, 4, 5404, 20, 20.30), ("13b", "sft", 64, 24, 8057, 7, 18.32),
    ("13b", "kto", 64, 16, 24930, 0, 18.40), ("7b", "sft", 128, 12, 5004, 0, 9.12),
    ("20b", "sft", 32, 6, 9984, 0, 21.86), ("20b", "sft", 32, 4, 6656, 0, 20.28),
    ("7b", "sft", 32, 24, 8264, 0, 7.12), ("7b", "sft", 32, 24, 8264, 14, 18.02), ("7b", "sft", 64, 24, 8264, 0, 7.90),
    ("7b", "sft", 64, 24, 8264, 13, 17.90), ("7b", "sft", 32, 48, 15945, 7, 18.49),
    ("7b", "kto", 64, 8, 11634, 0, 10.16),
]  # fmt: skip


@pytest.mark.parametrize(("size", "stage", "r", "rows", "tokens", "opened", "measured"), RUNS)
def test_the_estimate_is_within_a_tenth_of_what_whole_runs_took(
    size: str, stage: str, r: int, rows: int, tokens: int, opened: int, measured: float
) -> None:
    steps = {"sft__batch_size": 48, "sft__gradient_accumulation_steps": 4} if rows == 48 else {}
    plan = planned(size, stage, lora__r=r, **steps)
    plan = plan.model_copy(update={stage: with_batch(plan.stage(stage), rows)})
    found = estimate(plan, stage, SHAPES[size], Lengths([1]), open_layers=opened, tokens=tokens)
    assert found and found.total / GIB == pytest.approx(measured, rel=0.1)


def planned(size: str, stage: str, card: float = 80, **settings: Any) -> Plan:
    """A plan for a card of so many GiB, with everything installed."""
    values = {"model.size": size, **{key.replace("__", "."): value for key, value in settings.items()}}
    found = resolve(stage, None, {key: (value, "flag") for key, value in values.items()}, gpu_present=True)
    return settle(found, int(card * GIB)).plan


@pytest.mark.parametrize(("size", "stage", "changes", "rows", "length", "reserved"), MEASURED)
def test_the_estimate_is_within_a_tenth_of_what_was_measured(
    size: str, stage: str, changes: dict[str, Any], rows: int, length: int, reserved: float
) -> None:
    plan = planned(size, stage, **changes)
    plan.stage(stage).batch_size, plan.stage(stage).gradient_accumulation_steps = max(rows, 2), 1
    lengths = Lengths([length] * rows)
    found = estimate(plan, stage, SHAPES[size], lengths)
    assert found and (found.total - found.items["CUDA context"]) / GIB == pytest.approx(reserved, rel=0.1)
    assert sum(found.items.values()) == found.total and min(found.items.values()) >= 0


def test_an_adapter_is_counted_as_the_trainers_counted_it() -> None:
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    seen = {"135m": (16, 4_884_480), "3b": (32, 59_867_136), "7b": (64, 167_772_160), "13b": (64, 250_347_520),
            "20b": (8, 92_454_912)}  # fmt: skip
    for size, (r, parameters) in seen.items():
        assert SHAPES[size].adapter_parameters(every, r) == parameters, size
    assert SHAPES["20b"].adapter_parameters(every[:4], 128) == 63_700_992
    assert SHAPES["7b"].adapter_parameters(["lm_head"], 8) is None


def test_shape_and_weights_of_a_model_folder_are_those_of_the_model(make_run: MakeRun) -> None:
    stage = Stage(make_run("sft"), "sft")
    shape = shape_in(Path(stage.source.base), None)
    assert shape is not None
    base = stage.loaded.model.get_base_model()
    frozen = sum(p.numel() for name, p in base.named_parameters() if "lora_" not in name)
    assert shape.linear_parameters + shape.other_parameters == frozen
    assert weight_bytes(shape, stage.plan) == 4 * frozen
    trained = sum(p.numel() for p in base.parameters() if p.requires_grad)
    assert shape.adapter_parameters(stage.plan.lora.target_modules, stage.plan.lora.r) == trained


@pytest.mark.parametrize(
    "config",
    [{}, {"num_attention_heads": 0}, {"num_attention_heads": "x"}, {"hidden_size": 8}, [], "x", None,
     {"num_attention_heads": 4, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 9,
      "num_local_experts": 4}],
)  # fmt: skip
def test_a_model_whose_shape_cannot_be_told_has_no_estimate_and_no_traceback(tmp_path: Path, config: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert shape_in(tmp_path, "7b") is None
    assert shape_of({}) is None and shape_in(tmp_path / "not here", "7b") is None


@given(st.sampled_from(["3b", "7b", "13b"]), st.sampled_from(["sft", "kto"]), st.integers(1, 80), st.integers(64, 4096))
@settings(max_examples=60)
def test_an_arrangement_keeps_the_step_and_stays_inside_its_budget(size: str, stage: str, card: int, most: int) -> None:
    plan = planned(size, stage)
    lengths, budget = Lengths([most] * 512), card * GIB
    found = arrange(plan, stage, SHAPES[size], lengths, lambda rows: rows * most, budget)
    after = found.applied(plan.stage(stage))
    assert after.effective_batch == plan.stage(stage).effective_batch
    tried = plan.model_copy(update={stage: after})
    need = estimate(tried, stage, SHAPES[size], lengths, open_layers=found.open_layers, tokens=after.batch_size * most)
    assert need is not None
    if "more than fits" in found.why:
        assert after.batch_size == batch_sizes(plan.stage(stage))[-1] and not found.open_layers
    else:
        assert need.total - need.items["CUDA context"] <= budget


def test_more_memory_means_more_rows_at_once_and_then_open_layers() -> None:
    plan = planned("7b", "sft")
    found = [arrange(plan, "sft", SHAPES["7b"], Lengths([1500]), lambda rows: rows * 1500, card * GIB)
             for card in (6, 8, 11, 23, 40, 200)]  # fmt: skip
    assert [one.batch_size for one in found] == sorted(one.batch_size for one in found)
    assert found[0].batch_size < 24 == found[3].batch_size
    assert found[4].open_layers > 1 and found[4].checkpointing == "on"
    assert found[5].checkpointing == "off" and not found[5].open_layers
    by_hand = planned("7b", "sft", sft__batch_size=6, sft__gradient_checkpointing="on")
    same = arrange(by_hand, "sft", SHAPES["7b"], Lengths([1500]), lambda rows: rows * 1500, 200 * GIB)
    assert (by_hand.sft.regroup, same.batch_size, same.open_layers, same.checkpointing) == ("off", 6, 0, "on")


def test_all_four_sizes_fit_a_card_of_24_gib_and_the_largest_has_its_adapter_cut() -> None:
    place = Place("a card of 24 GiB", 24 * GIB, 24 * GIB)
    for size in ("3b", "7b", "13b", "20b"):
        plan = planned(size, "sft-kto", card=24)
        found = verdicts(plan, {}, place, None)
        assert [name for name, judged in found.items() if judged and judged.fits] == ["sft", "kto"], size
        assert plan.lora.alpha == 2 * plan.lora.r
    assert plan.lora.r == 16 and planned("20b", "sft", card=24).lora.r == 32  # KTO holds its reference beside it
    resolved = make_plan("sft", None, {"model.size": ("20b", "flag")}, card=24 * GIB)
    assert "cut from 128" in resolved.sources["lora.r"]
    kept = make_plan("sft", None, {"model.size": ("20b", "flag"), "lora.r": (128, "flag")}, card=24 * GIB)
    assert kept.plan.lora.r == 128
    assert planned("20b", "sft", card=80).lora.r == 128


def test_the_presets_needs_grow_with_their_size() -> None:
    for method in ("sft", "sft-kto"):
        needs = list(preset_needs(method, cards=True).values())
        assert needs == sorted(needs) and 1 < needs[0] < 3
    assert preset_needs("sft", cards=True)["20b"] < 24


def test_the_table_of_sizes_and_the_review_need_the_same_for_the_same_rows() -> None:
    lengths = {"sft": Lengths([900, 300, 64])}
    plan = settle(resolve("sft", None, {"model.size": ("135m", "x")}, gpu_present=False)).plan
    judged = verdicts(plan, lengths, Place("here", 2**40, 2**40), None)["sft"]
    assert judged and preset_needs("sft", cards=False, lengths=lengths)["135m"] == judged.estimate.total / GIB


def test_fit_says_item_by_item_what_is_needed_and_whether_it_is_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # nothing is fetched, wherever this runs
    assert main(["fit", "sft", "--model-size", "7b", "--card", "24"]) == 0
    shown = capsys.readouterr().out
    assert "24.0 of 24.0 GiB free" in shown and "✔ fits" in shown
    items = ("weights", "adapter", "gradients", "optimiser", "activations", "CUDA context", "fragmentation", "in all")
    assert [item for item in items if item not in shown] == []
    assert main(["fit", "kto", "--model-size", "20b", "--card", "8", "--json"]) == 3
    report = json.loads(capsys.readouterr().out)
    assert report["fits"] is False and "too large" in report["stages"]["kto"]["words"]
    assert sum(report["stages"]["kto"]["items"].values()) == report["stages"]["kto"]["bytes"]


def test_fit_measures_the_plans_own_rows_where_the_model_is_here(
    capsys: pytest.CaptureFixture[str], make_run: MakeRun, tiny_model: Path
) -> None:
    run = make_run("sft")
    words = ["--model-name", str(tiny_model), "--local-file", str(run.plan().sft.data.file), "--batch-size", "4"]
    assert main(["fit", "sft", *words, "--device", "cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    stage = Stage(run, "sft")
    longest = sorted((len(e.tokens.input_ids) for e in stage.data.training.examples), reverse=True)
    assert report["stages"]["sft"]["tokens"] == sum(longest[:4]) and report["notes"] == []


@pytest.mark.usefixtures("no_gpu")
def test_fit_without_a_card_says_how_to_ask_about_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "sft", "--model-size", "7b"]) == 3
    assert "--card 24" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["sft", "kto"])
def test_the_look_takes_the_largest_batch_that_the_run_will_make(make_run: MakeRun, name: str) -> None:
    changes = {f"{name}__num_train_epochs": 2, f"{name}__max_steps": -1, "sft__padding_free": "on"}
    stage = Stage(make_run(name, **changes), name)
    lengths = row_lengths(stage.trainer.train_dataset)
    loader = stage.trainer.get_train_dataloader()
    seen = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        for batch in loader.batch_sampler:
            found = [lengths[row] for row in batch]
            seen.append(max(found) * len(found) if name == "kto" else sum(found))
    padded = name == "kto"
    batch = largest_batch(loader, stage.trainer.train_dataset, 99, padded=padded, passes=2)
    assert batch["input_ids"].numel() == max(seen)
    if name == "kto":
        fitting = Fitting(stage.plan, name, stage.source, stage.data)
        assert fitting.largest(stage.settings.batch_size) == max(seen)


def test_a_run_on_a_gpu_arranges_its_batches_tells_it_and_goes_the_same_way_again(make_run: MakeRun) -> None:
    run = make_run("sft", sft__batch_size=2, sft__gradient_accumulation_steps=6)
    plan = run.plan()
    plan.device, plan.backend, plan.sft.regroup, plan.sft.gradient_checkpointing = "cuda", "unsloth", "on", "on"
    stage = Stage(run, "sft")
    fitting, folder = Fitting(plan, "sft", stage.source, stage.data), run.stage_path("sft")
    found = fitting.arrangement(folder, 40 * GIB, Reporter(run, "sft"))
    assert found.batch_size == 12 and run.state().notices[-1]["text"].startswith("12 rows at once, 1 times a step")
    plan.sft.regroup = "off"
    assert fitting.arrangement(folder, 1 * GIB, Reporter(run, "sft")) == found
    assert torch.get_default_dtype() == torch.float32


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from core.gpu import GpuSample

    cards = [GpuSample(0, "One", memory_free_bytes=9 * GIB), GpuSample(1, "Two", memory_free_bytes=9 * GIB)]
    monkeypatch.setattr("core.gpu.gpus", lambda pids=(): cards)
    monkeypatch.setattr("core.backend.installed", lambda package: True)
    with pytest.raises(FinetuiError, match="There is no GPU 2") as refused:
        make_plan("sft", None, {"gpu": (2, "flag"), "model.size": ("7b", "flag")})
    assert refused.value.advice == "There is: 0 (One), 1 (Two)." and refused.value.exit_code == 3
    assert make_plan("sft", None, {"gpu": (1, "flag"), "model.size": ("7b", "flag")}).plan.gpu == 1
