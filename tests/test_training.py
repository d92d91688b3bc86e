"""What is trained: batches, masks, references and losses, with real trainers on the tiny model."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHARED_DATA, MakeRun
from datasets import Dataset
from transformers import AutoTokenizer

from core import train
from core.artefacts import Trained
from core.chat import Template
from core.checkpoints import complete_checkpoints
from core.errors import FinetuiError
from core.export_answers import trained_model
from core.prepare import StageData, prepare
from core.runs import Run
from core.sources import ModelSource, model_source
from core.train_events import Reporter
from core.train_kto import KTOBatches, kto_losses
from core.train_logps import CHUNK_ROWS, completion_logps
from core.train_model import Loaded, load_model, only_unsloth_reads
from core.train_tokenizer import load_tokenizer

SHARED = sorted(SHARED_DATA.glob("*.jsonl"))


class Stage:
    """One stage of a run, loaded and built in this process."""

    def __init__(self, run: Run, name: str, adapter: Path | None = None) -> None:
        self.run, self.plan = run, run.plan()
        self.settings: Any = self.plan.stage(name)
        source = model_source(self.plan.model, print)
        self.source = ModelSource(source.base, adapter or source.adapter)
        tokenizer, template, _ = load_tokenizer(self.plan, self.source)
        self.loaded = Loaded(load_model(self.plan, self.source, self.settings), tokenizer, template)
        self.data: StageData = prepare(self.settings, name, template, print)
        build: Any = train.kto_trainer if name == "kto" else train.sft_trainer
        folder = run.stage_path(name)
        folder.mkdir(exist_ok=True)
        self.trainer = build(self.plan, self.settings, self.loaded, self.data, folder, Reporter(run, name))

    @property
    def logs(self) -> list[dict[str, float]]:
        return [entry for entry in self.trainer.state.log_history if "loss" in entry]


@pytest.fixture
def trained_sft(make_run: MakeRun) -> Path:
    """The adapter of a short SFT that has moved well away from its base."""
    stage = Stage(make_run("sft", sft__max_steps=4), "sft")
    stage.trainer.train()
    train.save_final(stage.loaded, stage.run.final_model("sft"))
    return stage.run.final_model("sft")


def test_a_batch_of_the_trainer_carries_the_labels_of_the_preview(make_run: MakeRun, tiny_model: Path) -> None:
    stage = Stage(make_run("sft", sft__padding_free="on"), "sft")
    template = Template.of(AutoTokenizer.from_pretrained(tiny_model))
    expected = set()
    for example in stage.data.training.examples:
        tokens = template.tokenize(example.row.messages)
        expected.add((tuple(tokens.input_ids), tuple(tokens.labels)))
    seen = 0
    for batch in stage.trainer.get_train_dataloader():
        starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), batch["input_ids"].shape[1]]
        for start, end in zip(starts, starts[1:], strict=False):
            ids = tuple(batch["input_ids"][0, start:end].tolist())
            labels = tuple(batch["labels"][0, start:end].tolist())
            assert (ids, labels) in expected
            seen += 1
    assert seen == len(stage.data.training.examples)


def test_a_padded_batch_carries_the_same_labels(make_run: MakeRun) -> None:
    free, padded = (Stage(make_run("sft", sft__padding_free=word), "sft") for word in ("on", "off"))
    trained = [
        sum(int((batch["labels"] != -100).sum()) for batch in stage.trainer.get_train_dataloader())
        for stage in (free, padded)
    ]
    assert trained[0] == trained[1] == free.data.training.trained_tokens


def test_rows_laid_end_to_end_never_see_each_other(make_run: MakeRun) -> None:
    stage = Stage(make_run("sft", sft__padding_free="on"), "sft")
    model = stage.trainer.model.eval()
    batch = next(iter(stage.trainer.get_train_dataloader()))
    with torch.no_grad():
        together = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0]
        starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), batch["input_ids"].shape[1]]
        assert len(starts) == 5
        for start, end in zip(starts, starts[1:], strict=False):
            alone = model(input_ids=batch["input_ids"][:, start:end]).logits[0]
            torch.testing.assert_close(together[start:end], alone, atol=1e-5, rtol=1e-4)
        mixed = model(input_ids=batch["input_ids"]).logits[0]
    assert not torch.allclose(mixed[starts[1] :], together[starts[1] :], atol=1e-3), "the test could not tell"


def test_an_optimiser_step_sees_exactly_the_effective_batch(make_run: MakeRun) -> None:
    stage = Stage(make_run("sft", sft__batch_size=2, sft__gradient_accumulation_steps=3, sft__max_steps=2), "sft")
    batches = stage.trainer.get_train_dataloader()
    rows = [int((batch["position_ids"][0] == 0).sum()) for batch in batches]
    assert stage.settings.effective_batch == 6 and set(rows[:-1]) == {2}
    stage.trainer.train()
    assert stage.trainer.state.epoch == pytest.approx(2 * 3 / len(rows))


def test_long_batches_are_padded_and_the_person_is_told(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "PADDING_FREE_TOKENS", 50)
    stage = Stage(make_run("sft"), "sft")
    assert not stage.trainer.padding_free
    assert any("padded" in notice["text"] for notice in stage.run.state().notices)


def test_kto_after_sft_has_the_sft_model_as_reference(make_run: MakeRun, trained_sft: Path) -> None:
    stage = Stage(make_run("kto", kto__max_steps=1), "kto", adapter=trained_sft)
    stage.trainer.train()
    first = stage.logs[0]
    for metric in ("rewards/chosen", "rewards/rejected", "rewards/margins", "kl"):
        assert first[metric] == 0, metric


def test_with_the_base_as_reference_the_rewards_would_not_be_zero(make_run: MakeRun, trained_sft: Path) -> None:
    stage = Stage(make_run("kto", kto__max_steps=1), "kto", adapter=trained_sft)
    with torch.no_grad():
        for name, parameter in stage.trainer.model.named_parameters():
            if ".ref." in name:
                parameter.zero_()
    stage.trainer.train()
    assert abs(stage.logs[0]["rewards/chosen"]) > 1e-3


def test_the_reference_stays_while_the_model_moves(make_run: MakeRun, trained_sft: Path) -> None:
    stage = Stage(make_run("kto", kto__max_steps=4), "kto", adapter=trained_sft)
    before = {n: p.detach().clone() for n, p in stage.trainer.model.named_parameters() if "lora_B" in n}
    stage.trainer.train()
    moved = {n: not torch.equal(p, before[n]) for n, p in stage.trainer.model.named_parameters() if n in before}
    assert all(not changed for name, changed in moved.items() if ".ref." in name)
    assert all(changed for name, changed in moved.items() if ".default." in name)


def test_a_kto_checkpoint_is_taken_up_again_and_not_the_sft_weights(make_run: MakeRun, trained_sft: Path) -> None:
    run = make_run("kto", kto__max_steps=4, kto__save_steps=2)
    whole = Stage(run, "kto", adapter=trained_sft)
    whole.trainer.train()
    checkpoint = complete_checkpoints(run.stage_path("kto") / "checkpoints")[1]
    assert checkpoint.name == "checkpoint-2"
    assert not (checkpoint / "ref").exists()
    again = Stage(make_run("kto", kto__max_steps=4, kto__save_steps=2), "kto", adapter=trained_sft)
    again.trainer.train(resume_from_checkpoint=str(checkpoint))
    for ours, theirs in zip(again.logs[-2:], whole.logs[-2:], strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-7)
        assert ours["rewards/margins"] == pytest.approx(theirs["rewards/margins"], abs=1e-6)
    assert abs(again.logs[-1]["rewards/margins"]) > 1e-4


def test_kto_feeds_every_row_once_with_its_neighbours_completion(make_run: MakeRun) -> None:
    stage = Stage(make_run("kto"), "kto")
    examples = {tuple(e.prompt_ids + e.completion_ids): e for e in stage.data.training.examples}
    seen = []
    for batch in stage.trainer.get_train_dataloader():
        count = len(batch["label"])
        assert count >= 2
        rows = [row(batch, "", index) for index in range(count)]
        for index in range(count):
            example, neighbour = examples[rows[index]], examples[rows[index - 1]]
            assert row(batch, "KL_", index) == tuple(example.prompt_ids + neighbour.completion_ids)
            assert example.row.prompt_key != neighbour.row.prompt_key
            assert bool(batch["label"][index]) is example.row.label
        seen += rows
    assert sorted(seen) == sorted(tuple(e.prompt_ids + e.completion_ids) for e in stage.data.training.examples)


def row(batch: dict[str, torch.Tensor], prefix: str, index: int) -> tuple[int, ...]:
    """The ids of a row of a batch without its padding."""
    ids, mask = batch[f"{prefix}input_ids"][index], batch[f"{prefix}attention_mask"][index]
    return tuple(ids[mask.bool()].tolist())


def first_batch(stage: Stage) -> dict[str, torch.Tensor]:
    stage.trainer.model.train()
    return next(iter(stage.trainer.get_train_dataloader()))


def test_our_kto_losses_are_trls(make_run: MakeRun, trained_sft: Path) -> None:
    """The same batch, a moved model: TRL's own loss against the one used for KTO-S with the correction off."""
    stage = Stage(make_run("kto", kto__max_steps=3), "kto", adapter=trained_sft)
    stage.trainer.train()
    batch = first_batch(stage)
    with torch.no_grad():
        theirs = stage.trainer.compute_loss(stage.trainer.model, batch)
        ours = stage.trainer._sign_corrected_loss(stage.trainer.model, batch)
    assert float(ours) == pytest.approx(float(theirs), abs=1e-6)


