"""Figures are computed in float32, whatever is set around them."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from softvq_hf.metrics.features import FeatureExtractor, ImageFeatures
from softvq_hf.metrics.lpips import LPIPS
from softvq_hf.metrics.precision import full_float32
from softvq_hf.metrics.precision_recall import precision_recall


PRODUCTS = ("convolution", "mm", "addmm", "bmm", "_euclidean_dist", "_cdist_forward")


class ProductsRecorder(TorchDispatchMode):
    """Dtype and CUDA's precision of float32, at each convolution and matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in PRODUCTS:
            backends = torch.backends
            precisions = (backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision)
            self.found.add((args[0].dtype, *precisions))
        return func(*args, **(kwargs or {}))


class Convolution(FeatureExtractor):
    """The mean of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Conv2d(3, 4, 3)

    def description(self) -> dict[str, str]:
        return {"name": "convolution"}

    def extract(self, images: torch.Tensor) -> ImageFeatures:
        return ImageFeatures(self.network(images.float()).mean((2, 3)))


@pytest.fixture
def tf32():
    """What `allow_tf32` of a training configuration sets."""
    settings = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [setting.allow_tf32 for setting in settings]
    for setting in settings:
        setting.allow_tf32 = True
    yield
    for setting, value in zip(settings, before, strict=True):
        setting.allow_tf32 = value


def measure_lpips(images, tmp_path):
    weights = {"features." + name: torch.zeros(shape) for name, shape in ALEXNET.items()}
    torch.save(weights, tmp_path / "alexnet.pth")
    LPIPS("alex", weights_path=tmp_path / "alexnet.pth").add_batch(predictions=images, references=images)


ALEXNET = {
    f"{layer}.{kind}": shape if kind == "weight" else shape[:1]
    for layer, shape in {
        0: (64, 3, 11, 11),
        3: (192, 64, 5, 5),
        6: (384, 192, 3, 3),
        8: (256, 384, 3, 3),
        10: (256, 256, 3, 3),
    }.items()
    for kind in ("weight", "bias")
}


@pytest.mark.parametrize(
    "measure",
    [
        lambda images, folder: Convolution()(images),
        measure_lpips,
        lambda images, folder: precision_recall(images.flatten(1).float(), images.flatten(1).float(), num_neighbors=1),
    ],
    ids=["FeatureExtractor", "LPIPS", "precision_recall"],
)
def test_neither_autocast_nor_tf32_counts(measure, tf32, tmp_path):
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with ProductsRecorder() as recorder, torch.autocast("cpu", dtype=torch.bfloat16):
        measure(images, tmp_path)
    assert recorder.found == {(torch.float32, "ieee", "ieee")}
    assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32


def test_settings_are_those_of_before_after_an_error(tf32):
    with pytest.raises(KeyError), full_float32("cpu"):
        raise KeyError
    assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32
