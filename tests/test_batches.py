"""KTO's batches: every row once, both labels everywhere the counts allow, and no row beside its own prompt."""

from collections import Counter

import pytest
from conftest import SHARED_DATA
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from core.batches import batch_sizes, kto_batches, padding, repeats
from core.data import read_rows

# Hypothesis itself throws away what it drew where an epoch grows large, and counts that as filtering.
EPOCHS = settings(max_examples=150, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])


@st.composite
def epochs(draw: st.DrawFn) -> tuple[list[bool], list[int], int, int]:
    """Labels, prompts, batch size and seed of an epoch of 2 to 60 rows."""
    count = draw(st.integers(2, 60))
    share, kinds = draw(st.integers(0, 10)), draw(st.integers(1, count))
    marks = draw(st.lists(st.integers(1, 10), min_size=count, max_size=count))
    prompts = draw(st.lists(st.integers(1, kinds), min_size=count, max_size=count))
    return [mark <= share for mark in marks], prompts, draw(st.integers(2, 9)), draw(st.integers(0, 999))


def good(batch: list[int], labels: list[bool]) -> int:
    return sum(labels[index] for index in batch)


@given(st.integers(1, 500), st.integers(2, 64))
def test_batches_are_full_but_one_and_none_holds_a_single_row(rows: int, batch_size: int) -> None:
    sizes = batch_sizes(rows, batch_size)
    assert sum(sizes) == rows
    assert sizes[:-1] == [batch_size] * (len(sizes) - 1)
    assert sizes[-1] <= batch_size + 1 and (sizes[-1] >= 2 or rows == 1)


@EPOCHS
@given(epochs())
def test_every_row_stands_in_one_batch_and_no_batch_has_one_row(epoch: tuple[list[bool], list[int], int, int]) -> None:
    labels, prompts, batch_size, seed = epoch
    batches = kto_batches(labels, prompts, batch_size, seed)
    assert sorted(index for batch in batches for index in batch) == list(range(len(labels)))
    assert sorted(len(batch) for batch in batches) == sorted(batch_sizes(len(labels), batch_size))
    assert min(len(batch) for batch in batches) >= 2


@EPOCHS
@given(epochs())
def test_both_labels_are_spread_as_evenly_as_their_counts_allow(epoch: tuple[list[bool], list[int], int, int]) -> None:
    labels, prompts, batch_size, seed = epoch
    batches = kto_batches(labels, prompts, batch_size, seed)
    share = sum(labels) / len(labels)
    for batch in batches:
        assert abs(good(batch, labels) - share * len(batch)) <= 1
    one_class = sum(good(batch, labels) in (0, len(batch)) for batch in batches)
    rarer = min(sum(labels), len(labels) - sum(labels))
    assert one_class == max(len(batches) - rarer, 0), "a batch of one label although the other had rows left"


def test_a_short_last_batch_gets_a_row_of_the_rarer_label_when_there_is_one_to_spare() -> None:
    labels = [number % 6 != 0 or number > 12 for number in range(19)]
    assert labels.count(False) == 3
    batches = kto_batches(labels, list(range(19)), 8, 1)
    assert sorted(len(batch) for batch in batches) == [3, 8, 8]
    assert [len(batch) - good(batch, labels) for batch in batches] == [1, 1, 1]


@EPOCHS
@given(epochs())
def test_no_row_stands_beside_a_row_with_its_prompt(epoch: tuple[list[bool], list[int], int, int]) -> None:
    labels, prompts, batch_size, seed = epoch
    batches = kto_batches(labels, prompts, batch_size, seed)
    for batch in batches:
        most = max(Counter(prompts[index] for index in batch).values())
        if 2 * most <= len(batch):
            assert repeats(batch, prompts) == 0, "the batch's rows had an order without repeats"
    assume(2 * max(Counter(prompts).values()) <= len(batches))
    assert sum(repeats(batch, prompts) for batch in batches) == 0, "the rows had batches without repeats"


def test_neighbours_are_counted_around_the_batch_as_trl_pairs_them() -> None:
    assert repeats([0, 1, 2], ["a", "b", "a"]) == 1
    assert repeats([0, 1], ["a", "a"]) == 2
    assert repeats([0, 1, 2, 3], ["a", "b", "a", "b"]) == 0


