"""The event log: whole lines whoever writes, and readers that nothing in it can hurt."""

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.event_log import EventLog
from core.events import EventTail, RunState, StageState, parse_line, state_of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


@pytest.fixture
def log(path: Path) -> EventLog:
    return EventLog(path)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def folded(*events: dict[str, Any]) -> RunState:
    """The state after these events, each a second after the one before."""
    state = RunState()
    for second, event in enumerate(events):
        state.fold({"t": 1000.0 + second, **event})
    return state


def step(number: int, stage: str = "sft", **fields: Any) -> dict[str, Any]:
    return {"kind": "log", "stage": stage, "step": number, **fields}


# --- writing ---


def test_an_event_is_one_line_with_time_and_kind(log: EventLog, path: Path) -> None:
    log.append("notice", text="a\nb\u2028c", nested={"a": (1, 2)})
    log.append("notice", text="d")
    assert path.read_bytes().count(b"\n") == 2
    first = lines(path)[0]
    assert first.pop("t") > 1e9
    assert first == {"kind": "notice", "text": "a\nb\u2028c", "nested": {"a": [1, 2]}}


def test_numbers_that_are_not_finite_become_null_and_are_counted(log: EventLog, path: Path) -> None:
    log.append("log", loss=math.nan, rates=[math.inf, 1.0], inner={"x": -math.inf})
    log.append("log", loss=1.5)
    events = lines(path)
    assert (events[0]["loss"], events[0]["rates"], events[0]["inner"], events[0]["nonfinite"]) == (
        None,
        [None, 1.0],
        {"x": None},
        3,
    )
    assert "nonfinite" not in events[1]
    assert state_of(path).nonfinite == 3
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()


def test_what_json_cannot_hold_is_written_as_text_and_long_text_is_cut(log: EventLog, path: Path) -> None:
    import numpy

    log.append("error", path=Path("/x"), message="m" * 50_000, number=numpy.float32(2.5), bad="a\ud800b", key={1: 2})
    event = lines(path)[0]
    assert (event["path"], event["number"], event["bad"], event["key"]) == ("/x", 2.5, "a?b", {"1": 2})
    assert len(event["message"]) < 21_000 and " … " in event["message"]


def test_an_event_after_a_torn_line_is_not_lost_with_it(path: Path) -> None:
    path.write_bytes(b'{"t":1,"kind":"run_start"}\n{"t":2,"kind":"lo')
    EventLog(path).append("run_end", status="crashed")
    assert state_of(path).end_status == "crashed"
    tail = EventTail(path)
    assert [event["kind"] for event in tail.read()] == ["run_start", "run_end"]
    assert tail.broken_lines == 1


