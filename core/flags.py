"""The flags of every command. Those of the training commands are made from the plan."""

import argparse
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from core import __version__
from core.data_cli import add_check, add_data
from core.errors import FinetuiError
from core.stages import METHODS

if TYPE_CHECKING:  # `finetui` alone becomes the app at once
    from core.plan import Option

# Shared flags that would set SFT and KTO to the same value where that cannot be meant.
ONE_STAGE_ONLY = {"--learning-rate": "learning_rate"}
MAPPING_WORDS = {"--add-file": "FILE[=WEIGHT]", "--column": "PART=COLUMN"}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are FinetuiErrors with a way forward."""

    def error(self, message: str) -> NoReturn:
        advice = f"`{self.prog} --help` lists what there is."
        if found := re.match(r"argument COMMAND: invalid choice: '(.*?)' \(choose from (.*)\)", message):
            near = difflib.get_close_matches(found[1], re.findall(r"[\w-]+", found[2]), 1)
            advice = f"Did you mean {near[0]}? {advice}" if near else advice
            message = f"There is no command {found[1]!r}"
        raise FinetuiError(f"{message}.", advice)


def flags_of(method: str | None) -> dict[str, list["Option"]]:
    """Every flag with the options it sets for `method`; None takes the options of all methods."""
    from core.plan import options

    stages = method.split("-") if method else ["sft", "kto"]
    found: dict[str, list[Option]] = {}
    for option in options():
        section = option.path.split(".")[0]
        if option.flag and (section not in ("sft", "kto") or section in stages):
            found.setdefault(option.flag, []).append(option)
    return found


def add_plan_flags(parser: argparse.ArgumentParser, method: str | None) -> None:
    """The plan's flags, in three groups, and the ones that reach into it by another name."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="a plan in YAML; flags win over it")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key of the plan")
    parser.add_argument(
        "--runs-dir", type=Path, metavar="DIR", help="folder of the runs (default: ./runs or $FINETUI_RUNS)"
    )
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="this run's own directory, must not exist")
    parser.add_argument("--wandb", action="store_true", help="report to Weights & Biases (key from WANDB_API_KEY)")
    parser.add_argument("--hf-token", metavar="TOKEN", help="handed on in the environment; better: set HF_TOKEN")
    parser.add_argument("--resume-from-checkpoint", metavar="RUN", help="same as `finetui resume RUN`")
    _on_end(parser)
    group = parser.add_argument_group("options of the plan (see also --set)")
    for flag, targets in flags_of(method).items():
        first = targets[0]
        named: dict[str, Any] = {"dest": f"plan{flag}", "default": None, "help": _help(targets)}
        if flag == "--split-dataset":
            named |= {"nargs": "?", "const": "0.1", "metavar": "SHARE"}
        elif first.kind is bool:
            named |= {"action": argparse.BooleanOptionalAction}
        elif first.kind is list:
            named |= {"action": "append", "choices": first.choices or None}
        elif first.kind is dict:
            named |= {"action": "append", "metavar": MAPPING_WORDS.get(flag, "KEY=VALUE")}
        else:
            metavar = "GIB" if first.unit == "GiB" else {int: "N", float: "X"}.get(first.kind, "TEXT")
            named |= {"choices": first.choices} if first.choices else {"metavar": metavar}
        group.add_argument(flag, **named)


def _on_end(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--on-end", metavar="COMMAND", help="shell command at the run's end, with FINETUI_RUN and FINETUI_STATUS set"
    )


def _help(targets: "list[Option]") -> str:
    unit, words = targets[0].unit, targets[0].help
    return (f"{words} ({unit})" if unit and unit not in words.lower() else words).replace("%", "%%")


SOURCES = ("--local-file", "--dataset-name", "--model-name")
"""Flags whose absence means the demo's own: an empty value must not start that."""


def settings_of(arguments: argparse.Namespace, method: str) -> dict[str, tuple[Any, str]]:
    """What the command line sets, as dotted path to (value, source). Raises FinetuiError."""
    from core.config import parse_setting

    settings: dict[str, tuple[Any, str]] = {}
    for flag in sorted(flags_of(None).keys() - flags_of(method).keys()):
        if getattr(arguments, f"plan{flag}", None) is not None:
            raise FinetuiError(f"{flag} is no option of {method}.", "Leave it out, or choose another method.")
    for flag, targets in flags_of(method).items():
        value = getattr(arguments, f"plan{flag}", None)
        if value is None:
            continue
        if value == "" and flag in SOURCES:
            raise FinetuiError(f"{flag} is empty.", "Give a value, or leave it out: an unset variable is easily empty.")
        if flag in ONE_STAGE_ONLY and len(targets) > 1:
            key = ONE_STAGE_ONLY[flag]
            raise FinetuiError(
                f"{flag} would give SFT and KTO the same value, and KTO needs a far gentler one.",
                f"Use --set sft.{key}=… and --set kto.{key}=….",
            )
        if targets[0].kind is dict:
            value = mapping_of(flag, value)
        for target in targets:
            settings[target.path] = (value, f"flag {flag}")
    for text in arguments.set:
        path, value = parse_setting(text)
        settings[path] = (value, "flag --set")
    if arguments.wandb:
        reported = settings.get("tracking.report_to", ([], ""))[0]
        reported = [reported] if isinstance(reported, str) else reported or []
        settings["tracking.report_to"] = (sorted({*reported, "wandb"}), "flag --wandb")
    return settings


