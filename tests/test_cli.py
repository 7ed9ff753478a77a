"""The command `softvq-hf`, in this process and in its own."""

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
from safetensors.torch import save_file

from softvq_hf import AutoencoderSoftVQ
from softvq_hf.cli import build_parser, main
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
        build_parser().parse_args(shlex.split(command, comments=True))


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
        (["convert", "x", "--output_dir", "y", "--system", "mar"], "invalid choice: 'mar' (choose from"),
        (["convert", "x", "--output_dir", "y", "--path_type", "linear", "--detect_path"], "not allowed with argument"),
    ],
)
def test_usage_errors(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2 and message in capsys.readouterr().err


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
