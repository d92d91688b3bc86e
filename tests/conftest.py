"""Fixtures: models, rows, real runs in temporary folders, a machine without a card, commands that are refused."""

import contextlib
import io
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# One thread each: tiny models gain nothing from two, and waiting threads of several processes starve each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from core import runner
from core.backend import gpu_present, settle
from core.cli import main
from core.config import Resolved, resolve
from core.gpu import GpuReport
from core.paths import cache_dir
from core.runs import Run, create_run, is_alive

# A busy machine is no failure: examples may take as long as they take.
hypothesis.settings.register_profile(
    "patient", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.register_profile(  # pytest --hypothesis-profile=wide looks for new ones
    "wide", hypothesis.settings.get_profile("patient"), derandomize=False, max_examples=2000
)
hypothesis.settings.load_profile("patient")

SHARED_DATA = Path(os.environ.get("FINETUI_SHARED_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
USER = {"role": "user", "content": "Set a timer for 5 minutes"}
CALL = 'tool_call: set_timer\narguments: {"minutes": 5}'
ANSWER = {"role": "assistant", "content": CALL}


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tests never write into the checkout's runs, never report anywhere, and look the same on every terminal."""
    monkeypatch.setenv("FINETUI_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("FINETUI_CACHE", str(cache_dir()))
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every machine looks like one without a card."""
    monkeypatch.setattr("core.gpu.gpus", lambda pids=(): [])


@pytest.fixture
def own_cache_and_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_gpu: None) -> None:
    """Drafts and recent files go into the test's own cache; to the app, too, every machine is one without a card."""
    monkeypatch.setenv("FINETUI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tui.follow.gpu_report", lambda: GpuReport())
    monkeypatch.setattr("core.ready.WORTH_BYTES", 1 << 60)  # a trainer in waiting costs seconds


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where `FINETUI_RUNS` points; nothing is there yet."""
    return tmp_path / "runs"


@pytest.fixture
def folder_made(folder: Path) -> None:
    """Makes the folder of runs, empty."""
    folder.mkdir()


@pytest.fixture(scope="session")
def demo_model_dir() -> Path:
    """SmolLM2-135M-Instruct, fetched and converted once into the cache."""
    from core.smollm import demo_model

    return demo_model(cache_dir(), print)


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny-llama")


def build_tiny_model(folder: Path) -> Path:
    """A Llama of 0.1 M random parameters with a byte-level BPE of 600 tokens and ChatML: a step takes milliseconds."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([json.dumps(row) for row in default_rows()], trainer)
    bpe.add_special_tokens([AddedToken(word, special=True) for word in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", bos_token="<|im_start|>", pad_token="<|im_end|>",
        unk_token="<|endoftext|>", chat_template=CHATML,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_template(tiny_model: Path) -> Any:
    """The template of the tiny model, probed."""
    from transformers import AutoTokenizer

    from core.chat import Template

    return Template.of(AutoTokenizer.from_pretrained(tiny_model))


@pytest.fixture(scope="session")
def tokenizer(demo_model_dir: Path) -> Any:
    """The demo model's tokenizer, loaded once."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model_dir)


WriteRows = Callable[..., Path]


@pytest.fixture
def rows_file(tmp_path: Path) -> WriteRows:
    """Writes rows as JSONL and returns the path; without rows, forty labelled tool calls over ten prompts."""

    def write(rows: list[Any] | None = None, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in (default_rows() if rows is None else rows)))
        return path

    return write


WriteFile = Callable[..., Path]


@pytest.fixture
def file(tmp_path: Path) -> WriteFile:
    """Writes text, bytes, or a list of rows as JSONL."""

    def write(content: str | bytes | list[Any], name: str = "rows.jsonl") -> Path:
        if isinstance(content, list):
            content = "".join(f"{json.dumps(row)}\n" for row in content)
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def good(prompt: str = "Hi", label: bool | None = None, answer: str = "Hello!") -> dict[str, Any]:
    """A usable row; without a label it has no such key."""
    row = {"conversations": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
    return row if label is None else row | {"label": label}


def default_rows() -> list[dict[str, Any]]:
    """Forty rows, half of them good, four to a prompt."""
    rows = []
    for number in range(40):
        minutes, good = number % 10, number % 20 < 10
        answer = f'tool_call: set_timer\narguments: {{"minutes": {minutes + (0 if good else number)}}}'
        rows.append(
            {
                "conversations": [
                    {"role": "user", "content": f"Set a timer for {minutes} minutes"},
                    {"role": "assistant", "content": answer},
                ],
                "label": good,
            }
        )
    return rows


def plan(**settings: Any) -> Resolved:
    """A plan of SFT; a keyword `model__name="x"` sets a key."""
    values = {key.replace("__", "."): (value, "test") for key, value in settings.items()}
    return resolve("sft", None, values, gpu_present=False)


MakeNamed = Callable[..., Run]


@pytest.fixture
def named(folder: Path) -> MakeNamed:
    """Makes a run of SFT with a name that has not been started."""
    return lambda name="one", **more: create_run(folder, plan(name=name, **more))


MakeRun = Callable[..., Run]


@pytest.fixture
def make_run(tmp_path: Path, tiny_model: Path, rows_file: Callable[..., Path]) -> Iterator[MakeRun]:
    """Makes a run of the tiny model that has not been started; a keyword `sft__max_steps=3` sets a key of the plan."""
    made: list[Run] = []

    def make(method: str = "sft", **settings: Any) -> Run:
        values: dict[str, Any] = {"model.name": str(tiny_model), "lora.r": 8, "device": "cpu"}
        for stage in method.split("-"):
            values |= {
                f"{stage}.data.file": str(rows_file()),
                f"{stage}.data.demo": False,
                f"{stage}.max_steps": 6,
                f"{stage}.logging_steps": 1,
                f"{stage}.save_steps": 2,
                f"{stage}.learning_rate": 1e-2,
                f"{stage}.batch_size": 4,
            }
        values |= {key.replace("__", "."): value for key, value in settings.items()}
        plan = resolve(method, None, {k: (v, "test") for k, v in values.items()}, gpu_present=gpu_present())
        run = create_run(tmp_path / "runs", settle(plan))
        made.append(run)
        return run

    yield make
    for run in made:
        if run.path.exists() and is_alive(run):
            runner.abort(run)
            wait_until(lambda run=run: not is_alive(run), 60)


Finished = Callable[..., Run]


@pytest.fixture(scope="session")
def tiny_adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny model with random weights."""
    from exports import save_adapter

    folder = tmp_path_factory.mktemp("tiny-adapter") / "final_model"
    save_adapter(tiny_model, folder)
    return folder


@pytest.fixture
def finished(
    folder: Path, tiny_model: Path, tiny_adapter: Path, rows_file: Callable[..., Path]
) -> Iterator[Finished]:
    """Makes runs of the tiny model whose training is over."""
    from exports import finished_run

    runs: list[Run] = []

    def make(name: str = "one", **settings: Any) -> Run:
        base, adapter = settings.pop("base", tiny_model), settings.pop("adapter", tiny_adapter)
        runs.append(finished_run(folder, base, adapter, rows_file(), name, **settings))
        return runs[-1]

    yield make
    for run in runs:
        if run.path.exists() and is_alive(run):
            runner.abort(run)
            wait_until(lambda run=run: not is_alive(run), 60)


@pytest.fixture(scope="session")
def short_model(demo_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """SmolLM2 with its first two layers only, real tokenizer and all; and an adapter for it."""
    from exports import save_adapter
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("short") / "SmolLM2-short"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(demo_model_dir / name, folder / name)
    config = json.loads((demo_model_dir / "config.json").read_text()) | {"num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(demo_model_dir / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if ".layers." not in name or ".layers.0." in name}
    kept |= {name: tensor for name, tensor in weights.items() if ".layers.1." in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    save_adapter(folder, folder.parent / "adapter")
    return folder, folder.parent / "adapter"


@pytest.fixture(scope="session")
def trained_chain(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """SFT and KTO of the tiny model with held-out rows and samples, trained in this process once; not to be changed."""
    from test_training import Stage

    from core import train
    from core.train_events import Reporter
    from core.train_samples import sample_callback

    folder = tmp_path_factory.mktemp("chain")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in default_rows()))
    values: dict[str, Any] = {
        "model.name": str(tiny_model), "lora.r": 8, "device": "cpu", "name": "chain", "samples.every": 2,
        "samples.max_new_tokens": 6, "evaluate.max_new_tokens": 8,
    }  # fmt: skip
    for stage in ("sft", "kto"):
        values |= {f"{stage}.data.file": str(rows), f"{stage}.data.holdout": 0.3, f"{stage}.batch_size": 4}
        values |= {f"{stage}.max_steps": 4, f"{stage}.logging_steps": 1, f"{stage}.learning_rate": 1e-2}
    plan = resolve("sft-kto", None, {k: (v, "test") for k, v in values.items()}, gpu_present=gpu_present())
    run = create_run(folder / "runs", settle(plan))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run.events.append("run_start", pid=1, version="0", python="3", host="secret-host")
        adapter = None
        for name in ("sft", "kto"):
            stage = Stage(run, name, adapter)
            run.events.append("stage_start", name=name)
            run.events.append("totals", stage=name, steps=4, batch=4, **stage.data.report())
            reporter = Reporter(run, name)
            stage.trainer.add_callback(
                sample_callback(stage.plan.samples, 2, stage.loaded, stage.data, stage.trainer, reporter)
            )
            stage.trainer.train()
            adapter = run.final_model(name)
            train.save_final(stage.loaded, adapter)
            run.events.append("stage_end", name=name, status="done", output=f"{name}/final_model")
        run.events.append("run_end", status="done")
    return run


@pytest.fixture
def chain(trained_chain: Run, folder: Path) -> Run:
    """A copy of the trained chain, in the folder of runs."""
    shutil.copytree(trained_chain.path, folder / "chain")
    return Run(folder / "chain")


def wait_until(condition: Callable[[], Any], limit_s: float = 120) -> Any:
    """Wait for `condition` to hold and return what it returned; fails the test after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {limit_s} s: {condition}")


def finish(run: Run, limit_s: float = 180) -> str:
    """Wait until a started run has ended; returns the status its log ends with."""
    wait_until(lambda: not is_alive(run), limit_s)
    return run.state().end_status or "crashed"


def losses(run: Run, stage: str) -> dict[int, float]:
    """Loss by step."""
    return {step: value for step, value in run.state().stage(stage).series["loss"] if value is not None}


class Refused:
    """Runs a command that must be refused, and holds what it said."""

    def __init__(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        self.capsys, self.folder = capsys, folder

    def __call__(self, *words: object, code: int = 2) -> str:
        before = sorted(self.folder.rglob("*")) if self.folder.exists() else None
        assert main([str(word) for word in words]) == code
        out, err = self.capsys.readouterr()
        assert out == "", "a refusal says nothing on standard output"
        lines = err.splitlines()
        assert len(lines) in (1, 2) and lines[0].startswith("finetui: ") and lines[0].endswith(".")
        assert all(line.startswith("  ") and line.strip() for line in lines[1:]), "the second line is advice"
        assert not re.search("Traceback|Error\\b", err) and "\x1b" not in err
        assert (sorted(self.folder.rglob("*")) if self.folder.exists() else None) == before, "something was written"
        return err


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], folder: Path) -> Refused:
    return Refused(capsys, folder)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must succeed and returns its standard output."""

    def run(*words: object, code: int = 0) -> str:
        assert main([str(word) for word in words]) == code
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return run
