"""The order of KTO's rows: which rows share a batch, and who is whose KL partner. No torch.

TRL estimates the KL term from mismatched pairs: the completion of a row's neighbour in the batch stands in for its own.
So a batch needs at least two rows, neighbours must not share a prompt, and a batch of one label gives no margin.
"""

import random
from collections import deque
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
    total = {label: len(queue) for label, queue in queues.items()}
    batches: list[list[int]] = []
    placed = 0
    for size in batch_sizes(len(labels), batch_size):
        placed += size
        wanted = round(total[True] * placed / max(len(labels), 1)) - (total[True] - len(queues[True]))
        good = min(max(wanted, size - len(queues[False]), 0), size, len(queues[True]))
        batch: list[int] = []
        for label, count in ((True, good), (False, size - good)):
            batch.extend(_take(queues[label], count, [prompts[index] for index in batch], prompts))
        batches.append(_ring(batch, prompts))
    _swap_repeats(batches, labels, prompts)
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


def _swap_repeats(batches: list[list[int]], labels: Sequence[bool], prompts: Sequence[Hashable]) -> None:
    """Mend batches that still pair a prompt with itself by swapping a row with one of its label elsewhere."""
    for number, batch in enumerate(batches):
        for place in range(len(batch)):
            if not repeats(batch, prompts):
                break
            row = batch[place]
            for other_number, other in enumerate(batches):
                if other_number == number:
                    continue
                if _swapped(batch, place, other, labels, prompts, row):
                    break


def _swapped(
    batch: list[int], place: int, other: list[int], labels: Sequence[bool], prompts: Sequence[Hashable], row: int
) -> bool:
    """Swap `row` with a row of `other` if that lowers the repeats of the two; says whether it did."""
    before = repeats(batch, prompts) + repeats(other, prompts)
    for there, candidate in enumerate(other):
        if labels[candidate] is not labels[row]:
            continue
        batch[place], other[there] = candidate, row
        if repeats(batch, prompts) + repeats(other, prompts) < before:
            return True
        batch[place], other[there] = row, candidate
    return False
