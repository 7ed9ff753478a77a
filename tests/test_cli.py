"""The command `softvq-hf`, in this process and in its own."""

import importlib
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file

from softvq_hf import AutoencoderSoftVQ
from softvq_hf.cli import EVALUATIONS, build_parser, main, parse_command
from softvq_hf.conversion.published_models import load_published_models, published_models_table
from softvq_hf.training.convert import convert_pretrained


@pytest.fixture
def source(golden, tmp_path):
    """An official folder of a tiny tokenizer."""
    description, tensors = golden("softvq_tokenizer")
    overrides = {key: description[key] for key in ("encoder_override", "decoder_override")}
    (tmp_path / "official").mkdir()
    (tmp_path / "official" / "config.json").write_text(json.dumps(description["config"] | overrides))
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    save_file(weights, tmp_path / "official" / "model.safetensors")
    return tmp_path / "official"


def test_convert(source, tmp_path, capsys):
    main(["convert", str(source), "--output_dir", str(tmp_path / "out")])
    assert capsys.readouterr().out == f"AutoencoderSoftVQ written to {tmp_path / 'out'}\n"
    converted = convert_pretrained(source, tmp_path / "by_function")
    loaded = AutoencoderSoftVQ.from_pretrained(tmp_path / "out")
    assert all(torch.equal(*pair) for pair in zip(loaded.parameters(), converted.parameters(), strict=True))


def test_options_are_those_of_the_function():
    parameters = inspect.signature(convert_pretrained).parameters
    options = vars(build_parser().parse_args(["convert", "x", "--output_dir", "y"]))
    assert options.pop("command") == "convert"
    assert options.keys() == parameters.keys()
    for name, parameter in parameters.items():
        if parameter.default is not parameter.empty:
            assert options[name] == parameter.default, name


def test_commands_of_documents_are_understood():
    root = Path(__file__).parents[1]
    commands = []
    for document in [root / "README.md", *sorted((root / "docs").rglob("*.md"))]:
        for block in re.findall(r"```bash\n(.*?)```", document.read_text(), re.DOTALL):
            commands += re.findall(r"^softvq-hf (.*)$", block.replace("\\\n", " "), re.MULTILINE)
    assert len(commands) >= 5
    for command in commands:
        try:
            parse_command(shlex.split(command, comments=True))
        except ValueError as error:
            assert "that exists" in str(error), command  # files that documents name need not be here


