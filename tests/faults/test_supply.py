"""What set-up installs: every package of the lock has a hash, covers what finetui needs, and is what was tried."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
LOCK = (ROOT / "requirements-cpu.lock").read_text(encoding="utf-8")
PACKAGES = re.split(r"^(?=[a-z])", LOCK, flags=re.MULTILINE)[1:]


def locked() -> dict[str, str]:
    pairs = [re.match(r"([\w.-]+)==([^\s;\\]+)", package) for package in PACKAGES]
    return {pair[1].lower(): pair[2] for pair in pairs if pair}


def test_every_package_of_the_lock_has_hashes_and_no_other_source() -> None:
    assert len(PACKAGES) > 60
    assert all("--hash=sha256:" in package for package in PACKAGES)
    assert not re.search(r"^-|://|@ ", LOCK, flags=re.MULTILINE)


def test_the_lock_covers_what_the_project_needs_and_fits_its_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = locked()
    for wanted in map(Requirement, project["dependencies"]):
        if wanted.name != "torch":
            assert found[wanted.name.lower()] in wanted.specifier, wanted


def test_what_is_installed_here_is_what_is_locked() -> None:
    other = {}
    for name, wanted in locked().items():
        try:
            if version(name) != wanted:
                other[name] = (version(name), wanted)
        except PackageNotFoundError:
            continue  # for another platform
    assert len(other) < 5, other  # numpy and networkx have a version for each Python


def test_set_up_uses_the_lock_and_checks_hashes() -> None:
    script = (ROOT / "setup.sh").read_text(encoding="utf-8")
    assert "--require-hashes --no-deps -r requirements-cpu.lock" in script and "install_locked" in script


def test_children_are_told_to_report_nothing() -> None:
    from core.children import CHILD_ENV

    assert CHILD_ENV["HF_HUB_DISABLE_TELEMETRY"] == "1" and CHILD_ENV["DO_NOT_TRACK"] == "1"
