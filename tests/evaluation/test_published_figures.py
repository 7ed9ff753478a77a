"""benchmarks/published_figures.py, with tiny models in the authors' layout in place of the published ones."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file


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
    return json.loads((output_dir / model.replace(" ", "_") / "comparison.json").read_text())


def test_tokenizer(official_folder, tiny_classifier_dir, tmp_path, fresh_accelerate, capsys):
    options = {"source": official_folder("softvq_tokenizer"), "dataset": "photographs", "num_images": 16}
    options["feature_extractor"] = [str(tiny_classifier_dir)]
    record = run("SoftVQ-B-64", tmp_path / "out", **options)
    assert record["figures"] == {"rfid": {"published": 0.88, "measured": None}}  # no FID by another network
    result = json.loads((tmp_path / "out/SoftVQ-B-64/result.json").read_text())
    assert result["metrics"]["fd (tiny_classifier)"] > 0 and result["protocol"]["rounding"] == "round"
    assert "rfid: published 0.88, measured None" in capsys.readouterr().out


def test_generator(official_folder, tiny_classifier_dir, image_folder, tmp_path, fresh_accelerate):
    options = {"source": official_folder("sit"), "tokenizer": official_folder("softvq_tokenizer"), "guided": True}
    options |= {"num_images": 6, "num_inference_steps": 3, "feature_extractor": [str(tiny_classifier_dir)]}
    options["reference"] = str(image_folder(8))
    with pytest.raises(ValueError, match="split"):  # the folder has no training images
        run("SiT-XL on SoftVQ-B-64", tmp_path / "out", **options)
    (tmp_path / "images/val").rename(tmp_path / "images/train")
    record = run("SiT-XL on SoftVQ-B-64", tmp_path / "out", **options)  # the model is there now
    assert record["figures"] == {"gfid": {"published": 1.78, "measured": None}}
    plan = json.loads((tmp_path / "out/SiT-XL_on_SoftVQ-B-64/samples_guided/plan.json").read_text())
    assert plan["rounding"] == "truncate" and plan["guidance_scale"] == 1.75
    assert plan["guidance_interval"] == [0.0, 0.7]
    assert plan["pipeline"]["scheduler"]["path_type"] == "cosine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "SoftVQ-XL"}, "`--model` is 'SoftVQ-XL', allowed: SoftVQ-L-64, "),
        ({"model": "SiT-XL on SoftVQ-L-64"}, "`--reference` is None"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        published_figures.PublishedFiguresArguments(**options)
