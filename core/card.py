"""The model card of an upload: what is true of the model and fit for the public. No torch."""

import json
import re
from typing import TYPE_CHECKING, Any

from core.artefacts import LINEAGE, merged_folder, read_report
from core.plan import Plan
from core.text import clean, count, duration

if TYPE_CHECKING:
    from core.runs import Run

SHAPES = {
    "lora": "a LoRA adapter for",
    "merged_16bit": "a fine-tuned copy of",
    "merged_4bit": "a fine-tuned 4-bit copy of",
}
METHODS = {
    "sft": "supervised fine-tuning (SFT), loss on assistant turns only",
    "kto": "Kahneman-Tversky optimisation (KTO, arXiv 2402.01306)",
    "sft-kto": "supervised fine-tuning (SFT), then Kahneman-Tversky optimisation (KTO, arXiv 2402.01306)",
}


def model_card(run: "Run", plan: Plan, lineage: dict[str, Any], repository: str, bytes_by_name: dict[str, int]) -> str:
    """The README.md of the repository: YAML front matter and Markdown, from the lineage and the run's reports."""
    form = plan.export.uploaded_form
    parts = [
        f"# {repository.rsplit('/', 1)[-1]}",
        _what(lineage, form),
        _use(lineage, form, repository, plan),
        _training(lineage),
        _data(lineage),
        _results(run, lineage),
        _checks(run, plan, lineage),
        _files(bytes_by_name),
        _licence(lineage),
        _made_with(lineage),
    ]
    return f"---\n{front_matter(lineage, form, plan)}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def front_matter(lineage: dict[str, Any], form: str, plan: Plan) -> str:
    """The card's YAML, in the Hub's own terms."""
    from huggingface_hub import ModelCardData

    base, licence = lineage["base"]["name"], lineage["base"].get("licence")
    names = [plan.stage(stage["name"]).data.dataset for stage in lineage["stages"]]
    datasets = list(dict.fromkeys(name for name in names if name))
    tags = ["finetui", "trl", *lineage["method"].split("-"), *(["lora"] if form == "lora" else [])]
    more: dict[str, Any] = {}
    if base.count("/") == 1:
        more |= {"base_model": base, "base_model_relation": "adapter" if form == "lora" else "finetune"}
    if licence == "other":
        more["license_name"] = "see-base-model"
    return ModelCardData(
        library_name="peft" if form == "lora" else "transformers",
        pipeline_tag="text-generation",
        license=licence,
        datasets=datasets or None,
        tags=[*tags, *(["gguf"] if plan.export.gguf else [])],
        ignore_metadata_errors=True,
        **more,
    ).to_yaml()


def _what(lineage: dict[str, Any], form: str) -> str:
    base = lineage["base"]["name"]
    link = f"[{base}](https://huggingface.co/{base})" if base.count("/") == 1 else base
    words = f"This is {SHAPES[form]} {link}, trained by {METHODS.get(lineage['method'], lineage['method'])}."
    trained_on = lineage["trained_on"]["name"]
    if trained_on != base:
        words += f" It was trained on {trained_on}"
        words += ", whose weights are quantised, and merged into the 16-bit ones." if form != "lora" else "."
    return words


def _use(lineage: dict[str, Any], form: str, repository: str, plan: Plan) -> str:
    if form == "lora":
        code = f"""from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{repository}")"""
    else:
        code = f"""from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repository}", dtype="auto")"""
    text = f"""## Use

```python
{code}
tokenizer = AutoTokenizer.from_pretrained("{repository}")
messages = [{{"role": "user", "content": "Hello"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=128)[0]))
```"""
    if plan.export.gguf:
        quantisation = next(one for one in ("Q4_K_M", "Q5_K_M", "Q8_0", "F16") if one in plan.export.gguf)
        text += f"""

The GGUF files run with llama.cpp and Ollama:

    llama-server -hf {repository}:{quantisation} --jinja
    ollama run hf.co/{repository}:{quantisation}"""
    return text


def _training(lineage: dict[str, Any]) -> str:
    adapter = lineage["adapter"]
    lines = ["## Training", ""]
    rows = [("", [stage["name"].upper() for stage in lineage["stages"]])]
    keys = list(dict.fromkeys(key for stage in lineage["stages"] for key in stage["settings"]))
    rows += [("steps", [count(stage["steps"] or "–") for stage in lineage["stages"]])]
    rows += [("duration", [duration(stage["seconds"]) for stage in lineage["stages"]])]
    for key in keys:
        rows.append((key, [_value(stage["settings"].get(key)) for stage in lineage["stages"]]))
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows]
    lines.insert(3, "|---" * (1 + len(lineage["stages"])) + "|")
    if adapter.get("r"):
        targets = adapter.get("target_modules")
        where = ", ".join(targets) if isinstance(targets, list) else str(targets)
        lines += ["", f"LoRA of rank {adapter['r']}, alpha {adapter['alpha']}, on {where}."]
    bits = lineage["trained_on"].get("bits")
    lines.append(
        f"Trained in {f'{bits} bit, ' if bits else ''}{lineage['trained_on']['dtype']} on: {lineage['hardware']}."
    )
    return "\n".join(lines)