@pytest.fixture
def tiny_experts(tiny_model: Path, tmp_path: Path) -> Path:
    """A gpt-oss of 4 experts with random weights and the coefficient of the real one, under the tiny tokenizer."""
    from transformers import GptOssConfig, GptOssForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    config = GptOssConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, head_dim=16, num_attention_heads=4,
        num_key_value_heads=2, num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2, sliding_window=32,
        router_aux_loss_coef=0.9, eos_token_id=2, pad_token_id=2, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    GptOssForCausalLM(config).save_pretrained(tmp_path / "tiny-experts")
    tokenizer.save_pretrained(tmp_path / "tiny-experts")
    return tmp_path / "tiny-experts"


def test_the_balance_of_experts_is_not_in_the_loss(make_run: MakeRun, tiny_experts: Path) -> None:
    settings = {"model__name": str(tiny_experts), "lora__target_modules": ["q_proj"]}
    for name in ("sft", "kto"):
        stage = Stage(make_run(name, **settings), name)
        assert not stage.trainer.aux_loss_enabled  # with it Unsloth makes KTO's logits whole
        loss = stage.trainer.compute_loss(stage.trainer.model, first_batch(stage))
        expected = math.log(len(stage.loaded.tokenizer)) if name == "sft" else 0.5  # of weights that know nothing
        assert loss.item() == pytest.approx(expected, abs=0.3)


