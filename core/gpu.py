"""What the NVIDIA cards say (NVML). It cannot fail: each figure the driver withholds is None, each error a sentence."""

import importlib
import os
import threading
import time
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

OSRELEASE = Path("/proc/sys/kernel/osrelease")

# Codes after which a handle is worthless: uninitialised, driver not loaded, GPU lost, reset required, version mismatch.
LOST = {1, 9, 15, 16, 18}

WHY_NONE = {
    4: "The NVIDIA driver is there, but this user has no permission to use it.",
    9: "The NVIDIA driver is installed but not loaded.",
    12: "No NVIDIA driver was found: its library NVML is not on this machine.",
    15: "A GPU fell off the bus (NVML: GPU is lost); the machine needs a restart.",
    16: "A GPU has to be reset before it can be used again.",
    17: "The operating system refused access to the NVIDIA driver.",
    18: "The NVIDIA driver was updated while its old module is still running; restart the machine.",
}

# Bits of nvmlClocksEventReasons. An idle card (bit 0) and the clock of a display (bit 8) slow nobody's training.
THROTTLE = {
    0x02: "clocks set by user",
    0x04: "power limit",
    0x08: "hardware slowdown",
    0x10: "sync boost",
    0x20: "temperature",
    0x40: "temperature (hardware)",
    0x80: "power brake",
}

NOT_AVAILABLE = {0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF}  # how some drivers spell "no value" in a field that is there


def in_wsl() -> bool:
    """Whether this is Linux inside Windows (WSL2, Docker on it): the GPU is reached through Windows' driver."""
    return OSRELEASE.is_file() and "microsoft" in OSRELEASE.read_text().lower()


@dataclass(frozen=True)
class GpuSample:
    """One card at one moment; None is "the driver does not say". `index` counts as nvidia-smi does, by PCI bus."""

    index: int
    name: str | None = None
    uuid: str | None = None
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    memory_free_bytes: int | None = None
    utilisation_percent: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    energy_j: float | None = None
    """Counts up since the driver was loaded."""
    throttle: tuple[str, ...] | None = None
    """Why the clocks are below their top; empty when nothing holds them back."""
    own_memory_bytes: int | None = None
    """Of the asked processes. None where the driver does not list them (WSL2, many containers): unknown, not zero."""
    mig: bool | None = None
    """True: cut into MIG slices; the figures are the whole card's, a process sees only its slice."""


def visible_card(index: int | None = None) -> str:
    """The one card that a run uses, as CUDA_VISIBLE_DEVICES names it; empty where that variable hides them all.

    The given one, else the first that the variable names (by index, or by uuid), else 0.
    """
    if index is not None:
        return str(index)
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    return "" if first == "-1" else first


def sample_of(samples: Iterable[GpuSample], card: str) -> GpuSample | None:
    """The sample of the card that is called so."""
    named = (one for one in samples if card == str(one.index) or (card and (one.uuid or "").startswith(card)))
    return next(named, None)


@dataclass(frozen=True)
class GpuReport:
    """All cards, the driver's version, the newest CUDA it runs ("13.0"), and the sentence why there is no card."""

    samples: tuple[GpuSample, ...] = ()
    driver_version: str | None = None
    cuda_version: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class _Card:
    """What does not change while NVML stays up. A card that could not be opened has no handle."""

    index: int
    handle: Any = None
    name: str | None = None
    uuid: str | None = None
    mig: bool | None = None


