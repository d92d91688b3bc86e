"""Writes requirements-cpu.lock: every package of the CPU install with its version and hashes, as installed in .venv.

    pip install uv && python tests/bench/lock.py

PyTorch and its CUDA packages are left out: setup.sh brings the small CPU build from an index of its own, whose files
have other hashes. Everything else is what was tried together here.
"""

import re
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements-cpu.lock"
LEFT_OUT = re.compile(r"^(torch|triton|cuda-\w+|nvidia-(?!ml-py)[\w-]+)==")
HEAD = "# Made by tests/bench/lock.py; setup.sh installs this for the CPU with --require-hashes, after torch.\n"


def main() -> None:
    tried = [f"{one.name}=={one.version.split('+')[0]}" for one in distributions() if one.name.lower() != "finetui"]
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("\n".join(tried))
        words = ["uv", "pip", "compile", str(ROOT / "pyproject.toml"), "-c", str(constraints)]
        words += ["--python-version", "3.11", "--universal", "--generate-hashes", "--no-header", "--no-annotate", "-q"]
        made = subprocess.run(words, capture_output=True, text=True, check=False)
    if made.returncode:
        sys.exit(made.stderr)
    packages = re.split(r"^(?=\S)", made.stdout, flags=re.MULTILINE)
    kept = [one for one in packages if one.strip() and not LEFT_OUT.match(one)]
    LOCK.write_text(HEAD + "".join(kept), encoding="utf-8")
    print(f"{len(kept)} packages in {LOCK.name}")


if __name__ == "__main__":
    main()
