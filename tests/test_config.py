"""The settings: each explained and typed once, refused where they cannot work, written and read back as they are."""

import dataclasses
import inspect
import json
import re
import typing
from importlib import import_module

import pytest

from ft.checks import field_types, flag
from ft.config import Config
from ft.errors import FtError, UsageError
from ft.settings import (
    FREE_ON_RESUME,
    LONGER_ON_RESUME,
    NOT_RECORDED,
    field_help,
    find_changed_settings,
    parse_value,
    read_config_file,
)

FIELDS = {field.name: field for field in dataclasses.fields(Config)}
FIXED = {"class_weights": "balanced", "encoding": "cp1252"}  # texts of which not every one is valid
EVERY_FIELD = pytest.mark.parametrize("name", FIELDS)


def other_value(name):
    """A value of the field that is valid and is not its default."""
    kind, choices = field_types(Config)[name]
    default = FIELDS[name].default
    if choices:
        return next(choice for choice in choices if choice != default)
    number = (default or 0) + 3 if kind is int else None
    text = f"{name} of mine" if name.endswith("_column") else FIXED.get(name, "somewhere")
    return {bool: True, int: number, float: 0.625, str: text, tuple: ("h.1.*", "ln_f.bias")}[kind]


def needed(name):
    """The settings without which one has no effect."""
    return {"lora_rank": 8} if name in ("lora_alpha", "lora_dropout", "lora_targets") else {}


def changed(*names):
    settings = {}
    for name in names:
        settings |= {**needed(name), name: other_value(name)}
    return Config(**settings)


# --- what a field consists of -----------------------------------------------------------------------------------------


@EVERY_FIELD
def test_every_field_has_a_help_of_its_own(name):
    text = field_help()[name]
    assert text == text.strip()
    assert "\n" not in text
    assert len(text.split()) >= 3
    assert list(field_help().values()).count(text) == 1


HYPER_PARAMETERS = (
    "epochs",
    "batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "learning_rate",
    "warmup_steps",
)
HYPER_PARAMETERS += ("lr_schedule", "weight_decay", "max_grad_norm", "dropout", "seed", "lora_rank")


@pytest.mark.parametrize("name", HYPER_PARAMETERS)
def test_every_hyper_parameter_is_explained_below_its_help(name):
    source = inspect.getsource(Config)
    found = re.search(rf'^    {name}: [^=]*= setting\((?:[^"]|"[^"]+")*?\)\n    """([^"]*)"""$', source, re.MULTILINE)
    explanation = found[1]
    assert len(explanation.split()) > 25
    if name not in ("seed", "lr_schedule"):
        assert {"large", "small", "many", "few"} & set(re.findall(r"[a-z]+", explanation))
    for function, path in re.findall(r"`(\w+)` in (ft/\w+\.py)", explanation):
        assert hasattr(import_module(path.removesuffix(".py").replace("/", ".")), function)


@EVERY_FIELD
def test_every_fields_type_is_that_of_its_annotation_and_default(name):
    kind, choices = field_types(Config)[name]
    default, hint = FIELDS[name].default, typing.get_type_hints(Config)[name]
    assert kind in (str, int, float, bool, tuple)
    assert default is None or type(default) is kind
    assert choices == (typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ())
    assert not choices or default in choices
    assert (default is None) == (type(None) in typing.get_args(hint))
    assert flag(name) == "--" + name.replace("_", "-")


def test_helps_and_types_are_of_the_fields_and_of_nothing_else():
    assert list(field_help()) == list(field_types(Config)) == list(FIELDS)
    assert set(FREE_ON_RESUME) <= set(FIELDS)
    assert set(NOT_RECORDED) <= set(FREE_ON_RESUME)


def test_the_defaults_are_the_recipe():
    recipe = {
        "model": "openai-community/gpt2",
        "init": "pretrained",
        "dataset": "cornell-movie-review-data/rotten_tomatoes",
        "epochs": 1.0,
        "max_steps": None,
        "batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_length": 32,
        "seed": 42,
        "learning_rate": 2e-5,
        "lr_schedule": "linear",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "dropout": None,
        "activation_checkpointing": "none",
        "logging_steps": 100,
        "eval_steps": 100,
        "save_steps": 100,
    }
    defaults = dataclasses.asdict(Config())
    assert {name: defaults[name] for name in recipe} == recipe


