"""What README and docs show must run: Python on tiny models, commands through the arguments of the scripts."""

import dataclasses
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml

from softvq_hf import AutoencoderSoftVQ, DiTTransformer1DModel, SoftVQPipeline, StochasticInterpolantScheduler
from softvq_hf.cli import build_parser
from softvq_hf.data import load_image_dataset
from softvq_hf.evaluation.generation import GenerationArguments
from softvq_hf.evaluation.inspection import InspectionArguments
from softvq_hf.evaluation.reconstruction import ReconstructionArguments
from softvq_hf.evaluation.reference import ReferenceArguments
from softvq_hf.training.arguments import parse_args
from softvq_hf.training.hub import export_pipeline


ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
QUICKSTART = ROOT / "training/configs/quickstart"


def fenced_blocks(document, language):
    """Fenced blocks in order, except those below a line `<!-- not run: why -->`."""
    blocks = re.findall(rf"(<!-- not run: .+ -->\n)?```{language}\n(.*?)```", document.read_text(), re.DOTALL)
    return [block for not_run, block in blocks if not not_run]


def shown_commands():
    """Every `accelerate launch` command of documents and Makefile, as a list of words."""
    texts = {document: "\n".join(fenced_blocks(document, "bash")) for document in DOCUMENTS}
    makefile = ROOT / "Makefile"
    texts[makefile] = makefile.read_text().replace("$(QUICKSTART)", "training/configs/quickstart")
    texts[makefile] = texts[makefile].replace("$(LAUNCH) ", "accelerate launch ")
    for document, text in texts.items():
        for line in text.replace("\\\n", " ").splitlines():
            if "accelerate launch" in line and ".py" in line:
                yield pytest.param(shlex.split(line.strip()), id=f"{document.name}: {' '.join(line.split())[:70]}")


def load_script(name, folder="training"):
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look their types up there
    spec.loader.exec_module(module)
    return module


def arguments_of(script):
    """The dataclass of arguments that a script takes: its own, or of those it knows the most derived one."""
    known = [value for name, value in vars(script).items() if name.endswith("Arguments")]
    own = [arguments for arguments in known if arguments.__module__ == script.__name__]
    return max(own or known, key=lambda arguments: len(arguments.__mro__))


