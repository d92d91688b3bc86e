"""The plan: where each value comes from, what a file may say, and that every key reaches the trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from core.config import OPTIONS, Resolved, load_plan, parse_setting, resolve, save_plan
from core.errors import FinetuiError
from core.paths import configs_dir
from core.plan import SIZES, Plan, options
from core.stages import METHODS

PRESETS = {"sft.yaml": "sft", "kto.yaml": "kto", "sft-kto.yaml": "sft-kto", "demo.yaml": "sft-kto"}
WritePlan = Callable[..., Path]

# Options of a stage that finetui carries out itself; every other one must reach TRL's config.
OWN = {
    "max_length", "max_prompt_length", "extra", "values", "two_stage_lr", "lr_reduction_step", "lr_reduction_factor",
    "sign_correction", "padding_free", "regroup", "save_total_limit", "desirable_weight", "undesirable_weight", "beta",
    "early_stopping_patience", "early_stopping_threshold", "load_best_model_at_end", "on_alarm",
}  # fmt: skip


@pytest.fixture
def plan_file(tmp_path: Path) -> WritePlan:
    def write(text: str | bytes, name: str = "plan.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def resolved(method: str | None = "sft", file: Path | None = None, **flags: Any) -> Resolved:
    given_flags = {key.replace("__", "."): (value, f"flag {key}") for key, value in flags.items()}
    return resolve(method, file, given_flags, gpu_present=False)


def refused(method: str | None, file: Path | None = None, **flags: Any) -> FinetuiError:
    with pytest.raises(FinetuiError) as caught:
        resolved(method, file, **flags)
    error = caught.value
    assert error.exit_code == 2
    assert error.message.endswith(".") and "\n" not in f"{error}", error
    return error


# --- precedence ---


def test_a_flag_wins_over_the_file_the_file_over_the_size_the_size_over_the_method_and_that_over_the_default(
    plan_file: WritePlan,
) -> None:
    file = plan_file("model: {size: 3b}\nsft: {batch_size: 5, learning_rate: 3e-5}\n")
    found = resolved("sft", file, sft__batch_size=7)
    sft, sources = found.plan.sft, found.sources
    assert (sft.batch_size, sources["sft.batch_size"]) == (7, "flag sft__batch_size")
    assert (sft.learning_rate, sources["sft.learning_rate"]) == (3e-5, f"file {file}")
    assert (sft.gradient_accumulation_steps, sources["sft.gradient_accumulation_steps"]) == (2, "size 3b")
    assert (sft.num_train_epochs, sources["sft.num_train_epochs"]) == (3, "preset sft.yaml")
    assert "kto.num_train_epochs" not in sources and found.plan.kto.num_train_epochs == 3


def test_every_value_of_the_printed_plan_is_followed_by_where_it_came_from() -> None:
    lines = resolved("kto", kto__beta=0.2).as_yaml().splitlines()
    leaves = [line for line in lines if not line.split("#")[0].strip().endswith(":")]
    assert len(leaves) == len([path for path in OPTIONS if not path.startswith("sft.")])
    assert all(" # " in line for line in leaves)
    assert any(line.split() == ["beta:", "0.2", "#", "flag", "kto__beta"] for line in leaves)


@pytest.mark.parametrize(
    ("size", "model", "lora", "sft", "rate", "kto"),
    [
        ("3b", "unsloth/Qwen2.5-3B-Instruct-bnb-4bit", (32, 64), (12, 2), 2e-4, (16, 2)),
        ("7b", "unsloth/mistral-7b-v0.3-bnb-4bit", (64, 128), (6, 4), 2e-4, (8, 4)),
        ("13b", "unsloth/llama-2-13b-bnb-4bit", (64, 128), (4, 6), 2e-4, (4, 8)),
        ("20b", "unsloth/gpt-oss-20b-unsloth-bnb-4bit", (128, 256), (4, 6), 1e-4, (4, 8)),
    ],
)
def test_a_size_really_changes_model_adapter_batch_and_accumulation(
    size: str, model: str, lora: tuple[int, int], sft: tuple[int, int], rate: float, kto: tuple[int, int]
) -> None:
    plan = resolved("sft-kto", model__size=size).plan
    assert (plan.model.name, plan.model.load_in_4bit) == (model, True)
    assert (plan.lora.r, plan.lora.alpha) == lora
    assert (plan.sft.batch_size, plan.sft.gradient_accumulation_steps) == sft
    assert (plan.sft.learning_rate, plan.sft.max_length) == (rate, 2048)
    assert (plan.kto.batch_size, plan.kto.gradient_accumulation_steps) == kto
    assert (plan.kto.max_length, plan.kto.max_prompt_length) == (4096, 2048)


def test_the_default_size_is_7b_with_a_gpu_and_the_small_real_model_without() -> None:
    assert resolve("sft", gpu_present=True).plan.model.size == "7b"
    small = resolve("sft", gpu_present=False)
    assert (small.plan.model.size, small.plan.model.load_in_4bit) == ("135m", False)
    assert small.sources["model.size"] == "no NVIDIA GPU here"


def test_a_custom_model_is_not_given_a_size() -> None:
    plan = resolved("kto", model__name="someone/model").plan
    assert (plan.model.name, plan.model.size) == ("someone/model", None)
    assert plan.kto.learning_rate <= 1e-5, "KTO's own default is gentle, whatever the model"


def test_the_command_wins_over_the_method_in_the_file(plan_file: WritePlan) -> None:
    file = plan_file("method: kto\n")
    assert resolved(None, file).plan.method == "kto"
    found = resolved("sft", file)
    assert (found.plan.method, found.sources["method"]) == ("sft", "command")


def test_the_originals_kto_values_are_offered_and_any_of_them_can_still_be_changed(plan_file: WritePlan) -> None:
    def values(found: Resolved) -> tuple[float | None, ...]:
        kto = found.plan.kto
        return kto.learning_rate, kto.beta, kto.desirable_weight, kto.undesirable_weight

    for size in ("135m", "3b", "7b", "13b"):
        assert values(resolved("kto", model__size=size, kto__values="original")) == (2e-7, 0.3, 1.0, 1.0)
    assert values(resolved("kto", model__size="20b", kto__values="original")) == (5e-7, 0.05, 1.0, 1.0)
    assert values(resolved("kto", model__name="a/b", kto__values="original")) == (2e-7, 0.3, 1.0, 1.0)
    assert values(resolved("kto", plan_file("kto: {values: original}"))) == (2e-7, 0.3, 1.0, 1.0)
    assert values(resolved("kto", kto__values="original", kto__beta=0.7))[:2] == (2e-7, 0.7)
    assert values(resolved("kto", plan_file("kto: {beta: 0.7}"), kto__values="original"))[1] == 0.3
    measured = values(resolved("kto", model__size="7b"))
    assert measured[0] is not None and measured[0] > 1e-6 and measured[2:] == (None, None)


@pytest.mark.parametrize("name", ["file", "dataset"])
def test_own_data_switches_the_demos_data_off_wherever_it_is_named(plan_file: WritePlan, name: str) -> None:
    by_flag = resolved("sft", **{f"sft__data__{name}": "mine"})
    by_file = resolved("sft", plan_file(f"sft: {{data: {{{name}: mine}}}}"))
    in_a_copy_of_the_preset = resolved("sft", plan_file(f"sft: {{data: {{{name}: mine, demo: true}}}}"))
    for found in (by_flag, by_file, in_a_copy_of_the_preset):
        assert found.plan.sft.data.demo is False
        assert found.sources["sft.data.demo"] == "own data given"
    assert resolved("sft").plan.sft.data.demo is True


def test_the_rows_named_by_a_flag_replace_those_of_the_file(plan_file: WritePlan) -> None:
    file = plan_file("sft: {data: {dataset: someone/rows}}\nkto: {data: {file: kept.jsonl}}")
    plan = resolved("sft-kto", file, sft__data__file="mine.jsonl").plan
    assert (plan.sft.data.file, plan.sft.data.dataset) == ("mine.jsonl", None)
    assert plan.kto.data.file == "kept.jsonl"
    demo = resolved("sft-kto", file, sft__data__demo=True).plan
    assert (demo.sft.data.demo, demo.sft.data.dataset) == (True, None)


# --- what a file may say ---


@pytest.mark.parametrize("written", ["2e-7", "2.0e-7", "0.0000002", "2E-7", "'2e-7'"])
def test_a_number_with_an_exponent_is_a_number(plan_file: WritePlan, written: str) -> None:
    plan = resolved("kto", plan_file(f"kto: {{learning_rate: {written}, extra: {{adam_epsilon: {written}}}}}")).plan
    assert plan.kto.learning_rate == 2e-7 and type(plan.kto.learning_rate) is float
    assert plan.kto.extra == {"adam_epsilon": 2e-7}
    assert parse_setting(f"kto.learning_rate={written}")[0] == "kto.learning_rate"


@pytest.mark.parametrize(
    ("text", "line", "says", "advice"),
    [
        ("sft:\n  batch_size: 2\n  learning_rte: 1e-4\n", 3, "sft.learning_rte", "Did you mean sft.learning_rate?"),
        ("\n\nmodle:\n  size: 7b\n", 3, "modle", "Did you mean model?"),
        ("batch_size: 4\n", 1, "batch_size", "batch_size?"),
        ("zzzzzz: 4\n", 1, "zzzzzz", "`finetui plan` lists every key."),
        ("sft:\n  seed: 1\n  seed: 2\n", 3, "the key sft.seed stands twice", "Keep one"),
        ("sft: {}\nkto: {}\nsft: {}\n", 3, "the key sft stands twice", "Keep one"),
        ("sft:\n  extra:\n    adam_beta1: 0.9\n    adam_beta1: 0.8\n", 4, "sft.extra.adam_beta1 stands twice", "Keep"),
        ("sft: 3\n", 1, "sft needs keys below it", "section"),
        ("? [a, b]\n: 1\n", 1, "a key must be a word", "configs/sft.yaml"),
    ],
)
def test_a_wrong_key_is_told_with_file_line_and_the_nearest_one(
    plan_file: WritePlan, text: str, line: int, says: str, advice: str
) -> None:
    file = plan_file(text)
    error = refused("sft", file)
    assert f"{file}, line {line}: " in error.message and says in error.message
    assert advice in error.advice


BOMB = "a: &a [x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- sft\n- kto\n", "is a list, not keys with values"),
        ("sft\n", "is a single value, not keys with values"),
        (BOMB, "uses YAML aliases"),
        (b"note: \xff\xfe\n", "is not UTF-8 text"),
        (b"sft: {}\n#" + b"x" * 1_000_001, "is larger than 1 MB"),
        ("sft: {batch_size: 4\n", "line 2 is not valid YAML"),
        ("sft:\n\tseed: 1\n", "line 2 is not valid YAML"),
        ('note: "\0"\n', "is not valid YAML"),
        ("[" * 1500, "is not valid YAML"),
        ("sft: {seed: " + "9" * 5000 + "}\n", "is not valid YAML"),
        ("sft: {}\n---\nkto: {}\n", "line 2 is not valid YAML"),
        ("note: !!python/object/apply:os.system [ls]\n", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_plan_is_refused_in_one_sentence(plan_file: WritePlan, text: str | bytes, says: str) -> None:
    file = plan_file(text)
    error = refused("sft", file)
    assert says in error.message and str(file) in error.message


def test_a_plan_that_is_missing_or_a_folder_is_refused(tmp_path: Path) -> None:
    assert "No such file" in refused("sft", tmp_path / "none.yaml").message
    assert "Is a directory" in refused("sft", tmp_path).message


@pytest.mark.parametrize("text", ["", "# only a comment\n", "sft:\n", "\ufeffsft: {}\n"])
def test_a_plan_that_says_nothing_changes_nothing(plan_file: WritePlan, text: str) -> None:
    assert resolved("sft", plan_file(text)).plan == resolved("sft").plan


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sft.batch_size", "four"), ("sft.batch_size", 2.5), ("sft.batch_size", True), ("sft.batch_size", 0),
        ("sft.batch_size", None), ("sft.batch_size", [4]), ("sft.learning_rate", -1e-4), ("sft.learning_rate", 0),
        ("sft.learning_rate", float("nan")), ("sft.learning_rate", False), ("sft.max_steps", 0), ("sft.seed", 2**32),
        ("sft.max_length", 4), ("sft.lr_scheduler_type", "cosin"), ("sft.data.too_long", "keep"),
        ("sft.data.holdout", 0.9), ("sft.num_train_epochs", 0), ("sft.extra", [1]), ("sft.extra", {"a": float("inf")}),
        ("lora.r", "big"), ("lora.target_modules", []), ("lora.target_modules", "q_proj"), ("model.dtype", "int3"),
        ("note", 5), ("device", "tpu"), ("tracking.report_to", ["mlflow"]), ("model.name", ["a"]), ("model.size", "8b"),
        ("model.size", [7]), ("kto.beta", 0), ("kto.lr_reduction_factor", 2), ("evaluate.enabled", "perhaps"),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_kind_is_refused_by_key_and_source(key: str, value: object) -> None:
    error = refused("sft-kto", **{key.replace(".", "__"): value})
    if key != "model.size":
        assert error.message.startswith(key)


def test_kto_with_a_batch_of_one_row_is_refused_because_rows_need_a_partner() -> None:
    error = refused("kto", kto__batch_size=1)
    assert error.message.startswith("kto.batch_size: ") and "at least 2" in error.message
    assert "flag kto__batch_size" in error.message


@pytest.mark.parametrize("base", [{"model__size": "7b"}, {"model__size": "135m"}, {"model__name": "some/model"}])
def test_a_shorter_row_brings_the_longest_prompt_down_with_it(base: dict[str, Any]) -> None:
    found = resolved("kto", kto__max_length="512", **base)
    assert (found.plan.kto.max_prompt_length, found.sources["kto.max_prompt_length"]) == (512, "kto.max_length")


def test_a_prompt_may_not_be_allowed_to_fill_the_whole_row() -> None:
    assert (
        "no room would be left for an answer" in refused("kto", kto__max_length=512, kto__max_prompt_length=600).message
    )


def test_a_method_or_setting_that_does_not_exist_is_refused() -> None:
    assert "'dpo'" in refused("dpo").message
    for text in ("sft.seed", "sft.sed=3", "=3", "sft.seed=[", "sft=3"):
        with pytest.raises(FinetuiError):
            parse_setting(text)


def test_extra_arguments_pass_through_from_file_and_command_line(plan_file: WritePlan) -> None:
    path, value = parse_setting("sft.extra.adam_beta2=0.95")
    plan = resolved("sft", plan_file("sft: {extra: {adam_beta1: 0.8}}"), **{path.replace(".", "__"): value}).plan
    assert plan.sft.extra == {"adam_beta1": 0.8, "adam_beta2": 0.95}


# --- the presets ---


def test_the_shipped_presets_are_the_ones_tested_here() -> None:
    assert {file.name for file in configs_dir().iterdir()} == {*PRESETS, "models.yaml"}
    assert tuple(yaml.safe_load((configs_dir() / "models.yaml").read_text())) == SIZES


def leaves(tree: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted paths of a YAML tree, down to the plan's options."""
    found = []
    for key, value in tree.items():
        path = f"{prefix}{key}"
        found += [path] if path in OPTIONS or not isinstance(value, dict) else leaves(value, f"{path}.")
    return found


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_names_every_option_of_its_stages_and_runs_as_it_is(name: str) -> None:
    method = PRESETS[name]
    stages = method.split("-")
    wanted = {path for path in OPTIONS if path.split(".")[0] not in ("sft", "kto") or path.split(".")[0] in stages}
    tree = yaml.safe_load((configs_dir() / name).read_text())
    assert set(leaves(tree)) == wanted
    found = resolved(None, configs_dir() / name)
    assert found.plan.method == method
    assert all(found.plan.stage(stage).data.demo for stage in stages)


