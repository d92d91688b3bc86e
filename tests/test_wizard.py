"""The wizard, driven by its keys: preview, consequences, forecast, completion; with hostile rows."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import finish, wait_until
from pilots import CONTROLS, HOSTILE, frame, shows, until
from textual.app import App
from textual.widgets import Input

import tui
from core.backend import settle
from core.checkpoints import write_manifest
from core.config import resolve
from core.disk import adapter_parameters, checkpoint_bytes
from core.errors import FinetuiError
from core.gpu import GpuSample
from core.paths import configs_dir
from core.ready import Ready
from core.runs import Run, create_run
from core.sources import ModelSource
from core.turns import take_turn
from tui.completion import completions, load_recent, remember
from tui.data_room import DataRoom
from tui.data_views import TRAINED, row_words
from tui.draft import STEPS, Draft, RowsDraft
from tui.forecast import Count, consequence, differences, fit, stage_words
from tui.review import refusal
from tui.settings import Setting
from tui.wizard import WizardScreen

pytestmark = pytest.mark.usefixtures("own_cache_and_no_gpu")


class WizardApp(App[None]):
    """The wizard alone, with the app's looks."""

    CSS_PATH = Path(tui.__file__).parent / "app.tcss"

    def __init__(self, draft: Draft, folder: Path) -> None:
        super().__init__()
        self.animation_level = "none"
        self.draft, self.folder = draft, folder
        self.given: Run | None = None

    def on_mount(self) -> None:
        self.push_screen(WizardScreen(self.draft, self.folder / "draft.json", self.folder / "runs"), self.take)

    def take(self, run: Run | None) -> None:
        self.given = run
        self.exit()

    @property
    def wizard(self) -> WizardScreen:
        return next(screen for screen in self.screen_stack if isinstance(screen, WizardScreen))


def draft_of(method: str, model: Path, rows: Path, step: int = 2, **values: str) -> Draft:
    """A draft of the tiny model on a file; keywords are settings, with `__` for the dot."""
    draft = Draft(method=method, model=str(model), step=step)  # type: ignore[arg-type]
    for stage in draft.stages:
        draft.data[stage] = RowsDraft(kind="file", file=str(rows))
    draft.values = {key.replace("__", "."): value for key, value in values.items()}
    return draft


def marked(app: WizardApp) -> str:
    """The text of the preview that is underlined."""
    content = app.wizard.query_one("#preview-text").content  # type: ignore[attr-defined]
    return "".join(content.plain[span.start : span.end] for span in content.spans if "underline" in str(span.style))


# --- preview ---


async def test_a_row_is_shown_as_it_will_be_trained_and_keys_go_through_the_rows(
    tmp_path: Path, tiny_model: Path, rows_file: Callable[..., Path]
) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"Question {n}"}, {"role": "assistant", "content": f"Answer {n}"}]}
        for n in range(60)
    ]
    app = WizardApp(draft_of("sft", tiny_model, rows_file(rows)), tmp_path)
    async with app.run_test(size=(120, 40)) as pilot:
        text = await shows(pilot, "row 1 of 60", "Answer 0")
        assert "<|im_start|>user" in text and "<|im_end|>" in text and "tokens" in text
        assert marked(app) == "Answer 0<|im_end|>"
        app.wizard.query_one(DataRoom).focus()
        await pilot.press("right")
        await shows(pilot, "row 2 of 60", "Answer 1")
        assert marked(app) == "Answer 1<|im_end|>"
        await pilot.press("shift+right", "shift+right", "shift+right", "right")
        await shows(pilot, "row 60 of 60", "Answer 59")
        await pilot.press("left")
        await shows(pilot, "row 59 of 60", "Answer 58")
        child = app.wizard.lens.pid
        assert child and psutil.pid_exists(child)
        await pilot.press("enter")
        await until(pilot, lambda: app.wizard.draft.step == 3)
    assert not psutil.pid_exists(child), "the child ends with the wizard"


async def test_a_labelled_row_shows_prompt_completion_and_label_and_space_goes_to_the_other_stage(
    tmp_path: Path, tiny_model: Path, rows_file: Callable[..., Path]
) -> None:
    app = WizardApp(draft_of("sft-kto", tiny_model, rows_file()), tmp_path)
    async with app.run_test(size=(80, 40)) as pilot:
        await shows(pilot, "SFT  1 Rows", "row 1 of 20")
        app.wizard.query_one(DataRoom).focus()
        await pilot.press("space")
        await shows(pilot, "KTO  1 Rows", "row 1 of 40", "✔ good answer", "(prompt)", "completion, labelled true")
        await pilot.press("shift+right")
        await shows(pilot, "row 26 of 40")
        while "✘ bad answer" not in frame(app):
            at = app.wizard.query_one(DataRoom).here.at
            await pilot.press("left")
            await shows(pilot, f"row {at} of 40")
        await shows(pilot, "✘ bad answer", "labelled false")


