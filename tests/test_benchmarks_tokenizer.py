"""benchmarks/tokenizer.py on models of a few thousand parameters."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from diffusers import AutoencoderKL, AutoencoderRAE


ROOT = Path(__file__).parents[1]


def load_benchmark(file, name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look their types up there, and the timing scripts each other
    spec.loader.exec_module(module)
    return module


load_benchmark("side_by_side.py", "side_by_side")
tokenizer_benchmark = load_benchmark("tokenizer.py", "benchmarks_tokenizer")

TINY_KL = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
}
TINY_RAE = {
    "encoder_hidden_size": 64,
    "encoder_num_hidden_layers": 1,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
}


@pytest.fixture
def tiny_models(monkeypatch, tmp_path):
    """A tokenizer, an AutoencoderKL and an AutoencoderRAE for 32 pixels in place of the real ones."""
    model = {"sample_size": 32, "num_latent_tokens": 8, "latent_channels": 4, "codebook_size": 16, "num_codebooks": 2}
    for side in ("encoder", "decoder"):
        model |= {f"{side}_hidden_size": 16, f"{side}_num_layers": 2, f"{side}_num_attention_heads": 2}
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        yaml.safe_dump({"output_dir": "x", "dataset_name": "photographs", "max_train_steps": 1, "model": model})
    )
    monkeypatch.setattr(tokenizer_benchmark, "TOKENIZERS", {32: {"tiny": recipe}})
    autoencoders = {"kl": (AutoencoderKL, TINY_KL), "rae": (AutoencoderRAE, TINY_RAE)}
    monkeypatch.setattr(tokenizer_benchmark, "AUTOENCODERS", autoencoders)


def arguments(tmp_path, **values):
    values = {"resolution": 32, "batch_sizes": [1, 2], "rounds": 2, "device": "cpu", "dtype": "float32", **values}
    return tokenizer_benchmark.TokenizerBenchmarkArguments(output_dir=str(tmp_path / "out"), **values)


def test_every_model_is_timed_and_compared(tiny_models, tmp_path):
    tokenizer_benchmark.main(arguments(tmp_path))
    record = json.loads((tmp_path / "out/tokenizer.json").read_text())
    assert record["ratios"].keys() == {
        f"tiny.{call}.vs_{name}" for call in ("encode", "decode") for name in ("kl", "rae")
    }
    for call in ("encode", "decode"):
        own, other = (record["measurements"][name][call] for name in ("tiny", "rae"))
        batches = [own["best_batch_size"], other["best_batch_size"]]
        seconds = [
            figures["seconds_by_batch_size"][str(batch)] for figures, batch in zip((own, other), batches, strict=True)
        ]
        expected = [(batches[0] / seconds[0][i]) / (batches[1] / seconds[1][i]) for i in range(2)]
        ratio = record["ratios"][f"tiny.{call}.vs_rae"]
        assert [ratio["min"], ratio["max"]] == pytest.approx(sorted(expected))
        assert own["gflops_per_image"] > 0 and own["num_parameters"] > 0
        rates = {batch: batch / sorted(own["seconds_by_batch_size"][str(batch)])[0] for batch in (1, 2)}
        assert own["images_per_second"]["max"] == pytest.approx(rates[own["best_batch_size"]])
    formats = record["measurements"]["kl"]["seconds_by_memory_format"]
    assert record["measurements"]["kl"]["memory_format"] == min(formats, key=formats.get)
    assert record["measurements"]["rae"]["seconds_by_memory_format"] is None
    table = (tmp_path / "out/tokenizer.md").read_text()
    assert "| tiny | contiguous |" in table and "| tiny.decode.vs_kl |" in table


def test_flops_are_those_of_products_convolutions_and_attention():
    linear, convolution = torch.nn.Linear(3, 4), torch.nn.Conv2d(3, 5, 3, padding=1)
    assert tokenizer_benchmark.count_flops(lambda: linear(torch.ones(7, 3))) == 2 * 7 * 3 * 4
    assert tokenizer_benchmark.count_flops(lambda: convolution(torch.ones(1, 3, 8, 8))) == 2 * 64 * 27 * 5
    query, key = torch.ones(1, 2, 6, 4), torch.ones(1, 2, 10, 4)
    flops = tokenizer_benchmark.count_flops(lambda: F.scaled_dot_product_attention(query, key, key))
    assert flops == 2 * 2 * (2 * 6 * 10 * 4)


def test_memory_formats_that_give_other_images_are_an_error():
    subject = tokenizer_benchmark.Subject(AutoencoderKL(**TINY_KL).eval())
    images = torch.rand(1, 3, 16, 16)
    seconds = tokenizer_benchmark.choose_memory_format("kl", subject, images)
    assert seconds.keys() == {"contiguous", "channels_last"}

    decode = subject.decode
    subject.decode = lambda latents: decode(latents) + (subject.memory_format == "channels_last")
    with pytest.raises(ValueError, match="The reconstruction of kl differs by 1 between the memory formats"):
        tokenizer_benchmark.choose_memory_format("kl", subject, images)
    subject.decode = lambda latents: decode(latents) * torch.nan
    with pytest.raises(ValueError, match="The reconstruction of kl differs by nan"):
        tokenizer_benchmark.choose_memory_format("kl", subject, images)


def test_the_real_models_are_the_published_ones():
    """At both resolutions, by their parameters; on the meta device."""
    for resolution, expected in ((256, {"b_64": 172.97, "l_64": 608.14}), (512, {"bl_64_512": 391.5})):
        args = tokenizer_benchmark.TokenizerBenchmarkArguments(output_dir="x", resolution=resolution)
        millions = {}
        for name, (model_class, config) in tokenizer_benchmark.model_configs(args).items():
            with torch.device("meta"):
                millions[name] = model_class(**config).num_parameters() / 1e6
        expected |= {"autoencoder_kl": 83.65, "autoencoder_dc": 312.25, "autoencoder_rae": 501.64}
        assert millions.pop("autoencoder_rae_default") == pytest.approx(112.59, abs=0.01)
        assert millions == pytest.approx(expected, abs=0.5)


@pytest.mark.parametrize("batch_sizes", [[], [0, 2]])
def test_bad_batch_sizes_are_an_error(batch_sizes, tmp_path):
    with pytest.raises(ValueError, match="`--batch_sizes` is .*, allowed: one or more integers from 1 on"):
        arguments(tmp_path, batch_sizes=batch_sizes)