def test_info(capsys):
    main(["info"])
    out = capsys.readouterr().out
    assert out == published_models_table() + "\n"
    for model in load_published_models():
        assert model.repo_id in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./nowhere"], "error: './nowhere' does not exist"),
        (["nobody/nothing", "--local_files_only"], "error: config.json of 'nobody/nothing' is not in the cache"),
        (["{source}", "--path_type", "linear"], "error: `path_type` is given, but the system of `source` is 'softvq'"),
        (["{source}", "--config", "{source}/broken.json"], "which is not JSON"),
        (["{source}", "--system", "sit"], "error: `config` lacks input_size"),
        (["{source}", "--output_dir", "{source}"], "allowed: a folder that does not exist, or is empty"),
        (["{source}", "--output_dir", "/proc/out"], "allowed: a folder that can be written"),
    ],
)
def test_errors_are_one_line(source, tmp_path, capsys, arguments, message):
    (source / "broken.json").write_text("{\n\n\n")
    arguments = [argument.format(source=source) for argument in arguments]
    with pytest.raises(SystemExit) as exit_:
        main(["convert", "--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache"), *arguments])
    assert exit_.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["convert", "x"], "the following arguments are required: --output_dir"),
        (["convert", "x", "--output_dir", "y", "--system", "var"], "invalid choice: 'var' (choose from"),
        (["convert", "x", "--output_dir", "y", "--path_type", "linear", "--detect_path"], "not allowed with argument"),
        (["convert", "x", "--output_dir", "y", "--seed", "0"], "unrecognized arguments: --seed 0"),
        (["info", "models"], "unrecognized arguments: models"),
        (["evaluate"], "the following arguments are required: TASK"),
        (["evaluate", "speed"], "invalid choice: 'speed' (choose from"),
        (["evaluate", "reconstruction"], "the following arguments are required: --dataset, --model"),
        (["evaluate", "reference", "--dataset", "x", "--resolution", "a"], "--resolution: invalid int value: 'a'"),
    ],
)
def test_usage_errors(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("task", ["evaluate reconstruction", "evaluate generation", "evaluate reference", "inspect"])
def test_help_of_evaluations(capsys, task):
    with pytest.raises(SystemExit) as exit_:
        main([*task.split(), "--help"])
    out = capsys.readouterr().out
    assert exit_.value.code == 0 and f"usage: softvq-hf {task} " in out and "--output_" in out


def test_evaluations_are_there():
    for module, arguments, function in EVALUATIONS.values():
        annotations = inspect.get_annotations(getattr(importlib.import_module(module), function))
        assert annotations["args"] is getattr(importlib.import_module(module), arguments)


def test_arguments_of_an_evaluation_come_from_a_file(tmp_path):
    config = {
        "model": "someone/softvq",
        "dataset": "photographs",
        "feature_extractor": ["dinov2", "x"],
        "batch_size": 4,
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    words = ["evaluate", "reconstruction", "--config", str(tmp_path / "config.yaml"), "--batch_size", "8"]
    command, args = parse_command(words)
    assert command == "evaluate reconstruction"
    assert (args.model, args.feature_extractor, args.batch_size) == ("someone/softvq", ["dinov2", "x"], 8)
    (tmp_path / "config.yaml").write_text(json.dumps({**config, "model": {"sample_size": 32}}))
    with pytest.raises(ValueError, match="gives a mapping for `model`, it needs a single value"):
        parse_command(words)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["reconstruction", "--model", "./nowhere", "--dataset", "photographs"],
            "error: `--model` is './nowhere', which cannot be loaded",
        ),
        (["reconstruction", "--model", "x", "--dataset", "x", "--bad"], "error: Unknown arguments: --bad."),
        (["reconstruction", "--model", "x", "--dataset", "x", "--batch_size", "0"], "error: `--batch_size` is 0"),
        (["reference", "--dataset", "x", "--resolution", "8", "--output_file", "x.json"], "ends in .npz"),
    ],
)
def test_errors_of_evaluations_are_one_line(capsys, monkeypatch, arguments, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as exit_:
        main(["evaluate", *arguments])
    assert exit_.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line


def test_evaluations_are_imported_by_their_commands_only():
    code = (
        "import sys; from softvq_hf.cli import main; main(['info']);"
        " print([name for name in sys.modules if name.startswith('softvq_hf.evaluation')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.fixture
def accelerate_on_cpu(monkeypatch):
    """Lets the command make an accelerator of its own."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_evaluation_prints_its_figures(accelerate_on_cpu, tmp_path, capsys):
    config = {"encoder_patch_size": 8, "decoder_patch_size": 8, "num_latent_tokens": 4, "latent_channels": 4}
    sizes = {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2}
    config |= {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in sizes.items()}
    AutoencoderSoftVQ(sample_size=32, quantizer="none", **config).save_pretrained(tmp_path / "tokenizer")
    words = ["--model", tmp_path / "tokenizer", "--dataset", "photographs", "--max_samples", 4, "--lpips", "none"]
    main(["evaluate", "reconstruction", *map(str, words), "--feature_extractor", "none"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["metrics"].keys() == {"psnr", "ssim"} and printed["protocol"].startswith(
        "4 images, ADM centre crop"
    )


def test_a_mistake_of_the_program_is_not_hidden(source, tmp_path, monkeypatch):
    monkeypatch.setattr("softvq_hf.cli.convert_pretrained", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["convert", str(source), "--output_dir", str(tmp_path / "out")])


@pytest.mark.slow
def test_own_process(source, tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(*arguments):
        command = [sys.executable, "-m", "softvq_hf.cli", *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    result = run("convert", source, "--output_dir", "out")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "AutoencoderSoftVQ written to out\n"
    assert f"{source}: detected the system 'softvq'" in result.stderr
    AutoencoderSoftVQ.from_pretrained(tmp_path / "out")

    result = run("convert", "SoftVQVAE/softvq-l-64", "--output_dir", "offline")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith(
        "error: config.json of 'SoftVQVAE/softvq-l-64' is not in the cache"
    )
    assert not (tmp_path / "offline").exists()