async def test_what_is_left_out_by_length_says_so(
    tmp_path: Path, tiny_model: Path, rows_file: Callable[..., Path]
) -> None:
    rows = [{"prompt": "short", "completion": "fine"}, {"prompt": "long " * 400, "completion": "too far"}]
    app = WizardApp(draft_of("sft", tiny_model, rows_file(rows), sft__max_length="64"), tmp_path)
    async with app.run_test(size=(120, 40)) as pilot:
        await shows(pilot, "row 1 of 2", "trained")
        app.wizard.query_one(DataRoom).focus()
        await pilot.press("right")
        await shows(pilot, "row 2 of 2", "left out: longer than", "not learned from")


async def test_hostile_rows_change_nothing_on_the_terminal(
    tmp_path: Path, tiny_model: Path, rows_file: Callable[..., Path]
) -> None:
    rows = [{"prompt": HOSTILE, "completion": HOSTILE + "x" * 100_000, "label": label} for label in (True, False)]
    rows += [{"messages": [{"role": HOSTILE, "content": HOSTILE}], HOSTILE: 1}]
    draft = draft_of("kto", tiny_model, rows_file(rows), kto__max_length="1024", kto__max_prompt_length="512")
    app = WizardApp(draft, tmp_path)
    async with app.run_test(size=(80, 24)) as pilot:
        await shows(pilot, "3 rows: 2 ")
        await until(pilot, lambda: "[INST]" in app.wizard.query_one("#preview-text").content.plain)  # type: ignore[attr-defined]
        app.wizard.query_one(DataRoom).focus()
        await pilot.press("down")
        shown = app.wizard.query_one("#preview-text").content.plain  # type: ignore[attr-defined]
        assert CONTROLS.findall(shown.replace("\n", "")) == []
        assert CONTROLS.findall(frame(app).replace("\n", "")) == []
        assert "[/x]" in shown and "␛" in shown


async def test_without_a_tokenizer_the_preview_says_why(tmp_path: Path, rows_file: Callable[..., Path]) -> None:
    app = WizardApp(draft_of("sft", Path("nobody/nothing"), rows_file()), tmp_path)
    async with app.run_test(size=(120, 40)) as pilot:
        await shows(pilot, "The tokenizer of nobody/nothing is not on this machine yet.", "dry run")


async def test_a_child_that_dies_is_told_of_and_started_again(
    tmp_path: Path, tiny_model: Path, rows_file: Callable[..., Path]
) -> None:
    app = WizardApp(draft_of("sft", tiny_model, rows_file()), tmp_path)
    async with app.run_test(size=(120, 40)) as pilot:
        await shows(pilot, "row 1 of 20")
        psutil.Process(app.wizard.lens.pid).kill()
        app.wizard.query_one(DataRoom).focus()
        await pilot.press("right")
        await until(pilot, lambda: "row 2 of 20" in frame(app) or "process died" in frame(app))
        await pilot.press("right", "left", "right")
        await shows(pilot, "of 20", "tokens,")


def test_marks_are_a_colour_and_an_underline() -> None:
    assert "underline" in TRAINED and "$" in TRAINED
    reply = {"segments": [["<s>", False, True, 1], ["hi\n", False, False, 1], ["yes", True, False, 1]], "left_out": ""}
    turns = [{"role": role, "start": start, "tokens": tokens, "trained": trained}
             for role, start, tokens, trained in (("user", 0, 2, 0), ("assistant", 2, 1, 1))]  # fmt: skip
    content = row_words("kto", {**reply, "turns": turns, "label": False, "cut": 3, "tokens": 3})
    told = "user 2 tokens (prompt)\n<s>hi\nassistant 1 token, 1 trained: the completion, labelled false\nyes"
    assert content.plain == f"! 3 tokens are cut from the left\n{told}"


# --- settings ---


def setting(app: WizardApp, path: str) -> Setting:
    return next(field for field in app.wizard.query(Setting) if field.option.path == path)


def help_of(app: WizardApp, path: str) -> str:
    return setting(app, path).query_one(".help").content.plain  # type: ignore[attr-defined]


