"""LPIPS (Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", arXiv 1801.03924),
through the `lpips` library."""

import os
import warnings
from pathlib import Path
from typing import Any

import evaluate
import torch
from torch import nn
from torchvision.models import AlexNet_Weights, VGG16_Weights

from softvq_hf.metrics.image_pairs import FEATURES, INPUTS_DESCRIPTION, ImagePairMetric
from softvq_hf.metrics.precision import full_float32
from softvq_hf.metrics.weights import locate_weights, read_weights


# Weights of the network that gives the features, and the smallest image that it takes, in pixels.
TRUNKS = {"vgg": VGG16_Weights.IMAGENET1K_V1, "alex": AlexNet_Weights.IMAGENET1K_V1}
MINIMUM_SIZES = {"vgg": 16, "alex": 31}

_DESCRIPTION = """
Learned perceptual distance of images, version 0.1, 0 for identical ones: differences of the features of VGG16 or
AlexNet, weighted by layers that were trained on people's judgements; the mean over the images. Lower is better.
"""
_CITATION = """
@inproceedings{zhang2018perceptual,
  title={The Unreasonable Effectiveness of Deep Features as a Perceptual Metric},
  author={Zhang, Richard and Isola, Phillip and Efros, Alexei A and Shechtman, Eli and Wang, Oliver},
  booktitle={CVPR}, year={2018}
}
"""
_RETURNS = """\
Returns:
    lpips (`float`): Mean over the images.
    num_images (`int`): Number of pairs.
"""


class LPIPS(ImagePairMetric):
    """
    Mean learned perceptual distance (version 0.1) between 8-bit images, without dropout, in float32 (not TF32), on the
    device of the images.

    `net="vgg"` is also the perceptual loss that most tokenizers are trained with, so it flatters them; the authors of
    LPIPS recommend `"alex"` as a metric. State which one a figure is of: they differ by much.

    Args:
        net (`str`, *optional*, defaults to `"vgg"`): `"vgg"` (sides of 16 pixels or more) or `"alex"` (31 or more).
        rounding, kwargs: As in [`~softvq_hf.metrics.image_pairs.ImagePairMetric`].
        weights_path (`str` or `os.PathLike`, *optional*):
            torchvision's VGG16 (`vgg16-397923af.pth`, 528 MB) or AlexNet (`alexnet-owt-7be5be79.pth`, 233 MB), of
            which the `features.*` are used. By default it is taken from torch's hub cache, and downloaded there if
            need be. The learned layers are in the `lpips` wheel.

    Raises:
        ValueError: If `net` is unknown, or the file cannot be read or holds other weights.
        FileNotFoundError: If `weights_path` does not exist.
        FeatureWeightsUnavailable: If the file is not in the cache and cannot be downloaded; says what to place where.

    Example:

    ```python
    >>> metric = evaluate.load("src/softvq_hf/metrics/lpips.py", net="alex")  # or LPIPS(net="alex")
    >>> metric.add_batch(predictions=reconstructions, references=images)
    >>> metric.compute()["lpips"]
    ```
    """

    key = "lpips"

    def __init__(
        self,
        net: str = "vgg",
        rounding: str = "round",
        weights_path: str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> None:
        if net not in TRUNKS:
            raise ValueError(f"`net` is {net!r}, allowed: {', '.join(map(repr, TRUNKS))}.")
        super().__init__(rounding=rounding, **kwargs)
        self.net = net
        self.network = load_network(net, weights_path)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=INPUTS_DESCRIPTION + _RETURNS,
            features=FEATURES,
        )

    @torch.no_grad()
    def measure(self, predictions: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        height, width = predictions.shape[2:]
        if min(height, width) < MINIMUM_SIZES[self.net]:
            raise ValueError(
                f"`predictions` has images of {height} x {width} pixels, allowed for net={self.net!r}: sides of "
                f"{MINIMUM_SIZES[self.net]} pixels or more."
            )
        self.network.to(predictions.device)
        with full_float32(predictions.device.type):
            distances = self.network(predictions.float() / 127.5 - 1, references.float() / 127.5 - 1)
        return distances.flatten()


def load_network(net: str, weights_path: str | os.PathLike | None) -> nn.Module:
    """LPIPS with the features of a file or of the cache and the learned layers of the `lpips` wheel, in eval mode."""
    import lpips

    path = locate_weights(TRUNKS[net].url, weights_path, "weights_path", f"LPIPS with net={net!r}")
    trunk = read_weights(path)
    learned = read_weights(Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth")
    with warnings.catch_warnings(), torch.device("meta"):  # no weights are drawn only to be replaced
        # lpips 0.1.4 calls torchvision by an argument name that is deprecated
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
        network = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
    # net.slice3.10.weight is features.10.weight
    names = {name: "features." + name.split(".", 1)[1] for name in network.net.state_dict()}
    lacking = sorted(set(names.values()) - set(trunk))
    if lacking:
        raise ValueError(f"The weights in {os.fspath(path)!r} lack {', '.join(lacking)}, which {net!r} needs.")
    try:
        network.net.load_state_dict({name: trunk[source].float() for name, source in names.items()}, assign=True)
    except RuntimeError as error:
        raise ValueError(f"The weights in {os.fspath(path)!r} are not those of {net!r}: {error}") from error
    for i, layer in enumerate(network.lins):
        layer.load_state_dict({"model.1.weight": learned[f"lin{i}.model.1.weight"]}, assign=True)
    return network.requires_grad_(False).eval()
