"""Checkpoints and models as folders of files: when one is complete, whether it is still as it was saved.

Completeness is a matter of names and sizes and is asked often; soundness reads every byte and is asked before training
goes on from a checkpoint. No torch.
"""

import contextlib
import json
import os
import stat
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from core.paths import writing_whole

MANIFEST = "finetui-manifest.json"
CHUNK_BYTES = 1 << 20


def write_manifest(folder: Path) -> None:
    """List every file of `folder` with its size and XXH3 hash, written last: the mark of a complete checkpoint."""
    sizes, hashes = {}, {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name != MANIFEST:
            name = file.relative_to(folder).as_posix()
            sizes[name], hashes[name] = file.stat().st_size, hash_of(file)
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    with writing_whole(folder / MANIFEST) as stream:
        json.dump({"files": sizes, "xxh3": hashes}, stream, indent=1)
    with contextlib.suppress(OSError):  # the names, too, outlast a power cut
        handle = os.open(folder.parent, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def hash_of(file: Path) -> str:
    digest = xxhash.xxh3_64()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`. Raises OSError or ValueError where there is none that can be used."""
    found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    files = found.get("files") if isinstance(found, dict) else None
    if not isinstance(files, dict) or not files:
        raise ValueError("it lists no files")
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError("it names a file outside of its folder")
    return found


def is_complete(folder: Path) -> bool:
    """Whether `folder` has a manifest and every file in it has the size the manifest says."""
    try:
        files = read_manifest(folder)["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, RecursionError):
        return False


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint or model, in words; empty where every byte is as it was saved."""
    try:
        manifest = read_manifest(folder)
    except FileNotFoundError:
        return "it was never finished"
    except (OSError, ValueError, RecursionError):
        return "its manifest cannot be read"
    hashes = manifest.get("xxh3")
    for name, size in manifest["files"].items():
        file = folder / name
        try:
            found = file.stat()
            if not stat.S_ISREG(found.st_mode):
                return f"{name} is no file"
            if found.st_size != size:
                return f"{name} has {found.st_size} bytes instead of {size}"
            known = hashes.get(name) if isinstance(hashes, dict) else None
            if known is not None and hash_of(file) != known:
                return f"{name} is not as it was saved"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return ""


def step_of(checkpoint: Path | None) -> int:
    """The step of ``checkpoint-N``; 0 for none, -1 for a folder of another name."""
    if checkpoint is None:
        return 0
    step = checkpoint.name.removeprefix("checkpoint-")
    return int(step) if step.isdigit() else -1


def checkpoints_in(folder: Path) -> list[Path]:
    """Every folder ``checkpoint-N``, complete or not, newest step first."""
    return sorted((path for path in folder.glob("checkpoint-*") if step_of(path) >= 0), key=step_of, reverse=True)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of `folder`, newest step first."""
    return [path for path in checkpoints_in(folder) if is_complete(path)]


def sound_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose every byte is as it was saved, and what is wrong with each newer one, in words."""
    wrong: list[str] = []
    for path in checkpoints_in(folder):
        if not (words := damage(path)):
            return path, wrong
        wrong.append(f"{path.name} is left out: {words}")
    return None, wrong
