"""LPIPS as a loss: the official numbers, what is frozen, where the weights come from and what is said without them."""

import time
import urllib.request

import lpips
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import VGG16_Weights, vgg16

from softvq_hf.losses.perceptual import PerceptualLoss, PerceptualWeightsUnavailable, warmup_weight


def random_trunk_weights():
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in vgg16().state_dict().items() if key.startswith("features.")}
    generator = torch.Generator().manual_seed(5)
    return {
        key: torch.randn(shape, generator=generator) * (2 / shape[1:].numel()) ** 0.5
        if len(shape) > 1
        else torch.zeros(shape)
        for key, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def trunk_weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(random_trunk_weights(), path)
    return path


@pytest.fixture(scope="module")
def perceptual_loss(trunk_weights):
    return PerceptualLoss(trunk_weights)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(6)
    return torch.rand(2, 2, 3, 32, 32, generator=generator) * 2 - 1


def test_official_numbers_from_given_features(golden, trunk_weights):
    """With the reference's feature maps and linear layers in place of VGG16's: its value per image and their mean."""
    _, tensors = golden("softvq_losses")
    loss = PerceptualLoss(trunk_weights)

    class GivenFeatures(nn.Module):
        """Features 0 for the first call of a pair, features 1 for the second, as LPIPS runs its two images."""

        calls = 0

        def forward(self, image):
            image_index, self.calls = self.calls % 2, self.calls + 1
            return [tensors[f"input.lpips_feat{image_index}_{level}"] for level in range(5)]

    loss.lpips.net = GivenFeatures()
    for level, layer in enumerate(loss.lpips.lins):
        layer.model[1].weight = nn.Parameter(tensors[f"input.lpips_lin{level}"])

    sample, target = tensors["input.image"], tensors["input.recon"]
    torch.testing.assert_close(loss.lpips(sample, target), tensors["output.lpips"], atol=1e-6, rtol=0)
    torch.testing.assert_close(loss(sample, target), tensors["output.lpips"].mean(), atol=1e-6, rtol=0)
    scaled = loss.lpips.scaling_layer(tensors["input.image"])
    torch.testing.assert_close(scaled, tensors["output.lpips_scaled_input"], atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:The parameter 'pretrained' is deprecated", "ignore:Arguments other than a weight")
def test_agrees_with_the_library_built_the_ordinary_way(perceptual_loss, images):
    reference = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    trunk = {f"features.{key.split('.', 1)[1]}": value for key, value in reference.net.state_dict().items()}
    for key, value in random_trunk_weights().items():
        trunk[key].copy_(value)
    expected = reference(*images).mean()
    assert expected > 0
    torch.testing.assert_close(perceptual_loss(*images), expected, atol=1e-7, rtol=1e-6)


def test_gradients_reach_the_sample_only(perceptual_loss, images):
    sample = images[0].requires_grad_()
    perceptual_loss(sample, images[1]).backward()
    assert sample.grad.isfinite().all() and sample.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in perceptual_loss.parameters())
    assert perceptual_loss(images[1], images[1]) == 0


def test_dead_features_give_finite_gradients(trunk_weights, images):
    loss = PerceptualLoss(trunk_weights)
    loss.lpips.net.slice4[-2].bias.fill_(-1e6)  # relu4_3 and all features after it are zero everywhere
    sample = images[0].requires_grad_()
    loss(sample, images[1]).backward()
    assert sample.grad.isfinite().all() and sample.grad.abs().sum() > 0


def test_dropout_only_where_asked_for(trunk_weights, perceptual_loss, images):
    without = perceptual_loss(*images)
    assert torch.equal(perceptual_loss.train()(*images), without)
    assert not perceptual_loss.training

    with_dropout = PerceptualLoss(trunk_weights, dropout=True)
    assert torch.equal(with_dropout(*images), without)
    with_dropout.train()
    draws = torch.stack([with_dropout(*images) for _ in range(8)])
    assert draws.std() > 0
    torch.testing.assert_close(draws.mean(), without, atol=0, rtol=0.1)
    assert torch.equal(with_dropout.eval()(*images), without)


def test_dropout_of_an_image_follows_its_own_generator(trunk_weights):
    """What is dropped does not depend on how the batch is split, nor on the global random state."""
    loss = PerceptualLoss(trunk_weights, dropout=True).train()
    sample, target = torch.rand(2, 3, 3, 32, 32) * 2 - 1

    def generators(indices):
        return [torch.Generator().manual_seed(7 + index) for index in indices]

    state = torch.get_rng_state()
    whole = loss(sample, target, generators(range(3)))
    first = loss(sample[:1], target[:1], generators([0]))
    rest = loss(sample[1:], target[1:], generators([1, 2]))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close((first + 2 * rest) / 3, whole, atol=0, rtol=1e-5)
    other = loss(sample, target, generators(range(1, 4)))
    assert (other - whole).abs() > 1e-3 * whole
    assert torch.equal(loss.eval()(sample, target, generators(range(3))), loss(sample, target))
    with pytest.raises(ValueError, match="`sample_generators` has length 2, allowed: 3, one per image"):
        loss(sample, target, generators(range(2)))

    # Half of the entries are dropped, the others doubled.
    loss.train().sample_dropout.seed(generators(range(2)), torch.device("cpu"))
    dropped = loss.sample_dropout(torch.ones(2, 4, 100, 100))
    assert dropped.unique().tolist() == [0, 2]
    torch.testing.assert_close(dropped.mean((1, 2, 3)), torch.ones(2), atol=0.03, rtol=0)


def test_construction_draws_no_random_numbers(trunk_weights):
    state = torch.get_rng_state()
    PerceptualLoss(trunk_weights)
    assert torch.equal(torch.get_rng_state(), state)


def test_safetensors_trunk(perceptual_loss, images, tmp_path):
    save_file(random_trunk_weights(), tmp_path / "vgg16.safetensors")
    assert torch.equal(PerceptualLoss(tmp_path / "vgg16.safetensors")(*images), perceptual_loss(*images))


def test_trunk_from_the_hub_cache(perceptual_loss, trunk_weights, images, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    checkpoints = tmp_path / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / VGG16_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]).symlink_to(trunk_weights)
    assert torch.equal(PerceptualLoss()(*images), perceptual_loss(*images))


