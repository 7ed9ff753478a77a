"""LPIPS (Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", arXiv 1801.03924) as
a training loss, through the `lpips` library: VGG16 features compared by learned linear layers."""

import os
import pickle
import urllib.request
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn


class PerceptualWeightsUnavailable(RuntimeError):
    """The VGG16 weights of the perceptual loss are neither on this machine nor downloadable from it."""


class PerceptualLoss(nn.Module):
    """Mean LPIPS-VGG distance between images.

    All weights are frozen: gradients reach the images only. The module stays in eval mode unless `dropout` is asked
    for. It belongs to the training run, not to the tokenizer: do not wrap it for distributed training or save it.

    The `lpips` wheel carries the linear layers (version 0.1), not the VGG16 trunk, which is torchvision's
    `VGG16_Weights.IMAGENET1K_V1` (528 MB): taken from `trunk_weights`, or else from torch's hub cache, or else
    downloaded there.

    Args:
        trunk_weights (`str` or `os.PathLike`, *optional*):
            A VGG16 state dict with torchvision's names (`features.0.weight`, ...; classifier weights are not used), as
            `.pth` or `.safetensors`.
        dropout (`bool`, defaults to `False`):
            In train mode, drop each squared feature difference with probability 0.5 before the linear layers. The
            official SoftVQ-VAE code does so by accident (it puts the loss into train mode), so its published recipe
            used it; the metric itself has none.

    Raises:
        PerceptualWeightsUnavailable: If no trunk weights are given, cached or downloadable.
        FileNotFoundError: If `trunk_weights` does not exist.
        ValueError: If the file cannot be read, lacks a VGG16 weight or holds one of another shape.
    """

    def __init__(self, trunk_weights: str | os.PathLike | None = None, dropout: bool = False) -> None:
        super().__init__()
        import lpips

        self.dropout = dropout
        trunk = _load_trunk(trunk_weights)
        linear_weights = Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth"
        linear = torch.load(linear_weights, map_location="cpu", weights_only=True)
        with warnings.catch_warnings(), torch.device("meta"):
            # lpips 0.1.4 calls torchvision by an argument name that is deprecated.
            warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
            # `use_dropout` only decides whether the layers exist: the stored names of the linear layers need them.
            self.lpips = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, use_dropout=True, verbose=False)
        state_dict = {}
        for name, tensor in self.lpips.state_dict().items():
            if name.startswith("net."):  # net.slice3.10.weight is features.10.weight
                trunk_name = "features." + name.split(".", 2)[2]
                if trunk_name not in trunk:
                    raise ValueError(f"`trunk_weights` ({trunk_weights}) lacks {trunk_name!r}, which VGG16 needs.")
                if trunk[trunk_name].shape != tensor.shape:
                    raise ValueError(
                        f"`trunk_weights` ({trunk_weights}): {trunk_name!r} has shape "
                        f"{tuple(trunk[trunk_name].shape)}, allowed: {tuple(tensor.shape)}."
                    )
                state_dict[name] = trunk[trunk_name].float()
            elif name.startswith("lin"):  # registered twice, as lin0 and as lins.0
                state_dict[name] = linear[name.replace("lins.", "lin")]
            else:  # the constants of the input scaling are built from numbers, hence not on the meta device
                state_dict[name] = tensor
        self.lpips.load_state_dict(state_dict, assign=True)
        self.sample_dropout = SampleDropout()
        for layer in self.lpips.lins:
            layer.model[0] = self.sample_dropout
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "PerceptualLoss":
        return super().train(mode and self.dropout)

    def forward(
        self, sample: torch.Tensor, target: torch.Tensor, sample_generators: list[torch.Generator] | None = None
    ) -> torch.Tensor:
        """
        Args:
            sample (`torch.Tensor` of shape `(B, 3, H, W)`):
                Images in [-1, 1] with sides of at least 16 pixels; gradients flow into them.
            target (`torch.Tensor` of the same shape): Images in [-1, 1].
            sample_generators (`list[torch.Generator]`, *optional*):
                One source per image of what `dropout` drops, which then does not depend on the other images. By
                default it comes from the global random state of the images' device.

        Returns:
            `torch.Tensor`: the mean LPIPS over the batch, a scalar.

        Raises:
            ValueError: If the shapes differ or are not those of RGB images of sufficient size, or there is not one
                generator per image.
        """
        if sample.shape != target.shape:
            raise ValueError(
                f"`sample` has shape {tuple(sample.shape)}, allowed: that of `target`, {tuple(target.shape)}."
            )
        if sample.ndim != 4 or sample.shape[1] != 3 or min(sample.shape[2:]) < 16:
            raise ValueError(
                f"`sample` has shape {tuple(sample.shape)}, allowed: (B, 3, H, W) with sides of 16 pixels or more."
            )
        if sample_generators is not None and len(sample_generators) != len(sample):
            raise ValueError(
                f"`sample_generators` has length {len(sample_generators)}, allowed: {len(sample)}, one per image."
            )
        self.sample_dropout.seed(sample_generators if self.training else None, sample.device)
        return self.lpips(sample, target).mean()


