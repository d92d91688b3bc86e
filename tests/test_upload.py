"""Uploading a run's result: over real HTTP, to a Hub on this machine."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Finished, MakeRun, Refused, finish, wait_until
from hub import FINE, READ, WRITE, WRONG, Hub, Repo
from huggingface_hub import ModelCard, constants

from core import gguf_tools, runner
from core.artefacts import ask_for, checked_request, made, read_report
from core.checkpoints import write_manifest
from core.cli import main
from core.errors import FinetuiError
from core.evaluation import HELD_OUT, REPORT_KEYS, evaluation_path
from core.upload import check_upload


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub on this machine that the client, here and in children, takes for the real one; a token that may write."""
    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", WRITE)
    yield server
    server.close()


def everything_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_a_merged_model_arrives_whole_with_a_true_card_and_no_word_of_this_machine(
    hub: Hub, finished: Finished, capfd: pytest.CaptureFixture[str]
) -> None:
    run = finished()
    marks = {mark: {"hits": 3, "total": 4, "low": 0.3, "high": 0.95} for mark in ("format", "tool", "exact")}
    report: dict[str, object] = {key: kind() for key, kind in REPORT_KEYS.items()}
    report |= {"prompts": 4, "variants": ["sft"], "table": {"sft": marks}}
    folder = evaluation_path(run, HELD_OUT)
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(report))
    assert main(["upload", "one", "me/model", "--yes"]) == 0
    repo = hub.repos["me/model"]
    assert not repo.private and repo.commits == ["Upload merged_16bit by finetui"]
    merged = run.path / "merge" / "merged_16bit"
    sent = {file.name for file in merged.iterdir()} - {"finetui-manifest.json"}
    assert repo.files.keys() == sent | {"README.md"}
    assert all(repo.files[name] == (merged / name).read_bytes() for name in sent)
    card = ModelCard(repo.files["README.md"].decode())
    assert card.data.library_name == "transformers" and card.data.tags == ["finetui", "trl", "sft"]
    for words in (
        "20 rows, 18 trained on, 2 left out", "2 × no assistant turn", f"`{'ab' * 32}`", "to 4 held-out prompts",
        "75 %",
        "1 min 01 s", "learning_rate", "rank 4, alpha 8", "rows.jsonl", "% of the tokens",
    ):  # fmt: skip
        assert words in card.text, words
    public = b"".join(data for name, data in repo.files.items() if not name.endswith(".safetensors"))
    for place in (str(run.path), str(Path.home()), os.environ["FINETUI_CACHE"], "/tmp/"):
        assert place.encode() not in public
    said = "".join(capfd.readouterr())
    assert WRITE not in said and WRITE.encode() not in everything_in(run.path), "the token is told to nobody"
    assert f"uploaded: {hub.url}/me/model" in said


def test_an_adapter_names_its_base_without_the_way_there(hub: Hub, finished: Finished) -> None:
    finished()
    assert main(["upload", "one", "team/adapter", "--save-method", "lora", "--private", "--yes"]) == 0
    repo = hub.repos["team/adapter"]
    assert repo.private
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md", "finetui.json"} <= set(
        repo.files
    )
    assert json.loads(repo.files["adapter_config.json"])["base_model_name_or_path"] == "tiny-llama"
    card = ModelCard(repo.files["README.md"].decode())
    assert card.data.library_name == "peft" and "lora" in card.data.tags and "AutoPeftModel" in card.text


def test_an_upload_that_is_cut_off_goes_on_and_sends_nothing_twice(hub: Hub, finished: Finished) -> None:
    run = finished()
    assert main(["merge", "one"]) == 0
    hub.hold_after = 1
    assert main(["upload", "one", "me/model", "--yes", "--detach"]) == 0
    assert wait_until(hub.holding.is_set)
    assert not hub.repos["me/model"].files, "the repository is never half of an upload"
    runner.abort(run)
    assert finish(run) == "aborted"
    hub.hold_after = None
    hub.released.set()
    before = list(hub.puts)
    assert len(before) == 1 and not made(run, "upload")
    assert main(["resume", "one"]) == 0
    assert hub.puts.count(before[0]) == 1, "the file that had arrived was not sent again"
    assert len(hub.puts) > 1 and made(run, "upload")
    assert hub.repos["me/model"].commits == ["Upload merged_16bit by finetui"]


