import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from pipeline.crops.augment import Augmentation
from train.config.load import SHORT_FLAGS, all_keys, load_config, load_config_with_origins, meant_keys
from train.config.schema import Config
from train.config.yaml12 import ConfigError, flatten

CONFIGS = Path(__file__).parents[3] / "configs"
SHIPPED = sorted(CONFIGS.glob("*.yaml"))
MINIMAL = "data: {data_path: shards}\nlogging: {run_name: a}\n"


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def errors_of(path: Path, overrides: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return [line.replace(str(path), "run.yaml") for line in str(caught.value).splitlines()]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_config_written_out_reads_back_equal(path, write):
    config, origins = load_config_with_origins(path)
    assert load_config(write(config.to_yaml(origins))) == config


def test_text_that_looks_like_a_number_survives_writing_and_reading_by_any_reader(write):
    kwargs = {"a": "010", "b": "1e4", "c": "on", "d": "null", "e": "q\"'\\ü\n # x", "f": "", "g": 1, "h": 1e-30, "i": None}
    values = {"data": {"data_path": "12"}, "logging": {"run_name": "1e4"}, "model": {"encoder_kwargs": kwargs}}
    config = Config.model_validate(values)
    assert load_config(write(config.to_yaml({"model.encoder_kwargs.e": "here"}))) == config
    assert yaml.safe_load(config.to_yaml()) == config.resolved


def test_the_imagenet_config_writes_every_key_and_agrees_with_the_defaults(write):
    path = CONFIGS / "multicrop_training.yaml"
    config, origins = load_config_with_origins(path)
    assert {place for place in origins.values() if not place.startswith(f"{path}:")} == set()
    minimal = write("data: {data_path: shards/imagenet}\nlogging: {run_name: multicrop_training}")
    assert config == load_config(minimal)


def test_origins_name_the_line_the_command_line_or_the_default():
    path = CONFIGS / "quickstart.yaml"
    _, origins = load_config_with_origins(path, ["data.batch_size=8", "model.encoder_kwargs.depth=2"])
    lines = path.read_text().splitlines()
    written = next(i for i, line in enumerate(lines, 1) if line.strip().startswith("lr:"))
    assert origins["training.lr"] == f"{path}:{written}"
    assert origins["data.batch_size"] == origins["model.encoder_kwargs.depth"] == "command line"
    assert origins["training.grad_clip"] == "default"
    assert origins.keys() == flatten(load_config(path, ["model.encoder_kwargs.depth=2"]).resolved).keys()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("1e-4", 1e-4), ("-2E3", -2e3), (".5", 0.5), ("1.", 1.0), ("1e100", 1e100), ("12", 12), ("+3", 3), ("-0", 0)],
        *[("true", True), ("false", False), ("null", None), ("~", None), ("'12'", "12"), ("9" * 18, int("9" * 18))],
        *[(text, text) for text in ("shards/x", "nullo", "2024-01-01", "010", "0x1f", "1:30", "1_000", ".inf", "9" * 5000)],
        *[(text, text) for text in ("on", "off", "yes", "True")],
    ],
)
def test_a_plain_scalar_is_what_it_looks_like_or_text(text, value, write):
    read = load_config(write(MINIMAL), [f"model.encoder_kwargs.a={text}"]).model.encoder_kwargs["a"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("line", "key", "facts"),
    [
        ("training: {use_amp: on}", "training.use_amp", ['found "on"', "valid boolean"]),
        ("training: {use_amp: 1}", "training.use_amp", ["found 1", "valid boolean"]),
        ("training: {lr: true}", "training.lr", ["found true", "valid number"]),
        ("training: {epochs: 010}", "training.epochs", ['found "010"', "valid integer"]),
        ("training: {epochs: '5'}", "training.epochs", ['found "5"', "valid integer"]),
        ("training: {epochs: 5.0}", "training.epochs", ["found 5.0", "valid integer"]),
        ("training: {betas: [0.9]}", "training.betas", ["too few entries"]),
        ("training: {max_steps: 0}", "training.max_steps", ["found 0", "greater than or equal to 1"]),
        ("training: {lr: }", "training.lr", ["no value"]),
        ("training:", "training", ["no value"]),
        ("training: 3", "training", ["found 3", "a mapping"]),
        ("training: {quux: 3}", "training.quux", ["unknown key", "epochs, lr, "]),
        ("training: {batch_size: 3}", "training.batch_size", ["data.batch_size or evaluation.batch_size?"]),
        ("training: {knn_k: 3}", "training.knn_k", ["did you mean evaluation.knn_k?"]),
        ("training: {lr: 1, lr: 2}", "invalid YAML", ["duplicate key training.lr, first at run.yaml:3"]),
        ("training: {<<: {lr: 1}}", "training.<<", ["unknown key"]),
        ("training: {[a]: 1}", "invalid YAML", ["a key must be text"]),
        ("training: {lr: 1e999}", "training.lr", ["found Infinity"]),
        ("traning: {lr: 1}", "traning", ["did you mean training?"]),
        ("training.lr: 1", "training.lr", ["write lr under training"]),
        ("masking: {mask_scale: [0.3, 0.2]}", "masking.mask_scale", ["[0.3, 0.2]", "[low, high]"]),
        ("data: {crop_device: tpu, data_path: a}", "invalid YAML", ["duplicate key data"]),
        (
            "model: {levels: [{layer: -1, strid: 1, weight: 1, stride: 1}]}",
            "model.levels[0].strid",
            ["did you mean model.levels.stride?"],
        ),
        ("model: {levels: [{layer: -1, stride: 1}]}", "model.levels[0].weight", ["missing"]),
    ],
)
def test_an_error_names_the_line_the_key_the_value_and_what_is_allowed(line, key, facts, write):
    (error,) = errors_of(write(f"{MINIMAL}{line}"))
    assert error.startswith(f"run.yaml:3: {key}: ")
    assert [fact for fact in facts if fact not in error] == []


