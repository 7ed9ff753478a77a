"""PSNR, SSIM and LPIPS against other implementations of them, and in their limits."""

import math

import lpips
import numpy as np
import pytest
import skimage.data
import skimage.metrics
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import alexnet, vgg16

from softvq_hf.metrics import LPIPS, PSNR, SSIM, FeatureWeightsUnavailable
from softvq_hf.metrics.image_pairs import MeanAccumulator


@pytest.fixture(scope="module")
def photographs() -> torch.Tensor:
    """Six crops of photographs, 48 x 64 pixels."""
    photograph = torch.from_numpy(np.array(skimage.data.astronaut())).permute(2, 0, 1)
    return torch.stack([photograph[:, 64 * i : 64 * i + 48, 40 * i : 40 * i + 64] for i in range(6)])


@pytest.fixture(scope="module")
def distorted(photographs) -> torch.Tensor:
    """Each of the photographs with more noise and blur than the one before."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(photographs.shape, generator=generator) * torch.arange(1, 7).view(6, 1, 1, 1) * 6
    blurred = F.avg_pool2d(photographs.float(), 3, stride=1, padding=1, count_include_pad=False)
    return (blurred + noise).clamp(0, 255).round().to(torch.uint8)


@pytest.fixture(scope="module")
def trunks(tmp_path_factory) -> dict[str, str]:
    """Random weights of VGG16 (without its classifier) and AlexNet in torchvision's names."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("trunks")
    with torch.device("meta"):
        networks = {"vgg": vgg16(), "alex": alexnet()}
    for net, network in networks.items():
        weights = {
            name: torch.randn(tensor.shape) / math.sqrt(max(tensor[0].numel(), 1))
            for name, tensor in network.state_dict().items()
            if name.startswith("features.")
        }
        torch.save(weights, folder / f"{net}.pth")
    return {net: str(folder / f"{net}.pth") for net in networks}


def compute(metric, predictions, references, batch_size: int = 6) -> dict:
    for batch in zip(predictions.split(batch_size), references.split(batch_size), strict=True):
        metric.add_batch(predictions=batch[0], references=batch[1])
    return metric.compute()


def test_psnr_agrees_with_scikit_image(photographs, distorted):
    expected = [
        skimage.metrics.peak_signal_noise_ratio(image.numpy(), other.numpy(), data_range=255)
        for image, other in zip(photographs, distorted, strict=True)
    ]
    assert max(expected) - min(expected) > 5
    result = compute(PSNR(), distorted, photographs)
    mean = pytest.approx(np.mean(expected), rel=1e-6)
    assert result == {"psnr": mean, "num_images": 6, "num_identical_pairs": 0, "psnr_of_differing_pairs": mean}


def test_psnr_of_a_known_error():
    references = torch.full((1, 3, 4, 4), 100, dtype=torch.uint8)
    assert compute(PSNR(), references + 51, references)["psnr"] == pytest.approx(20 * math.log10(5))


def test_images_may_be_on_a_device_without_float64():
    """
    As on Apple's: fake tensors have a device and a dtype, and no numbers. SSIM is computed on the CPU, LPIPS in
    float32.
    """
    with FakeTensorMode(), DevicesOfFloat64() as recorder:
        images = torch.zeros(2, 3, 12, 12, dtype=torch.uint8, device="cuda")
        values = PSNR().measure(images, images)
        assert values.shape == (2,)
        with pytest.raises(DataDependentOutputException):  # it asks for the number, which is on the CPU
            MeanAccumulator().update(values)
    assert recorder.devices == {"cpu"}


