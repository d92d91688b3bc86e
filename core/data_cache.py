"""Where work on a data set is kept, so that the second look at the same bytes costs nothing.

Entries are folders under ``CACHE/data``, named by a hash of what they were made from: the file's content and every
setting that matters. They are built beside and renamed, so that a folder that is there is whole. The oldest go when
together they are larger than a limit.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from core.data_pieces import PIECE_BYTES
from core.errors import FinetuiError
from core.paths import TORN, building_folder, cache_dir, is_held, remove_torn, writing_whole

VERSION = 3
"""Part of every key: raise it when rows are read, keyed or tokenised differently."""
MAX_BYTES = 20 << 30
TIDY_BYTES = 64 << 20
MAX_STAMPS = 500


def data_cache() -> Path:
    return cache_dir() / "data"


def key_of(*parts: Any) -> str:
    """The name of an entry for what `parts` (JSON values or bytes) say."""
    whole = hashlib.sha256()
    for part in (VERSION, *parts):
        whole.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True, default=str).encode())
        whole.update(b"\0")
    return whole.hexdigest()[:32]


def entry(key: str) -> Path | None:
    """The folder of an entry, marked as used now; None where there is none."""
    folder = data_cache() / key
    if not folder.is_dir():
        return None
    with contextlib.suppress(OSError):
        os.utime(folder)
    return folder


class CacheUnwritable(FinetuiError):
    """The cache cannot be written; what can do without it does."""


@contextlib.contextmanager
def building(key: str) -> Iterator[Path]:
    """A folder to fill, which becomes the entry `key` when the block ends without an exception.

    Raises CacheUnwritable where the cache cannot be written. Where another process finished it first, its is kept.
    """
    root = data_cache()
    try:
        with building_folder(root / key) as folder:
            yield folder
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            with contextlib.suppress(OSError):
                os.rename(folder, root / key)
    except OSError as error:
        raise _unwritable(root, error) from error
    if size > TIDY_BYTES or key.endswith("0"):  # small entries are many: one in sixteen looks at the others
        tidy(keep=key)


def _unwritable(root: Path, error: OSError) -> CacheUnwritable:
    return CacheUnwritable(
        f"The cache {root} cannot be written: {error.strerror or error}.",
        "Free some space, or move the cache with FINETUI_CACHE.",
    )


def tidy(*, keep: str = "", limit: int | None = None) -> None:
    """Remove the entries used longest ago until the rest is below the limit (bytes), and what was left half built."""
    limit = MAX_BYTES if limit is None else limit
    remove_torn(data_cache().glob(f".*{TORN}"))
    found = []
    with contextlib.suppress(OSError):
        for folder in data_cache().iterdir():
            with contextlib.suppress(OSError):
                used = folder.stat().st_mtime
                if folder.is_dir():
                    found.append((used, folder, sum(file.stat().st_size for file in folder.rglob("*"))))
    total = sum(size for _, _, size in found)
    newest = max((used for used, _, _ in found), default=0)
    for used, folder, size in sorted(found):
        hidden = folder.name.startswith(".")
        if hidden and is_held(folder):  # its builder lives, whatever the clock says of its age
            continue
        if (total > limit or (hidden and used < newest - 24 * 3600)) and folder.name != keep:
            shutil.rmtree(folder, ignore_errors=True)
            total -= size


# --- the content of a file ---


def stamp_of(path: Path) -> list[Any]:
    """What changes with a file: its place, size, time and inode. Raises FinetuiError where it is gone."""
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        raise FinetuiError(f"{path} cannot be read.", "Check the path.") from error
    return [str(path.absolute()), found.st_size, found.st_mtime_ns, found.st_ino]


def content_key(path: Path, digests: list[bytes] | None = None, progress: Callable[[int], None] | None = None) -> str:
    """A hash of a file's bytes: known from its stamp, else from the `digests` of its pieces, else read now."""
    stamp = stamp_of(path)
    stamps = _stamps()
    name = key_of(stamp)
    if name not in stamps:
        if digests is None:
            digests = []
            with path.open("rb") as stream:
                while piece := stream.read(PIECE_BYTES):
                    digests.append(hashlib.sha256(piece).digest())
                    if progress:
                        progress(len(digests) * PIECE_BYTES)
        stamps[name] = key_of(b"".join(digests)), stamp[1]
        _keep_stamps(stamps)
    return stamps[name][0]


def known_content(path: Path) -> str:
    """The hash of a file's bytes if they may have been read before: by its stamp, or read now where a file of this
    size was; else empty."""
    stamps, stamp = _stamps(), stamp_of(path)
    name = key_of(stamp)
    if name not in stamps and any(size == stamp[1] for _, size in stamps.values()):
        return content_key(path)
    return stamps[name][0] if name in stamps else ""


def _stamps() -> dict[str, tuple[str, int]]:
    try:
        found = json.loads((data_cache() / "stamps.json").read_text(encoding="utf-8"))
        return {str(name): (str(content), int(size)) for name, (content, size) in found.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _keep_stamps(stamps: dict[str, tuple[str, int]]) -> None:
    with contextlib.suppress(FinetuiError), writing_whole(data_cache() / "stamps.json") as stream:
        json.dump(dict(list(stamps.items())[-MAX_STAMPS:]), stream)
