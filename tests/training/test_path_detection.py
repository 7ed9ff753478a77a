"""The path of a SiT from its weights: tiny models trained on either path, on toy latents and on those of images."""

import copy
import functools
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from softvq_hf import DiTTransformer1DModel, SoftVQPipeline, StochasticInterpolantScheduler
from softvq_hf.cli import main
from softvq_hf.conversion import convert_checkpoint
from softvq_hf.conversion.sit import _key_map
from softvq_hf.data import PhotographDataset
from softvq_hf.losses import flow_matching_loss, sample_flow_times
from softvq_hf.training.path_detection import detect_path_type, encode_images


SHAPE = (8, 6)  # tokens and channels, as the reference tokenizer makes them
RESOLUTION = 64
NUM_CLASSES = 3


def clusters(count: int, generator: torch.Generator, share: float = 0.9) -> torch.Tensor:
    """Latents of unit variance; so much of it is between 16 clusters."""
    centres = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(5))
    chosen = centres[torch.randint(16, (count,), generator=generator)]
    return math.sqrt(share) * chosen + math.sqrt(1 - share) * torch.randn(chosen.shape, generator=generator)


def train(latents_of, paths: list[str], weighting: str = "lognormal", steps: int = 300) -> DiTTransformer1DModel:
    """A tiny SiT; with several paths it sees them in turn."""
    torch.manual_seed(1)
    config = {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16, "num_classes": NUM_CLASSES}
    transformer = DiTTransformer1DModel(num_tokens=SHAPE[0], in_channels=SHAPE[1], **config)
    transformer.initialize_weights()
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(2)
    transformer.train()
    for step in range(steps):
        path_type = paths[step % len(paths)]
        latents = latents_of(32, generator)
        times = sample_flow_times(32, weighting, path_type, generator)
        noise = torch.randn(latents.shape, generator=generator)
        labels = torch.randint(NUM_CLASSES, (32,), generator=generator)
        scheduler = StochasticInterpolantScheduler(path_type=path_type)
        flow_matching_loss(transformer, scheduler, latents, labels, times, noise).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return transformer.eval()


@functools.cache
def trained(path_type: str, weighting: str = "lognormal") -> DiTTransformer1DModel:
    return train(clusters, [path_type], weighting)


@pytest.mark.parametrize("weighting", ["uniform", "lognormal"])
@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_path_of_trained_models(path_type, weighting):
    transformer = trained(path_type, weighting)
    latents = clusters(64, torch.Generator().manual_seed(9))
    detection = detect_path_type(transformer, latents)
    assert detection.path_type == path_type
    # the difference is no matter of chance
    assert abs(detection.errors["linear"] - detection.errors["cosine"]) > 6 * detection.standard_error
    # the losses themselves say "linear" for all of these models
    assert detection.losses["linear"] < detection.losses["cosine"]
    again = detect_path_type(transformer, latents, batch_size=7)
    assert again.errors == pytest.approx(detection.errors) and again.losses == pytest.approx(detection.losses)