def test_on_and_off_may_stand_without_quotes(plan_file: WritePlan) -> None:
    found = resolved("sft", plan_file("sft: {gradient_checkpointing: off, padding_free: on}\n")).plan.sft
    assert (found.gradient_checkpointing, found.padding_free) == ("off", "on")


@pytest.mark.parametrize("method", METHODS)
def test_a_methods_preset_given_as_a_file_changes_nothing(method: str) -> None:
    assert resolved(method, configs_dir() / f"{method}.yaml").plan == resolved(method).plan


@pytest.mark.parametrize("name", PRESETS)
def test_the_annotations_of_a_preset_are_the_helps_of_its_options(name: str) -> None:
    text = (configs_dir() / name).read_text()
    stages = PRESETS[name].split("-")
    shown = [option for option in options() if option.path.split(".")[0] not in {"sft", "kto"} - set(stages)]
    assert len(shown) > 40
    assert [option.path for option in shown if f"# {option.help}" not in text] == []


# --- TRL ---


def trl_config(plan: Plan, stage: str, folder: Path) -> Any:
    """The real SFTConfig or KTOConfig of a plan's stage, as the trainer builds it."""
    from trl import KTOConfig, SFTConfig

    from core import train

    arguments = train.arguments(plan, plan.stage(stage), folder, "run")
    return (KTOConfig if stage == "kto" else SFTConfig)(**arguments)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("size", SIZES)
