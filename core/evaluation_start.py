"""Start an evaluation of a run that has ended, from the command line or the app: checked, then a detached child."""

from pathlib import Path
from typing import Any

from core import runner
from core.errors import FinetuiError
from core.evaluation import HELD_OUT, ask, evaluation_path, name_of, options_of
from core.heldout import held_out
from core.paths import expanded
from core.plan import EvaluatePlan, Plan
from core.runs import Run, is_alive
from core.tools import read_tools
from core.variants import variants_of


def kept_options(run: Run, name: str = HELD_OUT) -> EvaluatePlan:
    """What an evaluation was last asked to do; without one, what the plan says. Raises FinetuiError."""
    try:
        return options_of(evaluation_path(run, name))
    except FinetuiError:
        return run.plan().evaluate


def checked(run: Run, plan: Plan, values: dict[str, Any]) -> tuple[str, EvaluatePlan]:
    """The name and options of an evaluation; `values` are keys of EvaluatePlan that differ from the plan's.

    Without ``file`` among them it answers what the run held out. Raises FinetuiError for what would fail later.
    """
    from pydantic import ValidationError

    if is_alive(run):
        raise FinetuiError(f"{run.name} is running.", f"Wait for its end, or stop it: finetui stop {run.name}.")
    variants_of(run, plan)
    for key in ("file", "tools"):
        if values.get(key):
            values[key] = str(expanded(values[key]).absolute())
    try:
        options = EvaluatePlan.model_validate({**plan.evaluate.model_dump(), **values})
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        key = str(first["loc"][0]) if first["loc"] else "It"
        raise FinetuiError(f"{key}: {first['msg']}.", "`finetui eval --help` lists what there is.") from error
    if options.tools:
        read_tools(Path(options.tools))
    held_out(plan, Path(options.file) if options.file else None, options.max_prompts)
    return name_of(Path(values["file"]) if values.get("file") else None), options


def start(run: Run, name: str, options: EvaluatePlan) -> None:
    """Start it, in a session of its own. Raises FinetuiError."""
    ask(run, options, name)
    runner.start(run, "evaluate", name)