def mapping_of(flag: str, words: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` words as a mapping; a file may stand without its weight. Raises FinetuiError."""
    found: dict[str, Any] = {}
    for word in words:
        key, separator, value = word.rpartition("=") if flag == "--add-file" else word.partition("=")
        if flag == "--add-file":
            try:
                found[key or word] = float(value) if separator else 1.0
            except ValueError:  # an equals sign in the name
                found[word] = 1.0
        elif not separator or not key:
            raise FinetuiError(f"{flag} {word!r} has no '='.", f"Write {flag} prompt=question.")
        else:
            found[key] = value
    return found


METHOD_WORDS = {
    "sft": "SFT, learn from conversations with good answers",
    "kto": "KTO, learn from answers labelled good or bad",
    "sft-kto": "SFT→KTO, both, one after the other",
}
FIRST = """\
to begin with:
  finetui                                          the app: a wizard leads from the rows to the run
  finetui demo                                     a small real training, no GPU and no data of yours needed
  finetui check rows.jsonl --method sft            what is in your rows, and what is wrong with them
  finetui sft --local-file rows.jsonl --dry-run    what a training on them would do
  finetui sft --local-file rows.jsonl              the training; Ctrl-C leaves it running if you like

RUN is a run's name, the beginning of it, or `last`.  `finetui COMMAND --help` tells more.
"""


def build_parser() -> Parser:
    about = "Fine-tune language models: SFT, KTO, SFT→KTO. Without arguments: the app."
    parser = Parser(
        prog="finetui", description=about, epilog=FIRST, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"finetui {__version__}")
    parser.add_argument(
        "--runs-dir", type=Path, metavar="DIR", dest="every_runs_dir",
        help="folder of the runs (default: ./runs or $FINETUI_RUNS)",
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for method in METHODS:
        command = commands.add_parser(method, help=f"train: {METHOD_WORDS[method]}")
        add_plan_flags(command, method)
        _following(command)
    command = commands.add_parser("demo", help="SFT and KTO of a small real model on tool calling, scored at the end")
    add_plan_flags(command, "sft-kto")
    _following(command)
    command = commands.add_parser("fit", help="what a plan needs of memory, item by item, and whether that is there")
    command.add_argument("method", choices=METHODS)
    command.add_argument("--card", type=float, metavar="GIB", help="as if this machine had an NVIDIA GPU of this size")
    command.add_argument("--json", action="store_true", help="JSON instead of text")
    add_plan_flags(command, None)
    command = commands.add_parser("plan", help="print the resolved plan as YAML and do nothing else")
    command.add_argument("method", choices=METHODS)
    add_plan_flags(command, None)
    for name, text in (
        ("show", "what a run is or was, did and made"), ("watch", "follow a run; leaving does not stop it"),
        ("stop", "have a run save a checkpoint and end; it can be resumed"), ("abort", "end a run at once"),
        ("resume", "go on from a run's newest checkpoint"),
        ("delete", "remove a run and all it made"),
    ):  # fmt: skip
        command = commands.add_parser(name, help=text)
        _of_run(command)
        if name in ("show", "watch"):
            command.add_argument("--json", action="store_true", help="JSON instead of text")
        if name == "watch":
            command.add_argument("--tui", action="store_true", help="in the app; RUN may be a recorded events.jsonl")
        if name == "resume":
            command.add_argument("--detach", action="store_true", help="do not follow it")
            command.add_argument("--json", action="store_true", help="print events as JSON lines")
            command.add_argument("--fix", action="store_true", help="first change what the failure asks for")
            _on_end(command)
        if name == "delete":
            command.add_argument("--yes", action="store_true", help="do not ask")
    _add_exports(commands)
    _eval_command(commands.add_parser("eval", help="answer held-out prompts with what a run made, and score them"))
    _of_run(commands.add_parser("chat", help="talk to what a run made, in the app; the base answers beside it"))
    command = commands.add_parser("compare", help="runs beside each other: results, evaluations, settings that differ")
    command.add_argument("runs", metavar="RUN", nargs="+", help="two to six runs: names, unique prefixes, or `last`")
    command.add_argument("--runs-dir", type=Path, metavar="DIR", help="folder of the runs")
    command.add_argument("--output", type=Path, metavar="FILE", help="write an HTML page with the curves as well")
    command.add_argument("--no-rows", action="store_true", help="leave prompts and answers out of the page")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command = commands.add_parser("report", help="a run as one HTML page and as Markdown, to send to a colleague")
    _of_run(command)
    command.add_argument("--output", type=Path, metavar="FILE", help="write this .html or .md file alone")
    command.add_argument("--no-rows", action="store_true", help="leave out prompts, answers and samples")
    command = commands.add_parser("runs", help="every run: state, loss, duration, newest first")
    command.add_argument("--runs-dir", type=Path, metavar="DIR", help="folder of the runs")
    command.add_argument("--json", action="store_true", help="JSON instead of a table")
    add_check(commands)
    add_data(commands)
    command = commands.add_parser("doctor", help="what is installed, GPU, driver, disk, hub access, WSL2")
    command.add_argument("--json", action="store_true", help="JSON instead of a table")
    return parser


def _add_exports(commands: Any) -> None:
    """``merge``, ``gguf`` and ``upload``: what is made of a run's result."""
    forms = ("merged_16bit", "merged_4bit", "lora")
    for name, text in (
        ("merge", "merge the adapter into its base"), ("gguf", "files for llama.cpp and Ollama"),
        ("upload", "put the result on the Hub"),
    ):  # fmt: skip
        command = commands.add_parser(name, help=text)
        command.add_argument(
            "run", metavar="RUN", nargs="?" if name == "gguf" else None, help="name, unique prefix, or `last`"
        )
        if name == "upload":
            command.add_argument("repository", metavar="OWNER/NAME")
            command.add_argument("--gguf", action="append", metavar="QUANT", help="GGUF files too; can be repeated")
            command.add_argument("--private", action="store_true", help="make the repository private")
            command.add_argument("--hf-token", metavar="TOKEN", help="better: set HF_TOKEN, or `hf auth login`")
            command.add_argument("--yes", action="store_true", help="do not ask")
        if name == "gguf":
            words = "F16, Q8_0, Q5_K_M or Q4_K_M (the default); can be repeated"
            command.add_argument("--quant", action="append", metavar="QUANT", help=words)
            command.add_argument("--install", action="store_true", help="install llama.cpp's tools first")
        else:
            command.add_argument("--save-method", choices=forms[: 3 if name == "upload" else 2])
        command.add_argument("--checkpoint", metavar="STAGE[/checkpoint-N]", help="this instead of the last result")
        command.add_argument("--merge-base", dest="base", metavar="MODEL", help="16-bit weights, or dequantised")
        command.add_argument("--runs-dir", type=Path, metavar="DIR", help="folder of the runs")
        command.add_argument("--detach", action="store_true", help="do not follow it")
        command.add_argument("--json", action="store_true", help="print events as JSON lines")


def _of_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", metavar="RUN", help="name, unique prefix, or `last`")
    command.add_argument("--runs-dir", type=Path, metavar="DIR", help="folder of the runs")


PLANS_OWN = "(unless given: as in the run's plan)"
EVAL_FLAGS = ("max_prompts", "max_new_tokens", "batch_size", "temperature", "loss")


def _eval_command(command: argparse.ArgumentParser) -> None:
    from core.plan import EvaluatePlan, options

    _of_run(command)
    known = {option.path: option for option in options(EvaluatePlan)}
    command.add_argument(
        "--file", type=Path, metavar="FILE", help="prompts to answer (default: the run's held-out rows)"
    )
    command.add_argument("--tools", type=Path, metavar="FILE", help=f"{known['tools'].help} {PLANS_OWN}")
    command.add_argument(
        "--ignore-argument", action="append", metavar="NAME",
        help=f"an argument that is not compared; may be repeated {PLANS_OWN}",
    )
    for name in EVAL_FLAGS:
        option = known[name]
        shape: dict[str, Any] = {"choices": option.choices} if option.choices else {"type": option.kind, "metavar": "N"}
        command.add_argument(f"--{name.replace('_', '-')}", help=f"{_help([option])} {PLANS_OWN}", **shape)
    command.add_argument(
        "--fail-under", action="append", default=[], metavar="METRIC=SHARE",
        help="exit with 4 where the last model (or MODEL.METRIC) does not reach the share; may be repeated",
    )  # fmt: skip
    command.add_argument("--detach", action="store_true", help="start and return; `finetui watch` follows")
    command.add_argument("--json", action="store_true", help="print the report as one JSON object")


def _following(command: argparse.ArgumentParser) -> None:
    command.add_argument("--detach", action="store_true", help="start and return; `finetui watch` follows")
    command.add_argument("--json", action="store_true", help="print events as JSON lines")
    command.add_argument(
        "--dry-run", nargs="?", const="data", choices=("data", "load"), metavar="load",
        help="check plan and data and say what would happen; =load also loads the model",
    )  # fmt: skip