class DevicesOfFloat64(TorchDispatchMode):
    """Where operations give tensors of float64."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and output.dtype == torch.float64:
            self.devices.add(output.device.type)
        return output


def test_ssim_agrees_with_scikit_image(photographs, distorted):
    expected = [
        skimage.metrics.structural_similarity(
            image.permute(1, 2, 0).numpy(),
            other.permute(1, 2, 0).numpy(),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
            channel_axis=2,
        )
        for image, other in zip(photographs, distorted, strict=True)
    ]
    assert max(expected) - min(expected) > 0.1
    result = compute(SSIM(), distorted, photographs)
    assert result == {"ssim": pytest.approx(np.mean(expected), rel=1e-12), "num_images": 6}


@pytest.mark.parametrize("level", [0, 1, 100, 254])
def test_ssim_of_flat_images(level):
    """Without any variance it is the term of the means; in float32 it was wrong by up to 1e-3 in bright images."""
    references = torch.full((2, 3, 32, 32), level, dtype=torch.uint8)
    stabiliser = (0.01 * 255) ** 2
    expected = (2 * level * (level + 1) + stabiliser) / (level**2 + (level + 1) ** 2 + stabiliser)
    metric = SSIM()
    assert metric.measure(references + 1, references).tolist() == pytest.approx([expected] * 2, abs=1e-9)
    assert metric.measure(references, references).tolist() == pytest.approx([1, 1], abs=1e-12)


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_lpips_agrees_with_its_library(net, trunks, photographs, distorted):
    library = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)  # with the learned layers of its wheel
    trunk = torch.load(trunks[net], weights_only=True)
    for name, weight in library.net.named_parameters():  # slice1.0.weight is features.0.weight
        weight.copy_(trunk["features." + name.split(".", 1)[1]])
    with torch.no_grad():
        expected = library(distorted / 255, photographs / 255, normalize=True)
    metric = LPIPS(net, weights_path=trunks[net])
    assert metric.network.training is False
    result = compute(metric, distorted, photographs)
    assert result == {"lpips": pytest.approx(expected.mean().item(), rel=1e-4), "num_images": 6}


def test_lpips_reads_safetensors(trunks, tmp_path, photographs, distorted):
    save_file(torch.load(trunks["alex"], weights_only=True), tmp_path / "alex.safetensors")
    results = [
        compute(LPIPS("alex", weights_path=path), distorted, photographs)
        for path in (trunks["alex"], str(tmp_path / "alex.safetensors"))
    ]
    assert results[0] == results[1]


@pytest.mark.parametrize("key", ["psnr", "ssim", "lpips"])
def test_batch_size_does_not_count(key, trunks, photographs, distorted):
    build = {"psnr": PSNR, "ssim": SSIM, "lpips": lambda: LPIPS("alex", weights_path=trunks["alex"])}[key]
    together, again, split = (compute(build(), distorted, photographs, size)[key] for size in (6, 6, 4))
    assert together == again
    assert together == pytest.approx(split, rel=1e-6)


def test_one_image_added_alone_counts_as_in_a_batch(photographs, distorted):
    metric = PSNR()
    for image, other in zip(photographs, distorted, strict=True):
        metric.add(prediction=other, reference=image)
    assert metric.compute() == pytest.approx(compute(PSNR(), distorted, photographs), rel=1e-12)


def test_identical_images_are_the_limits(photographs, trunks):
    result = compute(PSNR(), photographs, photographs)
    assert (result["psnr"], result["num_identical_pairs"], result["psnr_of_differing_pairs"]) == (math.inf, 6, None)
    assert compute(SSIM(), photographs, photographs)["ssim"] == pytest.approx(1, abs=1e-6)
    assert compute(LPIPS("alex", weights_path=trunks["alex"]), photographs, photographs)["lpips"] == 0


def test_psnr_beside_identical_pairs(photographs, distorted):
    """They are counted, and the mean over the others is told."""
    predictions = torch.cat([distorted[:4], photographs[4:]])
    result = compute(PSNR(), predictions, photographs, batch_size=3)
    expected = compute(PSNR(), distorted[:4], photographs[:4])["psnr"]
    assert result == {
        "psnr": math.inf,
        "num_images": 6,
        "num_identical_pairs": 2,
        "psnr_of_differing_pairs": pytest.approx(expected, rel=1e-12),
    }


@pytest.mark.parametrize("metric_class", [PSNR, SSIM])
def test_floating_point_images_are_measured_as_8_bit_ones(metric_class, photographs, distorted):
    values = distorted / 255 + 0.9 / 255
    expected = {
        "truncate": compute(metric_class(), to_levels(values, "floor"), photographs),
        "round": compute(metric_class(), to_levels(values, "round"), photographs),
    }
    assert expected["truncate"] != expected["round"]
    for rounding, result in expected.items():
        assert compute(metric_class(rounding=rounding), values.clamp(max=1), photographs / 255) == result


def to_levels(values: torch.Tensor, operation: str) -> torch.Tensor:
    return getattr(values.clamp(0, 1).mul(255), operation)().to(torch.uint8)


def test_unknown_rounding_is_refused_at_once():
    with pytest.raises(ValueError, match="`rounding` is 'nearest', allowed: 'round', 'truncate'"):
        PSNR(rounding="nearest")


def test_other_shape_is_refused_and_leaves_the_metric_as_it_was(photographs, distorted):
    metric = PSNR()
    metric.add_batch(predictions=distorted[:3], references=photographs[:3])
    with pytest.raises(ValueError, match=r"`predictions` has shape \(2, .*allowed: that of `references`, \(3,"):
        metric.add_batch(predictions=distorted[:2], references=photographs[:3])
    with pytest.raises(ValueError, match="`references` is of type NoneType"):
        metric.add_batch(predictions=distorted[:2])
    metric.add_batch(predictions=distorted[3:], references=photographs[3:])
    assert metric.compute() == pytest.approx(compute(PSNR(), distorted, photographs), rel=1e-12)


def test_nothing_added():
    with pytest.raises(ValueError, match="No sample was added"):
        PSNR().compute()


def test_images_in_0_to_1_cast_to_8_bits_are_noticed(photographs):
    metric = PSNR()
    metric.add_batch(predictions=(photographs / 255).to(torch.uint8), references=photographs)
    with pytest.raises(ValueError, match="`predictions` holds no value above 1 in any of 6 8-bit images.*`reset()"):
        metric.compute()
    metric.reset()
    assert metric.compute(predictions=photographs, references=photographs)["num_images"] == 6


@pytest.mark.parametrize("num_earlier", [0, 1])
@pytest.mark.parametrize("metric_class", [PSNR, SSIM])
def test_a_batch_that_compute_refuses_is_taken_back(metric_class, num_earlier, photographs, distorted):
    """What was added before stays: a black image, which is no error by itself."""
    metric, expected = metric_class(), metric_class()
    for each in (metric, expected):
        for image in torch.zeros(num_earlier, 3, 48, 64, dtype=torch.uint8):
            each.add(prediction=image, reference=image + 1)
    cast = (photographs / 255).to(torch.uint8)
    with pytest.raises(ValueError, match=f"`predictions` holds no value above 1 in any of {6 + num_earlier} 8-bit"):
        metric.compute(predictions=cast, references=cast)
    expected.add_batch(predictions=distorted, references=photographs)
    result = metric.compute(predictions=distorted, references=photographs)
    assert result == pytest.approx(expected.compute(), rel=1e-12)
    assert result["num_images"] == 6 + num_earlier


def test_images_smaller_than_the_window_of_ssim(photographs):
    smallest = photographs[..., :11, :11]
    assert compute(SSIM(), smallest, smallest)["ssim"] == pytest.approx(1, abs=1e-6)
    with pytest.raises(ValueError, match="images of 10 x 64 pixels, allowed: sides of 11 pixels"):
        compute(SSIM(), photographs[..., :10, :], photographs[..., :10, :])


@pytest.mark.parametrize(("net", "size"), [("vgg", 16), ("alex", 31)])
def test_images_smaller_than_the_network_of_lpips(net, size, trunks, photographs):
    metric = LPIPS(net, weights_path=trunks[net])
    small = photographs[..., :size, :size]
    assert compute(metric, small, small)["lpips"] == 0
    with pytest.raises(ValueError, match=f"images of {size} x {size - 1} pixels, allowed for net='{net}'"):
        compute(metric, small[..., :-1], small[..., :-1])


def test_lpips_without_weights_says_what_to_place_where(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", refuse_connection)
    with pytest.raises(FeatureWeightsUnavailable, match="LPIPS with net='vgg' needs vgg16-397923af.pth") as error:
        LPIPS()
    assert f"put it at {tmp_path / 'checkpoints' / 'vgg16-397923af.pth'}" in str(error.value)


def refuse_connection(*args, **kwargs):
    raise OSError("no network")


def test_lpips_takes_weights_from_the_cache(tmp_path, monkeypatch, trunks, photographs):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth").symlink_to(trunks["alex"])
    assert compute(LPIPS("alex"), photographs, photographs)["lpips"] == 0


def test_lpips_refuses_other_weights(tmp_path, trunks):
    with pytest.raises(ValueError, match="`net` is 'squeeze', allowed: 'vgg', 'alex'"):
        LPIPS("squeeze")
    with pytest.raises(FileNotFoundError, match="`weights_path` is .*nowhere.pth"):
        LPIPS("alex", weights_path=tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="lack features.12.bias"):
        LPIPS("vgg", weights_path=trunks["alex"])
    weights = torch.load(trunks["alex"], weights_only=True)
    torch.save({**weights, "features.0.weight": torch.zeros(1)}, tmp_path / "shape.pth")
    with pytest.raises(ValueError, match="(?s)are not those of 'alex': .*size mismatch"):
        LPIPS("alex", weights_path=tmp_path / "shape.pth")
    torch.save(lpips.LPIPS(net="alex", pnet_rand=True, verbose=False), tmp_path / "code.pth")
    with pytest.raises(ValueError, match="cannot be read"):
        LPIPS("alex", weights_path=tmp_path / "code.pth")


def test_making_lpips_draws_no_random_numbers(trunks):
    state = torch.get_rng_state()
    LPIPS("alex", weights_path=trunks["alex"])
    assert torch.equal(torch.get_rng_state(), state)


def test_means_merge():
    first, second = MeanAccumulator(), MeanAccumulator()
    first.update(torch.tensor([1.0, 2.0]))
    second.update(torch.tensor([6.0]))
    first.merge(second)
    first.merge(MeanAccumulator())
    assert (first.mean(), first.count) == (3, 3)
