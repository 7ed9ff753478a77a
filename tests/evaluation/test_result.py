"""The record of an evaluation, as JSON and in the model card."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import EvalResult, ModelCard

from softvq_hf.evaluation.result import build_result, check_output_file, differences, update_model_card, write_result
from softvq_hf.training.hub import export_model, export_pipeline, read_model_card, update_model_index


@pytest.fixture
def make_result(accelerator):
    def build(metrics, protocol="50 images", **details):
        return build_result(
            accelerator,
            task="image-reconstruction",
            model="someone/softvq",
            dataset={"name": "photographs", "config_name": None, "split": "validation", "revision": None},
            metrics=metrics,
            protocol={"name": protocol, "num_images": 50},
            notes=["a note"],
            **details,
        )

    return build


def test_a_record_says_what_it_ran_with(make_result, monkeypatch):
    output_file = f"--output_file={Path.home() / 'result.json'}"
    monkeypatch.setattr("sys.argv", ["evaluate", "--batch_size", "4", "--hub_token", "hf_secret", output_file])
    result = make_result({"psnr": 20.0}, latents={"latent_mean": 0.5})
    assert result["metrics"] == {"psnr": 20.0} and result["latents"] == {"latent_mean": 0.5}
    assert {"torch", "scikit-image", "torch-fidelity", "lpips", "softvq-hf"} <= result["versions"].keys()
    hardware = result["hardware"]
    assert hardware.pop("processor").endswith(f", {os.cpu_count()} cores")
    assert hardware == {"devices": {"cpu": 1}, "num_processes": 1, "mixed_precision": "no"}
    assert result["command"] == ["evaluate", "--batch_size", "4", "--output_file=~/result.json"]
    assert result["date"].startswith("20") and result["notes"] == ["a note"]


def test_of_a_folder_the_record_has_the_name(accelerator, tmp_path):
    result = build_result(
        accelerator,
        task="image-reconstruction",
        model=str(tmp_path),
        dataset={},
        metrics={},
        protocol={"name": "", "num_images": 2},
        notes=[],
    )
    assert result["model"] == tmp_path.name


def test_protocol_needs_a_name(accelerator):
    with pytest.raises(ValueError, match="`protocol` lacks name and num_images"):
        build_result(accelerator, task="", model="", dataset={}, metrics={}, protocol={}, notes=[])


def test_numbers_that_json_does_not_know(make_result, tmp_path):
    result = make_result({"psnr": math.inf, "ssim": 1.0}, latents={"kurtosis": [3.0, math.nan]})
    write_result(result, tmp_path / "new" / "result.json")
    read = json.loads((tmp_path / "new" / "result.json").read_text())
    assert read == result
    assert read["metrics"] == {"psnr": None, "ssim": 1.0} and read["latents"] == {"kurtosis": [3.0, None]}
    assert read["notes"] == [
        "a note",
        "psnr is infinite, which JSON has as null.",
        "kurtosis[1] is not a number, which JSON has as null.",
    ]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["result.json"]


def test_numbers_of_numpy(make_result, tmp_path):
    result = make_result({"psnr": np.float32(0.5), "rfid": np.float32("nan")}, latents={"counts": (np.int64(3), 4)})
    write_result(result, tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text())["metrics"] == {"psnr": 0.5, "rfid": None}
    assert result["latents"] == {"counts": [3, 4]} and "rfid is not a number" in result["notes"][-1]


def test_output_file_that_cannot_be_written(tmp_path):
    check_output_file(None)
    check_output_file(str(tmp_path / "folder" / "result.json"))
    assert not (tmp_path / "folder" / "result.json").exists()
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "result.json"):
        with pytest.raises(ValueError, match="`--output_file` is .*allowed: a file that can be written"):
            check_output_file(str(path))


def test_differences_of_records():
    record = {"seed": 0, "scheduler": {"shift": 1.0, "betas": (0.1, 0.2)}, "revision": None}
    assert differences(record, {"seed": 0, "scheduler": {"shift": 1.0, "betas": [0.1, 0.2]}}) == []
    assert differences(record, {"seed": 1, "scheduler": {"betas": [0.1, 0.3]}, "labels": "iid"}) == [
        "`seed` is 0 there and 1 here",
        "`scheduler.shift` is 1.0 there and not given here",
        "`scheduler.betas` is [0.1, 0.2] there and [0.1, 0.3] here",
        "`labels` is not given there and iid here",
    ]
    assert differences({"scheduler": None}, {"scheduler": {"shift": 1.0}}) == [
        "`scheduler.shift` is not given there and 1.0 here",
    ]


def test_card_is_whole_when_writing_is_interrupted(make_result, tiny_tokenizer, tmp_path, monkeypatch):
    export_model(tokenizer := tiny_tokenizer(), tmp_path)
    before = (tmp_path / "README.md").read_bytes()

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        update_model_card(tmp_path, make_result({"psnr": 20.0}), tokenizer)
    assert (tmp_path / "README.md").read_bytes() == before


def test_card_takes_figures_in(make_result, tiny_tokenizer, tmp_path):
    tokenizer = tiny_tokenizer()
    export_model(tokenizer, tmp_path)
    text = ModelCard.load(tmp_path / "README.md").text
    update_model_card(tmp_path, make_result({"psnr": 20.0, "fd (tiny_classifier)": 3.0, "rfid": None}), tokenizer)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text == text and card.data.library_name == "diffusers"
    figures = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert figures == {"psnr": 20.0, "fd (tiny_classifier)": 3.0}
    result = card.data.eval_results[0]
    assert (result.dataset_name, result.dataset_split) == ("photographs", "validation")
    assert result.metric_args == {"protocol": "50 images", "num_images": 50}


def test_card_replaces_figures_of_the_same_protocol_only(make_result, tiny_tokenizer, tmp_path):
    export_model(tokenizer := tiny_tokenizer(), tmp_path)
    foreign = EvalResult(
        task_type="image-reconstruction",
        dataset_type="ILSVRC/imagenet-1k",
        dataset_name="ImageNet",
        metric_type="psnr",
        metric_value=21.0,
    )
    update_model_index(tmp_path, [foreign])
    update_model_card(tmp_path, make_result({"psnr": 20.0, "ssim": 0.5}), tokenizer)
    update_model_card(tmp_path, make_result({"psnr": 19.0}, protocol="50 images, truncated"), tokenizer)
    update_model_card(tmp_path, make_result({"psnr": 22.0}), tokenizer)
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    found = [(r.dataset_name, (r.metric_args or {}).get("protocol"), r.metric_type, r.metric_value) for r in results]
    assert found == [
        ("ImageNet", None, "psnr", 21.0),
        ("photographs", "50 images", "ssim", 0.5),  # as a run with another feature network leaves it
        ("photographs", "50 images, truncated", "psnr", 19.0),
        ("photographs", "50 images", "psnr", 22.0),
    ]


def test_card_is_made_where_there_is_none(make_result, tiny_tokenizer, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    update_model_card(tmp_path, make_result({"psnr": 20.0}), tokenizer)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.model_name == tmp_path.name and card.data.eval_results[0].metric_value == 20.0
    assert "An image tokenizer" in card.text


@pytest.mark.parametrize("kind", ["vae", "transformer", "pipeline"])
def test_new_card_tells_of_the_source_that_the_folder_has(tiny_pipeline, tmp_path, kind):
    """What `save_pretrained` writes is loaded by the package, what is exported by diffusers."""
    pipeline = tiny_pipeline()
    model = pipeline if kind == "pipeline" else getattr(pipeline, kind)
    model.save_pretrained(tmp_path / "saved")
    (export_pipeline if kind == "pipeline" else export_model)(model, tmp_path / "exported")
    (tmp_path / "exported" / "README.md").unlink()
    saved, exported = (read_model_card(tmp_path / name, model).text for name in ("saved", "exported"))
    name = type(model).__name__
    assert f"from softvq_hf import {name}\n" in saved and f'{name}.from_pretrained("{tmp_path / "saved"}")' in saved
    assert "trust_remote_code" not in saved and "carries the source" not in saved and "runs no code" not in saved
    assert "carries the source" in exported and "trust_remote_code=True" in exported
    assert "from softvq_hf" not in exported
    for source in [*(tmp_path / "exported").glob("*.py")]:  # config.json still names it
        source.unlink()
    assert "trust_remote_code" not in read_model_card(tmp_path / "exported", model).text


def test_card_of_a_pipeline(make_result, tiny_pipeline, tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path)
    update_model_card(tmp_path, make_result({"gfid": 5.0}), pipeline)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results[0].metric_type == "gfid" and "class-conditional image generator" in card.text


def test_card_errors(tmp_path):
    with pytest.raises(ValueError, match="allowed for a model card: a local folder"):
        read_model_card("someone/softvq")
    with pytest.raises(ValueError, match="has no README.md"):
        read_model_card(tmp_path)


@pytest.mark.parametrize("metadata", ["a: [1", "- a", "model-index: 3", "model-index: [{name: x}]"])
def test_card_whose_metadata_cannot_be_read(make_result, tiny_tokenizer, tmp_path, metadata):
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\nOwn words.\n")
    before = (tmp_path / "README.md").read_bytes()
    with pytest.raises(ValueError, match="README.md has metadata that cannot be read"):
        update_model_card(tmp_path, make_result({"psnr": 20.0}), tiny_tokenizer())
    assert (tmp_path / "README.md").read_bytes() == before
