"""Rows of a Hub data set: its configurations, splits and files, a look at the first rows, and the files themselves.

What was fetched once is found again without a network. Configurations are those that the data set's card names, else
they are told from folders and file names, as the Hub itself does.
"""

import contextlib
import fnmatch
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from core.data_files import DATA_SUFFIXES, raw_rows
from core.errors import FinetuiError
from core.hub import HUB_ADVICE, hub_reason, hub_token
from core.paths import scratch
from core.plan import DataPlan

LOOK_BYTES = 512 << 10
SPLITS = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test", "eval")}
NO_ROWS = ("dataset_infos.json", "dataset_info.json", "requirements.txt", "license.txt", "readme.txt", "state.json")
Notify = Callable[[str], None]
Splits = dict[str, dict[str, list[str]]]
"""Files by configuration and split."""


@dataclass(frozen=True)
class HubRows:
    """Which rows of which data set; `file` may be a pattern (``data/part-*.jsonl``)."""

    dataset: str
    config: str | None = None
    file: str | None = None
    split: str = "train"
    revision: str | None = None

    @classmethod
    def of(cls, data: DataPlan) -> "HubRows":
        return cls(data.dataset or "", data.dataset_config, data.dataset_file, data.split, data.dataset_revision)


def listing(wanted: HubRows) -> dict[str, Any]:
    """The data set's configurations with their splits, its data files with sizes, and which of them are chosen.

    Raises FinetuiError where it cannot be had, or where what is wanted is not in it.
    """
    sizes, card, where = _files(wanted)
    files = sorted(name for name in sizes if is_data(name))
    if not files:
        raise FinetuiError(f"{wanted.dataset} has no readable data file.", "JSONL, JSON, CSV, Parquet and text are.")
    configs = _configs_of_card(card, files) or _configs_of_names(files)
    chosen = choose(wanted, files, configs)
    return {
        "dataset": wanted.dataset, "revision": wanted.revision or "main", "where": where, "configs": configs,
        "files": {name: sizes[name] for name in files}, "chosen": chosen,
        "bytes": sum(sizes[name] or 0 for name in chosen),
    }  # fmt: skip


def is_data(name: str) -> bool:
    lowered = name.lower()
    return lowered.endswith(DATA_SUFFIXES) and lowered.rsplit("/", 1)[-1] not in NO_ROWS


