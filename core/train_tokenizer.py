"""Load a model's tokenizer and probe its template. Works where torch may not be imported."""

from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from core.chat import Template, set_template
from core.errors import FinetuiError
from core.hub import HUB_ADVICE, hub_reason, hub_token, offline_unless_reachable
from core.plan import Plan
from core.sources import ModelSource


def load_tokenizer(plan: Plan, source: ModelSource) -> tuple[PreTrainedTokenizerBase, Template, str]:
    """The tokenizer with pad token and chat template, its probed template, and where the template comes from.

    An adapter's own tokenizer files win over the base's. Raises FinetuiError.
    """
    beside = source.adapter if source.adapter and (source.adapter / "tokenizer_config.json").is_file() else None
    place: Any = {"token": hub_token(), "trust_remote_code": plan.model.trust_remote_code}
    if not source.local:
        place["revision"] = plan.model.revision
        offline_unless_reachable()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(beside or source.base), **({} if beside else place))
        config = AutoConfig.from_pretrained(source.base, **place).to_dict()
    except Exception as error:
        raise unreadable(source, error) from error
    origin = set_template(tokenizer, plan.model.chat_template, config)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, Template.of(tokenizer), origin


def unreadable(source: ModelSource, error: Exception) -> FinetuiError:
    """The error for a model that cannot be read, from a folder or from the Hub."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return FinetuiError(
            f"{source.base} comes with its own Python code.",
            "If you trust its author: --set model.trust_remote_code=true.",
        )
    if source.local:
        return FinetuiError(f"The model in {source.base} cannot be read: {text[:160]}", "Download or save it again.")
    return FinetuiError(f"The model {source.base} cannot be had: {hub_reason(error.__cause__ or error)}.", HUB_ADVICE)
