"""The 16-bit weights that an adapter is merged into, and under which licence they stand. No torch.

The presets train 4-bit copies; merging into 16 bit needs the originals, which are a download of their own. The copies
themselves serve as well (``dequantised``): they are what the adapter was trained on, rounded once more.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.config import size_presets
from core.errors import FinetuiError
from core.hub import HUB_ADVICE, hub_reason, hub_token
from core.paths import expanded
from core.plan import Plan
from core.sources import DEMO_MODEL, Notify, model_source, read_json

DEQUANTISED = "dequantised"
FOUR_BIT_ENDS = ("-unsloth-bnb-4bit", "-bnb-4bit")
BASE_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "*.md",
    "LICENSE*",
    "NOTICE*",
]
LEGAL = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "Notice*", "License*")
LICENCE_PAGES = ("README.md", "SOURCE.txt")


@dataclass(frozen=True)
class BaseModel:
    """Where the weights to merge into come from: a folder, or a Hub id that is fetched when it is needed."""

    place: str
    quantised: bool
    """They are packed in 4 bit and will be unpacked."""
    trained_on: str
    """What the adapter was trained on: a folder or Hub id."""

    @property
    def here(self) -> Path | None:
        """The folder on this machine; None while the weights have to be fetched first."""
        if Path(self.place).is_dir():
            return Path(self.place)
        return cached(self.place)

    @property
    def extra_download(self) -> bool:
        """Whether the weights have to be fetched for the merge alone: training fetches what it trains on."""
        return self.here is None and self.place != self.trained_on


def find_base(plan: Plan, notify: Notify, *, fetch: bool = True) -> BaseModel:
    """What the plan's adapter is merged into. With `fetch` False nothing is downloaded or made.

    Raises FinetuiError when the 16-bit weights are not known, or the ones named cannot be merged into.
    """
    source = model_source(plan.model, notify, fetch=fetch)
    asked = plan.export.base
    if asked and asked != DEQUANTISED:
        return BaseModel(_named(asked), False, source.base)
    how = _quantisation(source.base)
    if asked == DEQUANTISED:
        if how != "bitsandbytes":
            raise FinetuiError(f"{_short(source.base)} is not packed in 4 bit.", "Leave --merge-base out.")
        return BaseModel(source.base, True, source.base)
    if not how:
        return BaseModel(source.base, False, source.base)
    known = known_16bit(source.base)
    if known is None:
        raise FinetuiError(
            f"{_short(source.base)} is quantised, and its 16-bit weights are not known here.",
            "Name them with --merge-base OWNER/NAME or FOLDER"
            + (f", or --merge-base {DEQUANTISED} for the 4-bit ones unpacked." if how == "bitsandbytes" else "."),
        )
    return BaseModel(known, False, source.base)


def known_16bit(name: str) -> str | None:
    """The 16-bit original of a quantised model: from the presets, or by Unsloth's way of naming its copies."""
    for preset in size_presets().values():
        if preset["model"]["name"] == name:
            return str(preset["about"]["base_16bit"])
    for end in FOUR_BIT_ENDS:
        if name.startswith("unsloth/") and name.endswith(end):
            return name.removesuffix(end)
    return None


def _named(place: str) -> str:
    folder = expanded(place)
    if folder.is_dir():
        how = _quantisation(str(folder))
        if how:
            raise FinetuiError(f"{place} is quantised itself ({how}).", "Name 16-bit weights.")
        return str(folder.absolute())
    if place == DEMO_MODEL or (place.count("/") == 1 and not place.startswith((".", "/", "~"))):
        return place
    raise FinetuiError(f"There is no model folder {place[:120]!r}.", "Give a Hub id as OWNER/NAME or a folder.")


def _quantisation(place: str) -> str:
    """How the weights are quantised: empty, ``bitsandbytes``, or another word. By the name while they are not here."""
    folder = Path(place) if Path(place).is_dir() else cached(place)
    if folder is None or not (folder / "config.json").is_file():
        return "bitsandbytes" if "bnb-4bit" in place else ""
    found = read_json(folder / "config.json").get("quantization_config") or {}
    return str(found.get("quant_method") or "bitsandbytes") if found else ""


def cached(name: str) -> Path | None:
    """The folder of a Hub model whose configuration and weights are in the Hub's cache on this machine."""
    if name.count("/") != 1 or name.startswith("/"):
        return None
    import huggingface_hub

    try:
        found = huggingface_hub.try_to_load_from_cache(name, "config.json")
    except Exception:  # a name that the Hub's client refuses
        return None
    folder = Path(found).parent if isinstance(found, str) else None
    return folder if folder and any(folder.glob("*.safetensors")) else None


def fetch_base(base: BaseModel, notify: Notify) -> tuple[Path, str | None]:
    """The folder of the weights, fetched where they are on the Hub, and their commit there. Raises FinetuiError."""
    if Path(base.place).is_dir():
        return Path(base.place), None
    if base.place == DEMO_MODEL:
        from core.paths import cache_dir
        from core.smollm import demo_model

        return demo_model(cache_dir(), notify), None
    import huggingface_hub

    notify(f"fetching {base.place}")
    try:
        folder = huggingface_hub.snapshot_download(base.place, allow_patterns=BASE_FILES, token=hub_token())
    except Exception as error:
        advice = HUB_ADVICE if not base.trained_on.endswith("-4bit") else f"{HUB_ADVICE} Or --merge-base {DEQUANTISED}."
        raise FinetuiError(f"{base.place} cannot be fetched: {hub_reason(error)}.", advice) from error
    return Path(folder), Path(folder).name


def _short(place: str) -> str:
    return Path(place).name if place.startswith("/") else place


# Licence and name -----------------------------------------------------------------------------------------------------


def public_name(plan: Plan, place: str) -> str:
    """How the base may be named in public: its Hub id, the demo's, or the name of its folder without the way there."""
    if not Path(place).is_absolute():
        return place
    if plan.model.name == DEMO_MODEL or Path(place).name == DEMO_MODEL.rsplit("/", 1)[-1]:
        return DEMO_MODEL
    parts = Path(place).parts
    cache = next((part for part in parts if part.startswith("models--")), None)
    return cache.removeprefix("models--").replace("--", "/") if cache else Path(place).name


def licence_of(name: str, folder: Path | None) -> str | None:
    """The licence's identifier as the Hub writes it (``apache-2.0``): from the model's own page, else the presets'."""
    for page in LICENCE_PAGES if folder else ():
        if found := _licence_on(folder / page):  # type: ignore[operator]
            return found
    for preset in size_presets().values():
        if name in (preset["model"]["name"], preset["about"]["base_16bit"]):
            return str(preset["about"]["licence"])
    return None


def _licence_on(page: Path) -> str | None:
    try:
        text = page.read_text(encoding="utf-8", errors="replace")[:20_000]
    except OSError:
        return None
    header = text.split("---", 2)[1] if text.startswith("---") else text if page.suffix == ".txt" else ""
    for line in header.splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in ("license", "licence") and value.strip():
            return value.strip().strip("'\"").lower()
    return None


def copy_legal(source: Path, target: Path) -> list[str]:
    """Copy the licence, notices and use policy of the base; their names."""
    files = sorted({file for pattern in LEGAL for file in source.glob(pattern) if file.is_file()})
    for file in files:
        shutil.copyfile(file, target / file.name)
    return [file.name for file in files]


def base_config(folder: Path) -> dict[str, Any]:
    """The base's config.json. Raises FinetuiError."""
    return read_json(folder / "config.json")
