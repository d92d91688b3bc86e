"""What a run used of its machine, told from the `gpu` events of its log."""

import contextlib
import hashlib
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from core.events import Event

GIB = 1 << 30
GAP_S = 120.0
"""Between samples farther apart the run was not at work: it was stopped, or something was asked of it later."""
PACKAGES = (
    "torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes", "unsloth", "safetensors",
)  # fmt: skip
CARD_FIGURES = (
    ("memory_used_bytes", "memory", GIB), ("utilisation_percent", "utilisation", 1),
    ("temperature_c", "temperature", 1),
    ("power_w", "power", 1),
)  # fmt: skip
Series = dict[str, list[tuple[float, float | None]]]


def versions() -> dict[str, str]:
    """The packages that train, by name, as they are installed here; none is imported."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def code() -> str:
    """What names the source of finetui as it lies here: a short hash, which a `git pull` changes."""
    found = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        with contextlib.suppress(OSError):
            found.update(file.name.encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:12]


def changed_software(before: Event, now: Event) -> list[str]:
    """What trains with is not what it was, between two `run_start` events; empty where either does not say."""
    old, new = before.get("versions"), now.get("versions")
    told: list[str] = []
    if before.get("python") and before["python"] != now.get("python"):
        told.append(f"Python {before['python']} → {now.get('python')}")
    if isinstance(old, dict) and isinstance(new, dict):
        names = [name for name in PACKAGES if old.get(name) != new.get(name)]
        told += [f"{name} {old.get(name, 'none')} → {new.get(name, 'none')}" for name in names]
    if before.get("version") and before["version"] != now.get("version"):
        told.append(f"finetui {before['version']} → {now.get('version')}")
    elif before.get("code") and before["code"] != now.get("code"):
        told.append("finetui's own code")
    return told


def system() -> str:
    """The operating system and processor in a few words, without the machine's name."""
    return f"{platform.system()} {platform.release()}, {platform.machine()}"


def oom_kills() -> int:
    """How many processes the kernel has ended for lack of memory since it started, 0 where it does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/vmstat").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    return 0


@dataclass
class MachineUse:
    """Curves over seconds since the start, by what is measured and device; names of the cards; energy in joules."""

    curves: dict[str, Series] = field(default_factory=dict)
    cards: list[str] = field(default_factory=list)
    energy_j: float | None = None

    def highest(self, what: str) -> float | None:
        """The largest value of a measure on any device."""
        return max((y for line in self.curves.get(what, {}).values() for _, y in line if y is not None), default=None)

    def mean(self, what: str) -> float | None:
        """The mean of a measure over all its samples."""
        values = [y for line in self.curves.get(what, {}).values() for _, y in line if y is not None]
        return sum(values) / len(values) if values else None


def use_of(events: Sequence[Event]) -> MachineUse:
    """Fold the `gpu` events of a run; what is no figure in them is passed over."""
    use = MachineUse()
    begun = next((event["t"] for event in events if event["t"]), 0.0)
    counters: dict[str, float] = {}
    cpu: tuple[float, float] | None = None
    for event in events:
        at = max(0.0, event["t"] - begun)
        cards = event.get("gpus")
        for card in cards if isinstance(cards, list) else []:
            if isinstance(card, dict):
                _fold_card(use, card, at, counters)
        if (rss := _figure(event.get("rss_bytes"))) is not None:
            _add(use, "memory", "process, RAM", at, rss / GIB)
        if (spent := _figure(event.get("cpu_s"))) is not None:
            if cpu and cpu[0] < at <= cpu[0] + GAP_S and spent >= cpu[1]:
                _add(use, "utilisation", "CPU", at, 100 * (spent - cpu[1]) / (at - cpu[0]))
            cpu = (at, spent)
    return use


def _fold_card(use: MachineUse, card: dict[str, Any], at: float, counters: dict[str, float]) -> None:
    name = f"GPU {card.get('index', 0)}"
    if isinstance(model := card.get("name"), str) and model not in use.cards:
        use.cards.append(model)
    for key, what, unit in CARD_FIGURES:
        if (value := _figure(card.get(key))) is not None:
            _add(use, what, name, at, value / unit)
    if (counter := _figure(card.get("energy_j"))) is not None:
        used = counter - counters.get(name, counter)
        use.energy_j = (use.energy_j or 0.0) + max(0.0, used)
        counters[name] = counter


def _add(use: MachineUse, what: str, device: str, at: float, value: float) -> None:
    line = use.curves.setdefault(what, {}).setdefault(device, [])
    if line and at > line[-1][0] + GAP_S:
        line.append((at, None))
    line.append((at, value))


def _figure(value: Any) -> float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and -1e15 < value < 1e15
    return float(value) if usable else None