def choose(wanted: HubRows, files: list[str], configs: Splits) -> list[str]:
    """The files that are wanted. Raises FinetuiError naming what there is."""
    if wanted.file:
        found = [name for name in files if name == wanted.file or fnmatch.fnmatchcase(name, wanted.file)]
        if not found:
            raise FinetuiError(f"{wanted.dataset} has no file {wanted.file!r}.", f"It has {_some(files)}.")
        return found
    names = list(configs)
    config = wanted.config or ("default" if "default" in names else names[0] if len(names) == 1 else "")
    if config not in configs:
        what = f"no configuration {config!r}" if config else f"{len(names)} configurations"
        raise FinetuiError(f"{wanted.dataset} has {what}.", f"Choose one with --dataset-config: {_some(names)}.")
    splits = configs[config]
    if wanted.split in splits:
        return splits[wanted.split]
    if len(splits) == 1 and wanted.split == "train":
        return next(iter(splits.values()))
    raise FinetuiError(
        f"{wanted.dataset} has no split {wanted.split!r}.", f"Choose one with --dataset-split: {_some(list(splits))}."
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def fetch(wanted: HubRows, notify: Notify) -> list[Path]:
    """The files that are wanted, from the cache or the network. Raises FinetuiError."""
    import huggingface_hub

    chosen = listing(wanted)["chosen"]
    notify(f"fetching {', '.join(chosen[:3])}{' …' if len(chosen) > 3 else ''} of {wanted.dataset}")
    try:
        return [
            Path(
                huggingface_hub.hf_hub_download(
                    wanted.dataset, name, repo_type="dataset", revision=wanted.revision, token=hub_token(),
                    endpoint=endpoint(),
                )  # fmt: skip
            )
            for name in chosen
        ]
    except Exception as error:  # the hub client raises many kinds; each is "cannot be had" to the person
        raise _unfetched(wanted, error) from error


def here(wanted: HubRows) -> list[Path]:
    """The files that are wanted if all of them are on this machine, else none. Never goes to the network."""
    folder = _snapshot(wanted)
    if folder is None:
        return []
    with contextlib.suppress(FinetuiError):
        files = _cached(folder)
        names = sorted(name for name in files if is_data(name))
        configs = _configs_of_card(_card(folder / "README.md"), names) or _configs_of_names(names)
        found = [folder / name for name in choose(wanted, names, configs)] if names else []
        if not any(re.search(r"-00\d+-of-00\d+", name.name) for name in found) or _whole(found):
            return found
    return []


def _whole(found: list[Path]) -> bool:
    """Whether all parts of files named like ``train-00000-of-00003`` are there."""
    parts = [match for path in found if (match := re.search(r"-of-(\d+)", path.name))]
    return bool(parts) and len(parts) == int(parts[0].group(1))


def first_rows(wanted: HubRows, count: int) -> list[Any]:
    """The first rows of what is wanted, without fetching more than the beginning of a file. Raises FinetuiError."""
    if local := here(wanted):
        return [row for _, row in islice(raw_rows(local[0]), count)]
    from huggingface_hub import HfFileSystem

    name = listing(wanted)["chosen"][0]
    try:
        system = HfFileSystem(endpoint=endpoint(), token=hub_token(), skip_instance_cache=True)
        revision = f"@{wanted.revision}" if wanted.revision else ""
        place = f"datasets/{wanted.dataset}{revision}/{name}"
        with system.open(place, "rb", block_size=LOOK_BYTES) as stream:
            if name.endswith(".parquet"):
                return _parquet_head(stream, count)
            head = stream.read(LOOK_BYTES)
            whole = len(head) < LOOK_BYTES
    except FinetuiError:
        raise
    except Exception as error:
        raise _unfetched(wanted, error) from error
    return _head_rows(head, whole, name, count)


def _parquet_head(stream: Any, count: int) -> list[Any]:
    import pyarrow.parquet

    batch = next(pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=count), None)
    return batch.to_pylist()[:count] if batch is not None else []


def _head_rows(head: bytes, whole: bool, name: str, count: int) -> list[Any]:
    """The rows that the beginning of a file holds whole."""
    found: list[Any] = []
    with scratch() as folder:
        path = folder / f"head{Path(name).suffix}"
        path.write_bytes(head if whole else head[: head.rfind(b"\n") + 1] or head)
        with contextlib.suppress(FinetuiError):  # where the beginning ends is no defect of the file
            found.extend(row for _, row in islice(raw_rows(path), count))
    return found


# --- what the Hub says, and the cache without it ---


def endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _files(wanted: HubRows) -> tuple[dict[str, int | None], dict[str, Any], str]:
    """(sizes of all files, the card's head, where that is known from)."""
    import huggingface_hub

    try:
        api = huggingface_hub.HfApi(endpoint=endpoint(), token=hub_token())
        info = api.dataset_info(wanted.dataset, revision=wanted.revision, files_metadata=True)
    except Exception as error:
        folder = _snapshot(wanted)
        if folder is None or type(error).__name__ in ("RepositoryNotFoundError", "GatedRepoError", "HFValidationError"):
            raise _unfetched(wanted, error) from error
        return _cached(folder), _card(folder / "README.md"), "the cache"
    sizes = {entry.rfilename: entry.size for entry in info.siblings or []}
    card: dict[str, Any] = {}
    if "README.md" in sizes:
        with contextlib.suppress(Exception):  # a data set is read without its card as well
            card = _card(
                Path(
                    huggingface_hub.hf_hub_download(
                        wanted.dataset, "README.md", repo_type="dataset", revision=wanted.revision, token=hub_token(),
                        endpoint=endpoint(),
                    )  # fmt: skip
                )
            )
    return sizes, card, "the Hub"


