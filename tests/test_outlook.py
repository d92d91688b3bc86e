"""What is ahead of a run, told before it starts: bytes on the disk, seconds, and the weights that a merge needs."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import Finished, MakeNamed, MakeRun, Refused, WriteRows, plan

from core.artefacts import parameters_in, tensors_of
from core.bases import find_base, known_16bit, licence_of, public_name
from core.errors import FinetuiError
from core.outlook import expected_examples, expected_seconds, export_bytes
from core.plan import ExportPlan, Plan
from tui.forecast import disk_words, export_seconds
from tui.forecast import found_source as source_of

GIB = 1 << 30


def seven(**export: object) -> Plan:
    """The 7b preset with this section ``export``."""
    from core.config import size_presets

    name = size_presets()["7b"]["model"]["name"]
    return Plan.model_validate({"model": {"size": "7b", "name": name}, "export": export})


def test_the_disk_counts_base_merged_weights_and_every_file(folder: Path) -> None:
    needed = export_bytes(seven(gguf=["Q4_K_M", "Q8_0"]))
    assert needed and {what: round(count / GIB) for what, count in needed.items()} == {
        "16-bit base": 14, "merged model": 14, "GGUF files": 25,  # F16 is needed on the way
    }  # fmt: skip
    assert export_bytes(seven()) == {} and export_bytes(seven(save_method="lora", upload="me/x")) == {}
    four = export_bytes(seven(save_method="merged_4bit")) or {}
    assert list(four) == ["16-bit base", "merged model", "merged 4-bit model"]
    words, _ = disk_words(seven(gguf=["Q4_K_M"]), source_of(seven()), {}, folder)  # type: ignore[arg-type]
    assert "merged model 13.5 GiB" in words and "GGUF files 17.6 GiB" in words
    assert set(export_seconds(seven(gguf=["Q4_K_M"], upload="me/x"))) == {"merge", "gguf", "upload"}


def test_a_model_of_unknown_size_is_said_to_be_unknown(folder: Path) -> None:
    strange = Plan.model_validate({"model": {"name": "someone/model"}, "export": {"gguf": ["Q8_0"]}})
    assert export_bytes(strange) is None
    words, room = disk_words(strange, source_of(strange), {}, folder)  # type: ignore[arg-type]
    assert "known once the model is fetched" in words and room


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("unsloth/mistral-7b-v0.3-bnb-4bit", "unsloth/mistral-7b-v0.3"),
        ("unsloth/gpt-oss-20b-unsloth-bnb-4bit", "unsloth/gpt-oss-20b-BF16"),
        ("unsloth/Llama-3.2-1B-unsloth-bnb-4bit", "unsloth/Llama-3.2-1B"),
        ("someone/model-bnb-4bit", None),
    ],
)
def test_the_sixteen_bit_weights_of_a_four_bit_model_are_known_or_asked_for(name: str, known: str | None) -> None:
    assert known_16bit(name) == known
    four = Plan.model_validate({"model": {"name": name, "load_in_4bit": True}})
    if known:
        base = find_base(four, print, fetch=False)
        assert base.place == known and not base.quantised and base.here is None
    else:
        with pytest.raises(FinetuiError, match="16-bit weights are not known"):
            find_base(four, print, fetch=False)


def test_every_preset_names_its_sixteen_bit_weights_its_size_and_its_licence() -> None:
    from core.config import size_presets

    for size, preset in size_presets().items():
        about = preset["about"]
        assert 0.1 < float(about["parameters"]) / 1e9 / (float(size.rstrip("bm")) / (1000 if "m" in size else 1)) < 1.1
        assert about["base_16bit"].count("/") == 1 and about["licence"]


def test_stages_ahead_are_foretold_by_earlier_runs_and_by_sizes(finished: Finished, named: MakeNamed) -> None:
    before = finished(name="before")
    events = [json.loads(line) for line in before.events_path.read_text().splitlines()]
    for event in events:
        event["t"] += 100 if event["kind"] in ("stage_end", "run_end") else 0  # of these the steps took 61 seconds
    before.events_path.write_text("".join(json.dumps(event) + "\n" for event in events))
    again = finished(name="again", export__save_method="merged_16bit")
    (again.final_model("sft") / "adapter_config.json").unlink()
    foretold = expected_seconds(again, again.plan())
    assert set(foretold) == {"sft", "merge"}, "training by the run before, the merge by the model's size"
    assert foretold["sft"] == pytest.approx(100, abs=0.2) and foretold["merge"] > 0
    assert expected_seconds(named("other"), plan(name="other").plan) == {}, "nothing is known of another model"


def test_what_no_earlier_run_tells_is_foretold_by_sizes_and_rows(make_run: MakeRun, tiny_model: Path) -> None:
    run = make_run("sft-kto", evaluate__enabled=True, sft__data__holdout=0.2, kto__data__holdout=0.2)
    plan = run.plan()
    assert set(expected_seconds(run, plan)) == {"evaluate"}
    assert expected_examples(run, plan, known=()) == {"kto": 24}, "six steps of four rows"
    plan.kto.max_steps, plan.kto.num_train_epochs = -1, 2
    assert 48 <= expected_examples(run, plan, known=())["kto"] <= 80, "two passes over what is not held out of forty"
    assert expected_examples(run, plan, known=("kto",)) == {}
    plan.kto.data.file, plan.kto.data.dataset = None, "someone/rows"
    assert expected_examples(run, plan, known=()) == {}, "nothing is fetched for it"


def test_wishes_are_checked_as_they_are_made() -> None:
    assert ExportPlan(gguf="q4_k_m, Q8_0").gguf == ["Q4_K_M", "Q8_0"]  # type: ignore[arg-type]
    assert ExportPlan(upload="").upload is None
    for save_method, forms in (("lora", []), ("merged_16bit", ["merged_16bit"]), (None, ["merged_16bit"])):
        export = ExportPlan(save_method=save_method, upload="me/x")  # type: ignore[arg-type]
        assert export.merged_forms == forms and export.stages == [*(["merge"] if forms else []), "upload"]
    assert ExportPlan(save_method="lora", gguf=["F16"]).stages == ["merge", "gguf"], "a GGUF file needs merged weights"


def test_public_names_hold_no_way_on_this_machine(tmp_path: Path) -> None:
    demo = Plan.model_validate({"model": {"name": "HuggingFaceTB/SmolLM2-135M-Instruct"}})
    other = Plan.model_validate({"model": {"name": "x"}})
    assert public_name(demo, "/home/me/.cache/finetui/SmolLM2-135M-Instruct") == demo.model.name
    assert public_name(other, "/home/me/hub/models--Qwen--Qwen2.5-3B/snapshots/abc") == "Qwen/Qwen2.5-3B"
    assert public_name(other, "/home/me/my-model") == "my-model" and public_name(other, "a/b") == "a/b"
    (tmp_path / "README.md").write_text("---\nlicense: MIT\n---\n# x")
    assert licence_of("x/y", tmp_path) == "mit" and licence_of("x/y", None) is None
    assert licence_of("unsloth/llama-2-13b", None) == "llama2"


def test_parameters_are_counted_from_the_headers(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert parameters_in(tiny_model) == sum(parameter.numel() for parameter in model.parameters())
    with pytest.raises(FinetuiError, match="no safetensors file"):
        (tmp_path / "x.safetensors").write_bytes(b"{}")
        tensors_of(tmp_path / "x.safetensors")


@pytest.mark.parametrize("free", [100_000, 0])
def test_a_run_that_the_disk_cannot_hold_is_refused_before_it_starts(
    free: int, refused: Refused, rows_file: WriteRows, tiny_model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr("core.disk.shutil.disk_usage", lambda place: usage._replace(free=free))
    words = ["sft", "--local-file", str(rows_file()), "--model-name", str(tiny_model), "--save-method", "merged_16bit"]
    told = refused(*words, code=3)
    assert "checkpoints and result" in told and "merged model" in told and "are free in" in told
    assert not list(folder.glob("*")), "nothing was made"


def test_weights_that_training_fetches_are_no_download_of_the_merge() -> None:
    plain = Plan.model_validate({"model": {"name": "someone/plain"}, "export": {"save_method": "merged_16bit"}})
    assert not find_base(plain, print, fetch=False).extra_download
    assert find_base(seven(save_method="merged_16bit"), print, fetch=False).extra_download