def test_no_weights_and_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # a closed port: no network, wherever this test runs
    monkeypatch.setattr(urllib.request, "_opener", None)
    started = time.perf_counter()
    with pytest.raises(PerceptualWeightsUnavailable) as error:
        PerceptualLoss()
    assert time.perf_counter() - started < 10
    assert isinstance(error.value, RuntimeError)
    assert str(tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth") in str(error.value)
    assert "`trunk_weights`" in str(error.value) and VGG16_Weights.IMAGENET1K_V1.url in str(error.value)


def test_unusable_trunk_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="`trunk_weights` is .*nothing.pth"):
        PerceptualLoss(tmp_path / "nothing.pth")
    weights = random_trunk_weights()
    last = weights.pop("features.28.bias")
    torch.save(weights, tmp_path / "vgg16.pth")
    with pytest.raises(ValueError, match=r"`trunk_weights` .* lacks 'features.28.bias'"):
        PerceptualLoss(tmp_path / "vgg16.pth")
    torch.save({**weights, "features.28.bias": last[:7]}, tmp_path / "vgg16.pth")
    with pytest.raises(ValueError, match=r"'features.28.bias' has shape \(7,\), allowed: \(512,\)"):
        PerceptualLoss(tmp_path / "vgg16.pth")
    cut_off = (tmp_path / "vgg16.pth").read_bytes()[:1_000_000]
    for name in ("cut_off.pth", "cut_off.safetensors", "empty.pth"):
        (tmp_path / name).write_bytes(b"" if name == "empty.pth" else cut_off)
        with pytest.raises(ValueError, match=f"VGG16 weights in '.*{name}' cannot be read .* a whole `.pth`"):
            PerceptualLoss(tmp_path / name)


def test_bad_images(perceptual_loss):
    with pytest.raises(ValueError, match="allowed: that of `target`"):
        perceptual_loss(torch.zeros(1, 3, 32, 32), torch.zeros(2, 3, 32, 32))
    for shape in [(1, 1, 32, 32), (3, 32, 32), (1, 3, 15, 32)]:
        with pytest.raises(ValueError, match="`sample` has shape"):
            perceptual_loss(torch.zeros(shape), torch.zeros(shape))


def test_warmup_weight():
    assert [warmup_weight(step, 0.5, 4) for step in (0, 1, 2, 4, 100)] == [0.0, 0.125, 0.25, 0.5, 0.5]
    assert warmup_weight(1, 0.5, 0) == 0.5
    with pytest.raises(ValueError, match="`warmup_steps` is -1"):
        warmup_weight(1, 0.5, -1)
