"""Hub data sets over real HTTP: configurations, splits, files, revisions, a look before the fetch, the cache."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Refused, good
from hub_server import Hub, serving
from test_data import as_parquet

from core.data_hub import HubRows, fetch, first_rows, here, listing
from core.errors import FinetuiError
from core.hub import hub_status, offline_unless_reachable
from core.plan import DataPlan
from core.sources import data_sources


def jsonl(*rows: Any) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


CARD = """---
configs:
- config_name: easy
  default: true
  data_files:
  - split: train
    path: easy/part-*.jsonl
  - split: test
    path: [easy/held.jsonl]
- config_name: hard
  data_files: hard.jsonl
---
# A card
"""
REPOSITORIES: dict[str, Any] = {
    "us/one": {"main": {"rows.jsonl": jsonl(good("only")), "README.md": b"# plain", "LICENSE.txt": b"MIT"}},
    "us/card": {"main": {
        "README.md": CARD.encode(), "easy/part-0.jsonl": jsonl(good("e0")), "easy/part-1.jsonl": jsonl(good("e1")),
        "easy/held.jsonl": jsonl(good("held")), "hard.jsonl": jsonl(good("h"))},
        "v2": {"README.md": b"", "train.jsonl": jsonl(good("second version"))}},
    "us/names": {"main": {"data/train-00000-of-00002.parquet": as_parquet([good("t0", True)]),
                          "data/train-00001-of-00002.parquet": as_parquet([good("t1", True)]),
                          "data/test-00000-of-00001.parquet": as_parquet([good("x", True)])}},
    "us/folders": {"main": {"de/train.csv": b"prompt,completion\nHallo,Ja\n",
                            "fr/train.csv": b"prompt,completion\nA,B\n",
                            "fr/dev.csv": b"prompt,completion\nC,D\n"}},
    "us/large": {"main": {"train.jsonl": jsonl(*[good(f"row {n} " * 100) for n in range(4000)])}},
    "us/none": {"main": {"README.md": b"nothing here", "picture.png": b"\x89PNG"}},
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub that serves the repositories, and a cache of its own."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with serving(REPOSITORIES) as (found, address):
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield found


def prompts(paths: list[Path]) -> list[str]:
    from core.data import read_rows

    return [row.messages[0]["content"] for path in paths for row in read_rows(path, "sft").used]


@pytest.mark.parametrize(
    ("wanted", "files"),
    [
        (HubRows("us/one"), ["rows.jsonl"]),
        (HubRows("us/card", config="easy"), ["easy/part-0.jsonl", "easy/part-1.jsonl"]),
        (HubRows("us/card", config="easy", split="test"), ["easy/held.jsonl"]),
        (HubRows("us/card", config="hard"), ["hard.jsonl"]),
        (HubRows("us/card", revision="v2"), ["train.jsonl"]),
        (HubRows("us/card", file="easy/part-*"), ["easy/part-0.jsonl", "easy/part-1.jsonl"]),
        (HubRows("us/names"), ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]),
        (HubRows("us/names", split="test"), ["data/test-00000-of-00001.parquet"]),
        (HubRows("us/folders", config="fr", split="validation"), ["fr/dev.csv"]),
    ],
)
def test_the_files_that_are_wanted_are_found(hub: Hub, wanted: HubRows, files: list[str]) -> None:
    found = listing(wanted)
    assert found["chosen"] == files and found["where"] == "the Hub"
    repository = REPOSITORIES[wanted.dataset][wanted.revision or "main"]
    assert found["bytes"] == sum(len(repository[name]) for name in files)


@pytest.mark.parametrize(
    ("wanted", "says", "advice"),
    [
        (HubRows("us/card"), "has 2 configurations", "--dataset-config: easy, hard"),
        (HubRows("us/card", config="odd"), "no configuration 'odd'", "easy, hard"),
        (HubRows("us/card", config="easy", split="dev"), "no split 'dev'", "--dataset-split: train, test"),
        (HubRows("us/card", file="x.jsonl"), "no file 'x.jsonl'", "It has easy/held.jsonl"),
        (HubRows("us/none"), "no readable data file", "JSONL"),
        (HubRows("us/nowhere"), "there is no such repository", "HF_TOKEN"),
        (HubRows("us/one", revision="v9"), "there is no such revision", ""),
        (HubRows("nonsense"), "cannot be fetched", ""),
    ],
)
def test_what_is_not_there_is_refused_with_what_there_is(hub: Hub, wanted: HubRows, says: str, advice: str) -> None:
    with pytest.raises(FinetuiError) as caught:
        listing(wanted)
    assert says in caught.value.message and advice in caught.value.advice


def test_files_are_fetched_once_and_found_again_without_a_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DataPlan(dataset="us/card", dataset_config="easy")
    assert prompts([path for path, _ in data_sources(data, "sft", print)]) == ["e0", "e1"]
    asked = len(hub.asked)
    assert prompts([path for path, _ in data_sources(data, "sft", print)]) == ["e0", "e1"]
    assert len(hub.asked) == asked, "the second time nobody is asked"
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert prompts(here(HubRows.of(data))) == ["e0", "e1"]
    assert listing(HubRows.of(data))["where"] == "the cache"
    with pytest.raises(FinetuiError, match="cannot be fetched"):
        fetch(HubRows("us/one"), print)


def test_half_a_set_in_the_cache_is_not_taken_for_the_whole(hub: Hub) -> None:
    import huggingface_hub

    huggingface_hub.hf_hub_download("us/names", "data/train-00000-of-00002.parquet", repo_type="dataset",
                                    endpoint=__import__("os").environ["HF_ENDPOINT"])  # fmt: skip
    assert here(HubRows("us/names")) == []
    assert prompts(fetch(HubRows("us/names"), print)) == ["t0", "t1"]
    assert len(here(HubRows("us/names"))) == 2


@pytest.mark.parametrize("name", ["us/large", "us/names", "us/folders"])
def test_the_first_rows_are_seen_before_anything_is_fetched(hub: Hub, name: str) -> None:
    config = "de" if name == "us/folders" else None
    rows = first_rows(HubRows(name, config=config), 3)
    whole = sum(len(content) for content in REPOSITORIES[name]["main"].values())
    assert rows and hub.given <= max(1 << 20, whole)
    if name == "us/large":
        assert [row["conversations"][0]["content"][:5] for row in rows] == ["row 0", "row 1", "row 2"]
        assert hub.given < whole / 2
    assert here(HubRows(name, config=config)) == []


def test_the_command_shows_what_a_data_set_offers(said: Callable[..., str], refused: Refused, hub: Hub) -> None:
    shown = said("data", "look", "us/card", "--dataset-config", "easy")
    assert "easy: train (2 files), test (1 file)" in shown and "hard: train (1 file)" in shown
    assert "chosen: easy/part-0.jsonl, easy/part-1.jsonl" in shown and '"e0"' in shown
    found = json.loads(said("data", "look", "us/one", "--json"))
    assert found["configs"] == {"default": {"train": ["rows.jsonl"]}} and found["rows"] == [good("only")]
    assert "has 2 configurations" in refused("data", "look", "us/card")


def test_a_private_set_needs_its_token_and_no_token_is_shown(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_secret"
    with pytest.raises(FinetuiError, match="private") as caught:
        listing(HubRows("us/one"))
    assert "hf_secret" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert prompts(fetch(HubRows("us/one"), print)) == ["only"]


def test_a_look_of_the_app_offers_the_set_and_fetches_it_when_asked(hub: Hub) -> None:
    def asked(**request: Any) -> list[dict[str, Any]]:
        words = {"stage": "sft", "data": {"dataset": "us/card", "dataset_config": "hard"}, **request}
        done = subprocess.run([sys.executable, "-P", "-m", "core.data_look"], input=json.dumps(words) + "\n",
                              capture_output=True, text=True, check=True)  # fmt: skip
        return [json.loads(line) for line in done.stdout.splitlines()]

    offer = asked(fetch=False)[-1]["hub"]
    assert offer["shapes"] == {"messages": 1} and offer["columns"] == ["conversations"] and '"h"' in offer["rows"][0]
    assert asked(fetch=True)[-1]["report"]["usable"] == 1
    assert asked(fetch=False)[-1]["report"]["usable"] == 1, "once it is here it is looked at as any file"
    words = {"stage": "sft", "data": {"dataset": "us/nowhere"}, "fetch": False}
    assert "no such repository" in asked(**words)[-1]["error"]


@pytest.mark.parametrize(
    "card",
    [
        "---\n: [\n---", "---\nconfigs: 3\n---", "---\nconfigs: [{config_name: [1]}]\n---", "---", "",
        "---\nconfigs: [{config_name: a, data_files: [{path: 5}]}]\n---",
    ],
)  # fmt: skip
def test_a_card_that_makes_no_sense_is_passed_over(hub: Hub, card: str) -> None:
    hub.repositories = {"us/odd": {"main": {"README.md": card.encode(), "train.jsonl": jsonl(good("a"))}}}
    assert listing(HubRows("us/odd"))["chosen"] == ["train.jsonl"]


def test_a_hub_that_gives_no_answer_is_asked_once_and_the_cache_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with serving(REPOSITORIES) as (_, address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        assert hub_status("api/datasets/us/one") == 200
        assert hub_status() == 404
        offline_unless_reachable()
        assert not constants.HF_HUB_OFFLINE
    assert hub_status() is None
    offline_unless_reachable()
    assert constants.is_offline_mode()