def test_a_backslash_in_plain_text_is_no_escape(write):
    assert load_config(write(f"{MINIMAL}model: {{encoder: vit\\0}}")).model.encoder == "vit\\0"


def test_a_number_in_place_of_a_name_has_to_be_quoted(write):
    folder = "data: {data_path: shards}\nlogging: {run_name: %s}"
    assert "found 2024" in errors_of(write(folder % "2024"))[0]
    assert "put it in quotes" in errors_of(write(folder % "2024"))[0]
    assert "quotes" not in errors_of(write(folder % "'..'"))[0]


@pytest.mark.parametrize("value", ["true", "false"])
def test_the_blocks_of_the_guide_are_accepted(value, write):
    data = f"data: {{data_path: shards, num_workers: 8, pin_memory: {value}}}"
    assert load_config(write(f"{data}\nlogging: {{run_name: a}}")).data.pin_memory is (value == "true")


def test_a_typo_does_not_hide_an_error_of_the_key_it_means(write):
    errors = errors_of(write(f"{MINIMAL}training: {{epoch: 3, epochs: x}}"))
    assert {error.split(": ")[1] for error in errors} == {"training.epoch", "training.epochs"}


@pytest.mark.parametrize(
    ("text", "line", "fact"),
    [
        ("", 1, "empty"),
        ("# only a comment\n", 1, "empty"),
        ("\n- 1\n- 2\n", 2, "expected sections"),
        ("just words", 1, "expected sections"),
        ("data:\n\tbatch_size: 3\n", 2, "tabs"),
        ("data: {a: 1\nlogging: [\n", 2, "invalid YAML"),
        ("a: &x 1\nb: *x\n", 1, "anchors (&)"),
        ("seed: !!python/object:os.system x", 1, "tags (!)"),
        ("a: 1\n---\nb: 2\n", 2, "expected a single document"),
        ("a: 1\nb: " + "[" * 5000, 1, "recursion depth"),
        ('a: "\\UFFFFFFFF"', 1, "invalid YAML"),
        ("a: 1\nb: \x01", 2, "#x0001"),
        (b"a: 1\nb: \xff\xfe", 2, "byte 0xff is not UTF-8"),
        (b"\x1f\x8b\x08\x00" * 9, 1, "byte 0x8b is not UTF-8"),
    ],
)
def test_a_file_that_is_not_a_config_gives_one_error_line(text, line, fact, write):
    (error,) = errors_of(write(text))
    assert error.startswith(f"run.yaml:{line}: ")
    assert fact in error


def test_a_missing_file_and_a_folder_give_one_error_line(tmp_path):
    (error,) = errors_of(tmp_path / "no.yaml")
    assert "No such file" in error.replace(str(tmp_path / "no.yaml"), "")
    assert "directory" in errors_of(tmp_path)[0]


def test_all_errors_are_reported_at_once_in_the_order_of_the_file(write):
    text = """\
seeed: 3
data:
  batch_szie: 32
  multicrop: {local_crop_size: 97}
masking: {strategy: nothing, context_ratio: 0.9}
training: {epochs: x, warmup_epochs: 300}
logging: {run_name: 2024}
"""
    errors = errors_of(write(text), ("training.lrr=1", "masking.query_ratio=x"))
    assert [" ".join(line.split(": ")[:2]) for line in errors] == [
        "run.yaml:1 seeed",
        "run.yaml:2 data.data_path",
        "run.yaml:3 data.batch_szie",
        "run.yaml:5 masking.strategy",
        "run.yaml:6 training.epochs",
        "run.yaml:7 logging.run_name",
        "command line training.lrr",
        "command line masking.query_ratio",
    ]


