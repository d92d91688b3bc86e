"""Where things lie: presets, cache, runs; and how a file is written whole."""

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import psutil

from core.errors import FinetuiError

TORN = ".tmp"
"""How the name of a temporary file ends: ``.NAME.PID.RANDOM.tmp`` beside NAME."""


def configs_dir() -> Path:
    """The folder of the shipped presets: ``configs/`` of the checkout, or its copy inside an installed wheel."""
    here = Path(__file__).resolve().parent
    return next(folder for folder in (here.parent / "configs", here / "_configs") if (folder / "models.yaml").is_file())


def cache_dir() -> Path:
    """Where converted models and the demo's data are kept: ``FINETUI_CACHE``, else ``~/.cache/finetui``."""
    chosen = os.environ.get("FINETUI_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "finetui"


def runs_dir(chosen: str | Path | None = None) -> Path:
    """The folder of runs: the argument, else ``FINETUI_RUNS``, else ``runs`` where the user stands. Absolute."""
    return Path(chosen or os.environ.get("FINETUI_RUNS") or "runs").expanduser().absolute()


def open_regular(path: Path) -> IO[bytes]:
    """Open a file for reading. Raises OSError for a pipe or a device in its place: it could hold a viewer for ever."""

    def without_waiting(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    stream = open(path, "rb", opener=without_waiting)
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise OSError(errno.EINVAL, "no regular file", str(path))
    return stream


def temporary_beside(path: Path) -> tuple[int, str]:
    """A new file beside `path` that names this process as its writer: its handle and its name. Raises OSError."""
    return tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.{os.getpid()}.", suffix=TORN)


def remove_torn(found: Iterable[Path]) -> None:
    """Remove what dead writers left among these temporary files; one that is being written stays."""
    for path in found:
        writer = path.name.removesuffix(TORN).split(".")[-2]
        if writer.isdecimal() and not psutil.pid_exists(int(writer)):
            with contextlib.suppress(OSError):
                path.unlink()


@contextlib.contextmanager
def writing_whole(path: Path, mode: str = "w") -> Iterator[IO]:
    """Open a temporary file beside `path` and rename it over `path` when the block ends without an exception.

    Raises FinetuiError (disk full, read-only folder) naming the file; the old content, if any, stays.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = temporary_beside(path)
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise FinetuiError(
            f"{path} cannot be written: {error.strerror or error}.", "Free some space or choose another folder."
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there as far as this user may look."""
    return next(part for part in (folder, *folder.parents) if os.path.exists(part))