def test_what_did_not_arrive_is_noticed(hub: Hub, finished: Finished, capfd: pytest.CaptureFixture[str]) -> None:
    run = finished()
    hub.lose_files = True
    assert main(["upload", "one", "me/model", "--save-method", "lora", "--yes"]) == 1
    assert "is not in me/model as it was sent" in capfd.readouterr().out
    assert run.state().end_status == "failed" and not made(run, "upload")


def test_the_next_upload_takes_away_the_weights_of_the_one_before(hub: Hub, finished: Finished) -> None:
    finished()
    assert main(["upload", "one", "me/model", "--yes"]) == 0
    hub.repos["me/model"].files["model-00009-of-00009.safetensors"] = b"of an earlier, larger one"
    hub.repos["me/model"].files["notes.md"] = b"my own"
    assert main(["upload", "one", "me/model", "--save-method", "lora", "--yes"]) == 0
    files = hub.repos["me/model"].files
    assert "adapter_model.safetensors" in files and "notes.md" in files
    assert not {"model.safetensors", "model-00009-of-00009.safetensors"} & set(files)


@pytest.mark.skipif(not gguf_tools.installed(), reason="finetui gguf --install was not run")
def test_the_whole_way_from_rows_to_the_hub_is_one_run(
    hub: Hub, make_run: MakeRun, short_model: tuple[Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    run = make_run(
        model__name=str(short_model[0]), sft__max_steps=2, sft__save_steps=2, export__gguf=["Q8_0"],
        export__upload="me/whole", export__private=True, export__check_prompts=1, export__check_tokens=4,
    )  # fmt: skip
    runner.start(run)
    assert finish(run) == "done"
    state = run.state()
    assert [(stage.name, stage.state) for stage in state.stages] == [
        (name, "done") for name in ("sft", "merge", "gguf", "upload")
    ]
    assert list(state.artefacts) == ["merged_16bit", "Q8_0", "upload"]
    assert all(state.stage(name).expected_s for name in ("merge", "gguf", "upload"))
    repo = hub.repos["me/whole"]
    assert repo.private and {"model.safetensors", "SmolLM2-short-sft.Q8_0.gguf", "Modelfile"} <= set(repo.files)
    card = ModelCard(repo.files["README.md"].decode())
    assert "gguf" in card.data.tags and "llama-server -hf me/whole:Q8_0" in card.text
    digest = json.loads((run.stage_path("sft") / "data.json").read_text())["sha256"]["rows.jsonl"]
    assert digest in card.text and "40 rows, 20 trained on, 20 left out" in card.text
    assert main(["show", "one" if run.name == "one" else run.name]) == 0
    said = capfd.readouterr().out
    assert f"upload: {hub.url}/me/whole" in said and "Q8_0: " in said


def test_what_would_fail_after_hours_of_training_is_refused_before_the_run_is_made(
    hub: Hub, refused: Refused, tiny_model: Path, rows_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["sft", "--model-name", tiny_model, "--local-file", rows_file(), "--upload", "me/model"]
    assert "stranger is neither you" in refused(*command[:-1], "stranger/model")
    monkeypatch.setenv("HF_TOKEN", READ)
    assert "may only read" in refused(*command)
    monkeypatch.setenv("HF_TOKEN", WRITE)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr("core.outlook.shutil.disk_usage", lambda place: usage._replace(free=1000))
    assert "The run and what is made of it take" in refused(*command, code=3)
    monkeypatch.undo()


# Before the first byte ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "repository", "words"),
    [
        (WRONG, "me/model", "does not take this token"),
        (READ, "me/model", "may only read"),
        (FINE, "me/other", "no right to write to me/other"),
        (WRITE, "stranger/model", "stranger is neither you nor an organisation of yours"),
        (WRITE, "club/model", "In club you may only read"),
        (None, "me/model", "there is none"),
    ],
)
def test_without_the_right_to_write_nothing_is_made_and_nothing_sent(
    hub: Hub, finished: Finished, refused: Refused, monkeypatch: pytest.MonkeyPatch, token: str | None, repository: str,
    words: str,
) -> None:  # fmt: skip
    finished()
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    else:
        monkeypatch.delenv("HF_TOKEN")
    said = refused("upload", "one", repository, "--yes", code=1 if token == WRONG else 2)
    assert words in said and (token or "hf_") not in said
    assert not hub.repos and not [line for line in hub.requests if not line.startswith("GET")]


def test_a_fine_grained_token_may_write_where_it_says(
    hub: Hub, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", FINE)
    run = finished(export__upload="me/allowed", export__save_method="lora")
    assert check_upload(run.plan(), run)[0].startswith("Upload to me/allowed (PUBLIC, will be made), as me, lora")


@pytest.mark.parametrize(
    "name", ["model", "me/", "/model", "me/a b", "me/../x", "me/x--y", "me/x.git", "me/" + "x" * 99, "me/x/y", "mé/x"]
)
def test_a_name_that_the_hub_would_refuse_is_refused_here(refused: Refused, finished: Finished, name: str) -> None:
    finished()
    assert "export.upload" in refused("upload", "one", name, "--yes")


def test_a_dead_server_is_told_in_a_sentence(
    hub: Hub, finished: Finished, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished()
    hub.close()
    assert "could not be reached" in refused("upload", "one", "me/model", "--yes", code=1)


def test_a_public_repository_is_not_written_to_when_a_private_one_was_asked_for(
    hub: Hub, finished: Finished, refused: Refused
) -> None:
    finished()
    hub.repos["me/model"] = Repo(private=False)
    assert "exists already and is public" in refused("upload", "one", "me/model", "--private", "--yes")


def test_weights_of_another_hand_are_not_mixed_with_ours(hub: Hub, finished: Finished, refused: Refused) -> None:
    finished()
    hub.repos["me/model"] = Repo(private=False, files={"pytorch_model.bin": b"x"})
    assert "holds other weights (pytorch_model.bin)" in refused(
        "upload", "one", "me/model", "--save-method", "lora", "--yes"
    )


def test_without_a_terminal_an_upload_needs_a_yes_and_says_what_it_would_send(
    hub: Hub, finished: Finished, capfd: pytest.CaptureFixture[str]
) -> None:
    finished()
    assert main(["upload", "one", "me/model", "--save-method", "lora"]) == 2
    out, err = capfd.readouterr()
    assert "Upload to me/model (PUBLIC, will be made), as me, lora" in out and "adapter_model.safetensors" in out
    assert "needs a yes" in err and not hub.repos


def test_a_file_that_names_a_place_on_this_machine_is_not_sent(hub: Hub, finished: Finished) -> None:
    run = finished(export__upload="me/model", export__save_method="lora")
    file = run.final_model("sft") / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"name_or_path": str(run.path)}))
    write_manifest(run.final_model("sft"))
    with pytest.raises(FinetuiError, match="tokenizer_config.json names a place"):
        check_upload(run.plan(), run)


def test_what_is_uploaded_already_is_not_uploaded_again(
    hub: Hub, finished: Finished, capfd: pytest.CaptureFixture[str]
) -> None:
    run = finished()
    assert main(["upload", "one", "me/model", "--save-method", "lora", "--yes"]) == 0
    assert read_report(run, "upload")["commit"]
    capfd.readouterr()
    assert main(["upload", "one", "me/model", "--save-method", "lora", "--yes"]) == 0
    assert "made already" in capfd.readouterr().err
    assert len(hub.repos["me/model"].commits) == 1


def test_only_an_upload_sends_and_another_checkpoint_takes_nothing_from_earlier_wishes(
    hub: Hub, finished: Finished, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = finished()
    checkpoint = run.stage_path("sft") / "checkpoints" / "checkpoint-4"
    shutil.copytree(run.final_model("sft"), checkpoint)
    write_manifest(checkpoint)
    assert main(["upload", "one", "me/model", "--save-method", "lora", "--yes"]) == 0
    assert main(["merge", "one"]) == 0
    assert "one of sft: merge" in capfd.readouterr().out
    assert run.plan().export.upload is None
    ask_for(run, checked_request(run, {"gguf": ["Q8_0"], "upload": "me/model"}))
    assert main(["merge", "one", "--checkpoint", "sft/checkpoint-4"]) in (0, 2)
    assert (run.plan().export.gguf, run.plan().export.upload) == ([], None)
    assert len(hub.repos["me/model"].commits) == 1
