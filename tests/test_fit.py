"""What happens when a micro-batch does not fit: found out before the first step, or met in the middle of a run."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeRun, finish, losses
from test_training import Stage

from core import runner
from core.fit import Arrangement, keep_arrangement, kept_arrangement, smaller_batches, with_batch
from core.plan import KTOPlan, SFTPlan
from core.train_events import Reporter
from core.train_fit import FitCallback, Refit, out_of_memory, preflight

# Loaded by every interpreter of a run: from the Nth forward pass on, of those that train or of those that evaluate, the
# model has memory for so many rows and no more.
SMALL_CARD = """
import json, os, sys
if "core.train" in " ".join(sys.orig_argv):
    import torch
    plain, seen = torch.nn.Module.__call__, [0]
    def call(self, *args, **kwargs):
        rows = kwargs.get("input_ids")
        counted = rows is not None and self.training == (os.environ["WHILE"] == "training")
        if counted and type(self).__name__ == "LlamaForCausalLM":
            seen[0] += 1
            if seen[0] > int(os.environ["FROM_PASS"]) and rows.shape[0] > int(os.environ["MOST_ROWS"]):
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return plain(self, *args, **kwargs)
    torch.nn.Module.__call__ = call
"""


@pytest.fixture
def small_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Children of this test have a card for two rows from the given pass on."""

    def put_in(from_pass: int, rows: int = 2, *, during: str = "training") -> None:
        folder = tmp_path / "site"
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(SMALL_CARD)
        monkeypatch.setenv("PYTHONPATH", str(folder))
        monkeypatch.setenv("FROM_PASS", str(from_pass))
        monkeypatch.setenv("MOST_ROWS", str(rows))
        monkeypatch.setenv("WHILE", during)

    return put_in


def refusing(model: Any, rows: int) -> Any:
    """A hook by which `model` has memory for `rows` rows and no more."""

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].shape[0] > rows:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    return model.register_forward_pre_hook(hook, with_kwargs=True)


def events(run: Any, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in run.events_path.read_text().splitlines()]
    return [event for event in lines if event["kind"] == kind]


def test_smaller_batches_divide_the_effective_batch_and_kto_keeps_two_rows() -> None:
    assert smaller_batches(SFTPlan(batch_size=6, gradient_accumulation_steps=4)) == [4, 3, 2, 1]
    assert smaller_batches(KTOPlan(batch_size=6, gradient_accumulation_steps=4)) == [4, 3, 2]
    assert smaller_batches(KTOPlan(batch_size=2)) == []
    smaller = with_batch(SFTPlan(batch_size=6, gradient_accumulation_steps=4), 3)
    assert (smaller.batch_size, smaller.gradient_accumulation_steps, smaller.effective_batch) == (3, 8, 24)


@pytest.mark.parametrize(
    "kept",
    ["", "[", "3", '{"batch_size": 5}', '{"batch_size": 16}', '{"batch_size": "2"}', '{"batch_size": 2, "more": 1}',
     '{"batch_size": 2, "open_layers": -1}', '{"batch_size": 2, "open_layers": true}',
     '{"batch_size": 2, "checkpointing": "x"}'],
)  # fmt: skip
def test_a_kept_arrangement_that_cannot_be_is_passed_over(tmp_path: Path, kept: str) -> None:
    stage = SFTPlan(batch_size=4, gradient_accumulation_steps=2)
    (tmp_path / "batch.json").write_text(kept)
    assert kept_arrangement(tmp_path, stage) is None
    found = Arrangement(2, open_layers=3)
    keep_arrangement(tmp_path, found)
    assert kept_arrangement(tmp_path, stage) == found
    applied = found.applied(stage)
    assert (applied.batch_size, applied.effective_batch, applied.gradient_checkpointing) == (2, 8, "on")


@pytest.mark.parametrize("name", ["sft", "kto"])
def test_the_largest_micro_batch_that_fits_is_found_before_the_first_step(make_run: MakeRun, name: str) -> None:
    settings = {f"{name}__batch_size": 8, "sft__padding_free": "off", f"{name}__data__holdout": 0.2}
    stage = Stage(make_run(name, **settings), name)
    reporter = Reporter(stage.run, name)
    hook = refusing(stage.trainer.model, 4)
    with pytest.raises(Refit) as found:
        preflight(stage.trainer, stage.settings, 1 << 40, reporter)
    assert found.value.to.batch_size == 4 and events(stage.run, "preflight")[0]["batch_size"] == 4
    hook.remove()
    preflight(stage.trainer, stage.settings, 1 << 40, reporter)
    assert events(stage.run, "preflight")[1]["batch_size"] == 8
    refusing(stage.trainer.model, 0)
    with pytest.raises(Refit) as found:
        preflight(stage.trainer, stage.settings, 1 << 40, reporter)
    assert found.value.to.batch_size == (2 if name == "kto" else 1)
    assert "did not fit" in events(stage.run, "notice")[-1]["text"]
    preflight(stage.trainer, found.value.to.applied(stage.settings), 1 << 40, reporter)  # warns, lets it try