def _plain(text: object) -> str:
    """Foreign text in a line: what Markdown or HTML would act on is shown as it is."""
    return re.sub(r"([\\`*_{}\[\]<>|#!~&$])", r"\\\1", clean(text, 200))


def _value(value: Any) -> str:
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _data(lineage: dict[str, Any]) -> str:
    lines = ["## Data", ""]
    for stage in lineage["stages"]:
        data = stage["data"]
        words = f"* **{stage['name'].upper()}**: {_plain(data['name'])}"
        if data.get("rows"):
            words += f"; {count(data['rows'])} rows, {count(data['examples'])} trained on, "
            words += f"{count(data['left_out'] or 0)} left out"
            words += f", {count(data['held_out'])} held out" if data.get("held_out") else ""
            labels = data.get("labels") or {}
            if labels.get("true") or labels.get("false"):
                words += f"; {count(labels.get('true', 0))} good and {count(labels.get('false', 0))} bad answers"
            words += (
                f"; {data['tokens']:,} tokens, {data['trained_tokens']:,} of them trained" if data.get("tokens") else ""
            )
        lines.append(words)
        for reason, many in list((data.get("left_out_reasons") or {}).items())[:5]:
            lines.append(f"  * left out: {count(many)} × {_plain(reason)}")
        for name, digest in (data.get("files") or {}).items():
            lines.append(f"  * SHA-256 of {_plain(name)}: `{digest}`")
    return "\n".join(lines)


def _results(run: "Run", lineage: dict[str, Any]) -> str:
    """The table of the run's evaluation, where it has one."""
    from core.evaluation import HELD_OUT, evaluation_path, read_report
    from core.evaluation_report import table_lines

    report = read_report(evaluation_path(run, HELD_OUT))
    if report is None:
        return "## Results\n\nIt was not evaluated by the tool that trained it."
    head = f"Answers to {int(report['prompts']):,} held-out prompts:"
    return "\n".join(["## Results", "", head, "", *table_lines(report)])


def _checks(run: "Run", plan: Plan, lineage: dict[str, Any]) -> str:
    lines = []
    check = lineage.get("check") or {}
    if "token_agreement" in check:
        lines.append(
            f"* The merged model gives {100 * check['token_agreement']:.1f} % of the tokens of the model as it was "
            f"trained ({check['reference']}; {count(check['tokens'])} tokens of {count(check['prompts'])} greedy "
            f"answers; mean KL divergence {check['mean_kl']:.2g})."
        )
    files = read_report(run, "gguf").get("files", {})
    for quantisation in plan.export.gguf:
        entry = files.get(quantisation, {})
        if "token_agreement" in entry:
            words = f"* {quantisation}: {100 * entry['token_agreement']:.1f} % of the merged model's tokens"
            if "calls" in entry:
                words += f", {count(entry['valid'])} of {count(entry['calls'])} tool calls well-formed"
            lines.append(f"{words} (in llama.cpp, greedy).")
    return "\n".join(["## Checks of the exported files", "", *lines]) if lines else ""


def _files(bytes_by_name: dict[str, int]) -> str:
    large = [(name, size) for name, size in bytes_by_name.items() if size >= 10_000_000]
    if not large:
        return ""
    return "\n".join(["## Files", "", *(f"* `{name}`, {size / 1e6:,.0f} MB" for name, size in large)])


def _licence(lineage: dict[str, Any]) -> str:
    base, licence = lineage["base"]["name"], lineage["base"].get("licence")
    if licence and licence != "other":
        return f"## Licence\n\nThe base, {base}, is licensed under {licence}; its terms hold for this model."
    return f"## Licence\n\nThe terms of the base, {base}, hold for this model: see its own page."


def _made_with(lineage: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in lineage["versions"].items())
    return f"## Made with\n\nfinetui {lineage['finetui']}, {packages}. Where it comes from, for machines: `{LINEAGE}`."


def public_lineage(run: "Run", plan: Plan) -> dict[str, Any]:
    """The lineage of what is uploaded: the one beside the merged weights, or made for an adapter on its own."""
    from core.artefacts import chosen, fingerprint
    from core.bases import find_base, licence_of, public_name
    from core.lineage import lineage_of

    form = plan.export.uploaded_form
    if form != "lora":
        return json.loads((merged_folder(run, form) / LINEAGE).read_text(encoding="utf-8"))
    trained = chosen(run, plan.export)
    lineage = lineage_of(run, plan, trained, fingerprint(trained.folder))
    name = lineage["trained_on"]["name"]
    here = find_base(plan, lambda text: None, fetch=False).here if plan.export.gguf else None
    lineage["base"] = {
        "name": name,
        "commit": plan.model.revision,
        "licence": licence_of(public_name(plan, name), here),
    }
    lineage["weights"] = {"form": "lora"}
    return lineage