def test_all_broken_rules_are_reported_at_once_when_each_value_is_valid(write):
    text = f"""{MINIMAL}\
model: {{levels: []}}
masking: {{strategy: none}}
"""
    errors = errors_of(write(text), ("model.encoder_kwargs={in_chans: 1}",))
    assert [" ".join(line.split(": ")[:2]) for line in errors] == [
        "run.yaml:3 model.levels",
        "run.yaml:4 masking.strategy",
        "command line model.encoder_kwargs",
    ]


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["model.encoder_kwargs.mean=0.5"], "model.encoder_kwargs"),
        (["masking.strategy=none"], "masking.strategy"),
        (["masking.strategy=cross_crop_prediction", "loss.prediction_weight=0"], "loss.prediction_weight"),
        (["masking.strategy=none", "loss.prediction_weight=0", "loss.whiten_targets=true"], "loss.whiten_targets"),
        (["loss.prediction_weight=0", "loss.view_weight=0", "loss.sigreg_weight=0"], "loss.prediction_weight"),
    ],
)
def test_each_rule_between_keys_is_enforced(overrides, key):
    assert any(f" {key}" in error for error in errors_of(CONFIGS / "multicrop_training.yaml", tuple(overrides)))


def test_one_number_applies_to_every_global_crop_and_without_multicrop_there_is_one_crop():
    path = CONFIGS / "multicrop_training.yaml"
    data = load_config(path, ["data.augmentation.solarize_prob=0.3"]).data
    views = [Augmentation(**data.augmentation.model_dump()).view(32, (0.4, 1.0), 0.4, g) for g in (0, 1, None)]
    assert [view.solarize_prob for view in views] == [0.3, 0.3, 0.0]
    assert [view.blur_prob for view in views] == [1.0, 0.1, 0.5]
    assert load_config(path, ["data.use_multicrop=false"]).data.crop_counts == (1, 0)
    assert load_config(path).data.crop_counts == (2, 6)


@pytest.mark.parametrize(
    ("override", "facts"),
    [
        ("data.batch_szie=3", ["did you mean data.batch_size?"]),
        ("data.batch_size=x", ['found "x"', "valid integer"]),
        ("data.batch_size=010", ['found "010"', "valid integer"]),
        ("data.batch_size=", ["no value"]),
        ("data.batch_size", ["section.key=value"]),
        ("training.betas=[1,", ["invalid YAML"]),
        ("data={batch_size: 3}", ["section"]),
        ("model.levels.layer=3", ["model.levels: ", "valid tuple"]),
        ("data.batch_size.x=3", ['data.batch_size: found {"x": 3}']),
        ("batch_size=3", ["did you mean data.batch_size or evaluation.batch_size?"]),
        ("traning.lr=3", ["did you mean training?"]),
        ("foo.bar=3", ["unknown key"]),
        ("=3", ["unknown key"]),
        ("model.levels=[{layer: 1, stride: 0, weight: 1}]", [": model.levels[0].stride: found 0"]),
        ("model.encoder_kwargs={a: 1, a: 2}", ["duplicate"]),
    ],
)
def test_a_wrong_override_is_reported(override, facts):
    (error,) = errors_of(CONFIGS / "quickstart.yaml", (override,))
    assert error.startswith("command line: ")
    assert [fact for fact in facts if fact not in error] == []


def test_an_override_given_twice_is_refused_so_that_neither_is_ignored():
    path = CONFIGS / "quickstart.yaml"
    assert "given twice" in errors_of(path, ("training.lr=1", "training.lr=2"))[0]
    all_after_one = ("model.encoder_kwargs.depth=2", "model.encoder_kwargs={depth: 3}")
    assert "given twice" in errors_of(path, all_after_one)[0]


def test_overrides_replace_what_the_file_says_even_if_that_was_wrong(write):
    path = write(f"{MINIMAL}training: {{lr: fast, betas: [1, 2, 3]}}")
    config = load_config(path, ["training.lr=1e-3", "training.betas=[0.5, 0.6]", "evaluation.knn_k=5"])
    assert (config.training.lr, config.training.betas, config.evaluation.knn_k) == (1e-3, (0.5, 0.6), 5)


def test_the_short_flags_of_the_guide_are_known_keys():
    assert set(SHORT_FLAGS) == {"batch_size", "epochs", "data_path", "dataset", "resume"}
    assert set(SHORT_FLAGS.values()) <= set(all_keys())


def test_a_config_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        load_config(CONFIGS / "quickstart.yaml").training.lr = 1.0


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("training.epoch", ["training.epochs"]),
        ("data.num_local_crop", ["data.multicrop.num_local_crops"]),
        ("data.local_crops", ["data.multicrop.num_local_crops"]),
        ("optimizer", ["training.optimizer"]),
        ("scheduler", []),
    ],
)
def test_suggestions_for_an_unknown_key_come_from_any_section(key, meant):
    assert meant_keys(key) == meant


def test_the_schema_command_prints_a_json_schema_with_every_key():
    printed = subprocess.run([sys.executable, "-m", "train.config", "--schema"], capture_output=True, text=True, check=True)
    assert json.loads(printed.stdout) == Config.model_json_schema()