def test_a_line_cut_short_by_a_full_disk_is_an_error_and_spoils_nothing_after_it(
    log: EventLog, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.append("notice", text="before")
    write = os.write
    with monkeypatch.context() as full:
        full.setattr(os, "write", lambda handle, data: write(handle, data[: len(data) // 2]))
        with pytest.raises(OSError) as caught:
            log.append("notice", text="lost")
    assert caught.value.errno == errno.ENOSPC
    log.append("notice", text="after")
    assert [event["text"] for event in EventTail(path).read()] == ["before", "after"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_error() -> None:
    with pytest.raises(OSError) as caught:
        EventLog(Path("/dev/full")).append("notice", text="x")
    assert caught.value.errno == errno.ENOSPC


WRITER = """
import sys
from pathlib import Path
from core.event_log import EventLog
log = EventLog(Path(sys.argv[1]))
sys.stdin.readline()
for number in range(1000):
    log.append("log", who=sys.argv[2], number=number, text="x" * (number * 37 % 5000))
"""


def test_four_processes_writing_at_once_tear_no_line(path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(path)]
    writers = [subprocess.Popen([*command, str(who)], stdin=subprocess.PIPE, text=True) for who in range(4)]
    for writer in writers:
        assert writer.stdin
        writer.stdin.write("go\n")
        writer.stdin.flush()
    tail, seen = EventTail(path), []
    while any(writer.poll() is None for writer in writers):
        seen += tail.read()
    seen += tail.read()
    assert [writer.wait() for writer in writers] == [0, 0, 0, 0]
    assert tail.broken_lines == 0 and len(seen) == 4000
    for who in "0123":
        assert [event["number"] for event in seen if event["who"] == who] == list(range(1000))


# --- reading ---


def test_a_tail_gives_each_event_once_and_waits_for_the_end_of_a_line(path: Path) -> None:
    tail = EventTail(path)
    assert tail.read() == []
    with path.open("a") as stream:
        stream.write('{"t":1,"kind":"a"}\n{"t":2,"ki')
        stream.flush()
        assert [event["kind"] for event in tail.read()] == ["a"]
        assert tail.read() == []
        stream.write('nd":"b"}\n')
        stream.flush()
        assert [event["kind"] for event in tail.read()] == ["b"]
    assert tail.read() == []


def test_a_long_log_and_a_long_line_are_read_in_pieces(log: EventLog, path: Path) -> None:
    for number in range(300):
        log.append("log", number=number)
    log.append("notice", text="y" * 9000)
    tail, seen = EventTail(path), []
    while events := tail.read(limit_bytes=1000):
        seen += events
    assert [event.get("number") for event in seen] == [*range(300), None]


def test_a_log_that_was_replaced_by_a_shorter_one_is_read_anew(path: Path) -> None:
    tail = EventTail(path)
    path.write_text('{"t":1,"kind":"a"}\n{"t":1,"kind":"b"}\n')
    assert len(tail.read()) == 2
    path.write_text('{"t":1,"kind":"c"}\n')
    assert [event["kind"] for event in tail.read()] == ["c"]


@pytest.mark.parametrize(
    "line",
    [b"", b"{", b"[]", b"5", b"null", b'"kind"', b"{}", b'{"kind": 5}', b'{"kind": null, "t": 1}', b"\xff\xfe",
     b"[" * 5000, b'{"kind": "log", "step": ' + b"9" * 5000 + b"}", b'{"t": 1, "kind": "lo'],
)  # fmt: skip
def test_a_line_that_is_no_event_is_passed_over_and_counted(path: Path, line: bytes) -> None:
    assert parse_line(line) is None
    path.write_bytes(line + b'\n{"t": 5, "kind": "run_end", "status": "done"}\n')
    tail = EventTail(path)
    assert [event["kind"] for event in tail.read()] == ["run_end"]
    assert tail.broken_lines == (1 if line else 0)


@pytest.mark.parametrize("time", ["null", '"noon"', "true", "1e999", "NaN", "-5", "1e300", "9" * 400, "[]"])
def test_a_time_that_is_none_is_zero(time: str) -> None:
    event = parse_line(f'{{"kind": "x", "t": {time}}}'.encode())
    assert event is not None and event["t"] == 0.0


def test_a_log_that_does_not_exist_tells_nothing(tmp_path: Path) -> None:
    assert state_of(tmp_path / "none" / "events.jsonl") == RunState()


# --- what the events mean ---


def test_the_state_of_a_whole_run_is_told_by_its_events() -> None:
    state = folded(
        {
            "kind": "created",
            "v": 1,
            "name": "r",
            "method": "sft-kto",
            "model": "135m",
            "note": "n",
            "stages": ["sft", "kto"],
        },
        {"kind": "run_start", "pid": 1},
        {"kind": "stage_start", "name": "sft", "base": "m", "pid": 7, "pid_started": 3.5},
        {"kind": "phase", "stage": "sft", "name": "load", "seconds": 2.5},
        {"kind": "phase", "stage": "sft", "name": "load", "seconds": 0.5},
        {"kind": "totals", "stage": "sft", "steps": 4, "examples": 9},
        step(2, loss=2.0, epoch=0.5),
        step(4, loss=1.0, epoch=1.0),
        {"kind": "checkpoint", "stage": "sft", "step": 4},
        {"kind": "stage_end", "name": "sft", "status": "done", "output": "sft/final_model", "exit": "exit 0"},
        {"kind": "stage_start", "name": "kto"},
        {"kind": "something new", "field": [1]},
        {"kind": "run_end", "status": "stopped"},
    )
    sft = state.stage("sft")
    assert (state.name, state.method, state.model, state.note) == ("r", "sft-kto", "135m", "n")
    assert (state.created, state.started, state.ended, state.end_status) == (1000.0, 1001.0, 1012.0, "stopped")
    assert (sft.state, sft.output, sft.step, sft.total_steps, sft.epoch) == ("done", "sft/final_model", 4, 4, 1.0)
    assert (sft.pid, sft.pid_started, sft.checkpoints, sft.phase_seconds) == (7, 3.5, [4], {"load": 3.0})
    assert sft.series["loss"] == [(2, 2.0), (4, 1.0)] and sft.totals["examples"] == 9
    assert sft.steps_per_second == 2.0
    assert state.current is state.stage("kto")
    assert [stage.name for stage in state.stages] == ["sft", "kto"] and state.notices == []


@pytest.mark.parametrize("kind", ["stage_start", "totals"])
def test_a_resume_takes_back_what_was_logged_after_its_checkpoint(kind: str) -> None:
    before = [
        {"kind": "stage_start", "name": "kto"},
        *(step(number, "kto", loss=float(number), kl=0.1) for number in range(1, 8)),
    ]
    saved = [{"kind": "checkpoint", "stage": "kto", "step": number} for number in (3, 6)]
    resumed = {"kind": kind, "stage": "kto", "name": "kto", "resumed_step": 4}
    state = folded(
        *before,
        *saved,
        {"kind": "run_start"},
        {"kind": "stage_start", "name": "kto"},
        resumed,
        step(5, "kto", loss=50.0),
    )
    kto = state.stage("kto")
    assert kto.series["loss"] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0)]
    assert [point[0] for point in kto.series["kl"]] == [1, 2, 3, 4]
    assert (kto.step, kto.checkpoints, kto.steps_per_second) == (5, [3], None)


def test_a_new_start_forgets_the_end_and_the_errors_of_the_last() -> None:
    state = folded(
        {"kind": "run_start"}, {"kind": "stage_start", "name": "sft"}, {"kind": "error", "message": "x"},
        {"kind": "stage_end", "name": "sft", "status": "failed"}, {"kind": "run_end", "status": "failed"},
        {"kind": "run_start"},
    )  # fmt: skip
    assert (state.started, state.end_status, state.ended, state.errors) == (1000.0, None, None, [])
    assert state.stage("sft").state == "waiting"


def test_a_gap_in_a_curve_is_a_gap_and_the_newest_finite_value_is_shown() -> None:
    state = folded(step(1, loss=3.0), step(2, loss=None), step(3, loss=float("inf")), step(4, other=1, words="x"))
    sft = state.stage("sft")
    assert sft.series["loss"] == [(1, 3.0), (2, None), (3, None)]
    assert sft.last("loss") == 3.0 and sft.last("none") is None
    assert set(sft.series) == {"loss", "other"}


def test_the_time_left_follows_the_pace_of_the_last_steps() -> None:
    slow_start = [step(number, loss=1.0) for number in range(1, 30)]
    state = folded({"kind": "totals", "stage": "sft", "steps": 100}, *slow_start)
    assert state.stage("sft").eta_s == 71.0
    assert StageState("x").eta_s is None
    assert folded(step(1), step(1)).stage("sft").eta_s is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-(10**400), 10**400) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
KINDS = [name.removeprefix("_on_") for name in vars(RunState) if name.startswith("_on_")]
FIELDS = (
    "name stage stages step steps status loss epoch seconds resumed_step nonfinite t pid pid_started table output "
    "message text advice examples tokens left_out_reasons rewards/margins checkpoint method model note base detail "
    "tokens_per_s"
).split()
stages = st.sampled_from(["sft", "kto"])
wild_events = st.builds(
    lambda kind, fields, stage: {"kind": kind, "stage": stage, "name": stage, **fields},
    st.sampled_from(KINDS) | st.text(max_size=12),
    st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=6), json_values, max_size=6),
    stages,
)


