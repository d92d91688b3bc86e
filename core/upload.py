"""What an upload to the Hub needs, looked at before the first byte: token and right, name, repository, files. No torch.

The token comes from HF_TOKEN or the Hub's own login, is handed to the Hub's client and to nothing else.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.artefacts import LINEAGE, chosen, merged_folder, read_report, stage_done
from core.card import model_card, public_lineage
from core.errors import FinetuiError
from core.paths import cache_dir, expanded
from core.plan import Plan

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from core.runs import Run

TOKEN_ADVICE = "Set HF_TOKEN to a token with the right to write, or log in: hf auth login."
TOKENS_PAGE = "Make one with the right to write: https://huggingface.co/settings/tokens."
WEIGHTS = (".safetensors", ".safetensors.index.json", ".gguf", ".bin")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
                   "tokenizer.model")  # fmt: skip
REFUSALS = {
    401: "it does not take this token", 403: "this token may not do that", 404: "there is no such place on it",
    413: "it is too large", 429: "it was asked too often",
}  # fmt: skip
WRITING_ROLES = ("admin", "write", "contributor")
LARGEST_TEXT = 20_000_000
MANIFEST = "finetui-manifest.json"


@dataclass(frozen=True)
class Repository:
    """The repository as the Hub has it now; `files` by name with their sizes, none while it does not exist."""

    name: str
    exists: bool
    private: bool
    files: dict[str, int] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        """Whether an earlier upload of finetui made what is there."""
        return LINEAGE in self.files


@contextlib.contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn what the Hub's client raises into a sentence without addresses or tokens."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except FinetuiError:
        raise
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else 0
        reason = REFUSALS.get(code, f"it answers {code}" if code else type(error).__name__)
        advice = TOKEN_ADVICE if code in (401, 403) else "Try later."
        raise FinetuiError(f"The Hub refuses {what}: {reason}.", advice, exit_code=1) from error
    except (httpx.HTTPError, OSError, RuntimeError, ValueError) as error:
        cause = type(error.__cause__ or error).__name__.removesuffix("Error").removesuffix("Exception")
        raise FinetuiError(
            f"The Hub could not be reached for {what} ({cause}).",
            "Check the network; what was uploaded already is not sent again.",
            exit_code=1,
        ) from error


def hub() -> "HfApi":
    """The Hub's client with the person's token. Raises FinetuiError when there is none."""
    from huggingface_hub import HfApi, get_token

    token = get_token()
    if not token:
        raise FinetuiError("An upload needs a token of the Hub, and there is none.", TOKEN_ADVICE)
    return HfApi(token=token, library_name="finetui")


def check_right(api: "HfApi", repository: str) -> str:
    """That this token may write there. Returns whose token it is. Raises FinetuiError."""
    with hub_errors("the token"):
        me = api.whoami()
    user, owner = str(me.get("name", "")), repository.split("/")[0]
    access = (me.get("auth") or {}).get("accessToken") or {}
    role = str(access.get("role", ""))
    if role == "read":
        raise FinetuiError(f"The Hub's token of {user} may only read.", TOKENS_PAGE)
    if role == "fineGrained" and not _finely_allowed(access, owner, repository):
        raise FinetuiError(f"The Hub's token of {user} has no right to write to {repository}.", TOKENS_PAGE)
    organisations = {str(one.get("name")): str(one.get("roleInOrg", "write")) for one in me.get("orgs") or []}
    if owner != user and owner not in organisations:
        mine = ", ".join([user, *organisations][:6])
        raise FinetuiError(f"{owner} is neither you nor an organisation of yours.", f"You can upload to: {mine}.")
    if owner != user and organisations[owner] not in WRITING_ROLES:
        raise FinetuiError(f"In {owner} you may only read.", "Ask an administrator of it, or upload to your own name.")
    return user


def _finely_allowed(access: dict[str, Any], owner: str, repository: str) -> bool:
    for scope in (access.get("fineGrained") or {}).get("scoped") or []:
        entity = scope.get("entity") or {}
        if entity.get("name") in (owner, repository) and "repo.write" in (scope.get("permissions") or []):
            return True
    return False


def look_at(api: "HfApi", name: str) -> Repository:
    """The repository on the Hub. Raises FinetuiError when the Hub cannot be asked."""
    from huggingface_hub.errors import RepositoryNotFoundError

    with hub_errors(f"a look at {name}"):
        try:
            info = api.model_info(name, files_metadata=True)
        except RepositoryNotFoundError:
            return Repository(name, False, False)
    return Repository(name, True, bool(info.private), {one.rfilename: one.size or 0 for one in info.siblings or []})


# Files ----------------------------------------------------------------------------------------------------------------


def upload_files(run: "Run", plan: Plan) -> dict[str, Path | bytes]:
    """Everything that is uploaded: path in the repository → file, or content made for it. Raises FinetuiError."""
    lineage = public_lineage(run, plan)
    files: dict[str, Path | bytes] = {}
    if plan.export.uploaded_form == "lora":
        files |= _adapter_files(run, plan, lineage)
        files[LINEAGE] = json.dumps(lineage, indent=1, ensure_ascii=False).encode()
    else:
        folder = merged_folder(run, plan.export.uploaded_form)
        files |= {file.name: file for file in sorted(folder.iterdir()) if file.is_file() and file.name != MANIFEST}
    made = read_report(run, "gguf").get("files", {})
    for quantisation in plan.export.gguf:
        path = run.stage_path("gguf") / made[quantisation]["name"]
        files[path.name] = path
    if plan.export.gguf:
        files["Modelfile"] = run.stage_path("gguf") / "Modelfile"
    sizes = {name: size_of(content) for name, content in files.items()}
    files["README.md"] = model_card(run, plan, lineage, str(plan.export.upload), sizes).encode()
    for name, content in files.items():
        _refuse_private(name, content, run)
    return files


def size_of(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _adapter_files(run: "Run", plan: Plan, lineage: dict[str, Any]) -> dict[str, Path | bytes]:
    """The adapter with its tokenizer; its configuration names the base as the Hub knows it, not where it lies here."""
    folder = chosen(run, plan.export).folder
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = lineage["base"]["name"]
    files: dict[str, Path | bytes] = {
        "adapter_config.json": json.dumps(config, indent=2).encode(),
        "adapter_model.safetensors": folder / "adapter_model.safetensors",
    }
    places = [folder, *(run.final_model(stage) for stage in ("kto", "sft"))]
    place = next((one for one in places if (one / "tokenizer_config.json").is_file()), folder)
    return files | {name: place / name for name in TOKENIZER_FILES if (place / name).is_file()}


def _refuse_private(name: str, content: Path | bytes, run: "Run") -> None:
    """No text that goes into public names a place on this machine. Raises FinetuiError with the file's name."""
    if name.endswith(WEIGHTS) or size_of(content) > LARGEST_TEXT:
        return
    text = content if isinstance(content, bytes) else content.read_bytes()
    for place in (run.path.parent, cache_dir(), expanded("~")):
        if len(str(place)) > 4 and str(place).encode() in text:
            raise FinetuiError(f"{name} names a place on this machine ({place}).", "Take that out, then upload again.")


