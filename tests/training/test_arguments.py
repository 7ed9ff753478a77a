"""Arguments from YAML and command line, and the configurations that the repository ships."""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from softvq_hf.models.transformer_dit_1d import DiTTransformer1DModel
from softvq_hf.training.arguments import TrainingArguments, check_model_config, check_output_dir, parse_args


TRAINING = Path(__file__).parents[2] / "training"
CONFIGS = TRAINING / "configs"


@dataclass
class ModelArguments(TrainingArguments):
    model: dict | str | None = None


@pytest.fixture
def config_file(tmp_path):
    def write(**values) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(values))
        return str(path)

    return write


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, TRAINING / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_command_line_wins_over_file_wins_over_default(config_file):
    config = config_file(output_dir="from-file", max_train_steps=5, learning_rate=2e-4, use_ema=False, streaming=True)
    args = parse_args(ModelArguments, ["--config", config, "--output_dir", "from-flag", "--train_batch_size=7"])
    assert (args.output_dir, args.max_train_steps, args.train_batch_size) == ("from-flag", 5, 7)
    assert args.learning_rate == 2e-4 and args.use_ema is False and args.streaming is True
    assert args.gradient_accumulation_steps is None and args.model is None


def test_yaml_values_are_converted_as_flags_are(tmp_path):
    # YAML reads 1e-3 as a string, and an empty value as none
    (tmp_path / "config.yaml").write_text("output_dir: x\nmax_train_steps: 5\nlearning_rate: 1e-3\ncache_dir:\n")
    args = parse_args(ModelArguments, [f"--config={tmp_path / 'config.yaml'}"])
    assert args.learning_rate == 1e-3 and args.cache_dir is None


def test_model_mapping_is_merged(config_file):
    config = config_file(output_dir="x", max_train_steps=1, model={"tau": 0.1, "num_codebooks": 2})
    assert parse_args(ModelArguments, ["--config", config]).model == {"tau": 0.1, "num_codebooks": 2}
    merged = parse_args(ModelArguments, ["--config", config, "--model", '{"tau": 0.2, "latent_channels": 8}']).model
    assert merged == {"tau": 0.2, "num_codebooks": 2, "latent_channels": 8}
    only_flag = parse_args(ModelArguments, ["--output_dir=x", "--max_train_steps=1", '--model={"tau": 1.0}'])
    assert only_flag.model == {"tau": 1.0}


def test_a_file_is_based_on_another(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "recipe.yaml").write_text(
        "output_dir: recipe\nmax_train_steps: 5\nlearning_rate: 2e-4\nmodel: {tau: 0.1, codebook_size: 16}\n"
    )
    (tmp_path / "middle.yaml").write_text("base: recipe.yaml\noutput_dir: middle\nmodel: {tau: 0.2}\n")
    path = tmp_path / "sub/variant.yaml"
    path.write_text("base: ../middle.yaml\nlearning_rate: 1e-4\nmodel: {num_codebooks: 2}\n")
    args = parse_args(ModelArguments, ["--config", str(path), "--model", '{"num_codebooks": 4}'])
    assert (args.output_dir, args.max_train_steps, args.learning_rate) == ("middle", 5, 1e-4)
    assert args.model == {"tau": 0.2, "codebook_size": 16, "num_codebooks": 4}

    # fine-tuning starts from weights: no new model
    assert parse_args(ModelArguments, ["--config", str(path), "--model=null"]).model is None
    path.write_text("base: ../middle.yaml\nmodel:\n")
    assert parse_args(ModelArguments, ["--config", str(path)]).model is None

    path.write_text("base: elsewhere.yaml\n")
    with pytest.raises(ValueError, match="`base` of .*variant.yaml is .*elsewhere.yaml', allowed: a YAML file"):
        parse_args(ModelArguments, ["--config", str(path)])
    (tmp_path / "recipe.yaml").write_text("base: sub/variant.yaml\n")
    path.write_text("base: ../recipe.yaml\n")
    with pytest.raises(ValueError, match="which is based on .*recipe.yaml itself"):
        parse_args(ModelArguments, ["--config", str(path)])


def test_accumulation_follows_the_global_batch():
    def accumulation(num_processes: int, **values) -> int:
        args = ModelArguments(output_dir="x", max_train_steps=1, train_batch_size=32, **values)
        return args.resolve_accumulation(num_processes)

    assert accumulation(8) == 1 and accumulation(8, gradient_accumulation_steps=3) == 3
    assert accumulation(8, global_batch_size=256) == 1 and accumulation(1, global_batch_size=256) == 8
    assert accumulation(2, global_batch_size=256, gradient_accumulation_steps=4) == 4
    with pytest.raises(ValueError, match="`--global_batch_size` is 256, allowed: multiples of 96"):
        accumulation(3, global_batch_size=256)
    with pytest.raises(ValueError, match="`--gradient_accumulation_steps` is 2, allowed with .*: 4, or leave it out"):
        accumulation(2, global_batch_size=256, gradient_accumulation_steps=2)