def test_errors_are_those_of_data_and_noise():
    """What the weights on the losses mean: the velocity, solved for data and noise, on both paths."""
    transformer = trained("linear")
    latents = clusters(64, torch.Generator().manual_seed(9))
    detection = detect_path_type(transformer, latents, seed=3)
    generator = torch.Generator().manual_seed(3)
    errors = {"linear": [], "cosine": []}
    for stratum in range(4):
        noise = torch.randn(latents.shape, generator=generator)
        angles = (stratum + (torch.arange(64, dtype=torch.float64) + 0.5) / 64) / 4 * math.pi / 2
        ratio = angles.tan()
        for path_type, times in (("linear", ratio / (1 + ratio)), ("cosine", angles * 2 / math.pi)):
            alpha, sigma = (1 - times, times) if path_type == "linear" else (angles.cos(), angles.sin())
            torch.testing.assert_close(sigma / alpha, ratio)  # the same ratio of noise to data
            if path_type == "linear":
                d_alpha, d_sigma = torch.tensor([-1.0]), torch.tensor([1.0])
            else:
                d_alpha, d_sigma = -math.pi / 2 * sigma, math.pi / 2 * alpha
            alpha, sigma, d_alpha, d_sigma = (values[:, None, None] for values in (alpha, sigma, d_alpha, d_sigma))
            noisy = alpha * latents + sigma * noise
            with torch.no_grad():
                velocity = transformer(
                    noisy.float(), timestep=1000 * times.float(), class_labels=torch.full((64,), NUM_CLASSES)
                ).sample
            determinant = alpha * d_sigma - d_alpha * sigma
            data_error = (d_sigma * noisy - sigma * velocity) / determinant - latents
            noise_error = (alpha * velocity - d_alpha * noisy) / determinant - noise
            errors[path_type].append((data_error.square() + noise_error.square()).mean())
    for path_type, values in errors.items():
        assert detection.errors[path_type] == pytest.approx(torch.stack(values).mean().item(), rel=1e-4)


def test_model_that_knows_nothing_of_the_latents():
    transformer = train(clusters, ["linear"], steps=1)
    with pytest.raises(
        ValueError, match=r"not measurably better than without a model \(error 0\.\d+\).*linear 1\.\d+ .*cosine"
    ):
        detect_path_type(transformer, clusters(64, torch.Generator().manual_seed(9)))


def test_difference_within_chance():
    transformer = train(clusters, ["linear", "linear", "linear", "cosine"])
    message = (
        r"cannot be detected: error linear 0\.\d+ .*, cosine 0\.\d+ .* 4 times that is needed\. .*give `path_type`"
    )
    with pytest.raises(ValueError, match=message):
        detect_path_type(transformer, clusters(64, torch.Generator().manual_seed(9)))


def test_labels():
    transformer = copy.deepcopy(trained("linear"))
    latents = clusters(64, torch.Generator().manual_seed(9))
    null = detect_path_type(transformer, latents)
    assert null == detect_path_type(transformer, latents, torch.full((64,), NUM_CLASSES))
    assert null.errors != detect_path_type(transformer, latents, torch.zeros(64, dtype=torch.int64)).errors
    transformer.register_to_config(class_dropout_prob=0.0)
    with pytest.raises(ValueError, match="no null class .* images in 3 folders"):
        detect_path_type(transformer, latents)


# From images, through the converter


@pytest.fixture
def images(tmp_path):
    """A folder of 48 crops of photographs."""
    dataset = PhotographDataset("train", resolution=64, train=False, max_samples=48)
    (tmp_path / "images").mkdir()
    for i in range(len(dataset)):
        pixels = (dataset[i]["pixel_values"].permute(1, 2, 0) * 127.5 + 127.5).round().to(torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / "images" / f"{i:02d}.png")
    return tmp_path / "images"


@pytest.fixture
def tokenizer(golden, images):
    """The reference tokenizer with the statistics of its latents: `(official weights, config, latents)`."""
    description, tensors = golden("softvq_tokenizer")
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    overrides = {key: description[key] for key in ("encoder_override", "decoder_override")}
    config = description["config"] | overrides
    vae = convert_checkpoint("softvq", weights, config)
    with torch.no_grad():
        raw = torch.cat([vae.encode(pixels).latent for pixels in read(images).split(16)])
    config |= {"vq_mean": raw.mean().item(), "vq_std": raw.std().item()}
    return weights, config, (raw - raw.mean()) / raw.std()


def read(folder):
    pixels = np.stack([np.asarray(Image.open(file)) for file in sorted(folder.iterdir())])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1


