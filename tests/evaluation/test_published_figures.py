"""benchmarks/published_figures.py, with tiny models in the authors' layout in place of the published ones."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from softvq_hf.training.arguments import parse_args


ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("published_figures", ROOT / "benchmarks/published_figures.py")
published_figures = importlib.util.module_from_spec(spec)
sys.modules["published_figures"] = published_figures  # its dataclasses look their types up there
spec.loader.exec_module(published_figures)


@pytest.fixture
def official_folder(golden, tmp_path):
    """Writes a reference model as it would lie on the Hub; the generator gets the 8 tokens of the tokenizer."""

    def write(name: str) -> str:
        description, tensors = golden(name)
        weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
        config = {**description["config"]}
        config |= {side: description[side] for side in ("encoder_override", "decoder_override") if side in description}
        if name == "sit":
            config["input_size"] = 8
            weights["pos_embed"] = weights["pos_embed"][:, :8].clone()
        folder = tmp_path / "official" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        save_file(weights, folder / "model.safetensors")
        return str(folder)

    return write


def run(model: str, output_dir: Path, **options) -> dict:
    args = published_figures.PublishedFiguresArguments(model=model, output_dir=str(output_dir), **options)
    published_figures.main(args)
    return json.loads((args.folder / ("comparison_guided.json" if args.guided else "comparison.json")).read_text())


@pytest.fixture
def sit_options(official_folder, tiny_classifier_dir, image_folder, tmp_path):
    """A SiT, its tokenizer and reference images, of the split "val": `tmp_path / "images/val"`."""
    options = {"source": official_folder("sit"), "tokenizer": official_folder("softvq_tokenizer")}
    options |= {"num_images": 6, "num_inference_steps": 3, "feature_extractor": [str(tiny_classifier_dir)]}
    return options | {"reference": str(image_folder(8))}


def test_tokenizer(official_folder, tiny_classifier_dir, tmp_path, fresh_accelerate, capsys):
    options = {"source": official_folder("softvq_tokenizer"), "dataset": "photographs", "num_images": 16}
    options["feature_extractor"] = [str(tiny_classifier_dir)]
    record = run("SoftVQ-B-64", tmp_path / "out", **options)
    assert record["figures"] == {"rfid": {"published": 0.88, "measured": None}}  # no FID by another network
    result = json.loads((tmp_path / "out/SoftVQ-B-64/result.json").read_text())
    assert result["metrics"]["fd (tiny_classifier)"] > 0 and result["protocol"]["rounding"] == "round"
    assert "rfid: published 0.88, measured None" in capsys.readouterr().out


def test_generator(sit_options, tmp_path, fresh_accelerate):
    name, folder = "SiT-XL on SoftVQ-B-64", tmp_path / "out/SiT-XL_on_SoftVQ-B-64"
    with pytest.raises(ValueError, match="split"):  # the folder has no training images
        run(name, tmp_path / "out", **sit_options, guided=True)
    (tmp_path / "images/val").rename(tmp_path / "images/train")
    converted = (folder / "model/model_index.json").stat().st_mtime_ns
    record = run(name, tmp_path / "out", **sit_options, guided=True)
    assert (folder / "model/model_index.json").stat().st_mtime_ns == converted  # the model was there
    assert record["figures"] == {"gfid": {"published": 1.78, "measured": None}}
    plan = json.loads((folder / "samples_guided/plan.json").read_text())
    assert plan["rounding"] == "truncate" and plan["guidance_scale"] == 1.75
    assert plan["guidance_interval"] == [0.0, 0.7]
    assert plan["pipeline"]["scheduler"]["path_type"] == "cosine"

    without = run(name, tmp_path / "out", **sit_options)
    assert without["figures"]["gfid"]["published"] != 1.78
    assert json.loads((folder / "comparison_guided.json").read_text()) == record  # both stay
    assert {path.name for path in folder.glob("result*.json")} == {"result.json", "result_guided.json"}


def test_another_conversion_of_the_same_model_is_refused(sit_options, tmp_path, fresh_accelerate):
    (tmp_path / "images/val").rename(tmp_path / "images/train")
    run("SiT-XL on SoftVQ-B-64", tmp_path / "out", **sit_options)
    for changes in ({"path_type": "linear"}, {"source": "elsewhere"}, {"tokenizer": "elsewhere"}):
        ((name, value),) = changes.items()
        earlier = sit_options.get(name, "cosine")
        with pytest.raises(ValueError, match=f"another conversion: `{name}` is {earlier} there and {value} here"):
            run("SiT-XL on SoftVQ-B-64", tmp_path / "out", **{**sit_options, **changes})
    (tmp_path / "out/SiT-XL_on_SoftVQ-B-64/conversion.json").unlink()
    with pytest.raises(ValueError, match="`path_type` is not given there and cosine here"):
        run("SiT-XL on SoftVQ-B-64", tmp_path / "out", **sit_options)


def test_arguments_of_the_evaluation_are_checked_first(sit_options, tmp_path, fresh_accelerate):
    with pytest.raises(ValueError, match="`--batch_size` is 0"):
        run("SiT-XL on SoftVQ-B-64", tmp_path / "out", **sit_options, batch_size=0)
    assert not (tmp_path / "out").exists()  # nothing was converted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "SoftVQ-XL"}, "`--model` is 'SoftVQ-XL', allowed: SoftVQ-L-64, "),
        ({"model": "SiT-XL on SoftVQ-L-64"}, "`--reference` is None"),
        ({"model": "SoftVQ-L-64", "guided": True}, "`--model` is 'SoftVQ-L-64', which does not take `--guided`"),
        ({"model": "SoftVQ-L-64", "path_type": "linear"}, "does not take `--path_type`"),
        ({"model": "SiT-XL on SoftVQ-L-64", "reference": "x", "lpips": "vgg"}, "does not take `--lpips`"),
        (
            {"model": "SiT-XL on SoftVQ-L-64", "reference": "x", "guidance_scale": 1.75},
            "`--guidance_scale` and `--guidance_high` are allowed with `--guided` only",
        ),
        (
            {"model": "DiT-XL on SoftVQ-L-64", "reference": "x", "guided": True, "guidance_high": 0.5},
            "does not take `--guidance_high`",
        ),
        (
            {"model": "SiT-XL on SoftVQ-L-64", "reference": "x", "guided": True, "guidance_scale": 1.0},
            "`--guidance_scale` is 1.0, allowed with `--guided`: numbers above 1",
        ),
    ],
)
def test_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        published_figures.PublishedFiguresArguments(**options)


@pytest.mark.parametrize("flag", ["--lpips=squeeze", "--mixed_precision=fp8"])
def test_choices(flag):
    with pytest.raises(SystemExit):
        parse_args(published_figures.PublishedFiguresArguments, ["--model", "SoftVQ-L-64", flag])