def test_nothing_changes_a_configuration():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("batch_size", "16", 16),
        ("max_steps", "3", 3),
        ("warmup_steps", "-1", -1),
        ("epochs", "0.5", 0.5),
        ("epochs", "2", 2.0),
        ("learning_rate", "5e-5", 5e-5),
        ("dropout", "0", 0.0),
        ("output_dir", "my runs/1", "my runs/1"),
        ("precision", "bf16", "bf16"),
        ("label_names", "1,2", "1,2"),
        ("freeze", ["wte.weight", "h.0.*"], ("wte.weight", "h.0.*")),
    ],
)
def test_text_becomes_the_type_of_the_field(name, text, value):
    parsed = parse_value(name, text)
    assert (parsed, type(parsed)) == (value, type(value))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("batch_size", "eight", "--batch-size is 'eight', it must be a whole number"),
        ("batch_size", "8.0", "--batch-size is '8.0', it must be a whole number"),
        ("max_steps", "1e3", "--max-steps is '1e3', it must be a whole number"),
        ("seed", "", "--seed is '', it must be a whole number"),
        ("epochs", "one", "--epochs is 'one', it must be a number"),
        ("learning_rate", "2e-", "--learning-rate is '2e-', it must be a number"),
    ],
)
def test_text_that_is_not_a_number_is_refused(name, text, message):
    with pytest.raises(UsageError) as raised:
        parse_value(name, text)
    assert raised.value.problems == (message,)


WRONG = [
    ({"batch_size": 0}, "--batch-size is 0, it must be at least 1"),
    ({"batch_size": -8}, "--batch-size is -8, it must be at least 1"),
    ({"gradient_accumulation_steps": 0}, "--gradient-accumulation-steps is 0, it must be at least 1"),
    ({"eval_batch_size": 0}, "--eval-batch-size is 0, it must be at least 1"),
    ({"max_steps": 0}, "--max-steps is 0, it must be at least 1"),
    ({"max_length": 1}, "--max-length is 1, it must be at least 2"),
    ({"seed": -1}, "--seed is -1, it must be at least 0"),
    ({"seed": 2**63}, "--seed is 9223372036854775808, it must be below 2**63"),
    ({"epochs": 0.0}, "--epochs is 0.0, it must be above 0 and at most 1000000"),
    ({"epochs": -1.0}, "--epochs is -1.0, it must be above 0 and at most 1000000"),
    ({"epochs": float("nan")}, "--epochs is nan, it must be finite"),
    ({"epochs": 10**400}, f"--epochs is 1{'0' * 17}...{'0' * 19}, it must be finite"),
    ({"epochs": 1e7}, "--epochs is 10000000.0, it must be above 0 and at most 1000000"),
    ({"max_steps": 2**63}, "--max-steps is 9223372036854775808, it must be below 2**63"),
    ({"text_column": "label"}, "--text-column and --label-column are both 'label': the model would read its answer"),
    ({"model": "a\0b"}, "--model is 'a\\x00b', it must not hold a NUL character"),
    ({"epochs": float("inf")}, "--epochs is inf, it must be finite"),
    ({"learning_rate": -1e-5}, "--learning-rate is -1e-05, it must be at least 0.0"),
    ({"learning_rate": float("nan")}, "--learning-rate is nan, it must be finite"),
    ({"warmup_steps": -1}, "--warmup-steps is -1, it must be at least 0"),
    ({"weight_decay": -0.1}, "--weight-decay is -0.1, it must be at least 0.0"),
    ({"max_grad_norm": -1.0}, "--max-grad-norm is -1.0, it must be at least 0.0"),
    ({"max_grad_norm": float("inf")}, "--max-grad-norm is inf, it must be finite"),
    ({"dropout": 1.0}, "--dropout is 1.0, it must be below 1"),
    ({"dropout": -0.1}, "--dropout is -0.1, it must be at least 0.0"),
    ({"logging_steps": 0}, "--logging-steps is 0, it must be at least 1"),
    ({"eval_steps": 0}, "--eval-steps is 0, it must be at least 1"),
    ({"save_steps": 0}, "--save-steps is 0, it must be at least 1"),
    ({"keep_checkpoints": 0}, "--keep-checkpoints is 0, it must be at least 1"),
    ({"init": "zeros"}, "--init is 'zeros', it must be one of pretrained, random"),
    ({"lr_schedule": "Linear"}, "--lr-schedule is 'Linear', it must be one of linear, cosine, constant"),
    ({"precision": "fp8"}, "--precision is 'fp8', it must be one of auto, fp32, bf16, fp16"),
    (
        {"activation_checkpointing": "all"},
        "--activation-checkpointing is 'all', it must be one of none, full, selective",
    ),
    ({"model": ""}, "--model is empty"),
    ({"output_dir": ""}, "--output-dir is empty"),
    ({"label_names": ""}, "--label-names is empty"),
    ({"batch_size": "8"}, "--batch-size is '8', it must be a whole number"),
    ({"batch_size": 8.0}, "--batch-size is 8.0, it must be a whole number"),
    ({"batch_size": True}, "--batch-size is True, it must be a whole number"),
    ({"batch_size": None}, "--batch-size is None, it must be a whole number"),
    ({"epochs": "1"}, "--epochs is '1', it must be a number"),
    ({"epochs": True}, "--epochs is True, it must be a number"),
    ({"model": 3}, "--model is 3, it must be a string"),
    ({"precision": ["fp32"]}, "--precision is ['fp32'], it must be a string"),
    ({"train_only": "wte.weight"}, "--train-only is 'wte.weight', it must be a list of strings"),
    ({"train_only": None}, "--train-only is None, it must be a list of strings"),
    ({"train_only": ("wte.weight", 3)}, "--train-only is 3, it must be a string"),
    ({"freeze": ("wte.weight", "")}, "--freeze is empty"),
    ({"freeze": ("a\0b",)}, "--freeze is 'a\\x00b', it must not hold a NUL character"),
    ({"demo": 1}, "--demo is 1, it must be true or false"),
    ({"overwrite": "no"}, "--overwrite is 'no', it must be true or false"),
    (
        {"resume": "newest", "overwrite": True},
        "--resume continues a run and --overwrite deletes it: give one of them",
    ),
    ({"lora_alpha": 4.0}, "--lora-alpha is for LoRA, which --lora-rank 8 or --adapter turns on"),
    ({"lora_dropout": 0.0}, "--lora-dropout is for LoRA, which --lora-rank 8 or --adapter turns on"),
    ({"lora_targets": ("c_attn",)}, "--lora-targets is for LoRA, which --lora-rank 8 or --adapter turns on"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_cannot_work_is_refused_with_flag_value_and_limit(settings, message):
    with pytest.raises(UsageError) as raised:
        Config(**settings)
    assert raised.value.problems == (message,)
    assert isinstance(raised.value, FtError)
    assert str(raised.value) == message


def test_all_problems_are_reported_at_once_in_the_order_of_the_fields():
    with pytest.raises(UsageError) as raised:
        Config(save_steps=0, precision="fp8", batch_size=0, epochs=float("nan"), resume="x", overwrite=True)
    assert raised.value.problems == (
        "--epochs is nan, it must be finite",
        "--batch-size is 0, it must be at least 1",
        "--precision is 'fp8', it must be one of auto, fp32, bf16, fp16",
        "--save-steps is 0, it must be at least 1",
        "--resume continues a run and --overwrite deletes it: give one of them",
    )
    assert str(raised.value).splitlines() == list(raised.value.problems)


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 1, "gradient_accumulation_steps": 1, "eval_batch_size": 1, "max_steps": 1, "max_length": 2},
        {"seed": 0, "learning_rate": 0.0, "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 0.0},
        {"seed": 2**63 - 1, "dropout": 0.0, "epochs": 1e-3},
        {"dropout": 0.999, "epochs": 2, "learning_rate": 1},
        {"max_steps": 2**63 - 1, "epochs": 1e6},
        {"logging_steps": 1, "eval_steps": 1, "save_steps": 1, "keep_checkpoints": 1},
        {"resume": "newest"},
        {"overwrite": True},
    ],
)
def test_the_limits_themselves_are_allowed(settings):
    assert dataclasses.asdict(Config(**settings)) == {**dataclasses.asdict(Config()), **settings}