@pytest.fixture(scope="module")
def after_quickstart(tmp_path_factory):
    """A folder as the repository is after `make quickstart`, but with tiny untrained models."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("repository")
    for name in ("pipelines", "src", "training"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "my-images").mkdir()

    dataset = load_image_dataset("photographs", split="validation", resolution=64, train=False)
    vae = AutoencoderSoftVQ(
        sample_size=64,
        num_latent_tokens=16,
        latent_channels=16,
        codebook_size=16,
        encoder_hidden_size=16,
        encoder_num_layers=1,
        encoder_num_attention_heads=2,
        decoder_hidden_size=16,
        decoder_num_layers=1,
        decoder_num_attention_heads=2,
    )
    transformer = DiTTransformer1DModel(
        num_tokens=16,
        in_channels=16,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_classes=dataset.num_classes,
    )
    scheduler = StochasticInterpolantScheduler()
    outputs = folder / "outputs/quickstart"
    vae.save_pretrained(outputs / "tokenizer")
    cache_latents = load_script("cache_latents")
    command = ["--pretrained_model_name_or_path", outputs / "tokenizer", "--output_dir", outputs / "latents"]
    command += ["--dataset_name", "photographs", "--max_train_samples", "16"]
    cache_latents.main(parse_args(cache_latents.CacheLatentsArguments, list(map(str, command))))
    vae = AutoencoderSoftVQ.from_pretrained(outputs / "latents/vae")
    pipeline = SoftVQPipeline(vae=vae, transformer=transformer.eval(), scheduler=scheduler, id2label=dataset.id2label)
    export_pipeline(pipeline, outputs / "generator")
    return folder


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if fenced_blocks(d, "python")], ids=lambda d: d.name)
def test_python_of_documents_runs(document, after_quickstart, monkeypatch):
    monkeypatch.chdir(after_quickstart)
    namespace = {}
    for code in fenced_blocks(document, "python"):
        exec(compile(code, document, "exec"), namespace)


@pytest.mark.parametrize("command", list(shown_commands()))
def test_shown_commands_are_understood(command, after_quickstart, monkeypatch):
    monkeypatch.chdir(after_quickstart)
    script = next(word for word in command if word.endswith(".py"))
    if "--config_file" in command:
        assert yaml.safe_load(Path(command[command.index("--config_file") + 1]).read_text())
    module = load_script(Path(script).stem, Path(script).parent)
    args = parse_args(arguments_of(module), command[command.index(script) + 1 :])
    assert args.output_dir.startswith("outputs/")


def test_flags_in_text_exist(monkeypatch):
    known = {"config", "help", "config_file", "num_processes", "logdir"}  # of the parser, accelerate and TensorBoard
    known |= {"nproc_per_node", "signals"}  # of torchrun
    known |= {"gpus", "open", "requeue", "signal", "time"}  # of sbatch
    known |= {"kills"}  # of benchmarks/crash_test.py
    scripts = [
        load_script(name) for name in ("train_softvq", "cache_latents", "train_sit", "train_mar", "linear_probe")
    ]
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmarks = ("tiny_classifier", "metric_behaviour", "published_figures", "check_ratios", "data", "generation")
    benchmarks += ("scaling", "solvers", "tokenizer", "training")
    scripts += [load_script(name, "benchmarks") for name in benchmarks]
    dataclasses_of_arguments = [arguments_of(script) for script in scripts]
    dataclasses_of_arguments += [ReconstructionArguments, GenerationArguments, ReferenceArguments, InspectionArguments]
    for arguments in dataclasses_of_arguments:
        known |= {field.name for field in dataclasses.fields(arguments)}
    known |= set(vars(build_parser().parse_args(["convert", "source", "--output_dir", "folder"])))
    for document in DOCUMENTS:
        shown = set(re.findall(r"(?<![\w-])--([a-z]\w*)", document.read_text()))
        assert shown <= known, document


def test_custom_pipeline_never_stands_without_trust_remote_code():
    calls = []
    for file in [*DOCUMENTS, *(ROOT / "training").glob("*.py"), *(ROOT / "pipelines").glob("*.py")]:
        calls += re.findall(r"from_pretrained\([^()]*custom_pipeline=(?:[^()]|\([^()]*\))*\)", file.read_text())
    assert len(calls) >= 3
    for call in calls:
        assert "trust_remote_code=True" in call or call.endswith("...)"), call


def test_quickstart_report(after_quickstart, monkeypatch, capsys):
    monkeypatch.chdir(after_quickstart)
    configs = after_quickstart / "configs"
    configs.mkdir()
    for name in ("softvq.yaml", "sit.yaml"):
        config = yaml.safe_load((QUICKSTART / name).read_text())
        (configs / name).write_text(yaml.safe_dump({**config, "num_inference_steps": 2}))
        lines = [
            {"step": step, "epoch": 0, "time": 6.0 * step, "loss": 1 / step, "reconstruction": 1 / step}
            for step in (1, 2)
        ]
        lines.append({"step": 2, "epoch": 0, "time": 15.0, "validation/psnr": 11.0})
        metrics = Path(config["output_dir"], "metrics.jsonl")
        metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))

    report = load_script("quickstart_report")
    report.main(configs)

    outputs = after_quickstart / "outputs/quickstart"
    for name in ("reconstructions.png", "samples.png", "training.png"):
        assert (outputs / name).read_bytes().startswith(b"\x89PNG")
    text = (outputs / "report.md").read_text()
    assert text in capsys.readouterr().out
    # 256 numbers per image on the tokenizer's side; 9 x 9 x 3 = 243 is the closest that a thumbnail comes
    tokenizer_psnr, thumbnail_psnr = map(float, re.findall(r"([\d.]+) dB", text))
    assert "| 256 |" in text and "| 243 |" in text
    assert thumbnail_psnr > 15 > tokenizer_psnr  # an untrained tokenizer is worse than the thumbnail
    assert "2 steps | 15 |" in text


@pytest.mark.parametrize(("num_values", "size"), [(3, (1, 1)), (256, (9, 9)), (270, (9, 10)), (2048, (26, 26))])
def test_thumbnail_size(num_values, size):
    assert load_script("quickstart_report").thumbnail_size(num_values) == size
