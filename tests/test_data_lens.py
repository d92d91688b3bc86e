"""The lens shows the very arrays the trainer gets: batches of real trainers against its replies, row by row."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED_DATA, USER, MakeRun, WriteRows
from test_training import Stage

from core.train_lens import Desk

ROWS = [
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Question {n} " + "é " * n},
                  {"role": "assistant", "content": f"Answer {n}"}, {"role": "user", "content": "More?"},
                  {"role": "assistant", "content": "No. " * (n % 5 + 1)}], "label": n % 3 > 0}
    for n in range(24)
]  # fmt: skip


def shown(stage: Stage, name: str) -> dict[int, dict[str, Any]]:
    """The lens's reply for every usable row of a stage, ids and labels included, by line."""
    desk, found = Desk(), {}
    request = {"plan": stage.plan.model_dump(mode="json"), "stage": name, "ids": True}
    first = desk.reply({**request, "do": "show", "at": 0})
    for at in range(first["of"]):
        reply = desk.reply({**request, "do": "show", "at": at})
        assert reply["at"] == at
        found[reply["line"]] = reply
    return found


def laid_end_to_end(batch: dict[str, Any]) -> Iterator[tuple[list[int], list[int]]]:
    """(ids, labels) of the rows of a batch without padding."""
    starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), batch["input_ids"].shape[1]]
    for start, end in zip(starts, starts[1:], strict=False):
        labels = [-100, *batch["labels"][0, start + 1 : end].tolist()]
        yield batch["input_ids"][0, start:end].tolist(), labels


def padded(batch: dict[str, Any]) -> Iterator[tuple[list[int], list[int]]]:
    """(ids, labels) of the rows of a padded batch, without their padding."""
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        kept = mask.bool()
        yield ids[kept].tolist(), labels[kept].tolist()


@pytest.mark.parametrize(("free", "rows_of"), [("on", laid_end_to_end), ("off", padded)])
@pytest.mark.parametrize("too_long", ["drop", "cut"])
def test_every_row_of_every_sft_batch_is_what_the_lens_shows(
    make_run: MakeRun, rows_file: WriteRows, free: str, rows_of: Any, too_long: str
) -> None:
    own = str(rows_file(ROWS, "own.jsonl"))
    settings = {"sft__data__too_long": too_long, "sft__max_length": 90, "sft__padding_free": free}
    stage = Stage(make_run("sft", sft__data__file=own, **settings), "sft")
    replies = shown(stage, "sft")
    wanted = sorted((reply["input_ids"], reply["labels"]) for reply in replies.values() if not reply["left_out"])
    batches = stage.trainer.get_train_dataloader()
    assert sorted(row for batch in batches for row in rows_of(batch)) == wanted
    cut = [reply for reply in replies.values() if reply["cut"]]
    gone = [reply for reply in replies.values() if reply["left_out"]]
    assert (bool(cut), bool(gone)) == (too_long == "cut", too_long == "drop"), "the test needs rows over the limit"
    assert all(len(ids) <= 90 for ids, _ in wanted)


def test_every_row_of_every_kto_batch_and_its_partner_is_what_the_lens_shows(
    make_run: MakeRun, rows_file: WriteRows
) -> None:
    own = str(rows_file(ROWS, "own.jsonl"))
    settings = {"kto__data__too_long": "cut", "kto__max_length": 110, "kto__max_prompt_length": 70}
    stage = Stage(make_run("kto", kto__data__file=own, **settings), "kto")
    replies = {line: reply for line, reply in shown(stage, "kto").items() if not reply["left_out"]}
    by_row = {tuple(reply["input_ids"]): reply for reply in replies.values()}
    assert len(by_row) == len(replies) and any(reply["cut"] for reply in replies.values())
    tokenizer = stage.loaded.tokenizer
    seen = 0
    for batch in stage.trainer.get_train_dataloader():
        rows = zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True)
        partners = zip(batch["KL_input_ids"], batch["KL_attention_mask"], strict=True)
        for label, (ids, mask, trained), (other, other_mask) in zip(batch["label"], rows, partners, strict=True):
            reply = by_row[tuple(ids[mask.bool()].tolist())]
            assert [int(label != -100) for label in reply["labels"]] == trained[mask.bool()].tolist()
            assert reply["label"] is bool(label)
            whole = other[other_mask.bool()].tolist()
            completion = whole[len(reply["input_ids"]) - reply["trained"] :]
            assert tokenizer.decode(completion) == reply["partner"]["text"]
            assert reply["partner"]["tokens"] == len(completion) and reply["partner"]["line"] != reply["line"]
            seen += 1
    assert seen == len(replies)


def test_turns_and_pieces_add_up_to_the_row(make_run: MakeRun, rows_file: WriteRows) -> None:
    stage = Stage(make_run("sft", sft__data__file=str(rows_file(ROWS, "own.jsonl"))), "sft")
    for reply in shown(stage, "sft").values():
        assert [turn["role"] for turn in reply["turns"]] == ["system", "user", "assistant", "user", "assistant"]
        edges = [(turn["start"], turn["end"]) for turn in reply["turns"]]
        assert edges[0][0] == 0 and edges[-1][1] == reply["tokens"]
        assert all(before[1] == after[0] for before, after in zip(edges, edges[1:], strict=False))
        assert sum(turn["trained"] for turn in reply["turns"]) == reply["trained"]
        assert [piece[0] for piece in reply["pieces"]] == reply["input_ids"]
        assert sum(segment[3] for segment in reply["segments"]) == reply["tokens"]
        assert "".join(segment[0] for segment in reply["segments"]) == stage.loaded.tokenizer.decode(reply["input_ids"])


