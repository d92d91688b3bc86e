"""Tokenise many conversations side by side: ``python -P -m core.train_tokens FOLDER``, started by `core.data_tokens`.

The job comes on stdin from the process that wants it: its length, then ledger, conversations and template as that
process pickled them. Each worker is forked from this process, so that the tokenizer is loaded once, and writes a shard
into FOLDER. Printed is the number done so far.
"""

import multiprocessing
import os
import pickle
import sys
import time
from pathlib import Path
from typing import Any

from core.data_ledger import Ledger
from core.data_tokens import Growing, fill

SAY_EVERY_S = 0.3
SHARD_ROWS = 1000


def main() -> int:
    folder, source = Path(sys.argv[1]), sys.stdin.buffer
    ledger, which, template = pickle.loads(source.read(int.from_bytes(source.read(8), "little")))
    count = max(1, min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1))
    count = min(count, -(-len(which) // SHARD_ROWS)) if "fork" in multiprocessing.get_all_start_methods() else 1
    edges = [len(which) * number // count for number in range(count + 1)]
    jobs = [(folder / f"{number:04}", which[start:end]) for number, (start, end) in
            enumerate(zip(edges, edges[1:], strict=False))]  # fmt: skip
    if count == 1:
        work(*jobs[0], ledger, template, None)
        return 0
    context: Any = multiprocessing.get_context("fork")
    done = [context.Value("q", 0, lock=False) for _ in jobs]
    children = [
        context.Process(target=work, args=(*job, ledger, template, counter))
        for job, counter in zip(jobs, done, strict=True)
    ]
    for child in children:
        child.start()
    while any(child.is_alive() for child in children):
        print(sum(counter.value for counter in done), flush=True)
        time.sleep(SAY_EVERY_S)
    return int(any(child.exitcode for child in children))


def work(folder: Path, which: Any, ledger: Ledger, template: Any, done: Any) -> None:
    """Tokenise `which` into a shard in `folder`, counting on `done`; ends when the process that started it has gone."""
    parent = os.getppid()

    def step(count: int, total: int) -> None:
        if done is None:
            print(count, flush=True)
            return
        done.value = count
        if os.getppid() != parent:
            os._exit(1)

    folder.mkdir()
    growing = Growing(folder)
    fill(growing, ledger, which, template, step)
    growing.close()


if __name__ == "__main__":
    sys.exit(main())
