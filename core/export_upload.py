"""The stage ``upload``: large files one by one, then one commit, so that the repository is never half of an upload.

A stop or a crash loses no more than the file that was on its way: the Hub knows the others by their hash.
"""

import time
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from core.artefacts import chosen, fingerprint, upload_wish, write_report
from core.errors import FinetuiError
from core.plan import Plan
from core.reporter import Reporter, Stopped
from core.runs import Run
from core.upload import check_right, hub, hub_errors, look_at, refuse_mixture, refuse_repository, size_of, stale
from core.upload import upload_files as files_of  # fmt: skip

MIB = 1 << 20


def upload_stage(run: Run, plan: Plan, reporter: Reporter) -> None:
    """Check once more, upload, commit, and look whether all of it arrived. Raises FinetuiError, Stopped."""
    name = str(plan.export.upload)
    with reporter.phase("check", name):
        api = hub()
        check_right(api, name)
        found = look_at(api, name)
        refuse_repository(found, plan)
        files = files_of(run, plan)
        refuse_mixture(found, files)
        gone = stale(found, files)
        sizes = {path: size_of(content) for path, content in files.items()}
    reporter.event("totals", steps=max(1, sum(sizes.values()) // MIB))
    with reporter.phase("create", name), hub_errors(f"the repository {name}"):
        api.create_repo(name, private=plan.export.private or None, exist_ok=True)
    operations = [CommitOperationAdd(path, content) for path, content in _largest_first(files, sizes)]
    with reporter.phase("upload"):
        _send(api, name, operations, sizes, reporter)
    with reporter.phase("commit", f"{len(operations)} files"), hub_errors("the commit"):
        everything: list[Any] = [*operations, *(CommitOperationDelete(path) for path in gone)]
        message = f"Upload {plan.export.uploaded_form} by finetui"
        commit = api.create_commit(name, everything, commit_message=message)
    with reporter.phase("verify"):
        _verify(api, name, sizes)
    reporter.event("log", step=max(1, sum(sizes.values()) // MIB))
    address = f"{api.endpoint}/{name}"
    report: dict[str, Any] = {
        "adapter": fingerprint(chosen(run, plan.export).folder), "wanted": upload_wish(plan.export), "address": address,
        "commit": commit.oid, "files": sizes, "removed": gone, "uploaded": time.strftime("%Y-%m-%d %H:%M:%S"),
    }  # fmt: skip
    write_report(run, "upload", report)
    reporter.event("artefact", what="upload", path=address, bytes=sum(sizes.values()))
    reporter.notice(f"Uploaded to {address}: {len(sizes)} files, {sum(sizes.values()) / MIB:,.0f} MiB.")


def _largest_first(files: dict[str, Path | bytes], sizes: dict[str, int]) -> list[tuple[str, Path | bytes]]:
    return sorted(files.items(), key=lambda item: -sizes[item[0]])


def _send(
    api: HfApi, name: str, operations: list[CommitOperationAdd], sizes: dict[str, int], reporter: Reporter
) -> None:
    """Large files, one after another; what the Hub has already is passed over by its client."""
    sent = 0
    for number, operation in enumerate(operations, 1):
        if reporter.stop_asked:
            raise Stopped
        path = operation.path_in_repo
        reporter.detail(f"{path} ({sizes[path] / MIB:,.0f} MiB), {number} of {len(operations)}")
        try:
            with hub_errors(path):
                api.preupload_lfs_files(name, [operation], free_memory=False)
        except FinetuiError:
            if reporter.terminated:  # the client wraps what a signal raises in errors of its own
                raise Stopped from None
            raise
        sent += sizes[path]
        reporter.event("log", step=sent // MIB)


def _verify(api: HfApi, name: str, sizes: dict[str, int]) -> None:
    """Raises FinetuiError when a file is not there at its size."""
    there = look_at(api, name).files
    missing = [path for path, size in sizes.items() if there.get(path) != size]
    if missing:
        raise FinetuiError(
            f"{missing[0]} is not in {name} as it was sent.", "Resume: what arrived is not sent again.", exit_code=1
        )