async def test_consequences_stand_beside_the_fields_and_follow_what_is_typed(
    tmp_path: Path, tiny_model: Path, rows_file: Callable[..., Path]
) -> None:
    app = WizardApp(draft_of("kto", tiny_model, rows_file(), 3, kto__num_train_epochs="3"), tmp_path)
    async with app.run_test(size=(120, 40)) as pilot:
        await until(pilot, lambda: "steps an epoch" in help_of(app, "kto.batch_size"))
        setting(app, "kto.batch_size").query_one(".value").focus()
        await pilot.press(*"4")
        await until(pilot, lambda: "→ 4 × 1 = 4 examples a step, 10 steps an epoch" in help_of(app, "kto.batch_size"))
        assert "30 steps in all" in help_of(app, "kto.num_train_epochs")
        assert "5 of 30 steps" in help_of(app, "kto.warmup_ratio")
        await shows(pilot, "→ 30 steps of 4 examples; an epoch is 10 steps, 40 examples")
        await shows(pilot, "of them trained")
        setting(app, "kto.save_steps").query_one(".value").focus()
        assert "none before the end at step 30" in help_of(app, "kto.save_steps")
        await pilot.press("1", "0")
        await until(pilot, lambda: "3 checkpoints, the newest 3 kept" in help_of(app, "kto.save_steps"))
        assert app.wizard.draft.values["kto.save_steps"] == "10"
        assert "set here" in setting(app, "kto.save_steps").query_one(".source").content.plain  # type: ignore[attr-defined]
        await pilot.press("f5")
        await until(pilot, lambda: app.wizard.draft.values["kto.save_steps"] == "")
        await until(pilot, lambda: "preset" in setting(app, "kto.save_steps").query_one(".source").content.plain)  # type: ignore[attr-defined]
        await pilot.press("ctrl+r")
        await until(pilot, lambda: app.wizard.draft.values == {})


def test_steps_are_said_as_training_counts_them() -> None:
    plan = settle(resolve("sft-kto", configs_dir() / "demo.yaml", {}, gpu_present=False)).plan
    counts = {"sft": Count(480, tokens=25_121, trained=11_625, longest=71), "kto": Count(320)}
    assert consequence(plan, "sft.max_steps", counts) == "0.47 epochs of 120 steps"
    assert consequence(plan, "sft.num_train_epochs", counts) == "56 steps in all, ended by max_steps after 0.47 epochs"
    assert consequence(plan, "sft.warmup_ratio", counts) == "3 of 56 steps"
    assert consequence(plan, "sft.max_length", counts) == "the longest row kept has 71 tokens"
    assert consequence(plan, "lora.alpha", counts) == "alpha / r = 2"
    assert consequence(plan, "kto.batch_size", {}) == "4 × 1 = 4 examples a step"
    assert "72 steps of 4 examples; an epoch is 80 steps, 320 examples" in stage_words(plan, "kto", counts["kto"])
    assert stage_words(plan, "kto", None) == "72 steps of 4 examples"


# --- review ---