@pytest.mark.parametrize("name", ["sft", "kto"])
def test_looking_beforehand_changes_nothing_that_is_trained_or_logged(make_run: MakeRun, name: str) -> None:
    dropout = {"lora__dropout": 0.1, f"{name}__data__holdout": 0.2}
    plain, looked = (Stage(make_run(name, **dropout), name) for _ in range(2))
    torch.manual_seed(3)
    plain.trainer.train()
    looked.trainer.add_callback(FitCallback(looked.trainer, looked.settings, 1 << 40, Reporter(looked.run, name)))
    torch.manual_seed(3)
    looked.trainer.train()
    timed = ("runtime", "per_second")
    histories = [stage.trainer.state.log_history for stage in (plain, looked)]
    logs = [[{k: v for k, v in entry.items() if not k.endswith(timed)} for entry in history] for history in histories]
    assert logs[0] == logs[1] and len(events(looked.run, "preflight")) == 1


def test_a_look_that_fails_for_another_reason_does_not_end_the_training(make_run: MakeRun) -> None:
    stage = Stage(make_run("sft"), "sft")
    stage.trainer.add_callback(FitCallback(stage.trainer, stage.settings, 1 << 40, Reporter(stage.run, "sft")))
    plain = stage.trainer.get_train_dataloader
    looked: list[int] = []

    def first_then_broken() -> Any:
        """The loop's own loader comes first, the look's second."""
        looked.append(1)
        return plain() if len(looked) == 1 else object()

    stage.trainer.get_train_dataloader = first_then_broken
    stage.trainer.train()
    assert len(looked) == 2 and stage.trainer.state.global_step == 6
    assert "look at the longest rows failed (AttributeError)" in events(stage.run, "notice")[-1]["text"]


def test_what_counts_as_out_of_memory() -> None:
    inner = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")
    outer = ValueError("the step failed")
    outer.__cause__ = inner
    assert out_of_memory(outer) and out_of_memory(torch.cuda.OutOfMemoryError("x"))
    assert not out_of_memory(ValueError("loss is nan")) and not out_of_memory(MemoryError("x"))


@pytest.mark.parametrize(("name", "during"), [("sft", "training"), ("kto", "evaluation")])
def test_memory_that_runs_out_in_the_middle_costs_a_notice_and_nothing_else(
    make_run: MakeRun, small_card: Any, name: str, during: str
) -> None:
    """The trainer meets the end of the card after step 4; the losses go on as those of a run with a larger card."""
    settings = {f"{name}__max_steps": 8, f"{name}__save_steps": 2, f"{name}__batch_size": 4}
    settings |= {"sft__padding_free": "off"} if name == "sft" else {"kto__data__holdout": 0.4, "kto__eval_steps": 5}
    if name == "sft":  # KTO's loss depends on the rows that go through at once: its KL term is estimated from them
        whole = make_run(name, **settings)
        runner.start(whole)
        assert finish(whole) == "done"
    small_card(from_pass=4 if name == "sft" else 0, during=during)
    run = make_run(name, **settings)
    runner.start(run)
    assert finish(run) == "done"
    assert [notice["text"][:18] for notice in run.state().notices if notice["level"] == "warning"] == [
        "GPU memory ran out"
    ]
    assert [event["status"] for event in events(run, "stage_end")] == ["refit", "done"]
    assert [event["resumed_step"] for event in events(run, "totals")] == [0, 4]
    assert list(losses(run, name)) == list(range(1, 9))
    if name == "sft":
        assert losses(run, name) == pytest.approx(losses(whole, name), abs=2e-5)
    assert json.loads((run.stage_path(name) / "batch.json").read_text())["batch_size"] == 2


def test_a_card_too_small_for_one_row_ends_the_run_with_advice(make_run: MakeRun, small_card: Any) -> None:
    small_card(from_pass=0, rows=0)
    run = make_run("sft", sft__padding_free="off", sft__batch_size=2)
    runner.start(run)
    assert finish(run) == "failed"
    statuses = [event["status"] for event in events(run, "stage_end")]
    assert statuses == ["refit", "failed"]
    assert "sft.max_length" in run.state().errors[-1]["advice"]
    assert os.path.exists(run.stage_path("sft") / "batch.json")