def test_what_unsloth_alone_reads_is_not_asked_beside_its_merged_form(make_run: MakeRun, tiny_experts: Path) -> None:
    run = make_run("sft", model__name=str(tiny_experts))
    plan, source = run.plan(), model_source(run.plan().model, print)
    trained = Trained("sft", None, run.final_model("sft"))
    assert not only_unsloth_reads(plan, source=source)
    plan.backend, plan.model.load_in_4bit = "unsloth", True
    assert only_unsloth_reads(plan, source=source)
    with pytest.raises(FinetuiError, match="cannot be asked beside its merged form"):
        trained_model(plan, source, trained)


def test_kto_of_a_model_with_experts_in_chunks_is_trls(make_run: MakeRun, tiny_experts: Path) -> None:
    settings = {"model__name": str(tiny_experts), "lora__target_modules": ["q_proj"]}
    stage = Stage(make_run("kto", kto__max_steps=3, **settings), "kto")
    stage.trainer.train()
    model, batch = stage.trainer.model, first_batch(stage)
    found = []
    for loss in (stage.trainer.compute_loss(model, batch), stage.trainer._sign_corrected_loss(model, batch)):
        model.zero_grad()
        loss.backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        found.append((loss.item(), gradients))
    (theirs, wanted), (ours, gradients) = found
    assert ours == pytest.approx(theirs, abs=1e-5) and any(bool(part.abs().max() > 1e-4) for part in wanted)
    torch.testing.assert_close(gradients, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 7, CHUNK_ROWS])