# The check ------------------------------------------------------------------------------------------------------------


def check_upload(plan: Plan, run: "Run | None") -> list[str]:
    """Token, right, name and repository, and what will be in it: in lines. Raises FinetuiError.

    Before a run is made there are no files yet: then the rest is checked.
    """
    name = str(plan.export.upload)
    api = hub()
    user = check_right(api, name)
    found = look_at(api, name)
    refuse_repository(found, plan)
    if found.exists:
        kind = f"{'private' if found.private else 'PUBLIC'}, exists already with {len(found.files)} files"
    else:
        kind = "private, will be made" if plan.export.private else "PUBLIC, will be made"
    lines = [f"Upload to {name} ({kind}), as {user}, {plan.export.uploaded_form}"]
    lines[0] += f" and GGUF {', '.join(plan.export.gguf)}" if plan.export.gguf else ""
    if run is not None and all(stage_done(run, stage) for stage in plan.stages if stage != "upload"):
        files = upload_files(run, plan)
        refuse_mixture(found, files)
        sizes = {one: size_of(content) for one, content in files.items()}
        lines.append(f"{len(sizes)} files, {sum(sizes.values()) / 2**20:,.1f} MiB:")
        lines += [
            f"  {one}  {count / 2**20:,.1f} MiB" for one, count in sorted(sizes.items(), key=lambda item: -item[1])
        ]
    return lines


def refuse_repository(found: Repository, plan: Plan) -> None:
    """A repository that is there must be as private as was asked. Raises FinetuiError."""
    if found.exists and plan.export.private and not found.private:
        raise FinetuiError(
            f"{found.name} exists already and is public.", "Choose another name, or make it private on the Hub first."
        )


def refuse_mixture(found: Repository, files: dict[str, Path | bytes]) -> None:
    """Weights of another hand beside ours would be loaded in their place. Raises FinetuiError."""
    strange = [name for name in found.files if name.endswith(WEIGHTS) and name not in files]
    if strange and not found.ours:
        raise FinetuiError(
            f"{found.name} holds other weights ({strange[0]}), which would be mixed with these.",
            "Choose another name, or empty that repository first.",
        )


def stale(found: Repository, files: dict[str, Path | bytes]) -> list[str]:
    """Weights of an earlier upload of finetui that this one does not replace: they must go."""
    keep_gguf = [name for name in found.files if name.endswith(".gguf")]
    return [
        name for name in found.files
        if found.ours and name.endswith(WEIGHTS) and name not in files and name not in keep_gguf
    ]  # fmt: skip
