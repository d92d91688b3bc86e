"""Examples as the data sets that the trainers take, laid over the tokens where they lie: nothing is copied.

Arrow lists are offsets into one array of values. What rows lost at the left, and the gaps between rows, become lists of
their own that no index names; so a million rows cost a few offsets each.
"""

import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy
import pyarrow
import pyarrow.compute
from datasets import Dataset
from datasets.table import InMemoryTable

from core.data_tokens import Examples, Shard

if TYPE_CHECKING:
    from numpy import ndarray

Slices = Callable[[Shard, "ndarray"], tuple["ndarray", "ndarray", "ndarray"]]
"""From a shard and the tokens its rows lost: (values, where each row's list begins in them, where it ends)."""
MAX_OFFSET = 2**31 - 1


def sft_dataset(examples: Examples, max_length: int) -> Dataset:
    """Columns input_ids and labels, one row an example."""
    lists: dict[str, Slices] = {
        "input_ids": lambda shard, over: (shard.ids, shard.starts[:-1] + over, shard.starts[1:]),
        "labels": lambda shard, over: (shard.labels, shard.starts[:-1] + over, shard.starts[1:]),
    }
    dataset = _dataset(examples, lists, {})
    dataset._unsloth_truncated_to = max_length  # without this promise Unsloth pads rows that are tokenised already
    return dataset


def kto_dataset(examples: Examples) -> Dataset:
    """Columns prompt_ids, completion_ids, label and prompt_key, one row an example."""
    lists: dict[str, Slices] = {
        "prompt_ids": lambda shard, over: (shard.ids, shard.starts[:-1] + over, shard.starts[:-1] + shard.first),
        "completion_ids": lambda shard, over: (shard.ids, shard.starts[:-1] + shard.first, shard.starts[1:]),
    }
    return _dataset(examples, lists, {"label": examples.labels, "prompt_key": examples.prompt_keys})


def row_lengths(dataset: Dataset) -> list[int]:
    """Tokens of each row, of KTO's prompt and completion together, without reading a token."""
    total = numpy.zeros(len(dataset.data), "i8")
    for name in {"input_ids", "prompt_ids", "completion_ids"} & set(dataset.column_names):
        total += pyarrow.compute.list_value_length(dataset.data.column(name)).to_numpy()
    return (total if dataset._indices is None else total[dataset._indices.column(0).to_numpy()]).tolist()


def _dataset(examples: Examples, lists: dict[str, Slices], plain: dict[str, "ndarray"]) -> Dataset:
    """A data set of list columns over the tokens' shards, and of plain columns; its rows are the examples in order."""
    shards = examples.shards
    rows = sum(len(shard.length) for shard in shards)
    lost = numpy.zeros(rows, "i8")
    lost[examples.places] = examples.over
    large = any(len(shard.ids) > MAX_OFFSET for shard in shards)
    columns: dict[str, Any] = {name: [] for name in lists}
    start = 0
    for shard in shards:
        over = lost[start : start + len(shard.length)]
        start += len(shard.length)
        for name, slices in lists.items():
            columns[name].append(_rows_and_gaps(*slices(shard, over), large))
    columns = {name: pyarrow.chunked_array(parts) for name, parts in columns.items()}
    columns |= {name: _spread(values, examples.places * 2, rows * 2) for name, values in plain.items()}
    table = InMemoryTable(pyarrow.table(columns))
    # Without a fingerprint of our own the whole table would be hashed for one.
    name = uuid.uuid4().hex
    return Dataset(table, fingerprint=name).select(examples.places * 2, new_fingerprint=f"{name[:8]}-rows")


def _spread(values: "ndarray", places: "ndarray", count: int) -> pyarrow.Array:
    """A column of `count` rows with the values at `places`; nobody looks at the others."""
    spread = numpy.zeros(count, values.dtype)
    spread[places] = values
    return pyarrow.array(spread)


def _rows_and_gaps(values: "ndarray", starts: "ndarray", ends: "ndarray", large: bool) -> pyarrow.Array:
    """Lists in turn: of a row, ``values[start:end]``, and of what lies between it and the next one."""
    edges = numpy.zeros(2 * len(starts) + 1, "i8")
    edges[0:-1:2], edges[1::2] = starts, ends
    if len(starts):
        edges[-1] = ends[-1]
    flat = pyarrow.Array.from_buffers(pyarrow.int32(), len(values), [None, pyarrow.py_buffer(values)])
    if large:
        return pyarrow.LargeListArray.from_arrays(pyarrow.array(edges), flat)
    return pyarrow.ListArray.from_arrays(pyarrow.array(edges.astype("i4")), flat)