@settings(max_examples=120)
@given(st.lists(wild_events, max_size=8))
def test_no_event_can_make_a_reader_raise(events: list[dict[str, Any]]) -> None:
    state = RunState()
    for event in events:
        parsed = parse_line(json.dumps(event).encode())
        assert parsed is not None and parsed["kind"] == event["kind"]
        state.fold(parsed)
    for stage in state.stages:
        assert isinstance(stage.step, int) and isinstance(stage.epoch, float)
        assert stage.eta_s is None or math.isfinite(stage.eta_s)
        for name, points in stage.series.items():
            assert all(value is None or math.isfinite(value) for _, value in points)
            stage.last(name)


def test_a_malformed_event_leaves_a_word_and_the_rest_stands() -> None:
    state = folded(
        step(1, loss=2.0),
        {"kind": "checkpoint", "stage": "sft"},
        {"kind": "log", "stage": "sft", "step": "x"},
        step(2, loss=1.0),
    )
    assert [notice["text"] for notice in state.notices] == [
        "an event of kind checkpoint is malformed", "an event of kind log is malformed"
    ]  # fmt: skip
    assert state.stage("sft").series["loss"] == [(1, 2.0), (2, 1.0)]


def test_steps_between_two_logs_move_the_stage_and_its_time_left() -> None:
    begun = ({"kind": "totals", "stage": "sft", "steps": 20}, step(1, loss=3.0))
    stage = folded(*begun, *({"kind": "step", "stage": "sft", "step": number} for number in (2, 3, 4))).stage("sft")
    assert (stage.step, stage.state, stage.eta_s) == (4, "running", 16.0)
    assert stage.series["loss"] == [(1, 3.0)]
