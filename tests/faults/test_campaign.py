"""The campaign, short: one run whose viewers die, one that is killed itself. The long one is a command, campaign.py."""

import subprocess
import sys
from pathlib import Path

import pytest
from campaign import Campaign, table
from clock_jumps import COMPILER
from clock_jumps import campaign as jumps
from clock_jumps import table as clock_table
from harness import Place

CAMPAIGN = Path(__file__).with_name("campaign.py")


def test_viewers_that_die_and_a_kill_leave_the_losses_of_an_unbroken_run(tmp_path: Path, tiny_model: Path) -> None:
    with Place(tmp_path, tiny_model) as place:
        campaign = Campaign(place, seed=5)
        campaign.method, campaign.moments_of_plain = "sft", ("loading", "a step", "writing a checkpoint")
        campaign.kill_viewers(3, at_once=3)
        campaign.break_run(1)
    assert [trial for trial in campaign.trials if trial.wrong] == [], table(campaign.trials)
    assert sum(bool(trial.terminal) for trial in campaign.trials) == 3 and len(campaign.trials) >= 4


@pytest.mark.slow
def test_the_long_campaign_breaks_no_promise() -> None:
    words = [sys.executable, "-P", str(CAMPAIGN), "--seed", "7", "--kills", "50", "--viewers", "100",
             "--stop-seconds", "60"]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, timeout=7200, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="needs Linux and a C compiler")
def test_a_clock_that_jumps_under_real_runs_changes_nothing_that_is_told(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUI_CACHE", str(tmp_path / "cache"))
    with Place(tmp_path, tiny_model) as place:
        trials = jumps(place)
    assert [trial for trial in trials if trial.wrong] == [], clock_table(trials)
