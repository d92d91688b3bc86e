"""Records real failures of the tiny model as event logs: ``python tests/faults/record.py FOLDER`` (a minute, no GPU).

What needs a GPU is not made here: those logs in ``tests/faults/failures`` carry PyTorch's and the driver's own words.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

from harness import Place, until  # noqa: E402

from core import runner  # noqa: E402
from core.runs import Run, is_alive  # noqa: E402


def killed(place: Place, name: str, number: int, *, runner_too: bool = False) -> Run:
    run = place.run("sft", name=name, sft__max_steps=400, sft__save_steps=5)
    runner.start(run)
    until(lambda: run.state().stage("sft").checkpoints)
    state = run.state()
    if runner_too:
        os.kill(state.start["pid"], signal.SIGKILL)
    os.kill(state.stage("sft").pid or 0, number)
    until(lambda: not is_alive(run))
    return run


def started(run: Run) -> Run:
    runner.start(run)
    until(lambda: not is_alive(run))
    return run


def failures(place: Place) -> Iterator[Run]:
    """One run a kind of failure."""
    yield killed(place, "killed", signal.SIGKILL)
    yield killed(place, "native-crash", signal.SIGSEGV)
    yield killed(place, "signalled", signal.SIGQUIT)
    yield killed(place, "vanished", signal.SIGKILL, runner_too=True)
    broken = place.folder / "broken-model"
    shutil.copytree(place.model, broken, dirs_exist_ok=True)
    run = place.run("sft", name="model-damaged", model__name=str(broken))
    (broken / "model.safetensors").write_bytes((place.model / "model.safetensors").read_bytes()[:1000])
    yield started(run)
    run = place.run("sft", name="not-finite", sft__max_steps=60, sft__save_steps=4)
    with place.sitecustomize("import torch, torch.nn.utils as u; real = u.clip_grad_norm_; n = [0]\n"
                             "def clip(p, *a, **k):\n"
                             "    p = list(p); n[0] += 1\n"
                             "    [q.grad.fill_(float('nan')) for q in p if q.grad is not None and n[0] > 9]\n"
                             "    return real(p, *a, **k)\n"
                             "u.clip_grad_norm_ = clip\n"):  # fmt: skip
        yield started(run)
    run = place.run("sft", name="package")
    with place.sitecustomize("import sys; sys.modules['trl'] = None\n"):
        yield started(run)
    run = place.run("sft", name="memory")
    with place.sitecustomize(
        "import resource, sys\n"
        "if 'core.train' in sys.orig_argv: resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "import transformers.trainer as t\n"
        "def step(*a, **k):\n"
        "    import torch; torch.ones(4 << 30, dtype=torch.uint8)\n"
        "if 'core.train' in sys.orig_argv: t.Trainer.training_step = step\n"
    ):  # fmt: skip
        yield started(run)
    run = killed(place, "rows-changed", signal.SIGKILL)
    place.rows.write_text(place.rows.read_text().replace("timer", "clock"))
    yield started(run)


def main(target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    with Place() as place:
        for run in failures(place):
            lines = [json.loads(line) for line in run.events_path.read_text().splitlines()]
            for line in lines:
                line.pop("boot", None)  # elsewhere, every recording would be of a machine that was restarted
            text = "".join(json.dumps(line) + "\n" for line in lines if line["kind"] != "phase")
            (target / f"{run.name}.jsonl").write_text(
                text.replace(str(place.folder), "/home/you").replace(str(HERE.parents[1]), "/home/you/finetui")
            )
            print(run.name, subprocess.run(
                [sys.executable, "-P", "-m", "core.cli", "show", run.name, "--runs-dir", str(run.path.parent)],
                capture_output=True, text=True, check=False).stdout)  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