def test_written_arguments_are_read_again(config_file, tmp_path):
    args = parse_args(
        ModelArguments, ["--output_dir=x", "--max_train_steps=3", '--model={"tau": 0.5}', "--hub_token=secret"]
    )
    written = config_file(**args.to_dict())
    assert "secret" not in Path(written).read_text()
    again = parse_args(ModelArguments, ["--config", written])
    assert again.to_dict() == args.to_dict()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"output_dir": "x", "learning_rte": 1}, "'learning_rte'.*Did you mean `learning_rate`"),
        ({"output_dir": None}, "leaves `output_dir` empty"),
        ({"output_dir": "x", "seed": {"a": 1}}, "a mapping for `seed`"),
        ({"output_dir": "x", "max_train_steps": 1, "model": "tiny"}, "`model` is 'tiny'"),
        ({"output_dir": "x"}, "`--max_train_steps` nor `--num_train_epochs`"),
    ],
)
def test_bad_files(values, message, config_file):
    with pytest.raises(ValueError, match=message):
        parse_args(ModelArguments, ["--config", config_file(**values)])


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(ValueError, match="`--config` is .*missing.yaml"):
        parse_args(ModelArguments, [f"--config={tmp_path / 'missing.yaml'}"])
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="holds list"):
        parse_args(ModelArguments, [f"--config={tmp_path / 'list.yaml'}"])
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(ValueError, match="no valid YAML"):
        parse_args(ModelArguments, [f"--config={tmp_path / 'broken.yaml'}"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train_batch_size=0"], "`--train_batch_size` is 0"),
        (["--checkpoints_total_limit=0"], "`--checkpoints_total_limit` is 0"),
        (["--learning_rate=0"], "`--learning_rate` is 0"),
        (["--learning_rate=nan"], "`--learning_rate` is nan"),
        (["--ema_decay=1"], "`--ema_decay` is 1"),
        (["--seed=-1"], "`--seed` is -1"),
        (["--max_grad_norm=-1"], "`--max_grad_norm` is -1"),
        (["--lr_warmup_steps=11"], "`--lr_warmup_steps` is 11, allowed: up to the number of updates, 10"),
        (["--min_lr=1e-6"], "`--min_lr` is 1e-06.*cosine_with_min_lr"),
        (["--lr_scheduler=cosine_with_min_lr", "--min_lr=1"], "`--min_lr` is 1.0, allowed: up to"),
        (["--train_data_dir=/nowhere"], "`--train_data_dir` is '/nowhere'"),
        (["--no_such_flag=1"], "--no_such_flag=1"),
        (['--model={"tau"'], "`--model` is"),
        (["--model=3"], "allowed: a JSON object"),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises(ValueError, match=message):
        parse_args(ModelArguments, ["--output_dir=x", "--max_train_steps=10", *flags])


@pytest.mark.parametrize("flag", ["--max_train_steps=many", "--optimizer=sgd", "--use_ema=maybe"])
def test_values_of_a_wrong_type(flag, capsys):
    with pytest.raises(SystemExit):
        parse_args(ModelArguments, ["--output_dir=x", "--max_train_steps=10", flag])
    assert flag.split("=")[0] in capsys.readouterr().err


def test_streaming_needs_a_number_of_steps():
    with pytest.raises(ValueError, match="`--streaming` needs `--max_train_steps`"):
        parse_args(ModelArguments, ["--output_dir=x", "--num_train_epochs=1", "--streaming"])


def test_output_dir(tmp_path):
    check_output_dir(str(tmp_path / "a/b"))
    assert (tmp_path / "a/b").is_dir() and not list((tmp_path / "a/b").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="`--output_dir` is"):
        check_output_dir(str(tmp_path / "file"))


def test_model_config_names():
    check_model_config(DiTTransformer1DModel, {"num_layers": 2})
    with pytest.raises(
        ValueError, match="`model` has 'depth', 'width', allowed for DiTTransformer1DModel: num_tokens"
    ):
        check_model_config(DiTTransformer1DModel, {"width": 1, "depth": 2})


@pytest.mark.parametrize("path", sorted((TRAINING / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_configs_load(path):
    config = load_config_from_file(str(path))  # refuses unknown keys
    written = yaml.safe_load(path.read_text())
    assert config.num_processes == written["num_processes"] and config.num_machines == written["num_machines"]