def test_a_row_is_found_by_its_line_and_a_lost_line_by_the_next(make_run: MakeRun, rows_file: WriteRows) -> None:
    path = rows_file([ROWS[0], {"messages": []}, ROWS[1], ROWS[2]], "own.jsonl")
    run = make_run("sft", sft__data__file=str(path), sft__data__include_undesirable=True)
    request = {"plan": run.plan().model_dump(mode="json"), "stage": "sft", "do": "show"}
    desk = Desk()
    assert [desk.reply({**request, "line": [str(path), line]})["line"] for line in (1, 2, 3, 4, 99)] == [1, 2, 3, 4, 4]


def test_a_row_that_is_left_out_is_shown_with_the_reason(make_run: MakeRun, rows_file: WriteRows) -> None:
    rows = [ROWS[1], {"messages": [USER]}, ROWS[0], ROWS[2]]
    path = rows_file(rows, "own.jsonl")
    request = {"plan": make_run("sft", sft__data__file=str(path)).plan().model_dump(mode="json"), "stage": "sft"}
    written, bad = (Desk().reply({**request, "do": "show", "line": [str(path), line]}) for line in (2, 3))
    assert (written["left_out"], written["tokens"], written["unused"]) == ("no assistant turn", 0, True)
    assert json.loads(written["segments"][0][0]) == rows[1]
    assert bad["left_out"] == "label is false: SFT would teach a bad answer" and bad["tokens"] > 0 and bad["unused"]


def test_a_ledger_with_tokens_is_written_where_it_is_asked_for(
    make_run: MakeRun, rows_file: WriteRows, tmp_path: Path
) -> None:
    path = rows_file([*ROWS, {"messages": []}], "own.jsonl")
    settings = {"kto__max_length": 110, "kto__max_prompt_length": 70, "kto__data__too_long": "cut"}
    plan = make_run("kto", kto__data__file=str(path), **settings).plan().model_dump(mode="json")
    request = {"do": "count", "plan": plan, "stage": "kto", "ledger": str(tmp_path / "ledger.jsonl")}
    counted = Desk().reply(request)
    entries = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    fates = Counter(entry["fate"] for entry in entries)
    totals = counted["totals"]
    assert len(entries) == totals["rows"] == 25 and fates["cut"] == totals["cut"] == counted["cut"] > 0
    assert (fates["used"], fates["left out"]) == (totals["used"], totals["left_out"])
    kept = [entry for entry in entries if entry["fate"] != "left out"]
    assert sum(entry["tokens"] - entry.get("cut", 0) for entry in kept) == counted["tokens"]
    assert sum(entry["trained"] for entry in kept) == counted["trained_tokens"]


def test_ktos_batches_are_as_full_as_the_count_says(make_run: MakeRun, rows_file: WriteRows) -> None:
    stage = Stage(make_run("kto", kto__data__file=str(rows_file(ROWS, "own.jsonl"))), "kto")
    plan = stage.plan.model_dump(mode="json")
    told = Desk().reply({"do": "count", "plan": plan, "stage": "kto"})["shape"]["padded"]
    masks = [batch["attention_mask"] for batch in stage.trainer.get_train_dataloader()]
    assert told == round(sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks), 4)


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the shared data is not here")
def test_a_limit_that_is_tried_does_what_the_count_under_it_says(make_run: MakeRun) -> None:
    path = str(SHARED_DATA / "ask_first_pairs.jsonl")
    run = make_run("sft", sft__data__file=path, sft__max_length=2000)
    request = {"plan": run.plan().model_dump(mode="json"), "stage": "sft"}
    desk = Desk()
    desk.reply({**request, "do": "count"})
    for at in (300, 700, 900):
        tried = desk.reply({**request, "do": "limit", "at": at})["limit"]
        request["plan"]["sft"]["max_length"] = at
        try:
            counted = desk.reply({**request, "do": "count"})
        except Exception as error:
            assert "No row is left" in str(error) and tried["left_out"] == tried["rows"]
            continue
        assert counted["examples"] == tried["whole"] and sum(counted["left_out"].values()) == tried["left_out"]
        assert counted["tokens"] == tried["tokens"] and counted["longest"] == tried["longest"]


def test_plain_text_is_shown_and_trained_as_a_whole(make_run: MakeRun, tmp_path: Path) -> None:
    path = tmp_path / "story.txt"
    path.write_text("\n\n".join(f"Once upon a time there were {n} bears. " * 3 for n in range(12)))
    stage = Stage(make_run("sft", sft__data__file=str(path), sft__padding_free="off"), "sft")
    replies = shown(stage, "sft")
    assert len(replies) == 12 and all(reply["trained"] == reply["tokens"] - 1 for reply in replies.values())
    wanted = sorted((reply["input_ids"], reply["labels"]) for reply in replies.values())
    assert sorted(row for batch in stage.trainer.get_train_dataloader() for row in padded(batch)) == wanted
    eos = stage.loaded.tokenizer.eos_token_id
    assert all(ids[-1] == eos for ids, _ in wanted)