def test_trl_accepts_every_preset_at_every_size_and_takes_its_values(name: str, size: str, tmp_path: Path) -> None:
    plan = resolved(None, configs_dir() / name, model__size=size, device="cpu").plan
    for stage in plan.training_stages:
        settings_of_stage = plan.stage(stage)
        settings_of_stage.optim = "adamw_torch"
        config = trl_config(plan, stage, tmp_path)
        assert config.learning_rate == settings_of_stage.learning_rate
        assert config.per_device_train_batch_size == settings_of_stage.batch_size
        assert config.gradient_accumulation_steps == settings_of_stage.gradient_accumulation_steps
        assert config.num_train_epochs == settings_of_stage.num_train_epochs
        assert config.max_steps == settings_of_stage.max_steps
        assert config.get_warmup_steps(1000) == 1000 * settings_of_stage.warmup_ratio
        assert str(config.lr_scheduler_type.value) == settings_of_stage.lr_scheduler_type
        assert (config.save_steps, config.logging_steps) == (
            settings_of_stage.save_steps,
            settings_of_stage.logging_steps,
        )
        assert (config.seed, config.max_grad_norm) == (settings_of_stage.seed, settings_of_stage.max_grad_norm)
        assert config.report_to == [] and config.output_dir.startswith(str(tmp_path))