class SampleDropout(nn.Module):
    """Dropout with probability 0.5 whose draws come from one generator per sample, on the device of the activations:
    the feature maps of LPIPS are too large to draw on the CPU and move."""

    def __init__(self) -> None:
        super().__init__()
        self.generators: list[torch.Generator] | None = None

    def seed(self, sample_generators: list[torch.Generator] | None, device: torch.device) -> None:
        """Seeds one generator on `device` with one draw from each of `sample_generators`; without them the draws come
        from the global random state."""
        self.generators = None
        if sample_generators is not None:
            seeds = [torch.randint(2**63 - 1, (), generator=g, device=g.device).item() for g in sample_generators]
            self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.training or self.generators is None:
            return F.dropout(hidden_states, 0.5, self.training)
        kept = torch.empty_like(hidden_states)
        for sample, generator in zip(kept, self.generators, strict=True):
            sample.bernoulli_(0.5, generator=generator)
        return hidden_states * kept * 2


def warmup_weight(step: int, weight: float, warmup_steps: int) -> float:
    """Weight that rises linearly over the first steps and then stays: `weight * min(1, step / warmup_steps)`.

    Args:
        step (`int`): Optimizer step, counted from 1.
        weight (`float`): Final weight.
        warmup_steps (`int`): Number of steps of the rise; 0 gives `weight` throughout.

    Returns:
        `float`: the weight of this step.

    Raises:
        ValueError: If `warmup_steps` is negative.
    """
    if warmup_steps < 0:
        raise ValueError(f"`warmup_steps` is {warmup_steps}, allowed: 0 or more.")
    if warmup_steps == 0:
        return weight
    return weight * min(1.0, step / warmup_steps)


def _load_trunk(trunk_weights: str | os.PathLike | None) -> dict[str, torch.Tensor]:
    """State dict of torchvision's VGG16 from a file, from torch's hub cache or from the network."""
    if trunk_weights is not None:
        if not os.path.isfile(trunk_weights):
            raise FileNotFoundError(f"`trunk_weights` is {os.fspath(trunk_weights)!r}, allowed: an existing file.")
        return _read_trunk(trunk_weights)

    from torchvision.models import VGG16_Weights

    url = VGG16_Weights.IMAGENET1K_V1.url
    cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if cached.exists():
        return _read_trunk(cached)
    try:
        # torch's download has no time limit of its own, so ask for the headers first
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10).close()
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except OSError as error:
        raise PerceptualWeightsUnavailable(
            f"The perceptual loss needs VGG16 weights, which could not be had ({error}). Download {url} on a machine "
            f"with network and put it at {cached}, or pass the file as `trunk_weights`. Training without the "
            "perceptual loss is possible (weight 0), but reconstructions come out blurrier and rFID is worse."
        ) from error


def _read_trunk(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"The VGG16 weights in {os.fspath(path)!r} cannot be read ({error}), allowed: a whole `.pth` or "
            "`.safetensors` file with tensors only."
        ) from error
