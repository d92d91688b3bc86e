"""Runs beside each other: settings that differ, evaluations over the same prompts, answers side by side. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from core.config import flatten
from core.errors import FinetuiError
from core.evaluation import Report, Row, evaluations, read_cases, variant_words
from core.evaluation_report import loss_words, share_words
from core.events import RunState, StageState
from core.runs import Run, summary
from core.scores import MARKS, changes
from core.stages import TRAINING_STAGES
from core.text import count, duration, number

SAME_ANYWAY = ("name", "note")
AXES = ("steps", "time", "examples")
RESULTS = (
    ("loss", "loss", 4), ("eval_loss", "held-out loss", 4), ("rewards/margins", "margin", 3), ("kl", "KL", 3),
    ("tokens_per_s", "tokens/s", 3),
)  # fmt: skip


@dataclass
class Side:
    """One run of a comparison."""

    name: str
    status: str
    took_s: float | None
    settings: dict[str, Any]
    state: RunState
    report: Report | None = None
    cases: list[Row] = field(default_factory=list)

    @property
    def variant(self) -> str:
        """The last model of the run that was evaluated; empty for none."""
        return str(self.report["variants"][-1]) if self.report else ""


def sides_of(runs: Sequence[Run]) -> list[Side]:
    """Each run with its settings and its evaluation, as far as they can be read."""
    found = []
    for run in runs:
        head, done = summary(run), evaluations(run)
        state = run.state()
        took_s = state.trained_s if state.task else head["duration_s"]  # that is the task's own
        side = Side(run.name, head["status"], took_s, settings_of(run), state)
        if done:
            side.report, side.cases = done[0][1], read_cases(done[0][0])
        found.append(side)
    return found


def settings_of(run: Run) -> dict[str, Any]:
    """The plan of a run by dotted path; empty where it cannot be read."""
    try:
        return flatten(run.plan().model_dump(mode="json"), keep_auto=True)
    except (FinetuiError, OSError, ValueError):
        return {}


def differences(settings: Sequence[dict[str, Any]]) -> list[tuple[str, list[Any]]]:
    """The settings that are not the same everywhere, with each run's value; an unreadable plan differs in none.

    Those of a stage count only where every run has it: that one has none, the method says.
    """
    methods = [str(one["method"]).split("-") for one in settings if "method" in one]
    skipped = {stage for stage in TRAINING_STAGES if any(stage not in method for method in methods)}
    paths = sorted({path for one in settings for path in one if path not in SAME_ANYWAY})
    paths = [path for path in paths if path.partition(".")[0] not in skipped]
    unlike = [path for path in paths if len({repr(one.get(path)) for one in settings if one}) > 1]
    return [(path, [one.get(path) for one in settings]) for path in unlike]


def results(sides: Sequence[Side]) -> list[tuple[str, list[str]]]:
    """How the runs ended: (what, a word of each run); what no run has is left out."""
    rows = [("status", [side.status for side in sides]), ("took", [duration(side.took_s) for side in sides])]
    for name in TRAINING_STAGES:
        stages = [stage_of(side.state, name) for side in sides]
        rows.append((f"{name.upper()} steps", [f"{s.step}/{s.total_steps}" if s and s.step else "–" for s in stages]))
        for key, word, digits in RESULTS:
            rows.append((f"{name.upper()} {word}", [number(s.last(key), digits) if s else "–" for s in stages]))
    return [(word, cells) for word, cells in rows if any(cell not in ("–", "") for cell in cells)]


def stage_of(state: RunState, name: str) -> StageState | None:
    return next((stage for stage in state.stages if stage.name == name), None)


def same_prompts(sides: Sequence[Side]) -> bool:
    """Whether the evaluations that there are answered the same prompts."""
    asked = [{str(case.get("prompt")) for case in side.cases} for side in sides if side.report]
    return len(asked) > 1 and all(prompts == asked[0] for prompts in asked)


def evaluation_rows(sides: Sequence[Side]) -> list[tuple[str, list[str]]]:
    """The evaluations, a row a mark: what each run's last model earned."""
    if not any(side.report for side in sides):
        return []
    rows = [
        ("answered by", [variant_words(side.variant) if side.report else "–" for side in sides]),
        ("prompts", [count(side.report["prompts"]) if side.report else "–" for side in sides]),
    ]
    tables = [side.report["table"].get(side.variant, {}) if side.report else {} for side in sides]
    rows += [
        (MARKS[mark][0], [share_words(t.get(mark)) for t in tables]) for mark in MARKS if any(mark in t for t in tables)
    ]
    losses = [side.report["losses"].get(side.variant) if side.report else None for side in sides]
    return rows + ([("loss a token", [loss_words(loss) for loss in losses])] if any(losses) else [])


def change_rows(sides: Sequence[Side]) -> list[str]:
    """What each run's last model mends and breaks of the first run's, over the prompts both answered."""
    first, sentences = sides[0], []
    marks = _marks_by_prompt(first)
    for other in sides[1:]:
        theirs = _marks_by_prompt(other)
        shared = [key for key in marks if key in theirs]
        found = (
            changes([marks[key] for key in shared], [theirs[key] for key in shared]).get("exact") if shared else None
        )
        if found:
            sure = "" if found["p"] < 0.05 else ": that may be chance"
            sentences.append(
                f"{other.name} against {first.name}, {len(shared):,} prompts: {found['mended']} whole answers mended, "
                f"{found['broken']} broken (exact McNemar test, p = {found['p']:.3g}){sure}."
            )
    return sentences


def _marks_by_prompt(side: Side) -> dict[str, dict[str, bool]]:
    return {
        str(case.get("prompt")): case["answers"][side.variant]["marks"]
        for case in side.cases
        if side.variant in case["answers"]
    }


@dataclass(frozen=True)
class Shared:
    """A prompt that several runs answered: each run's answer with its marks, None where it has none."""

    prompt: str
    expected: str | None
    answers: list[dict[str, Any] | None]

    @property
    def unlike(self) -> bool:
        """Whether the runs' answers earned different marks."""
        marks = [answer["marks"] for answer in self.answers if answer]
        return any(one != marks[0] for one in marks)


def shared_answers(sides: Sequence[Side]) -> list[Shared]:
    """Prompts that at least two runs answered, those first on which they differ."""
    by_prompt: dict[str, list[dict[str, Any] | None]] = {}
    expected: dict[str, str | None] = {}
    for place, side in enumerate(sides):
        for case in side.cases:
            prompt = str(case.get("prompt"))
            expected.setdefault(prompt, case.get("expected"))
            answer = case["answers"].get(side.variant)
            by_prompt.setdefault(prompt, [None] * len(sides))[place] = answer
    found = [
        Shared(prompt, expected[prompt], answers)
        for prompt, answers in by_prompt.items()
        if sum(answer is not None for answer in answers) > 1
    ]
    return sorted(found, key=lambda one: not one.unlike)


def over_examples(points: Sequence[tuple[float, float | None]], batch: float) -> list[tuple[float, float | None]]:
    """Points over steps as points over examples, at so many examples a step."""
    return [(step * batch, value) for step, value in points]
