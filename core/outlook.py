"""What is ahead of a run: how long its stages will take, and what they will put on the disk. Estimates. No torch."""

import shutil
from collections.abc import Container

from core.artefacts import bytes_needed, parameters_of, seconds_expected, stage_done, there
from core.bases import find_base
from core.errors import FinetuiError
from core.events import RunState, StageState
from core.plan import Plan
from core.runs import Run, list_runs
from core.stages import EXPORT_STAGES, TRAINING_STAGES

LOOKED_AT_RUNS = 8
TOKENS_AN_ANSWER = 100


def expected_seconds(run: Run, plan: Plan) -> dict[str, float]:
    """About how many seconds each stage that is not done will take; without those that nothing is known of.

    Training goes by the newest finished run of the same model on the same device, the rest by that or else by sizes.
    """
    ahead = [stage for stage in plan.stages if not stage_done(run, stage)]
    found: dict[str, float] = {}
    for other, before in _earlier(run, plan):
        for name in ahead:
            if name not in found and (seconds := _by_example(other, before, plan, name)):
                found[name] = round(seconds, 1)
    if set(ahead) - set(found) - set(TRAINING_STAGES) and (parameters := export_parameters(plan)):
        estimated = seconds_expected(plan.export, parameters, cuda=plan.device == "cuda")
        estimated["evaluate"] = _evaluation_seconds(plan, parameters)
        found |= {name: seconds for name, seconds in estimated.items() if name in ahead and name not in found}
    return found


def _evaluation_seconds(plan: Plan, parameters: int) -> float:
    """About how long the base and every stage's model answer the held-out prompts, in batches; without an earlier run.

    The rate on a CPU is that of SmolLM2-135M on two busy cores, on a GPU a guess from its memory's pace.
    """
    tokens = plan.evaluate.max_prompts * (plan.evaluate.max_new_tokens or TOKENS_AN_ANSWER)
    rate = 5e-13 if plan.device == "cuda" else 1.5e-10
    return round(10 + (1 + len(plan.training_stages)) * tokens * parameters * rate)


def expected_examples(run: Run, plan: Plan, known: Container[str]) -> dict[str, int]:
    """How many examples each later training stage will see that is not `known` otherwise, and whose rows are here."""
    from core.prepare import planned_steps, stage_ledger

    found = {}
    for name in plan.training_stages[1:]:
        settings = plan.stage(name)
        if name in known or stage_done(run, name):
            continue
        local = settings.data.demo or settings.data.file or settings.data.files
        if settings.max_steps > 0:
            found[name] = settings.max_steps * settings.effective_batch
        elif local and not settings.data.dataset:
            examples = len(stage_ledger(settings, name, lambda text: None).training())
            found[name] = planned_steps(settings, name, examples) * settings.effective_batch
    return found


def _earlier(run: Run, plan: Plan) -> list[tuple[RunState, Plan]]:
    """Runs beside this one that trained the same model on the same device, and ended well."""
    found = []
    for other in list_runs(run.path.parent)[:LOOKED_AT_RUNS]:
        try:
            before = other.plan() if other.name != run.name else None
        except FinetuiError:
            continue
        if before is None or (before.model.name, before.device, before.backend) != (
            plan.model.name, plan.device, plan.backend,
        ):  # fmt: skip
            continue
        state = other.state()
        if state.end_status == "done":
            found.append((state, before))
    return found


def _by_example(state: RunState, before: Plan, plan: Plan, name: str) -> float | None:
    """Seconds of a stage going by an earlier one; None where the two cannot be compared."""
    stage = next((stage for stage in state.stages if stage.name == name), None)
    if stage is None or not (took := _took(stage)):
        return None
    if name in EXPORT_STAGES:
        return took if before.export == plan.export else None
    if name not in TRAINING_STAGES:
        return took if before.evaluate.max_prompts == plan.evaluate.max_prompts else None
    if name not in before.training_stages or not stage.total_steps:
        return None
    old, new = before.stage(name), plan.stage(name)
    steps = new.max_steps if new.max_steps > 0 else stage.total_steps
    if new.max_steps <= 0 and (old.data, old.num_train_epochs) != (new.data, new.num_train_epochs):
        return None
    training = stage.phase_seconds.get("train", took)
    examples = steps * new.effective_batch / (stage.total_steps * old.effective_batch)
    return training * examples + max(0.0, took - training)


def _took(stage: StageState) -> float | None:
    return max(0.0, stage.ended - stage.started) if stage.ended and stage.started and stage.state == "done" else None


# Disk -----------------------------------------------------------------------------------------------------------------


def export_parameters(plan: Plan) -> int | None:
    """Parameters of the model that will be exported, as far as they can be told now."""
    try:
        base = find_base(plan, lambda text: None, fetch=False)
    except FinetuiError:
        return parameters_of(plan, None)
    return parameters_of(plan, base.here)


def export_bytes(plan: Plan, run: Run | None = None) -> dict[str, int] | None:
    """Bytes that the export stages will put on the disk, by what they are for; None where the size is not known.

    What `run` has already is not counted.
    """
    if not plan.export.merged_forms and not plan.export.gguf:
        return {}
    parameters = export_parameters(plan)
    if parameters is None:
        return None
    try:
        here = not find_base(plan, lambda text: None, fetch=False).extra_download
    except FinetuiError:
        here = True
    return bytes_needed(plan.export, parameters, base_here=here, have=there(run, plan.export) if run else ())


def refuse_exports(plan: Plan, run: Run) -> None:
    """Refuse exports that the run's disk cannot hold. Raises FinetuiError with exit code 3."""
    needed = export_bytes(plan, run)
    free = shutil.disk_usage(run.path).free
    if needed and sum(needed.values()) > free:
        words = ", ".join(f"{what} {count / 2**30:.1f}" for what, count in needed.items())
        raise FinetuiError(
            f"What is to be made takes {sum(needed.values()) / 2**30:.1f} GiB ({words}); "
            f"{free / 2**30:.1f} are free in {run.path}.",
            "Free some space, or export less.",
            exit_code=3,
        )