async def test_the_review_foresees_steps_memory_disk_and_what_changed_and_runs_dry(
    tmp_path: Path, tiny_model: Path, rows_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = str(rows_file())
    before = {"model.name": str(tiny_model), "sft.data.file": rows, "sft.learning_rate": 1e-3}
    plan = settle(resolve("sft", None, {key: (value, "x") for key, value in before.items()}, gpu_present=False))
    run = create_run(tmp_path / "runs", plan)
    for event in (
        {"kind": "run_start"},
        {"kind": "stage_start", "name": "sft"},
        {"kind": "phase", "stage": "sft", "name": "load", "seconds": 4},
        {"kind": "log", "stage": "sft", "step": 5, "loss": 1.0, "tokens_per_s": 100.0},
        {"kind": "stage_end", "name": "sft", "status": "done"},
        {"kind": "run_end", "status": "done"},
    ):
        run.events.append(**event)  # type: ignore[arg-type]
    draft = draft_of("sft", tiny_model, Path(rows), 4, sft__learning_rate="3e-4", sft__num_train_epochs="2")
    with monkeypatch.context() as small:
        small.setattr("core.disk.shutil.disk_usage", lambda place: type("Usage", (), {"free": 1000})())
        app = WizardApp(draft, tmp_path)
        async with app.run_test(size=(120, 40)) as pilot:
            await shows(pilot, "✘ The run and what is made of it take about", "checkpoints and result", "0 MiB free")
    app = WizardApp(draft, tmp_path)
    async with app.run_test(size=(120, 40)) as pilot:
        text = await shows(pilot, "✔ ready", "of them trained", "roughly", f"going by {run.name}", "100 tokens/s")
        assert f"since {run.name}: sft.learning_rate 0.001 → 0.0003; sft.num_train_epochs 3 → 2" in text
        assert "10 steps of 4 examples; an epoch is 5 steps, 20 examples" in text
        assert "free on this machine (RAM)" in text and "GiB with 4 rows at once" in text and "an estimate" in text
        assert "rows are left out" in text
        await pilot.press("d")
        await shows(pilot, "Dry run", "✔ it holds together", "SFT: 20 examples")
        await pilot.press("escape")
        await until(pilot, lambda: app.screen is app.wizard)


@pytest.mark.parametrize(
    ("part", "step"),
    [("model.name", "Model"), ("model", "Model"), ("kto.data", "Data"), ("sft.data.file", "Data"),
     ("sft.max_length", "Settings"), ("sft.data.holdout", "Settings"), ("", "Settings")],
)  # fmt: skip
def test_a_refusal_names_the_step_that_can_mend_it(part: str, step: str) -> None:
    error = FinetuiError("No.", "Yes.")
    error.about = part
    words = refusal(error).plain
    assert words.startswith("✘ No. Yes.") and words.endswith(f"  {STEPS.index(step) + 1} leads back to {step}.")


async def test_a_key_of_the_review_lets_the_run_start_after_the_one_that_has_the_device(
    tmp_path: Path, tiny_model: Path, rows_file: Callable[..., Path], own_cache_and_no_gpu: None
) -> None:
    handle = take_turn("cpu", "another-run")
    assert handle is not None
    draft = draft_of("sft", tiny_model, rows_file(), 4)
    app = WizardApp(draft, tmp_path)
    async with app.run_test(size=(120, 40)) as pilot:
        await shows(pilot, "✔ ready", "another-run trains on this device now", "w when that one has ended")
        await pilot.press("o")  # there is no other
        await pilot.press("w")
        await shows(pilot, "when another-run, which trains on this device now, has ended")
    os.close(handle)
    assert draft.values == {"wait_gpu": "true"}


@pytest.mark.skipif(os.name == "nt", reason="open files cannot be handed over on Windows")
async def test_a_trainer_gets_ready_while_the_review_is_read_and_is_the_runs_own_or_goes(
    tmp_path: Path, tiny_model: Path, rows_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.ready.WORTH_BYTES", 0)
    monkeypatch.setattr("tui.review.READ_S", 0.0)
    kept: list[Ready] = []
    monkeypatch.setattr("core.ready.Ready", lambda environment: kept.append(Ready(environment)) or kept[-1])
    app = WizardApp(draft_of("sft", tiny_model, rows_file(), 4), tmp_path)
    async with app.run_test(size=(80, 24)) as pilot:
        await shows(pilot, "✔ ready")
        await until(pilot, lambda: kept)
        await pilot.press("escape")  # back to the settings and here again: the same one waits
        await until(pilot, lambda: app.wizard.draft.step == 3)
        await pilot.press("enter")
        await shows(pilot, "✔ ready")
        await pilot.press("enter")
        run = await until(pilot, lambda: app.given)
    assert len(kept) == 1 and finish(run) == "done" and run.state().start["pid"] == kept[0].process.pid
    again = WizardApp(draft_of("sft", tiny_model, rows_file(), 4), tmp_path)
    async with again.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: len(kept) == 2)
    wait_until(lambda: kept[1].process.poll() is not None)


def test_the_estimate_of_an_adapter_and_its_checkpoints_is_what_training_wrote(tmp_path: Path) -> None:
    plan = settle(resolve("sft-kto", configs_dir() / "demo.yaml", {}, gpu_present=False)).plan
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    (tmp_path / "config.json").write_text(json.dumps({**shape, "num_key_value_heads": 3, "vocab_size": 49152}))
    assert adapter_parameters(plan, ModelSource(str(tmp_path))) == 4_884_480  # as the trainer counts them
    assert adapter_parameters(plan, ModelSource("/not/here/yet")) == 4_884_480
    (tmp_path / "config.json").write_text('{"hidden_size": "many"}')
    assert adapter_parameters(plan, ModelSource(str(tmp_path))) is None
    one = checkpoint_bytes(plan.model_copy(update={"method": "sft"}), {"sft": 56}, 4_884_480)
    assert one == 4_884_480 * (12 * 3 + 4)  # steps 40 and 56 kept, one being written, and the result


def test_differences_name_only_what_both_plans_have() -> None:
    def plan(method: str, **values: Any) -> Any:
        settings = {key.replace("__", "."): (value, "x") for key, value in values.items()}
        return settle(resolve(method, None, settings, gpu_present=False)).plan

    assert differences(plan("sft"), plan("sft", name="other", note=HOSTILE)) == []
    found = differences(plan("sft", sft__data__demo=True), plan("sft-kto", sft__data__file="x.jsonl"))
    assert ("method", "sft", "sft-kto") in found
    assert ("sft.data.file", "the demo's rows", str(Path("x.jsonl").absolute())) in found
    assert not [path for path, _, _ in found if path.startswith("kto.")]


# --- completion and model ---


async def test_paths_complete_by_tab_and_what_was_used_comes_back_by_down(
    tmp_path: Path, rows_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows_file(name="my-rows-one.jsonl")
    used = rows_file(name="my-rows-two.jsonl")
    (tmp_path / "my-rows-\x1b[2J.jsonl").write_text("evil")
    (tmp_path / "my-rows.bin").write_text("no data")
    monkeypatch.chdir(tmp_path)
    remember(draft_of("sft", Path("owner/name"), used))
    (tmp_path / "cache" / "recent.json").write_text(
        (tmp_path / "cache" / "recent.json").read_text().replace('"file": [', '"file": [3, "\\u001b]0;x\\u0007", ')
    )
    draft = Draft(step=2, method="sft")
    draft.data["sft"] = RowsDraft(kind="file")
    app = WizardApp(draft, tmp_path)
    async with app.run_test(size=(80, 24)) as pilot:
        await shows(pilot, "a Hub data set")
        line = app.wizard.query_one("PathLine.file", Input)
        line.focus()
        await shows(pilot, "↓ used before:")
        await pilot.press("m", "y", "tab")
        await until(pilot, lambda: line.value == "my-rows-")
        await shows(pilot, "Tab completes: my-rows-one.jsonl  my-rows-two.jsonl")
        await pilot.press("o", "tab")
        await until(pilot, lambda: line.value == "my-rows-one.jsonl")
        await shows(pilot, "✔ 40 rows")
        await pilot.press("down")
        await until(pilot, lambda: line.value == str(used))
        assert line.has_focus
        await pilot.press("tab")
        await until(pilot, lambda: not line.has_focus)
        assert CONTROLS.findall(frame(app).replace("\n", "")) == []
    assert load_recent()["file"] == [str(used)]


def test_an_earlier_runs_result_is_offered_by_name(tmp_path: Path, make_run: Callable[..., Run]) -> None:
    run = make_run()
    assert completions("model", "ru", run.path.parent) == []
    run.final_model("sft").mkdir(parents=True)
    (run.final_model("sft") / "weights").write_text("x")
    write_manifest(run.final_model("sft"))
    assert completions("model", "ru", run.path.parent) == [f"run:{run.name}"]
    assert completions("model", f"run:{run.name[:4]}", run.path.parent) == [f"run:{run.name}"]
    assert completions("file", "\0", tmp_path) == completions("model", "~nobody-here/", tmp_path) == []


async def test_a_model_of_ones_own_is_looked_at_and_the_sizes_say_what_fits_here(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = GpuSample(0, name="RTX 3090", memory_total_bytes=24 << 30, memory_free_bytes=10 << 30)
    monkeypatch.setattr("core.gpu.gpus", lambda pids=(): [card])
    (tmp_path / "empty").mkdir()
    app = WizardApp(Draft(step=1, method="sft", model=str(tmp_path / "empty")), tmp_path)
    async with app.run_test(size=(120, 40)) as pilot:
        text = await shows(pilot, "RTX 3090: 10.0 of 24.0 GiB free", "holds no model (no config.json)")
        assert "✔ yes" in text and "✘ 10.0 free" in text
        app.wizard.query_one("#own", Input).value = f"{tmp_path}/nowhere"
        await shows(pilot, "There is no model folder")
        app.wizard.query_one("#sizes").focus()
        await pilot.press("enter")
        await until(pilot, lambda: app.wizard.focused and app.wizard.focused.id == "own")
        assert app.wizard.draft.step == 1  # Enter holds, and leads to what is wrong
        app.wizard.query_one("#own", Input).value = str(tiny_model)
        await shows(pilot, "✔ ", "Clear the line to take one from the table")
        app.wizard.query_one("#own", Input).value = "run:nothing"
        await shows(pilot, "There are no runs in")
        app.wizard.query_one("#own", Input).value = ""
        await pilot.press("enter")
        await until(pilot, lambda: app.wizard.draft.step == 2)


def test_what_fits_is_told_against_the_free_memory() -> None:
    words = [fit(needed, 10.0, 24.0) for needed in (7.0, 9.9, 14.0, 30.0)]
    assert words == ["✔ yes", "~ tight", "✘ 10.0 free", "✘ too large"]
