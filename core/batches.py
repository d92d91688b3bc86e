"""The order of KTO's rows: which rows share a batch, and who is whose KL partner. No torch.

TRL estimates the KL term from mismatched pairs: the completion of a row's neighbour in the batch stands in for its own.
So a batch needs at least two rows, neighbours must not share a prompt, and a batch of one label gives no margin.
"""

import random
from collections import Counter, deque
from collections.abc import Hashable, Sequence


def batch_sizes(rows: int, batch_size: int) -> list[int]:
    """Sizes of the batches that hold `rows` rows, each row once: `batch_size` each, the last what is left.

    A remainder of one row would leave a batch without a KL partner: it is joined to the batch before it.
    """
    sizes = [batch_size] * (rows // batch_size)
    remainder = rows % batch_size
    if remainder == 1 and sizes:
        sizes[-1] += 1
    elif remainder:
        sizes.append(remainder)
    return sizes


def good_rows(sizes: Sequence[int], good: int) -> list[int]:
    """How many of `good` rows each batch gets: in proportion to its size, and both labels wherever the counts allow."""
    total, placed = sum(sizes), 0
    due = [0]
    for size in sizes:
        placed += size
        due.append((2 * good * placed + total) // (2 * total))
    counts = [after - before for before, after in zip(due, due[1:], strict=False)]
    for label in (True, False):
        held = [count if label else size - count for count, size in zip(counts, sizes, strict=True)]
        share = (good if label else total - good) / max(total, 1)
        # A short last batch may be due less than one row of a label that the others have to spare.
        for number in [number for number, size in enumerate(sizes) if not held[number] and size > 1]:
            giver = max(range(len(sizes)), key=lambda other: held[other] - share * sizes[other])
            if held[giver] < 2:
                break
            held[giver], held[number] = held[giver] - 1, 1
        counts = [count if label else size - count for count, size in zip(held, sizes, strict=True)]
    return counts


def kto_batches(
    labels: Sequence[bool], prompts: Sequence[Hashable], batch_size: int, seed: int, epoch: int = 0
) -> list[list[int]]:
    """Row indices of every batch of an epoch; each row stands in exactly one.

    Both labels are spread as evenly as their counts allow, and within a batch (taken as a ring, as TRL does)
    neighbours have different prompts wherever the batch's rows permit. `labels` and `prompts` have one entry a row.
    """
    chance = random.Random(f"{seed}-{epoch}")
    queues = {}
    for label in (True, False):
        members = [index for index, given in enumerate(labels) if given is label]
        chance.shuffle(members)
        queues[label] = deque(members)
    sizes = batch_sizes(len(labels), batch_size)
    batches: list[list[int]] = []
    for size, good in zip(sizes, good_rows(sizes, len(queues[True])), strict=True):
        batch: list[int] = []
        for label, count in ((True, good), (False, size - good)):
            batch.extend(_take(queues[label], count, [prompts[index] for index in batch], prompts))
        batches.append(batch)
    _part_repeats(batches, labels, prompts)
    batches = [_ring(batch, prompts) for batch in batches]
    chance.shuffle(batches)
    return batches


def _take(queue: deque[int], count: int, present: list[Hashable], prompts: Sequence[Hashable]) -> list[int]:
    """Take `count` rows from the front, passing over (a while) those whose prompt the batch has already."""
    taken: list[int] = []
    passed: list[int] = []
    seen = set(present)
    while len(taken) < count:
        if not queue or len(passed) > 64:
            taken.append(passed.pop(0))
        elif prompts[queue[0]] in seen:
            passed.append(queue.popleft())
        else:
            seen.add(prompts[queue[0]])
            taken.append(queue.popleft())
    queue.extendleft(reversed(passed))
    return taken


def _ring(batch: list[int], prompts: Sequence[Hashable]) -> list[int]:
    """The batch in an order in which ring neighbours have different prompts, where one exists.

    The rows of the most frequent prompt go to every second place, the others follow: the classical arrangement,
    which succeeds whenever no prompt has more than half of the rows.
    """
    groups: dict[Hashable, list[int]] = {}
    for index in batch:
        groups.setdefault(prompts[index], []).append(index)
    if len(groups) == len(batch):
        return batch
    ordered = [index for group in sorted(groups.values(), key=len, reverse=True) for index in group]
    ring: list[int] = [0] * len(batch)
    places = [*range(0, len(batch), 2), *range(1, len(batch), 2)]
    for place, index in zip(places, ordered, strict=True):
        ring[place] = index
    return ring


def repeats(batch: Sequence[int], prompts: Sequence[Hashable]) -> int:
    """How many ring neighbours of `batch` share a prompt."""
    return sum(prompts[one] == prompts[other] for one, other in zip(batch, [*batch[1:], batch[0]], strict=True))


def _part_repeats(batches: list[list[int]], labels: Sequence[bool], prompts: Sequence[Hashable]) -> None:
    """Swap rows of one label between batches until no prompt has more than half of a batch, where that can be done."""
    counts = [Counter(prompts[index] for index in batch) for batch in batches]
    stuck: set[tuple[bool, Hashable]] = set()
    for number, batch in enumerate(batches):
        for place, row in enumerate(batch):
            kind = labels[row], prompts[row]
            if counts[number][prompts[row]] <= len(batch) // 2 or kind in stuck:
                continue
            found = _partner(number, row, batches, counts, labels, prompts)
            if found is None:
                stuck.add(kind)
                continue
            other, there = found
            batch[place], batches[other][there] = batches[other][there], row
            for changed in (number, other):
                counts[changed] = Counter(prompts[index] for index in batches[changed])


def _partner(
    number: int,
    row: int,
    batches: list[list[int]],
    counts: list[Counter[Hashable]],
    labels: Sequence[bool],
    prompts: Sequence[Hashable],
) -> tuple[int, int] | None:
    """Batch and place of a row of the same label that can change places with `row` and crowds neither batch."""
    room, own = len(batches[number]) // 2, counts[number]
    for other, batch in enumerate(batches):
        if other == number or counts[other][prompts[row]] >= len(batch) // 2:
            continue
        for there, candidate in enumerate(batch):
            if labels[candidate] is labels[row] and own[prompts[candidate]] < room:
                return other, there
    return None
