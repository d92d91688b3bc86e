"""The sampler against a pretended NVML: whatever the driver does, there are values and sentences, never exceptions."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from core import gpu
from core.backend import gpu_present
from core.children import stage_environment
from core.gpu import GpuSample, Sampler, sample_as_event
from core.plan import Plan

GIB = 1 << 30
NOT_SUPPORTED, DRIVER_NOT_LOADED, LIBRARY_NOT_FOUND, FUNCTION_NOT_FOUND, GPU_IS_LOST = 3, 9, 12, 13, 15


class NvmlError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(f"code {value}")
        self.value = value


class PretendedNvml(ModuleType):
    """`answers` maps a function to its answer, or to a function of its arguments; all others are not supported."""

    def __init__(self, **answers: Any) -> None:
        super().__init__("pynvml")
        self.asked: list[str] = []
        self.answers: dict[str, Any] = {"nvmlInit": None, "nvmlShutdown": None, "nvmlDeviceGetCount": 1}
        self.answers |= {"nvmlDeviceGetHandleByIndex": lambda index: index} | answers

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml"):
            raise AttributeError(name)

        def function(*arguments: Any) -> Any:
            self.asked.append(name)
            answer = self.answers.get(name, NvmlError(NOT_SUPPORTED))
            answer = answer(*arguments) if callable(answer) else answer
            if isinstance(answer, Exception):
                raise answer
            return answer

        return function


WELL = {
    "nvmlSystemGetDriverVersion": "580.95.05",
    "nvmlSystemGetCudaDriverVersion": 13010,
    "nvmlDeviceGetName": "NVIDIA GeForce RTX 3090",
    "nvmlDeviceGetUUID": lambda index: f"GPU-{index}",
    "nvmlDeviceGetMigMode": [0, 0],
    "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=6 * GIB, total=24 * GIB, free=18 * GIB),
    "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=97, memory=40),
    "nvmlDeviceGetTemperature": 71,
    "nvmlDeviceGetPowerUsage": 349_500,
    "nvmlDeviceGetEnforcedPowerLimit": 350_000,
    "nvmlDeviceGetTotalEnergyConsumption": 12_345_678,
    "nvmlDeviceGetCurrentClocksEventReasons": 0x01 | 0x04 | 0x40,
    "nvmlDeviceGetComputeRunningProcesses": [
        SimpleNamespace(pid=10, usedGpuMemory=5 * GIB),
        SimpleNamespace(pid=11, usedGpuMemory=1 * GIB),
        SimpleNamespace(pid=99, usedGpuMemory=9 * GIB),
    ],
    "nvmlDeviceGetGraphicsRunningProcesses": [SimpleNamespace(pid=10, usedGpuMemory=5 * GIB)],
}


def pretend(monkeypatch: pytest.MonkeyPatch, **answers: Any) -> PretendedNvml:
    nvml = PretendedNvml(**answers)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return nvml


def test_a_card_in_good_health(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, **WELL)
    report = Sampler().report(pids=[10, 11])
    assert (report.driver_version, report.cuda_version, report.reason) == ("580.95.05", "13.1", None)
    (card,) = report.samples
    assert card == GpuSample(
        index=0,
        name="NVIDIA GeForce RTX 3090",
        uuid="GPU-0",
        memory_used_bytes=6 * GIB,
        memory_total_bytes=24 * GIB,
        memory_free_bytes=18 * GIB,
        utilisation_percent=97,
        temperature_c=71,
        power_w=349.5,
        power_limit_w=350.0,
        energy_j=12345.678,
        throttle=("power limit", "temperature (hardware)"),
        own_memory_bytes=6 * GIB,
        mig=False,
    )


def test_all_that_the_driver_withholds_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    assert Sampler().sample(pids=[10]) == [GpuSample(index=0)]


def test_not_available_spelled_as_the_largest_number_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    huge = SimpleNamespace(used=0xFFFFFFFFFFFFFFFF, total=24 * GIB, free=0xFFFFFFFFFFFFFFFF)
    pretend(monkeypatch, **WELL | {"nvmlDeviceGetMemoryInfo": huge, "nvmlDeviceGetPowerUsage": 0xFFFFFFFF})
    (card,) = Sampler().sample()
    assert (card.memory_used_bytes, card.memory_total_bytes, card.power_w) == (None, 24 * GIB, None)


def test_older_and_newer_drivers_answer_under_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = WELL | {
        "nvmlDeviceGetTemperature": NvmlError(FUNCTION_NOT_FOUND),
        "nvmlDeviceGetTemperatureV": 55,
        "nvmlDeviceGetCurrentClocksEventReasons": NvmlError(FUNCTION_NOT_FOUND),
        "nvmlDeviceGetCurrentClocksThrottleReasons": 0x01,
    }
    pretend(monkeypatch, **answers)
    (card,) = Sampler().sample()
    assert (card.temperature_c, card.throttle) == (55, ())


def test_memory_of_processes_that_the_driver_does_not_list_is_unknown_not_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    under_wsl = {
        "nvmlDeviceGetComputeRunningProcesses": [SimpleNamespace(pid=10, usedGpuMemory=None)],
        "nvmlDeviceGetGraphicsRunningProcesses": [],
    }
    pretend(monkeypatch, **WELL | under_wsl)
    assert Sampler().sample(pids=[10])[0].own_memory_bytes is None
    pretend(monkeypatch, **WELL)
    assert Sampler().sample(pids=[4711])[0].own_memory_bytes is None
    assert Sampler().sample()[0].own_memory_bytes is None


def test_two_cards_and_one_of_them_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def memory(index: int) -> Any:
        return NvmlError(GPU_IS_LOST) if index == 1 else SimpleNamespace(used=1, total=3, free=2)

    pretend(monkeypatch, **WELL | {"nvmlDeviceGetCount": 2, "nvmlDeviceGetMemoryInfo": memory})
    sampler = Sampler()
    first, second = sampler.sample()
    assert (first.uuid, first.memory_used_bytes) == ("GPU-0", 1)
    assert (second.uuid, second.memory_used_bytes) == ("GPU-1", None)
    assert sampler.reason is not None and "fell off the bus" in sampler.reason
    assert len(sampler.sample()) == 2


def test_a_run_uses_and_samples_one_card(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = pretend(monkeypatch, **WELL | {"nvmlDeviceGetCount": 3})
    sampler = Sampler()
    cards = sampler.sample()
    for given, index, card in ((None, None, "0"), ("2,1", None, "2"), ("2,1", 1, "1"), ("GPU-1", None, "GPU-1")):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if given:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        plan = Plan(device="cuda", gpu=index)
        assert stage_environment(plan)["CUDA_VISIBLE_DEVICES"] == card == gpu.visible_card(index)
        nvml.asked.clear()
        (sample,) = sampler.sample((), card)
        assert sample == gpu.sample_of(cards, card) and nvml.asked.count("nvmlDeviceGetMemoryInfo") == 1
        assert sample.index == int(card[-1])
    assert len(sampler.sample((), "MIG-7")) == 3  # a slice that the driver does not list: what there is
    monkeypatch.setattr(gpu, "gpus", lambda pids=(): cards)
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert not gpu_present() and gpu.sample_of(cards, gpu.visible_card()) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert gpu_present() and "CUDA_VISIBLE_DEVICES" not in stage_environment(Plan(device="cpu"))


def test_a_card_that_cannot_be_opened_is_shown_without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    def handle(index: int) -> Any:
        return NvmlError(GPU_IS_LOST) if index == 0 else index

    pretend(monkeypatch, **WELL | {"nvmlDeviceGetCount": 2, "nvmlDeviceGetHandleByIndex": handle})
    sampler = Sampler()
    lost, well = sampler.sample()
    assert lost == GpuSample(index=0) and well.memory_total_bytes == 24 * GIB
    assert sampler.reason is not None and "fell off the bus" in sampler.reason


def test_a_driver_lost_midway_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = pretend(monkeypatch, **WELL)
    sampler = Sampler(retry_s=0)
    assert sampler.sample()[0].temperature_c == 71

    nvml.answers = dict.fromkeys(nvml.answers, NvmlError(DRIVER_NOT_LOADED))
    assert sampler.sample()[0].memory_used_bytes is None
    assert sampler.sample() == []
    assert sampler.reason == "The NVIDIA driver is installed but not loaded."
    assert sampler.report().driver_version is None

    nvml.answers = PretendedNvml(**WELL).answers
    assert sampler.sample()[0].temperature_c == 71
    assert sampler.reason is None


def test_a_missing_driver_is_not_asked_for_at_every_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = pretend(monkeypatch, nvmlInit=NvmlError(LIBRARY_NOT_FOUND))
    sampler = Sampler(retry_s=3600)
    assert [sampler.sample() for _ in range(3)] == [[], [], []]
    assert nvml.asked.count("nvmlInit") == 1
    assert sampler.reason == "No NVIDIA driver was found: its library NVML is not on this machine."


def test_nvml_is_opened_once_for_many_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = pretend(monkeypatch, **WELL)
    sampler = Sampler()
    for _ in range(5):
        sampler.sample()
    assert (nvml.asked.count("nvmlInit"), nvml.asked.count("nvmlDeviceGetName")) == (1, 1)
    sampler.close()
    assert nvml.asked[-1] == "nvmlShutdown"
    assert len(sampler.sample()) == 1


def test_a_card_cut_into_mig_slices_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = WELL | {"nvmlDeviceGetMigMode": [1, 1]}
    del answers["nvmlDeviceGetUtilizationRates"]
    pretend(monkeypatch, **answers)
    (card,) = Sampler().sample()
    assert (card.mig, card.utilisation_percent, card.memory_total_bytes) == (True, None, 24 * GIB)


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({"nvmlInit": NvmlError(4)}, "permission"),
        ({"nvmlInit": NvmlError(18)}, "restart the machine"),
        ({"nvmlInit": NvmlError(999)}, "code 999"),
        ({"nvmlInit": OSError("half a library")}, "half a library"),
        ({"nvmlDeviceGetCount": 0}, "shows no GPU"),
    ],
)
def test_there_is_a_sentence_why_there_is_no_card(
    monkeypatch: pytest.MonkeyPatch, answers: dict[str, Any], words: str
) -> None:
    pretend(monkeypatch, **answers)
    report = Sampler().report()
    assert report.samples == () and report.reason is not None and words in report.reason


def test_without_the_bindings_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "nvidia-ml-py" in (Sampler().report().reason or "")


def test_the_event_is_json_and_leaves_out_what_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, **WELL)
    event = sample_as_event([*Sampler().sample(pids=[11, 10]), GpuSample(index=1)], pids=[11, 10])
    assert json.loads(json.dumps(event)) == event
    assert event["pids"] == [10, 11] and event["gpus"][1] == {"index": 1}
    assert event["gpus"][0]["throttle"] == ["power limit", "temperature (hardware)"]


def test_the_real_machine_gives_cards_or_a_reason() -> None:
    code = "from core import gpu; r = gpu.gpu_report(); print(len(r.samples), '|', r.reason or '')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, reason = done.stdout.split("|")
    assert int(count) > 0 or reason.strip()
    for card in gpu.gpus():
        assert card.name and card.memory_total_bytes


@pytest.mark.parametrize(
    ("kernel", "device", "given", "wanted"),
    [
        ("6.8.0-generic", "cuda", {}, "expandable_segments:True"),
        ("6.6.87.2-microsoft-standard-WSL2", "cuda", {}, None),
        ("6.8.0-generic", "cuda", {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, None),
        ("6.8.0-generic", "cpu", {}, None),
    ],
)
def test_memory_grows_in_segments_except_where_wsl2_would_end_it_or_the_user_chose(
    kernel: str, device: str, given: dict[str, str], wanted: str | None,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "osrelease").write_text(kernel)
    monkeypatch.setattr(gpu, "OSRELEASE", tmp_path / "osrelease")
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setitem(os.environ, name, value)
    assert stage_environment(Plan(device=device)).get("PYTORCH_CUDA_ALLOC_CONF") == wanted
