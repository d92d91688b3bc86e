"""The flags of ``finetui check`` and ``finetui data …``. What they do is in `core.data_commands`."""

import argparse
from pathlib import Path
from typing import Any

SHAPES = ("messages", "sharegpt", "prompt", "alpaca", "text")


def add_check(commands: Any) -> None:
    """``finetui check FILE``"""
    command = commands.add_parser("check", help="what data files hold, what is wrong with them, what is left out")
    command.add_argument("file", type=Path, metavar="FILE", nargs="+", help="any data file that a run takes")
    _method(command)
    _columns(command)
    _model(command)
    command.add_argument("--include-undesirable", action="store_true", help="SFT: count rows labelled false as used")
    command.add_argument("--split-dataset", nargs="?", const=0.1, default=0.0, type=float, metavar="SHARE",
                         help="hold out a share of the prompts")  # fmt: skip
    command.add_argument("--eval-file", type=Path, metavar="FILE", help="look for its prompts among the rows")
    command.add_argument("--no-near", action="store_true", help="do not look for near duplicates")
    command.add_argument("--ledger", type=Path, metavar="OUT", help="write every row with its fate: .csv or .jsonl")
    _force(command)
    command.add_argument("--json", action="store_true", help="JSON, with every row left out")


def add_data(commands: Any) -> None:
    """``finetui data clean|split|sample|convert|show|ledger|look``"""
    data = commands.add_parser("data", help="look at data files and write mended, split or converted copies")
    kinds = data.add_subparsers(dest="deed", metavar="DEED", required=True, parser_class=type(data))
    clean = kinds.add_parser("clean", help="a copy with its rows mended, and a ledger of what was done")
    _in_and_out(clean)
    clean.add_argument("--drop-duplicates", action="store_true", help="leave out rows that repeat an earlier one")
    clean.add_argument("--mend-encoding", action="store_true", help="put back text that was decoded wrongly (Ã¤, â€™)")
    split = kinds.add_parser("split", help="two files for training and evaluation, no prompt in both")
    split.add_argument("file", type=Path, metavar="IN")
    split.add_argument("training", type=Path, metavar="TRAINING", nargs="?", help="default: IN-train.jsonl")
    split.add_argument("held_out", type=Path, metavar="HELD-OUT", nargs="?", help="default: IN-heldout.jsonl")
    split.add_argument("--share", type=float, default=0.1, help="share of the prompts held out (default 0.1)")
    _seed(split)
    _copying(split)
    sample = kinds.add_parser("sample", help="some rows, drawn evenly")
    _in_and_out(sample)
    sample.add_argument("--rows", "-n", type=int, default=100, metavar="N", help="how many (default 100)")
    _seed(sample)
    sample.add_argument("--balanced", action="store_true", help="as many good as bad ones")
    convert = kinds.add_parser("convert", help="another shape or kind of file, by OUT's ending")
    _in_and_out(convert)
    convert.add_argument("--to", choices=SHAPES, default="messages", help="shape of the rows (default messages)")
    show = kinds.add_parser("show", help="a row as the model will see it, its trained tokens marked")
    show.add_argument("file", type=Path, metavar="FILE", help="any data file that a run takes")
    _method(show)
    _columns(show)
    _model(show)
    show.add_argument("--line", type=int, metavar="N", help="line of the file (default: the first usable)")
    show.add_argument("--ids", action="store_true", help="every token with its id")
    show.add_argument("--json", action="store_true", help="JSON: ids and labels as the trainer gets them")
    ledger = kinds.add_parser("ledger", help="every row of a run with its fate, as CSV or JSON lines")
    ledger.add_argument("run", metavar="RUN", help="name, unique prefix, or `last`")
    ledger.add_argument("out", type=Path, metavar="OUT", nargs="?", help=".csv or .jsonl; without it: totals")
    ledger.add_argument("--stage", choices=("sft", "kto", "all"), default="all",
                        help="default: all, each row naming its stage where there are two")  # fmt: skip
    _force(ledger)
    ledger.add_argument("--runs-dir", type=Path, metavar="DIR", help="folder of the runs")
    look = kinds.add_parser("look", help="configurations, splits and files of a Hub data set, and its first rows")
    look.add_argument("dataset", metavar="OWNER/NAME")
    look.add_argument("--dataset-config", metavar="NAME")
    look.add_argument("--dataset-file", metavar="FILE")
    look.add_argument("--dataset-split", metavar="NAME", default="train")
    look.add_argument("--dataset-revision", metavar="NAME")
    look.add_argument("--rows", "-n", type=int, default=3, metavar="N", help="rows shown (default 3)")
    look.add_argument("--json", action="store_true", help="JSON instead of text")


def _method(command: argparse.ArgumentParser) -> None:
    command.add_argument("--method", choices=("sft", "kto"), required=True, help="what the rows are to train")


def _columns(command: argparse.ArgumentParser) -> None:
    command.add_argument("--column", action="append", metavar="PART=COLUMN", help="which column is what, where it is "
                         "not found out: prompt=question")  # fmt: skip


def _model(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("lengths in tokens (the model's tokenizer must be on this machine)")
    group.add_argument("--model-size", metavar="SIZE")
    group.add_argument("--model-name", metavar="NAME")
    group.add_argument("--max-seq-length", type=int, metavar="N", help="longest row")
    group.add_argument("--too-long", choices=("drop", "cut"), default="drop")


def _in_and_out(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", type=Path, metavar="IN")
    command.add_argument("out", type=Path, metavar="OUT")
    _copying(command)


def _copying(command: argparse.ArgumentParser) -> None:
    _columns(command)
    _force(command)
    command.add_argument("--json", action="store_true", help="JSON instead of text")


def _force(command: argparse.ArgumentParser) -> None:
    command.add_argument("--force", action="store_true", help="overwrite what is there (never what is read)")


def _seed(command: argparse.ArgumentParser) -> None:
    command.add_argument("--seed", type=int, default=42, metavar="N", help="another one draws other rows (default 42)")
