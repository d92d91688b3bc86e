"""The Hugging Face Hub as finetui asks it: its token, whether it answers, and what its errors mean. No torch."""

import contextlib
import http.client
import os
import threading
import urllib.error
import urllib.request

from core.errors import FinetuiError

HUB_TIMEOUT_S = 5.0
HUB_ADVICE = "Check the name and the network; a private one needs HF_TOKEN in the environment."


def hub_token() -> str | None:
    """The Hub's token from the environment; None lets the Hub's own login decide."""
    return os.environ.get("HF_TOKEN") or None


def refuse_name(name: str) -> None:
    """Raises FinetuiError for what cannot be the name of a repository: OWNER/NAME, or NAME alone for very old ones."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        advice = "Give OWNER/NAME; a file goes into --local-file."
        raise FinetuiError(f"{name!r} is no name on the Hub.", advice) from error


def hub_status(path: str = "") -> int | None:
    """The HTTP status of the Hub's answer for `path`; None without one in HUB_TIMEOUT_S, name resolution included."""
    from huggingface_hub import constants

    answers: list[int] = []

    def ask() -> None:
        request = urllib.request.Request(
            f"{constants.ENDPOINT}/{path}", method="HEAD", headers={"User-Agent": "finetui"}
        )
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            try:
                with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S) as response:
                    answers.append(response.status)
            except urllib.error.HTTPError as error:
                answers.append(error.code)

    if constants.HF_HUB_OFFLINE:
        return None
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_S)
    return answers[0] if answers else None


def offline_unless_reachable() -> None:
    """Have this process take from the cache what the Hub would give, where the Hub gives no answer.

    The Hub's client and transformers would each try again for minutes.
    """
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE or hub_status() is None


def hub_reason(error: BaseException) -> str:
    """A Hub error in a few words, without addresses or tokens."""
    words = {
        "RepositoryNotFoundError": "there is no such repository, or it is private",
        "GatedRepoError": "it is gated: accept its terms on the Hub first",
        "EntryNotFoundError": "there is no such file in it",
        "RemoteEntryNotFoundError": "there is no such file in it",
        "RevisionNotFoundError": "there is no such revision",
        "HFValidationError": "the name is not of the form OWNER/NAME",
        "LocalEntryNotFoundError": "the Hub cannot be reached and it is not in the cache",
        "OfflineModeIsEnabled": "offline mode is on and it is not in the cache",
    }
    return words.get(type(error).__name__, f"the Hub cannot be reached ({type(error).__name__})")