def other_value(path: str) -> Any:
    """A valid value of an option that is not its default."""
    option = OPTIONS[path]
    if option.choices:
        return next(
            word for word in option.choices if word not in (option.default, "auto", "adamw_8bit", "adamw_torch")
        )
    if option.kind is bool:
        return not option.default
    if path.endswith(".eval_steps"):
        return 7
    return (option.default or 0) + 3 if option.kind is int else (option.default or 0) / 2 + 1e-6


STAGE_OPTIONS = [path for path in OPTIONS if path.split(".")[0] in ("sft", "kto") and ".data." not in path]


@pytest.mark.parametrize("path", STAGE_OPTIONS)
def test_every_option_of_a_stage_reaches_trl_unless_finetui_carries_it_out(path: str, tmp_path: Path) -> None:
    stage, key = path.split(".")
    if key in OWN:
        return
    base = {"device": "cpu", f"{stage}__optim": "adamw_torch", f"{stage}__data__holdout": 0.1}
    before = trl_config(resolved(stage, **base).plan, stage, tmp_path).to_dict()
    after = trl_config(resolved(stage, **{**base, path.replace(".", "__"): other_value(path)}).plan, stage, tmp_path)
    assert {name for name, value in after.to_dict().items() if value != before[name]}, f"{path} changes nothing"


