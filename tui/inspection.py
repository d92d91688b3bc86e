"""What is known of the rows of a draft: it has them looked at, shown and counted by children, and keeps the answers."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from textual.content import Content
from textual.message import Message

from core.errors import FinetuiError
from core.lens import Lens, Looks, Reply
from core.plan import Plan
from core.sources import is_untuned
from tui.data_room import DataRoom, row_key
from tui.data_views import MUTED, hub_words, progress_words, shorter, summary
from tui.draft import Checked, Draft
from tui.forecast import Count
from tui.pages import problem_words

LEDGER_SLOT = "ledger"


@dataclass
class LookSaid(Message):
    """A look into the rows of a stage is on its way, or over."""

    stage: str
    key: str
    said: Reply


@dataclass
class LensSaid(Message):
    """The lens answered: a row for the data room, the tokens of a stage, or what a limit would do."""

    slot: str
    reply: Reply


class Inspection:
    """The rows of the stages of a draft. `post` takes messages from any thread; all else belongs to the app's loop."""

    def __init__(self, post: Callable[[Message], object]) -> None:
        self.lens = Lens(lambda slot, reply: post(LensSaid(slot, reply)))
        self.looks = Looks(lambda stage, key, said: post(LookSaid(stage, key, said)))
        self.usable: dict[str, int | None] = {}
        """Usable rows by stage: None while they are read or where there are none, 0 where they are not here yet."""
        self.counts: dict[str, Count] = {}
        self.words: dict[str, Content] = {}
        self.troubles: dict[str, FinetuiError | None] = {}
        """What is in the way of training on the rows of a stage, None for nothing; no entry while they are read."""
        self._reports: dict[str, Reply] = {}
        self._hubs: dict[str, Reply] = {}
        self._replies: dict[str, Reply] = {}
        self._looked: dict[str, str] = {}
        self._counted: dict[str, str] = {}

    def close(self) -> None:
        self.lens.close()
        self.looks.close()

    def forget(self, stage: str) -> None:
        """The rows of a stage were named anew."""
        self.looks.end(stage)
        for known in (
            self.usable, self._looked, self._reports, self._hubs, self.words, self._replies, self._counted, self.counts,
            self.troubles,
        ):  # fmt: skip
            known.pop(stage, None)

    def look(self, found: Checked, draft: Draft, *, fetch: tuple[str, ...] = ()) -> None:
        """Have the rows of every stage looked at that are not known as the plan has them."""
        for stage in draft.stages:
            rows = draft.data[stage]
            missing = {"file": not rows.file.strip(), "hub": rows.dataset.strip().count("/") != 1}.get(rows.kind, False)
            if missing:
                words = "Type the path of a file." if rows.kind == "file" else "Type OWNER/NAME."
                self.forget(stage)
                self.words[stage] = Content.styled(words, MUTED)
                part = f"{stage}.data.{'file' if rows.kind == 'file' else 'dataset'}"
                self.troubles[stage] = found.problems.get(part) or FinetuiError(words)
            elif found.resolved:
                self._look(found.resolved.plan, stage, stage in fetch)

    def doubt(self) -> None:
        """Rows that could not be used are to be looked at anew."""
        for stage in [stage for stage, error in self.troubles.items() if error]:
            self._looked.pop(stage, None)

    def _look(self, plan: Plan, stage: str, fetch: bool) -> None:
        settings = plan.stage(stage)
        request: dict[str, Any] = {
            "stage": stage, "data": settings.data.model_dump(mode="json"), "seed": settings.seed, "fetch": fetch,
            "eval_file": plan.evaluate.file or "", "untuned": is_untuned(plan),
        }  # fmt: skip
        key = json.dumps({**request, "fetch": False}, sort_keys=True)
        if self._looked.get(stage) == key and not fetch:
            return
        self.forget(stage)
        self._looked[stage] = key
        self.words[stage] = Content.styled("○ reading …", MUTED)
        self.looks.look(stage, key, request)

    def heard(self, event: LookSaid, room: DataRoom | None) -> bool:
        """Take in what a look said; whether the stage's rows are known now."""
        stage, said = event.stage, event.said
        if event.key != self._looked.get(stage):
            return False
        if "progress" in said:
            if said["progress"].get("conversations"):
                self.troubles.setdefault(stage, None)
            if stage not in self._reports:
                self.words[stage] = progress_words(said["progress"])
            return False
        if "notice" in said:
            self.words[stage] = Content.styled(f"○ {said['notice']} …", MUTED)
            return False
        if "error" in said:
            file = str(json.loads(event.key)["data"]["file"] or "")
            error = FinetuiError(shorter(said["error"], file), said["advice"])
            fetched_later = "fetched" in said["error"]
            self.words[stage], self.usable[stage] = problem_words(error), 0 if fetched_later else None
            self.troubles[stage] = None if fetched_later else error
            return True
        if "hub" in said:
            self._hubs[stage] = said["hub"]
            self.words[stage], self.usable[stage] = hub_words(said["hub"]), 0
            self.troubles[stage] = None
        else:
            report = self._reports[stage] = said["report"]
            problem = report["problem"]
            self.usable[stage] = None if problem else int(report["usable"])
            self.troubles[stage] = None
            if problem:
                said_shorter = shorter(problem["error"], report["files"][0]["file"])
                self.troubles[stage] = FinetuiError(said_shorter, problem["advice"])
            self.words[stage] = summary(report, self._replies.get(stage), stage)
        if room:
            self.fill(room, stage)
        return True

    def ask(self, plan: Plan, stages: list[str], room: DataRoom | None) -> None:
        """Ask the lens for the tokens of stages not counted yet, and for the row that the room should show."""
        for stage in stages:
            used = self.usable.get(stage)
            key = f"{row_key(plan, stage, -1)}|{used}"
            if used is None:
                self.counts.pop(stage, None)
                self._counted.pop(stage, None)
                self._replies.pop(stage, None)
            elif self._counted.get(stage) != key:
                self._counted[stage] = key
                self.counts.pop(stage, None)
                if used:
                    self.counts[stage] = Count.of_rows(used, plan.stage(stage).data.holdout)
                self.lens.count(stage, key, plan, stage)
        if room:
            self._ask_row(plan, room)

    def _ask_row(self, plan: Plan, room: DataRoom) -> None:
        stage, here = room.stage, room.here
        if stage in self._hubs:
            room.key = ""
        elif self.usable.get(stage) is None:
            room.key = ""
            room.say(Content.styled("Rows appear here as they will be trained.", MUTED))
        elif room.ask(key := row_key(plan, stage, (room.place or here.at, room.ids))):
            request: dict[str, Any] = {
                "do": "show", "key": key, "plan": plan.model_dump(mode="json"), "stage": stage, "ids": room.ids,
            }  # fmt: skip
            self.lens.ask("preview", request | ({"line": room.place} if room.place else {"at": here.at}))

    def answered(self, event: LensSaid, plan: Plan | None, room: DataRoom | None) -> bool:
        """Take in what the lens said; whether the tokens of a stage are known now."""
        slot, reply = event.slot, event.reply
        if slot == "preview":
            if room:
                room.tell_row(reply)
            return False
        if slot.endswith(" limit"):
            if room:
                room.tell_limit(slot.removesuffix(" limit"), reply)
            return False
        if reply["key"] != self._counted.get(slot) or "error" in reply:
            return False
        self.counts[slot] = Count.of_reply(reply)
        self._replies[slot] = reply
        if slot in self._reports:
            self.words[slot] = summary(self._reports[slot], reply, slot)
        if room and plan:
            room.tell_count(slot, reply, plan.stage(slot).max_length)
        return True

    def count_again(self) -> None:
        """The tokens are to be counted anew: more of them are known now."""
        self._counted.clear()

    def save_ledger(self, plan: Plan, stage: str, path: Path) -> None:
        """Have the ledger of a stage written by a child, which says when it is done; with tokens and cuts where all
        rows were counted."""
        if path.exists():
            raise FinetuiError(f"{path} exists already.", "Choose another name.")
        if self._replies.get(stage, {}).get("exact"):
            asked = {"do": "count", "key": str(path), "plan": plan.model_dump(mode="json"), "stage": stage}
            self.lens.ask(LEDGER_SLOT, {**asked, "ledger": str(path)})
        else:
            data, seed = plan.stage(stage).data.model_dump(mode="json"), plan.stage(stage).seed
            request = {"stage": stage, "data": data, "seed": seed, "near": False, "ledger": str(path)}
            self.looks.look(LEDGER_SLOT, LEDGER_SLOT, request)

    def fill(self, room: DataRoom, stage: str, plan: Plan | None = None) -> None:
        """Tell a data room what is known of a stage."""
        if stage in self._hubs:
            room.tell_hub(stage, self._hubs[stage])
        if stage in self._reports:
            room.tell_look(stage, self._reports[stage])
        if plan and stage in self._replies:
            room.tell_count(stage, self._replies[stage], plan.stage(stage).max_length)

    def columns(self, stage: str) -> tuple[list[str], dict[str, str]]:
        """The columns of a stage's rows, and which part is read from which."""
        if stage in self._hubs:
            return list(self._hubs[stage]["columns"]), {}
        files = self._reports.get(stage, {}).get("files", [])
        names = dict.fromkeys(name for entry in files for name in entry["columns"])
        return list(names), {part: name for entry in files for part, name in entry["parts"].items()}
