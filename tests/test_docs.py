"""The README tells what the program does."""

import re
import subprocess
import sys
from pathlib import Path

from core.config import size_presets
from core.flags import build_parser
from core.plan import option_table

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_option_table_is_the_plans() -> None:
    written = README.split("<!-- options -->")[1].split("<!-- /options -->")[0].strip()
    assert written == option_table(), "run: python -m core.plan"


def test_every_command_of_the_readme_exists_and_every_command_is_in_it() -> None:
    actions = build_parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    known = set(actions or {})
    named = {word for group in re.findall(r"finetui ((?:[a-z-]+\|?)+)", README) for word in group.split("|")}
    named |= set(re.findall(r"\b(?:runs|show|watch|stop|abort|resume|delete)\b", README))
    assert known <= named, known - named
    assert {word for word in named if word in known} == known


def test_the_sizes_of_the_readme_are_the_presets() -> None:
    for size, preset in size_presets().items():
        row = next(line for line in README.splitlines() if line.startswith(f"| {size}"))
        lora, sft = preset["lora"], preset["sft"]
        assert preset["model"]["name"] in row and f"{lora['r']}/{lora['alpha']}" in row
        assert f"{sft['batch_size']} × {sft['gradient_accumulation_steps']}" in row


def test_setup_explains_its_options() -> None:
    said = subprocess.run(["bash", str(ROOT / "setup.sh"), "--help"], capture_output=True, text=True, check=True).stdout
    for flag in ("--quick", "--dev", "--gpu", "--cpu", "--with-flash-attn"):
        assert flag in said


def test_the_module_form_of_the_option_table_prints_it() -> None:
    said = subprocess.run([sys.executable, "-P", "-m", "core.plan"], capture_output=True, text=True, check=True).stdout
    assert said.strip() == option_table()