def test_extra_arguments_reach_trl_and_unknown_or_owned_ones_are_refused_by_name(tmp_path: Path) -> None:
    plan = resolved(
        "sft", device="cpu", sft__optim="adamw_torch", sft__extra={"adam_beta2": 0.9, "neftune_noise_alpha": 5}
    ).plan
    config = trl_config(plan, "sft", tmp_path)
    assert (config.adam_beta2, config.neftune_noise_alpha) == (0.9, 5)
    for extra, says in (({"adam_beta_2": 0.9}, "adam_beta2"), ({"packing": True}, "own option")):
        with pytest.raises(FinetuiError) as caught:
            trl_config(resolved("sft", device="cpu", sft__extra=extra).plan, "sft", tmp_path)
        assert next(iter(extra)) in caught.value.message and says in caught.value.advice


# --- saved and read back ---

awkward = ["auto", "null", "2e-7", "true", "#x", "a: b", "- a", "a\nb", "\u2028", "'"]
words = st.text(max_size=30) | st.sampled_from(awkward)
scalars = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
extras = st.dictionaries(
    st.text("abcdefg_", min_size=1, max_size=9), scalars | words | st.lists(scalars, max_size=3), max_size=3
)


def values_of(path: str) -> st.SearchStrategy[Any]:
    option = OPTIONS[path]
    if path.endswith(".extra"):
        return extras
    if path.endswith(".data.files"):
        return st.dictionaries(words, st.floats(0.01, 100), max_size=3)
    if path.endswith(".data.columns"):
        return st.dictionaries(st.sampled_from(["prompt", "completion", "label"]), words, max_size=3)
    if option.choices and option.kind is not list:
        return st.sampled_from(option.choices)
    if path == "lora.target_modules":
        return st.lists(words, min_size=1, max_size=4)
    if option.kind is list:
        return st.lists(st.sampled_from(option.choices) if option.choices else words, max_size=3, unique=True)
    if path == "export.upload":
        return st.sampled_from(["me/model", "my-team/Model_1.5"])
    kinds: dict[type, st.SearchStrategy[Any]] = {
        bool: st.booleans(), int: st.integers(8, 127), float: st.floats(1e-9, 0.5), str: words,
    }  # fmt: skip
    return kinds[option.kind]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plans")