def test_log_probabilities_do_not_depend_on_the_chunk(make_run: MakeRun, trained_sft: Path, size: int) -> None:
    from trl.trainer.utils import selective_log_softmax

    stage = Stage(make_run("kto"), "kto", adapter=trained_sft)
    model, batch = stage.trainer.model, first_batch(stage)
    ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:]
    whole = model(ids, attention_mask=batch["attention_mask"], use_cache=False).logits
    expected = selective_log_softmax(whole[:, :-1], ids[:, 1:], row_mask=mask).sum(-1)
    torch.testing.assert_close(completion_logps(model, batch, size), expected, atol=1e-4, rtol=1e-5)
    assert model(ids, attention_mask=batch["attention_mask"]).logits.shape == whole.shape  # no hook is left


def test_kto_s_changes_the_reference_point_by_the_sign_of_the_ratio() -> None:
    ratios = torch.tensor([0.5, -0.5, 0.5, -0.5], dtype=torch.float64, requires_grad=True)
    labels, z, beta = torch.tensor([True, True, False, False]), torch.tensor(0.3, dtype=torch.float64), 0.2
    expected = [
        1 - 1 / (1 + math.exp(-beta * gain))
        for gain in (0.5 + 0.3, -0.5 - 0.3, -0.3 - 0.5, 0.3 + 0.5)
    ]  # fmt: skip
    losses = kto_losses(ratios, labels, z, beta, sign_correction=True)
    assert losses.tolist() == pytest.approx(expected, abs=1e-12)
    plain = kto_losses(ratios, labels, z, beta)
    assert plain.tolist() == pytest.approx(
        [1 - 1 / (1 + math.exp(-beta * gain)) for gain in (0.2, -0.8, -0.2, 0.8)], abs=1e-12
    )
    losses.sum().backward()
    assert ratios.grad is not None and bool((ratios.grad[:2] < 0).all()) and bool((ratios.grad[2:] > 0).all())


def test_kto_s_trains(make_run: MakeRun, trained_sft: Path) -> None:
    stage = Stage(make_run("kto", kto__sign_correction=True, kto__max_steps=3), "kto", adapter=trained_sft)
    stage.trainer.train()
    assert all(math.isfinite(entry["loss"]) for entry in stage.logs)
    assert stage.logs[0]["kl"] == 0 and stage.logs[-1]["rewards/margins"] != 0


def test_a_batch_of_one_label_gives_a_number(make_run: MakeRun, trained_sft: Path) -> None:
    stage = Stage(make_run("kto"), "kto", adapter=trained_sft)
    batch = first_batch(stage)
    for label in (True, False):
        loss = stage.trainer.compute_loss(stage.trainer.model, {**batch, "label": torch.full((4,), label)})
        loss.backward()
        gradients = [p.grad for p in stage.trainer.model.parameters() if p.grad is not None]
        assert math.isfinite(loss.item()) and all(bool(torch.isfinite(g).all()) for g in gradients)


def test_class_weights_come_from_the_labels_unless_set(make_run: MakeRun, rows_file: Any) -> None:
    from conftest import default_rows

    rows = [entry for number, entry in enumerate(default_rows()) if entry["label"] or number % 4 == 2]
    stage = Stage(make_run("kto", kto__data__file=str(rows_file(rows, "uneven.jsonl"))), "kto")
    good, bad = stage.data.labels[True], stage.data.labels[False]
    ratio = stage.trainer.desirable_weight * good / (stage.trainer.undesirable_weight * bad)
    assert good > bad and 1 <= ratio <= 4 / 3 + 1e-5
    fixed = Stage(make_run("kto", kto__desirable_weight=0.7, kto__undesirable_weight=0.9), "kto")
    assert (fixed.trainer.desirable_weight, fixed.trainer.undesirable_weight) == (0.7, 0.9)


