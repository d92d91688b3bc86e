"""Damaged files: some through checker and wizard each time, the campaigns with ``-m slow`` or by tests/fuzz/*.py."""

import sys
from collections import Counter
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent / "fuzz"
sys.path.insert(0, str(FUZZ))

import data_fuzz  # noqa: E402
import wizard_fuzz  # noqa: E402
from mutate import Sample, sample  # noqa: E402

SEEDS = sorted((FUZZ / "seeds").glob("*"))


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FINETUI_CACHE", str(tmp_path / "cache"))


def problems(samples: list[Sample], folder: Path) -> tuple[list[str], Counter[str]]:
    outcomes: Counter[str] = Counter()
    found = [f"{made.name}: {problem}" for made in samples if (problem := data_fuzz.problem_of(made, folder, outcomes))]
    return found, outcomes


@pytest.mark.parametrize("first", (0, 100))
def test_damaged_files_raise_nothing_and_every_row_is_accounted_for(tmp_path: Path, first: int) -> None:
    found, outcomes = problems([sample(seed) for seed in range(first, first + 100)], tmp_path)
    assert found == []
    assert min(outcomes["used"], outcomes["refused"]) > 20, "the samples are neither all sound nor all lost"


@pytest.mark.parametrize("path", SEEDS, ids=lambda path: path.name)
def test_files_that_once_found_something_find_nothing_now(tmp_path: Path, path: Path) -> None:
    assert problems([Sample(path.name, path.read_bytes())], tmp_path)[0] == []


async def test_damaged_files_do_no_harm_in_the_wizard(tmp_path: Path, tiny_model: Path) -> None:
    samples = [sample(seed) for seed in range(700, 703)]
    outcomes = await wizard_fuzz.campaign(samples, tiny_model, tmp_path)
    assert not outcomes["PROBLEM"] and outcomes.total() == len(samples)


@pytest.mark.slow
def test_ten_thousand_damaged_files(tmp_path: Path) -> None:
    assert data_fuzz.run(10_000, 20_000, None)["PROBLEM"] == 0


@pytest.mark.slow
async def test_three_hundred_damaged_files_in_the_wizard(tmp_path: Path, tiny_model: Path) -> None:
    outcomes = await wizard_fuzz.campaign([sample(seed) for seed in range(5000, 5300)], tiny_model, tmp_path)
    assert not outcomes["PROBLEM"] and outcomes.total() == 300