@pytest.mark.parametrize(
    "note", [*awkward, "a\r\nb", "x\x85y", "\t", "\x07", "#", " ", "long word " * 2000, "ü 日本 🙂", "\ufeff"]
)
def test_any_note_is_kept_as_it_was_written(note: str, tmp_path: Path) -> None:
    found = resolved("sft", note=note, model__name=note or "x")
    save_plan(found, tmp_path / "plan.yaml")
    assert load_plan(tmp_path / "plan.yaml") == found.plan
    assert len((tmp_path / "plan.yaml").read_text().split("\n")) == len(found.as_yaml().split("\n")) + 1


def test_a_source_with_a_line_end_in_its_name_does_not_break_the_plan(plan_file: WritePlan, tmp_path: Path) -> None:
    found = resolved("sft", plan_file("note: x\n", name="a\nb: [.yaml"))
    save_plan(found, tmp_path / "saved.yaml")
    assert load_plan(tmp_path / "saved.yaml") == found.plan


@settings(max_examples=40)
@given(st.data(), st.sampled_from(METHODS))
def test_a_saved_plan_is_read_back_equal(scratch: Path, data: st.DataObject, method: str) -> None:
    free = [path for path in OPTIONS if path != "method" and "max_prompt" not in path and "model.size" not in path]
    chosen = data.draw(st.lists(st.sampled_from(free), max_size=12, unique=True))
    flags = {path: (data.draw(values_of(path), label=path), data.draw(words)) for path in chosen}
    flags |= {"kto.max_prompt_length": (8, "test")} if "kto" in method else {}
    flags |= {f"{stage}.data.holdout": (0.1, "test") for stage in method.split("-")}  # what stops early needs some
    found = resolve(method, None, flags, gpu_present=data.draw(st.booleans()))
    path = scratch / "plan.yaml"
    save_plan(found, path)
    assert load_plan(path) == found.plan
