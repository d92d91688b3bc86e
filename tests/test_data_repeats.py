"""Near duplicates: what says almost the same is found, what does not is not, wherever the pieces end."""

import random
from pathlib import Path

import numpy
import pytest
from conftest import WriteFile, good

from core import data_repeats
from core.data_repeats import BINS, Signer, groups_of, near_duplicates, text_of
from core.data_survey import survey

WORDS = [f"{a}{b}" for a in "kltrsm" for b in ("ano", "imu", "erat", "olin", "usta", "epa", "ivo", "andel")]


def text(words: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def changed(words: str, share: float, seed: int) -> str:
    """The same text with a share of its words replaced."""
    chance = random.Random(seed)
    return " ".join("other" if chance.random() < share else word for word in words.split())


def jaccard(one: str, other: str) -> float:
    sets = [{tuple(words[at : at + 3]) for at in range(len(words) - 2)} for words in (one.split(), other.split())]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_the_share_of_equal_bins_estimates_the_jaccard_similarity() -> None:
    signer = Signer()
    for share in (0.0, 0.01, 0.03, 0.1, 0.5):
        found, true = [], []
        for seed in range(60):
            one = text(120, seed)
            other = changed(one, share, seed + 1000)
            signed = signer.sign([one.encode(), other.encode()])
            found.append((signed[0] == signed[1]).mean())
            true.append(jaccard(one, other))
        assert numpy.mean(found) == pytest.approx(numpy.mean(true), abs=0.05), share


def test_signatures_do_not_depend_on_what_else_is_signed_case_or_blanks() -> None:
    texts = [text(n, n).encode() for n in (3, 9, 40, 300, 5000)]
    together = Signer().sign(texts)
    for number, words in enumerate(texts):
        assert (Signer().sign([words])[0] == together[number]).all()
        assert (Signer().sign([b"  " + words.upper().replace(b" ", b"\n\t ") + b" "])[0] == together[number]).all()
    assert not together[0].any() and together[1:].any(axis=1).all(), "a text of three words is alike by chance"


def test_near_duplicates_are_grouped_and_strangers_left_alone(file: WriteFile) -> None:
    base = [text(80, seed) for seed in range(40)]
    rows = [good(words, answer="yes") for words in base]
    rows += [good(f"other {words.split(' ', 1)[1]}", answer="yes") for words in base[:7]]
    rows += [good(f"{base[20]} and", answer="yes"), good("short one", answer="yes"), good("short one", answer="yes")]
    found = near_duplicates(survey(file(rows))).members()
    assert found[20] == [20, 47]
    assert {first: members for first, members in found.items() if first < 7} == {n: [n, 40 + n] for n in range(7)}
    assert len(found) == 8


def test_a_shared_system_prompt_makes_no_duplicates_and_tool_calls_count(file: WriteFile) -> None:
    system = {"role": "system", "content": text(400, 1)}
    call = {"role": "assistant", "content": None, "tool_calls": [
        {"function": {"name": "lay_table", "arguments": {"what": text(60, 5)}}}]}  # fmt: skip
    answer = {"role": "assistant", "content": "ok"}
    rows = [{"messages": [system, {"role": "user", "content": text(30, n + 50)}, answer]} for n in range(5)]
    rows += [{"messages": [{"role": "user", "content": word}, call]} for word in ("now", "today")]
    assert list(near_duplicates(survey(file(rows))).members().values()) == [[5, 6]]
    assert "lay_table" in text_of([call])


def test_groups_reach_over_steps_and_start_with_the_first() -> None:
    signatures = numpy.zeros((4, BINS), "u2")
    signatures[:3] = numpy.arange(1, BINS + 1)
    signatures[1, :5] += 100
    signatures[2, :5] += 100
    signatures[2, -5:] += 200
    assert groups_of(signatures).tolist() == [0, 0, 0, 3]


def test_workers_sign_what_one_process_signs(file: WriteFile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FINETUI_CACHE", str(tmp_path / "cache"))
    rows = [good(text(50, n % 60), answer="yes") for n in range(150)]
    found = survey(file(rows))
    alone = near_duplicates(found)
    monkeypatch.setattr(data_repeats, "WORKERS_FROM", 1)
    monkeypatch.setattr("core.data_pieces.PIECE_BYTES", 5000)
    steps: list[tuple[int, int]] = []
    together = near_duplicates(found, lambda done, total: steps.append((done, total)), workers=2)
    assert (alone.group == together.group).all() and len(alone.members()) == 60
    assert steps[-1] == (found.size, found.size)
