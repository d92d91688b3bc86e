"""Where things lie: presets, cache, runs; and how a file is written whole."""

import contextlib
import errno
import glob
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import psutil

from core.errors import FinetuiError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TORN = ".tmp"
"""How the name of a temporary file or folder ends: ``.NAME.PID.RANDOM.tmp`` beside NAME."""


def expanded(path: str | Path) -> Path:
    """The path with a ~ at its head as a home; one that nobody has stays as it was written."""
    return Path(os.path.expanduser(path))


def configs_dir() -> Path:
    """The folder of the shipped presets: ``configs/`` of the checkout, or its copy inside an installed wheel."""
    here = Path(__file__).resolve().parent
    return next(folder for folder in (here.parent / "configs", here / "_configs") if (folder / "models.yaml").is_file())


def cache_dir() -> Path:
    """Where converted models and the demo's data are kept: ``FINETUI_CACHE``, else ``~/.cache/finetui``.

    Raises FinetuiError for a user without a home."""
    chosen = os.environ.get("FINETUI_CACHE")
    if chosen:
        return expanded(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = expanded(base) / "finetui"
    if folder.parts[0].startswith("~"):
        raise FinetuiError("This user has no home folder.", "Set HOME, or FINETUI_CACHE to a folder for the cache.")
    return folder


def runs_dir(chosen: str | Path | None = None) -> Path:
    """The folder of runs: the argument, else ``FINETUI_RUNS``, else ``runs`` where the user stands. Absolute."""
    return expanded(chosen or os.environ.get("FINETUI_RUNS") or "runs").absolute()


def last_lines(path: Path, size: int, since: int = 0) -> str:
    """The last whole lines of a file that fit `size` bytes, of what comes after byte `since`. Raises OSError."""
    with open_regular(path) as stream:
        start = max(since, os.fstat(stream.fileno()).st_size - size)
        stream.seek(start)
        text = stream.read(size).decode("utf-8", "replace")
    return (text.partition("\n")[2] or text) if start > since else text


def open_regular(path: Path) -> IO[bytes]:
    """Open a file for reading. Raises OSError for a pipe or a device in its place: it could hold a viewer for ever."""

    def without_waiting(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    stream = open(path, "rb", opener=without_waiting)
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise OSError(errno.EINVAL, "no regular file", str(path))
    return stream


def _is_torn(path: Path) -> bool:
    """Whether the writer of a temporary file or folder is dead. One that this process cannot see, in another container
    that shares the disk, still holds its lock."""
    writer = path.name.removesuffix(TORN).split(".")[-2]
    if not writer.isdecimal() or psutil.pid_exists(int(writer)):
        return False
    return not is_held(path)


def is_held(path: Path) -> bool:
    """Whether a living writer holds a temporary file or folder, or that cannot be told; without ``flock`` none does."""
    if fcntl is None:
        return False
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(handle)


def _mark_as_written(handle: int) -> None:
    if fcntl is not None:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def remove_torn(found: Iterable[Path]) -> None:
    """Remove what dead writers left among these temporary files and folders; what is being written stays."""
    for path in found:
        if _is_torn(path):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()


def torn_beside(path: Path) -> Iterator[Path]:
    """The temporary files of `path`, of dead writers and living ones."""
    return path.parent.glob(f".{glob.escape(path.name)}.*{TORN}")


@contextlib.contextmanager
def replacing(path: Path, mode: str = "w", *, sync: bool = True) -> Iterator[IO]:
    """Open a temporary file beside `path` and rename it over `path` when the block ends without an exception.

    What killed writers of the same file left goes. Without `sync` the file outlives this process, but perhaps not a
    power cut: waiting for the disk could hold the keyboard up for seconds while a trainer writes a checkpoint.
    Raises OSError; the old content, if any, stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_torn(torn_beside(path))
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.{os.getpid()}.", suffix=TORN)
    try:
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as stream:
            _mark_as_written(handle)
            yield stream
            stream.flush()
            if sync:
                os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def building_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`, to be filled and renamed; it is gone when the block ends, and what killed
    builders of the same left goes before it begins. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_torn(torn_beside(path))
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.{os.getpid()}.", suffix=TORN))
    handle = os.open(folder, os.O_RDONLY) if fcntl is not None else -1
    try:
        if handle >= 0:
            _mark_as_written(handle)
        yield folder
    finally:
        if handle >= 0:
            os.close(handle)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """An empty folder among the system's temporary ones for as long as the block lasts. Raises FinetuiError."""
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(building_folder(Path(tempfile.gettempdir()) / "finetui"))
        except OSError as error:
            raise FinetuiError(
                f"No temporary folder can be made: {error.strerror or error}.", "Set TMPDIR to a folder with some room."
            ) from error
        yield folder


@contextlib.contextmanager
def writing_whole(path: Path, mode: str = "w") -> Iterator[IO]:
    """As `replacing`, for what shall outlast a power cut.

    Raises FinetuiError (disk full, read-only folder) naming the file; the old content, if any, stays.
    """
    try:
        with replacing(path, mode) as stream:
            yield stream
    except OSError as error:
        advice = "Free some space or choose another folder."
        with contextlib.suppress(FinetuiError):
            if path.is_relative_to(cache_dir()):
                advice = "Free some space, or move the cache with FINETUI_CACHE."
        raise FinetuiError(f"{path} cannot be written: {error.strerror or error}.", advice) from error


def nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there as far as this user may look."""
    return next(part for part in (folder, *folder.parents) if os.path.exists(part))
