"""A place for real runs of the tiny model: what the recordings and the campaign stand on."""

import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conftest import build_tiny_model, default_rows

from core.backend import settle
from core.config import resolve
from core.runs import Run, create_run, is_alive

ROOT = Path(__file__).resolve().parents[2]


class Place:
    """A temporary folder with the tiny model, rows and runs; as a context it ends what still runs and removes it."""

    def __init__(self, folder: Path | None = None, model: Path | None = None) -> None:
        self.own = folder is None
        self.folder = folder or Path(tempfile.mkdtemp(prefix="finetui-faults-"))
        self.model = model or build_tiny_model(self.folder / "tiny-llama")
        self.rows = self.folder / "rows.jsonl"
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in default_rows()))
        self.runs: list[Run] = []
        os.environ["PYTHONPATH"] = str(ROOT)
        os.environ.setdefault("OMP_NUM_THREADS", "1")

    def __enter__(self) -> "Place":
        return self

    def __exit__(self, *_: object) -> None:
        for run in self.runs:
            end(run)
        if self.own:
            shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, method: str, folder: Path | None = None, **settings: Any) -> Run:
        """A run that was not started; `sft__max_steps=3` sets a key of the plan."""
        values: dict[str, Any] = {"model.name": str(self.model), "lora.r": 8, "device": "cpu"}
        for stage in method.split("-"):
            values |= {
                f"{stage}.data.file": str(self.rows), f"{stage}.data.demo": False, f"{stage}.max_steps": 30,
                f"{stage}.logging_steps": 1, f"{stage}.save_steps": 5, f"{stage}.learning_rate": 2e-3,
                f"{stage}.batch_size": 4,
            }  # fmt: skip
        values |= {key.replace("__", "."): value for key, value in settings.items()}
        plan = resolve(method, None, {key: (value, "test") for key, value in values.items()}, gpu_present=False)
        self.runs.append(create_run(folder or self.folder / "runs", settle(plan)))
        return self.runs[-1]

    @contextmanager
    def sitecustomize(self, code: str) -> Iterator[None]:
        """Every Python that is started meanwhile runs `code` first: a fault inside a real trainer."""
        folder = self.folder / "site"
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(code)
        before = os.environ.get("PYTHONPATH", "")
        os.environ["PYTHONPATH"] = f"{folder}{os.pathsep}{before}"
        try:
            yield
        finally:
            os.environ["PYTHONPATH"] = before


def until(condition: Callable[[], Any], limit_s: float = 120) -> Any:
    """Wait for `condition` to hold and return what it returned."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.005)
    raise AssertionError(f"not within {limit_s} s: {condition}")


def end(run: Run) -> None:
    """Kill what is left of a run."""
    if not run.path.exists() or not is_alive(run):
        return
    state = run.state()
    for pid in [state.start.get("pid"), *(stage.pid for stage in state.stages)]:
        if pid:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
    until(lambda: not is_alive(run), 30)


def losses(run: Run, stage: str) -> dict[int, float]:
    """Loss by step."""
    return {step: value for step, value in run.state().stage(stage).series.get("loss", []) if value is not None}


def events(run: Run) -> list[dict[str, Any]]:
    found = []
    for line in run.events_path.read_text(errors="replace").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
