"""The order of KTO's rows: which rows share a batch, and who is whose KL partner. No torch.

TRL estimates the KL term from mismatched pairs: the completion of a row's neighbour in the batch stands in for its own.
So a batch needs at least two rows, neighbours must not share a prompt, and a batch of one label gives no margin.
"""

import random
from collections import Counter, deque
from collections.abc import Hashable, Sequence

MUCH_PADDING = 0.25
"""Share of the tokens from which on rows are put together by length."""


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
    labels: Sequence[bool], prompts: Sequence[Hashable], batch_size: int, seed: int, epoch: int = 0, *,
    lengths: Sequence[int] | None = None, parts: int = 1,
) -> list[list[int]]:  # fmt: skip
    """Row indices of every micro-batch of an epoch; each row stands in exactly one.

    `batch_size` rows make a step, in `parts` micro-batches (gradient accumulation): which rows a step holds does not
    depend on `parts`, so that a run may change it in the middle. Both labels are spread as evenly as their counts
    allow, and in a micro-batch (a ring, as TRL takes it) neighbours have different prompts wherever its rows permit.
    With `lengths` (tokens a row) rows of like length share a step, where padding would else be a quarter of the tokens
    or more. `labels`, `prompts` and `lengths` have one entry a row.
    """
    chance = random.Random(f"{seed}-{epoch}")
    sizes = batch_sizes(len(labels), batch_size)
    alike = lengths is not None and padding(lengths, batch_size, seed) >= MUCH_PADDING
    queues = {}
    for label in (True, False):
        members = [index for index, given in enumerate(labels) if given is label]
        chance.shuffle(members)
        if alike and lengths:
            about = {index: lengths[index] * chance.uniform(0.9, 1.1) for index in members}
            members.sort(key=about.__getitem__)
        queues[label] = deque(members)
    steps: list[list[int]] = []
    for size, good in zip(sizes, good_rows(sizes, len(queues[True])), strict=True):
        step: list[int] = []
        for label, count in ((True, good), (False, size - good)):
            step.extend(_take(queues[label], count, [prompts[index] for index in step], prompts))
        steps.append(step)
    _part_repeats(steps, labels, prompts)
    if parts == 1:
        batches = [_ring(step, prompts) for step in steps]
        chance.shuffle(batches)
        return batches
    last = [steps.pop()] if len(steps[-1]) < batch_size else []  # a short step elsewhere would shift all that follow
    chance.shuffle(steps)
    return [part for step in steps + last for part in _parts(step, labels, prompts, batch_size // parts, lengths)]


def padding(lengths: Sequence[int], batch_size: int, seed: int) -> float:
    """Share of padding among the tokens of shuffled rows, each batch filled up to its longest row."""
    shuffled = random.Random(seed).sample(lengths, len(lengths))
    batches = [shuffled[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    whole = sum(len(batch) * max(batch) for batch in batches)
    return 1 - sum(lengths) / whole if whole else 0.0


def _parts(
    step: list[int], labels: Sequence[bool], prompts: Sequence[Hashable], size: int, lengths: Sequence[int] | None
) -> list[list[int]]:
    """A step's rows as micro-batches of `size`, both labels in each where the counts allow, like lengths together."""
    ordered = sorted(step, key=lengths.__getitem__) if lengths else step
    count = max(len(step) // size, 1) + (1 if len(step) % size > 1 and len(step) > size else 0)
    sizes = [len(step) // count + (number < len(step) % count) for number in range(count)]
    queues = {label: deque(index for index in ordered if labels[index] is label) for label in (True, False)}
    found = []
    for part, good in zip(sizes, good_rows(sizes, len(queues[True])), strict=True):
        found.append([queues[True].popleft() for _ in range(good)])
        found[-1] += [queues[False].popleft() for _ in range(part - good)]
    _part_repeats(found, labels, prompts)
    return [_ring(part, prompts) for part in found]


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
