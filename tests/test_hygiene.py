"""What holds the parts apart and small (imports, lengths), and foreign text away from the terminal."""

import ast
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from core.text import clean, duration, number

ROOT = Path(__file__).resolve().parents[1]
CORE, TUI = sorted((ROOT / "core").glob("*.py")), sorted((ROOT / "tui").glob("*.py"))
TRAINING_STACK = {"torch", "transformers", "trl", "peft", "unsloth", "datasets", "accelerate"}
TRAINING_MODULES = {"train", "export", "evaluate"}


def loaded_after(statement: str) -> set[str]:
    """Top-level names in sys.modules of a fresh interpreter after `statement`."""
    code = f"import sys\n{statement}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, cwd="/")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every imported module of a file, and whether it is imported when the file is."""
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [f"core.{alias.name}" for alias in node.names] if node.module == "core" else [node.module]
        yield from ((name, id(node) not in inside) for name in names)


def test_these_tests_see_the_whole_core() -> None:
    assert len(CORE) >= 20 and {"cli.py", "train.py", "runner.py"} <= {path.name for path in CORE}


def test_no_module_of_core_needs_one_that_needs_it() -> None:
    known = {f"core.{path.stem}" for path in CORE}
    needs = {f"core.{path.stem}": {name for name, _ in imports(path)} & known for path in CORE}
    assert sum(map(len, needs.values())) > len(known)
    list(TopologicalSorter(needs).static_order())  # raises CycleError, which names the circle


def test_commands_runner_and_doctor_start_without_the_training_stack_and_without_the_app() -> None:
    loaded = loaded_after("import core.cli, core.commands, core.runner, core.doctor, core.prepare, core.watch")
    assert "core" in loaded and "pydantic" in loaded
    assert not loaded & {*TRAINING_STACK, "textual", "tui", "numpy", "pyarrow", "tokenizers"}


def test_the_runs_table_needs_no_training_stack(tmp_path: Path) -> None:
    loaded = loaded_after(f"from core.cli import main\nmain(['runs', '--json', '--runs-dir', '{tmp_path}'])")
    assert not loaded & {*TRAINING_STACK, "textual"}


def test_a_helps_text_needs_hardly_anything() -> None:
    loaded = loaded_after("from core.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass")
    assert not loaded & {*TRAINING_STACK, "textual", "rich", "psutil", "yaml"}


@pytest.mark.skipif(not TUI, reason="the app is not here")
def test_the_app_starts_without_the_training_stack() -> None:
    loaded = loaded_after("import tui.app")
    assert "textual" in loaded and not loaded & TRAINING_STACK


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_the_core_never_imports_the_app(path: Path) -> None:
    assert [name for name, _ in imports(path) if name.split(".")[0] in ("tui", "textual")] == []


@pytest.mark.parametrize("path", [*CORE, *TUI], ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_training_stack_is_imported_by_the_training_modules_only(path: Path) -> None:
    stack = {name for name, at_import in imports(path) if at_import and name.split(".")[0] in TRAINING_STACK}
    if path.parent.name == "core" and path.stem.split("_")[0] in TRAINING_MODULES:
        return
    assert stack == set()


@pytest.mark.parametrize("path", [*CORE, *TUI], ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_module_is_read_in_one_sitting_and_a_function_on_one_screen(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 500
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {name: length for name, length in lengths.items() if length > 70} == {}


def test_no_module_is_named_for_a_drawer() -> None:
    assert {path.stem for path in [*CORE, *TUI]} & {
        "utils",
        "util",
        "helpers",
        "services",
        "managers",
        "common",
        "misc",
    } == set()


# --- foreign text ---

BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
MARKS = set("\u200e\u200f\u061c\u200b\ufeff\u2028\u2029")
dangerous = st.sampled_from(
    ["\x1b[2J", "\x1b]52;c;eA==\x07", "\x9b31m", "\r", "\r\n", "\n", "\t", "\x7f", "\u202e", "\u2066", "\ud800"]
)
foreign = st.lists(st.text() | dangerous | st.characters(max_codepoint=0x20FF), max_size=12).map("".join)


@settings(max_examples=400)
@given(foreign, st.booleans())
@example(
    "".join(map(chr, [*range(0x300), *range(0x2000, 0x2100), *range(0xD7F0, 0xE010), *range(0xFE00, 0x10000)])), False
)
def test_no_character_that_acts_on_a_terminal_or_turns_text_around_survives(text: str, newlines: bool) -> None:
    shown = clean(text, 100_000, newlines=newlines)
    left = shown.replace("\n", "") if newlines else shown
    assert {unicodedata.category(letter) for letter in left} & {"Cc", "Cs", "Zl", "Zp"} == set()
    assert {unicodedata.bidirectional(letter) for letter in left} & BIDI == set()
    assert not set(left) & MARKS
    assert clean(shown, 100_000, newlines=newlines) == shown, "what is clean stays as it is"
    shown.encode()


def test_what_is_taken_out_stays_visible_and_what_is_harmless_stays() -> None:
    assert clean("a\x1b[31mb\r\nc\td\x7f\u202ee\x00") == "a␛[31mb⏎c  d␡�e␀"
    assert clean("a\nb", newlines=True) == "a\nb"
    assert clean("Grüße 日本 🙂👩‍💻 é [/x] {y}") == "Grüße 日本 🙂👩‍💻 é [/x] {y}"
    assert clean(None) == "None" and clean(5) == "5"


@given(st.text("ab\x1b", max_size=300), st.integers(1, 200))
def test_long_text_is_cut_and_says_by_how_much(text: str, limit: int) -> None:
    shown = clean(text, limit)
    if len(text) <= limit:
        assert len(shown) == len(text)
    else:
        assert shown.endswith(f" … ({len(text) - limit} more characters)")
        assert shown[:limit] == clean(text[:limit])


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (425, "7 min 05 s"), (3600, "1 h 00 min"),
     (11_520, "3 h 12 min"), (200_000, "2 d 7 h"), (None, "–"), (float("nan"), "–"), (-1, "–"), (float("inf"), "–")],
)  # fmt: skip
def test_durations_are_said_as_people_say_them(seconds: float | None, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.0, "0"),
        (1.23456, "1.235"),
        (2e-7, "2e-7"),
        (1234.5, "1,234"),
        (3e9, "3e9"),
        (None, "–"),
        (float("nan"), "–"),
    ],
)
def test_figures_are_short(value: float | None, words: str) -> None:
    assert number(value) == words