# --- files ------------------------------------------------------------------------------------------------------------


@EVERY_FIELD
def test_every_setting_is_read_back_as_it_was_saved(tmp_path, name):
    config = changed(name)
    assert config != Config()
    config.save(tmp_path / "config.json")
    settings = read_config_file(tmp_path / "config.json")
    if name in NOT_RECORDED:
        assert name not in settings
    else:
        assert Config(**settings) == config


def test_the_file_is_json_in_the_order_of_the_fields(tmp_path):
    Config(output_dir="läufe/1").save(tmp_path / "config.json")
    text = (tmp_path / "config.json").read_text(encoding="utf-8")
    settings = dataclasses.asdict(Config(output_dir="läufe/1"))
    assert json.loads(text) == {
        name: list(value) if field_types(Config)[name][0] is tuple else value for name, value in settings.items()
    }
    assert list(json.loads(text)) == list(FIELDS)
    assert text.endswith("}\n")
    assert len(text.splitlines()) == len(FIELDS) + 2


def test_a_file_written_by_hand_may_have_fewer_settings(tmp_path):
    (tmp_path / "mine.json").write_text('{"batch_size": 16, "resume": "newest", "overwrite": true}')
    assert read_config_file(tmp_path / "mine.json") == {"batch_size": 16}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the configuration {path}: No such file or directory"),
        (b"", "the configuration {path} is not JSON: Expecting value: line 1 column 1 (char 0)"),
        (b"batch_size: 8", "the configuration {path} is not JSON: Expecting value: line 1 column 1 (char 0)"),
        (b"\xff\xfe", "the configuration {path} is not JSON: 'utf-8' codec can't decode byte 0xff in position 0: "
                      "invalid start byte"),
        (b"[]", "the configuration {path} must be a JSON object of settings"),
        (b"[" * 100_000, "the configuration {path} is not JSON: maximum recursion depth exceeded while decoding a JSON "
                         "array from a unicode string"),
        (b"null", "the configuration {path} must be a JSON object of settings"),
        (b'{"batchsize": 8}', "the configuration {path} has unknown settings: batchsize"),
        (b'{"seed": 1, "b": 8, "a": 0}', "the configuration {path} has unknown settings: b, a"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as raised:
        read_config_file(path)
    assert raised.value.problems == (message.format(path=path),)


# --- resuming ---------------------------------------------------------------------------------------------------------


@EVERY_FIELD
def test_only_settings_of_the_run_are_reported_as_changed(name):
    old, new = dataclasses.asdict(Config(**needed(name))), changed(name)
    message = f"{flag(name)} was {old[name]!r} and would be {getattr(new, name)!r}"
    if name == "processes":
        message = "--batch-size was 8 and would be 8 x 4 processes"
    assert find_changed_settings(old, new) == ([] if name in (*FREE_ON_RESUME, *LONGER_ON_RESUME) else [message])


def test_every_change_of_a_recorded_setting_is_reported():
    old = dataclasses.asdict(Config())
    assert find_changed_settings(old, Config()) == []
    assert find_changed_settings({}, changed("seed")) == []
    changes = find_changed_settings(old, changed("seed", "learning_rate", "epochs", "model", "device"))
    assert [sentence.split()[0] for sentence in changes] == ["--model", "--seed", "--learning-rate"]
    assert len({sentence.index(" was ") for sentence in changes}) == 1, "a table"
    assert len({sentence.index(" and would be ") for sentence in changes}) == 1


@pytest.mark.parametrize(("batch_size", "processes"), [(12, 1), (6, 2), (3, 4), (1, 12)])
def test_the_same_reviews_may_be_shared_by_more_or_fewer(batch_size, processes):
    old = dataclasses.asdict(Config(batch_size=6, processes=2))
    assert find_changed_settings(old, Config(batch_size=batch_size, processes=processes)) == []


def test_the_base_of_an_adapter_may_have_moved():
    old = dataclasses.asdict(Config(lora_rank=8, model="here"))
    assert find_changed_settings(old, Config(lora_rank=8, model="there", model_revision="main")) == []
    (change,) = find_changed_settings(old, Config(lora_rank=4, model="there"))
    assert change == "--lora-rank was 8 and would be 4"


def test_a_run_without_recorded_processes_had_one():
    old = {name: value for name, value in dataclasses.asdict(Config(batch_size=8)).items() if name != "processes"}
    assert find_changed_settings(old, Config(batch_size=4, processes=2)) == []
    assert find_changed_settings(old, Config(batch_size=8, processes=2)) == [
        "--batch-size was 8 and would be 8 x 2 processes"
    ]


def test_what_decides_the_weights_is_not_free_on_resume():
    decides = {"model", "model_revision", "init", "dataset", "dataset_revision", "label_names", "demo", "epochs"}
    decides |= {"max_steps", "batch_size", "gradient_accumulation_steps", "max_length", "seed", "learning_rate"}
    decides |= {"dataset_config", "text_column", "label_column", "prompt_column", "completion_column"}
    decides |= {"train_fraction", "max_train_samples", "delimiter", "encoding", "skip_empty"}
    decides |= {"lr_schedule", "warmup_steps", "weight_decay", "max_grad_norm", "dropout"}
    decides |= {"train_only", "freeze", "processes", "bf16_gradients"}
    decides |= {"lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "adapter"}
    decides |= {"precision", "tf32", "compile", "static_shapes", "cuda_graphs"}  # how it rounds, and what dropout drops
    decides |= {"class_weights"}
    decides |= {"best_metric"}  # the best evaluations of two metrics are not to be compared
    decides |= {"forgetting"}  # which changes no weights, but figures of two texts are not to be compared
    assert decides | set(FREE_ON_RESUME) == set(FIELDS)
    assert not decides & set(FREE_ON_RESUME)
    assert set(LONGER_ON_RESUME) == {"epochs", "max_steps"}