def _snapshot(wanted: HubRows) -> Path | None:
    """The folder of a data set in the Hub's cache, at the revision wanted."""
    from huggingface_hub import constants

    if wanted.dataset.count("/") != 1:
        return None
    cache = Path(os.environ.get("HF_HUB_CACHE") or constants.HF_HUB_CACHE)
    folder = cache / f"datasets--{wanted.dataset.replace('/', '--')}"
    revision = wanted.revision or "main"
    try:
        commit = (folder / "refs" / revision).read_text().strip()
    except (OSError, ValueError):
        commit = revision
    found = folder / "snapshots" / commit
    return found if found.is_dir() and found.parent == folder / "snapshots" else None


def _cached(folder: Path) -> dict[str, int | None]:
    return {
        str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()
    }


def _card(path: Path) -> dict[str, Any]:
    """The YAML at the head of a card; empty where there is none that can be read."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")[:1_000_000]
        head = text.split("---", 2)[1] if text.startswith("---") else ""
        found = yaml.safe_load(head)
    except (OSError, yaml.YAMLError, IndexError, RecursionError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _configs_of_card(card: dict[str, Any], files: list[str]) -> Splits:
    found: Splits = {}
    given = card.get("configs")
    for entry in given if isinstance(given, list) else []:
        if not isinstance(entry, dict) or not isinstance(entry.get("config_name"), str):
            continue
        splits = _splits_of_card(entry.get("data_files"), str(entry.get("data_dir") or ""), files)
        if splits:
            found[entry["config_name"]] = splits
    return found


def _splits_of_card(given: Any, folder: str, files: list[str]) -> dict[str, list[str]]:
    if given is None and folder:
        return _splits_of_names([name for name in files if name.startswith(f"{folder.rstrip('/')}/")])
    entries = given if isinstance(given, list) else [given]
    found: dict[str, list[str]] = {}
    for entry in entries:
        split = str(entry.get("split") or "train") if isinstance(entry, dict) else "train"
        paths = entry.get("path") if isinstance(entry, dict) else entry
        patterns = [path for path in (paths if isinstance(paths, list) else [paths]) if isinstance(path, str)]
        lead = f"{folder.rstrip('/')}/" if folder else ""
        names = [name for name in files if any(_matches(name, lead + pattern) for pattern in patterns)]
        if names:
            found.setdefault(split, []).extend(names)
    return found


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern.removeprefix("./").replace("**/", "*"))


def _configs_of_names(files: list[str]) -> Splits:
    """Configurations by top folder, where several folders hold files and are not named for splits."""
    tops = {name.split("/", 1)[0] for name in files if "/" in name}
    named = {top for top in tops if not _split_of(top) and top != "data"}
    if named and named == tops and all("/" in name for name in files):
        return {top: _splits_of_names([name for name in files if name.startswith(f"{top}/")]) for top in sorted(named)}
    return {"default": _splits_of_names(files)}


def _splits_of_names(files: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in files:
        split = next((split for part in reversed(name.split("/")) if (split := _split_of(part))), "train")
        found.setdefault(split, []).append(name)
    return found


def _split_of(part: str) -> str:
    """The split that a folder or file is named for; empty for none."""
    words = re.split(r"[^a-z0-9]+", part.lower())
    return next((split for split, names in SPLITS.items() if any(name in words for name in names)), "")


def _unfetched(wanted: HubRows, error: Exception) -> FinetuiError:
    return FinetuiError(f"The data set {wanted.dataset} cannot be fetched: {hub_reason(error)}.", HUB_ADVICE)


def where_words(found: dict[str, Any]) -> list[str]:
    """A listing in a few lines."""
    lines = [f"{found['dataset']} at {found['revision']}, known from {found['where']}"]
    for config, splits in list(found["configs"].items())[:12]:
        words = ", ".join(f"{split} ({len(files)} file{'s' * (len(files) > 1)})" for split, files in splits.items())
        lines.append(f"  {config}: {words}")
    if len(found["configs"]) > 12:
        lines.append(f"  and {len(found['configs']) - 12} more configurations")
    size = f", {found['bytes'] / 1e6:,.1f} MB" if found["bytes"] else ""
    return [*lines, f"  chosen: {_some(found['chosen'])}{size}"]