@pytest.mark.parametrize("batch_size", [2, 4, 6])
def test_a_good_and_a_bad_answer_to_each_prompt_are_kept_apart(batch_size: int) -> None:
    """The shape of preference pairs: every prompt twice, once with each label."""
    labels, prompts = [number % 2 == 0 for number in range(24)], [number // 2 for number in range(24)]
    for epoch in range(20):
        batches = kto_batches(labels, prompts, batch_size, 1, epoch)
        assert sum(repeats(batch, prompts) for batch in batches) == 0
        assert all(good(batch, labels) == batch_size // 2 for batch in batches)


def test_rows_of_one_prompt_alone_are_batched_all_the_same() -> None:
    batches = kto_batches([True, False] * 500, ["same"] * 1000, 8, 1)
    assert sorted(index for batch in batches for index in batch) == list(range(1000))
    assert all(good(batch, [True, False] * 500) == 4 for batch in batches)


@settings(max_examples=50)
@given(epochs(), st.integers(0, 5))
def test_the_order_is_the_same_for_a_seed_and_an_epoch(
    epoch: tuple[list[bool], list[int], int, int], number: int
) -> None:
    assert kto_batches(*epoch, number) == kto_batches(*epoch, number)


def test_another_epoch_or_seed_brings_another_order() -> None:
    labels, prompts = [number % 3 == 0 for number in range(40)], list(range(40))
    orders = [kto_batches(labels, prompts, 4, seed, epoch) for seed in (1, 2) for epoch in (0, 1, 2)]
    assert len({str(order) for order in orders}) == 6
    together = [{frozenset(batch) for batch in order} for order in orders]
    assert together[0] != together[1], "the same rows would meet in every epoch"


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the shared data is not here")
@pytest.mark.parametrize("batch_size", [2, 4, 8, 16])
def test_the_real_file_with_766_doubly_labelled_prompts_is_batched_without_repeats(batch_size: int) -> None:
    rows = read_rows(SHARED_DATA / "behaviour_kto.jsonl", "kto").used
    labels, prompts = [bool(row.label) for row in rows], [row.prompt_key for row in rows]
    assert len(prompts) - len(set(prompts)) >= 766
    for epoch in range(2):
        batches = kto_batches(labels, prompts, batch_size, 42, epoch)
        assert sum(repeats(batch, prompts) for batch in batches) == 0
        one_class = sum(good(batch, labels) in (0, len(batch)) for batch in batches)
        assert one_class == max(len(batches) - labels.count(False), 0)


@EPOCHS
@given(epochs(), st.integers(2, 5), st.integers(2, 4), st.booleans())
def test_a_step_holds_the_same_rows_however_many_micro_batches_it_goes_through(
    epoch: tuple[list[bool], list[int], int, int], size: int, parts: int, with_lengths: bool
) -> None:
    labels, prompts, _, seed = epoch
    assume(len(labels) > 1)
    lengths = [7 + 13 * (prompt % 5) for prompt in prompts] if with_lengths else None
    step = size * parts
    fine = kto_batches(labels, prompts, step, seed, lengths=lengths, parts=parts)
    coarse = kto_batches(labels, prompts, step, seed, lengths=lengths, parts=1)
    assert sorted(row for batch in fine for row in batch) == list(range(len(labels)))
    assert min(len(batch) for batch in fine) >= 2 and max(len(batch) for batch in fine) <= size + 1
    whole = len(labels) // step
    steps = [sorted(row for batch in fine[at : at + parts] for row in batch) for at in range(0, whole * parts, parts)]
    assert {*map(tuple, steps)} <= {tuple(sorted(batch)) for batch in coarse}
    assert -(-len(fine) // parts) == len(coarse)  # so many optimiser steps an epoch


def test_rows_of_like_length_share_a_step_where_padding_is_much_and_only_there() -> None:
    labels = [number % 2 == 0 for number in range(200)]
    prompts = list(range(200))
    uneven = [20 + (number * 37) % 400 for number in range(200)]
    even = [100 + number % 7 for number in range(200)]

    def wasted(lengths: list[int], batches: list[list[int]]) -> float:
        whole = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
        return 1 - sum(lengths) / whole

    assert padding(uneven, 8, 1) > 0.25 > padding(even, 8, 1)
    assert wasted(uneven, kto_batches(labels, prompts, 8, 1)) > 0.3
    assert wasted(uneven, kto_batches(labels, prompts, 8, 1, lengths=uneven)) < 0.12
    assert kto_batches(labels, prompts, 8, 1, lengths=even) == kto_batches(labels, prompts, 8, 1)
    first, second = (kto_batches(labels, prompts, 8, 1, epoch, lengths=uneven) for epoch in (0, 1))
    assert {*map(frozenset, first)} != {*map(frozenset, second)}, "the same rows together in every epoch"
    halves = kto_batches(labels, prompts, 16, 1, lengths=uneven, parts=2)
    assert wasted(uneven, halves) < 0.12 and all(0 < good(batch, labels) < 8 for batch in halves)