class Sampler:
    """Keeps NVML open between samples; after the driver was lost it starts again, at most every `retry_s` seconds.

    May be used from several threads. Never raises.
    """

    def __init__(self, retry_s: float = 30.0) -> None:
        self.reason: str | None = None
        """Why the newest sample shows no card, or shows one without figures."""
        self._retry_s = retry_s
        self._nvml: Any = None
        self._cards: list[_Card] = []
        self._lost = False
        self._tried_at: float | None = None
        self._lock = threading.Lock()

    def sample(self, pids: Collection[int] = (), card: str = "") -> list[GpuSample]:
        """Every card now, or the one called `card`; an empty list when there is none, and then `reason` says why."""
        with self._lock:
            if not self._ready():
                return []
            named = [one for one in self._cards if card and sample_of([GpuSample(one.index, uuid=one.uuid)], card)]
            return [self._sample(one, frozenset(pids)) for one in named or self._cards]

    def report(self, pids: Collection[int] = ()) -> GpuReport:
        """The cards with the driver's version."""
        samples = tuple(self.sample(pids))
        with self._lock:
            driver, cuda = self._ask("nvmlSystemGetDriverVersion"), self._ask("nvmlSystemGetCudaDriverVersion")
            version = f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else None
            return GpuReport(samples, _text(driver), version, self.reason)

    def close(self) -> None:
        """Let NVML go; the next sample opens it again."""
        with self._lock:
            self._shut()
            self._tried_at = None

    def _ready(self) -> bool:
        if self._nvml is not None and not self._lost:
            self.reason = None
            return True
        if self._tried_at is not None and time.monotonic() - self._tried_at < self._retry_s:
            return self._nvml is not None  # a card is lost; the others are still worth showing
        self._tried_at = time.monotonic()
        self._shut()
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            self.reason = "The package nvidia-ml-py, which asks the NVIDIA driver, is not installed."
            return False
        try:
            nvml.nvmlInit()
            count = nvml.nvmlDeviceGetCount()
        except Exception as error:
            self.reason = why_none(error)
            return False
        self._nvml, self.reason = nvml, None
        if not count:
            self.reason = "The NVIDIA driver is loaded but shows no GPU."
            self._shut()
            return False
        self._cards = [self._open(index) for index in range(count)]
        return True

    def _shut(self) -> None:
        self._ask("nvmlShutdown")
        self._nvml, self._cards, self._lost = None, [], False

    def _open(self, index: int) -> _Card:
        handle = self._ask("nvmlDeviceGetHandleByIndex", index)
        if handle is None:
            return _Card(index)
        name, uuid = self._ask("nvmlDeviceGetName", handle), self._ask("nvmlDeviceGetUUID", handle)
        mode = self._ask("nvmlDeviceGetMigMode", handle)
        return _Card(index, handle, _text(name), _text(uuid), None if mode is None else mode[0] == 1)

    def _sample(self, card: _Card, pids: frozenset[int]) -> GpuSample:
        handle = card.handle
        if handle is None:
            self.reason = self.reason or f"GPU {card.index} does not answer."
            return GpuSample(card.index)
        memory = self._ask("nvmlDeviceGetMemoryInfo", handle)
        rates = self._ask("nvmlDeviceGetUtilizationRates", handle)
        return GpuSample(
            index=card.index,
            name=card.name,
            uuid=card.uuid,
            memory_used_bytes=_known(getattr(memory, "used", None)),
            memory_total_bytes=_known(getattr(memory, "total", None)),
            memory_free_bytes=_known(getattr(memory, "free", None)),
            utilisation_percent=_known(getattr(rates, "gpu", None)),
            temperature_c=self._temperature(handle),
            power_w=_thousandth(self._ask("nvmlDeviceGetPowerUsage", handle)),
            power_limit_w=_thousandth(self._ask("nvmlDeviceGetEnforcedPowerLimit", handle)),
            energy_j=_thousandth(self._ask("nvmlDeviceGetTotalEnergyConsumption", handle)),
            throttle=self._throttle(handle),
            own_memory_bytes=self._own_memory(handle, pids),
            mig=card.mig,
        )

    def _temperature(self, handle: Any) -> int | None:
        sensor = 0  # NVML_TEMPERATURE_GPU
        degrees = _known(self._ask("nvmlDeviceGetTemperature", handle, sensor))
        # The older call goes with CUDA 14, the newer one is missing from drivers before 570.
        return degrees if degrees is not None else _known(self._ask("nvmlDeviceGetTemperatureV", handle, sensor))

    def _throttle(self, handle: Any) -> tuple[str, ...] | None:
        bits = self._ask("nvmlDeviceGetCurrentClocksEventReasons", handle)
        if bits is None:  # drivers before 535 know it by its old name
            bits = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
        return None if bits is None else tuple(word for bit, word in THROTTLE.items() if bits & bit)

    def _own_memory(self, handle: Any, pids: frozenset[int]) -> int | None:
        """Bytes held by `pids`; a process that shows both as compute and as graphics counts once."""
        if not pids:
            return None
        held: dict[int, int] = {}
        for kind in ("Compute", "Graphics"):
            for process in self._ask(f"nvmlDeviceGet{kind}RunningProcesses", handle) or ():
                used = _known(getattr(process, "usedGpuMemory", None))
                if process.pid in pids and used is not None:
                    held[process.pid] = max(used, held.get(process.pid, 0))
        return sum(held.values()) if held else None

    def _ask(self, function: str, *arguments: Any) -> Any:
        """NVML's answer, or None. The one place that meets its errors, those of a half-installed driver included."""
        if self._nvml is None:
            return None
        try:
            return getattr(self._nvml, function)(*arguments)
        except Exception as error:
            if getattr(error, "value", None) in LOST:
                self._lost, self.reason = True, why_none(error)
            return None


def why_none(error: Exception) -> str:
    """An NVML error as a sentence."""
    code = getattr(error, "value", None)
    sentence = WHY_NONE.get(code) if isinstance(code, int) else None
    return sentence or f"The NVIDIA driver does not answer ({type(error).__name__}: {error})."


def _known(value: int | None) -> int | None:
    return None if value in NOT_AVAILABLE else value


def _thousandth(value: int | None) -> float | None:
    """Milliwatts as watts, millijoules as joules."""
    known = _known(value)
    return None if known is None else known / 1000


def _text(value: str | bytes | None) -> str | None:
    """Old bindings return bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


_shared = Sampler()


def gpus(pids: Collection[int] = ()) -> list[GpuSample]:
    """Every card now, through one sampler of this process."""
    return _shared.sample(pids)


def gpu_report(pids: Collection[int] = ()) -> GpuReport:
    """The cards with the driver's version, through one sampler of this process."""
    return _shared.report(pids)


def sample_as_event(samples: Iterable[GpuSample], pids: Collection[int] = ()) -> dict[str, Any]:
    """The body of the run's `gpu` event: a dict a card, without the figures that are not available."""
    cards = [{key: value for key, value in asdict(sample).items() if value is not None} for sample in samples]
    for card in cards:
        if "throttle" in card:
            card["throttle"] = list(card["throttle"])
    return {"gpus": cards, "pids": sorted(pids)}