def write_official(folder, weights, config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return str(folder)


def official_sit(transformer: DiTTransformer1DModel) -> tuple[dict[str, torch.Tensor], dict]:
    """A transformer in the official layout."""
    own = transformer.state_dict()
    weights = {official: torch.cat([own[key] for key in keys]) for official, keys in _key_map(transformer).items()}
    for kind in ("weight", "bias"):
        key = f"final_layer.adaLN_modulation.1.{kind}"
        weights[key] = torch.cat(weights[key].chunk(2)[::-1])  # (shift, scale) there, (scale, shift) here
    config = {
        "input_size": SHAPE[0],
        "in_channels": SHAPE[1],
        "hidden_size": 64,
        "depth": 2,
        "num_heads": 4,
        "mlp_ratio": 4.0,
        "num_classes": NUM_CLASSES,
        "class_dropout_prob": 0.1,
        "patch_size": 1,
        "vae_1d": True,
        "use_cfg": True,
        "path_type": "edm",  # as in the published configs: it says nothing
        "qk_norm": False,
    }
    return {key: value.clone() for key, value in weights.items()}, config


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_converted_pipeline_has_the_path(tokenizer, images, tmp_path, path_type, capsys):
    weights, config, latents = tokenizer

    def latents_of(count, generator):
        return latents[torch.randint(len(latents), (count,), generator=generator)]

    transformer = train(latents_of, [path_type])
    source = write_official(tmp_path / "sit", *official_sit(transformer))
    command = ["convert", source, "--output_dir", str(tmp_path / "out")]
    command += ["--tokenizer", write_official(tmp_path / "tokenizer", weights, config), "--detect_path"]
    main([*command, "--images", str(images), "--num_images", "32", "--device", "cpu"])
    assert f"SoftVQPipeline written to {tmp_path / 'out'}" in capsys.readouterr().out

    pipeline = SoftVQPipeline.from_pretrained(tmp_path / "out")
    assert all(
        torch.equal(*pair) for pair in zip(pipeline.transformer.parameters(), transformer.parameters(), strict=True)
    )
    assert type(pipeline.scheduler) is StochasticInterpolantScheduler
    assert json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())["path_type"] == path_type
    card = (tmp_path / "out/README.md").read_text()
    assert f"| path | {path_type}, detected on 32 images |" in card
    assert "| linear path | denoising error 0." in card and "| cosine path | denoising error 0." in card
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(0, num_inference_steps=3, output_type="np").images.shape == (1, 64, 64, 3)


def test_latents_of_images(tokenizer, images, tmp_path):
    weights, config, latents = tokenizer
    vae = convert_checkpoint("softvq", weights, config)
    encoded, class_labels = encode_images(vae, images, 1000, NUM_CLASSES, RESOLUTION)
    torch.testing.assert_close(encoded, latents, atol=1e-4, rtol=0)
    assert class_labels is None

    for label in range(NUM_CLASSES):
        (tmp_path / "labelled" / str(label)).mkdir(parents=True)
        for file in sorted(images.iterdir())[4 * label : 4 * label + 4]:
            file.rename(tmp_path / "labelled" / str(label) / file.name)
    (tmp_path / "labelled" / "0" / "broken.png").write_bytes(b"no image")
    encoded, class_labels = encode_images(vae, tmp_path / "labelled", 1000, NUM_CLASSES, RESOLUTION, batch_size=5)
    assert len(encoded) == 12 and class_labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    # whose classes, nobody knows
    assert encode_images(vae, tmp_path / "labelled", 1000, NUM_CLASSES + 1, RESOLUTION)[1] is None

    with pytest.raises(ValueError, match="holds 7 readable images, allowed to detect the path: 8 or more"):
        encode_images(vae, tmp_path / "labelled", 7, NUM_CLASSES, RESOLUTION)
    vae.register_to_config(scaling_factor=0.1)
    with pytest.raises(ValueError, match=r"standard deviation 0\.\d+ after normalisation, expected: about 1"):
        encode_images(vae, images, 1000, NUM_CLASSES, RESOLUTION)
    with pytest.raises(ValueError, match="nowhere"):
        encode_images(vae, tmp_path / "nowhere", 1000, NUM_CLASSES, RESOLUTION)