def test_the_second_rate_lasts_and_survives_a_resume(make_run: MakeRun) -> None:
    def rates(**settings: Any) -> list[float]:
        stage = Stage(make_run("kto", kto__max_steps=6, kto__lr_scheduler_type="linear", **settings), "kto")
        stage.trainer.train()
        return [entry["learning_rate"] for entry in stage.logs]

    plain, halved = rates(), rates(kto__two_stage_lr=True, kto__lr_reduction_step=3, kto__lr_reduction_factor=0.25)
    assert halved[:3] == plain[:3]
    assert halved[3:] == pytest.approx([rate * 0.25 for rate in plain[3:]])

    settings = {"kto__two_stage_lr": True, "kto__lr_reduction_step": 3, "kto__lr_reduction_factor": 0.25}
    run = make_run("kto", kto__max_steps=6, kto__lr_scheduler_type="linear", **settings)
    Stage(run, "kto").trainer.train()
    checkpoint = next(
        c for c in complete_checkpoints(run.stage_path("kto") / "checkpoints") if c.name == "checkpoint-4"
    )
    again = Stage(make_run("kto", kto__max_steps=6, kto__lr_scheduler_type="linear", **settings), "kto")
    again.trainer.train(resume_from_checkpoint=str(checkpoint))
    assert [entry["learning_rate"] for entry in again.logs[-2:]] == pytest.approx(halved[-2:])


def test_epochs_bring_kto_rows_in_another_order() -> None:
    rows = {"label": [True, False] * 10, "prompt_key": [str(i) for i in range(20)], "prompt_ids": [[1]] * 20}
    batches = KTOBatches(Dataset.from_dict(rows | {"completion_ids": [[2]] * 20}), 4, 1, shuffle=True)
    first = list(batches)
    batches.set_epoch(1)
    assert list(batches) != first
    batches.set_epoch(0)
    assert list(batches) == first


def test_checkpoints_are_kept_to_the_number_asked_and_each_is_complete(make_run: MakeRun) -> None:
    run = make_run("sft", sft__max_steps=5, sft__save_steps=1, sft__save_total_limit=2)
    Stage(run, "sft").trainer.train()
    folder = run.stage_path("sft") / "checkpoints"
    assert [path.name for path in complete_checkpoints(folder)] == ["checkpoint-5", "checkpoint-4"]
    assert len(list(folder.glob("checkpoint-*"))) == 2
    (folder / "checkpoint-5" / "optimizer.pt").write_bytes(b"cut")
    assert run.newest_checkpoint("sft") == folder / "checkpoint-4"


def test_extra_arguments_reach_trl_and_unknown_ones_are_named(make_run: MakeRun) -> None:
    from core.errors import FinetuiError

    stage = Stage(make_run("sft", sft__extra={"neftune_noise_alpha": 5.0}), "sft")
    assert stage.trainer.args.neftune_noise_alpha == 5.0
    with pytest.raises(FinetuiError, match="neftune_noise_alfa.*neftune_noise_alpha"):
        Stage(make_run("sft", sft__extra={"neftune_noise_alfa": 5.0}), "sft")
    with pytest.raises(FinetuiError, match="set by finetui itself"):
        Stage(make_run("sft", sft__extra={"packing": True}), "sft")


@pytest.mark.skipif(not SHARED, reason="the shared data sets are not beside this checkout")
@pytest.mark.parametrize("path", SHARED, ids=lambda path: path.stem)
def test_real_files_train_for_every_method_they_suit(path: Path, make_run: MakeRun) -> None:
    methods = ["sft"] if path.stem in ("tool_calls_sft", "vault_manager_tool_calls") else ["sft", "kto"]
    for method in methods:
        settings = {f"{method}__data__file": str(path), f"{method}__max_steps": 2, f"{method}__max_length": 2048}
        if method == "kto":
            settings |= {"kto__max_prompt_length": 1536}
        stage = Stage(make_run(method, **settings), method)
        report = stage.data.report()
        assert report["examples"] + report["left_out"] == report["rows"]
        stage.trainer.train()
        assert len(stage.logs) == 2 and all(math.isfinite(entry["loss"]) for entry in stage.logs)


def test_steps_are_told_between_two_logs(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.train_events.TELL_S", 0.0)
    run = make_run("sft", sft__max_steps=5, sft__logging_steps=3)
    Stage(run, "sft").trainer.train()
    told = [(event["kind"], event["step"]) for event in map(json.loads, run.events_path.read_text().splitlines())
            if event["kind"] in ("log", "step")]  # fmt: skip
    assert told == [("log", 1), ("step", 2), ("log", 3), ("step", 4), ("log", 5)]
