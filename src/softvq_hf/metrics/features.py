"""Networks whose features tell sets of images apart: Inception-v3 for the published protocol (FID, sFID, Inception
score), DINOv2, or any vision model of transformers.

Two figures can be compared only if the same extractor with the same weights and the same preprocessing made both:
[`FeatureExtractor.description`] tells what it is.
"""

import hashlib
import io
import json
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors import SafetensorError
from torch import nn

from softvq_hf.metrics.precision import full_float32
from softvq_hf.metrics.weights import FeatureWeightsUnavailable, locate_weights, read_weights


if TYPE_CHECKING:
    from transformers import BaseImageProcessor


# Channels of spatial features that count (sFID, arXiv 2103.03841, as in the evaluator of ADM, arXiv 2105.05233).
NUM_SPATIAL_CHANNELS = 7
# The longest side of the map of spatial features that is kept of networks other than Inception.
SPATIAL_SIDE = 7


@dataclass
class ImageFeatures:
    """
    What a [`FeatureExtractor`] finds in a batch of images, on its device, float32.

    Attributes:
        features (`torch.Tensor` of shape `(B, D)`): For the Fréchet and kernel distances, precision and recall.
        spatial_features (`torch.Tensor` of shape `(B, S)`, *optional*):
            For the spatial Fréchet distance: a feature map, flattened in the order height, width, channels.
        logits (`torch.Tensor` of shape `(B, K)`, *optional*): Of a classifier, for the Inception score.
    """

    features: torch.Tensor
    spatial_features: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class FeatureExtractor(nn.Module, ABC):
    """
    A frozen network in eval mode. A subclass sets the attributes and implements `description` and `extract`.

    Attributes:
        label (`str`): What figures are called after it, such as "FD (DINOv2)".
        num_features (`int`): D of [`ImageFeatures`].
        num_spatial_features (`int`, *optional*): S of [`ImageFeatures`]; `None` without such features.
        num_classes (`int`, *optional*): K of [`ImageFeatures`]; `None` without logits.
    """

    label: str
    num_features: int
    num_spatial_features: int | None
    num_classes: int | None

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """
        Identity of the extractor, as JSON can hold it: `name` of the architecture, `weights_sha256`
        ([`weights_sha256`] of the network), `preprocessing` of the images, and which `features`, `spatial_features`
        and `logits` are taken. Features of extractors with different descriptions cannot be compared.
        """

    @abstractmethod
    def extract(self, images: torch.Tensor) -> ImageFeatures:
        """Features of checked 8-bit images on the device of the weights."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def train(self, mode: bool = True) -> "FeatureExtractor":
        """Stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> ImageFeatures:
        """
        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)`): uint8, on any device.

        Returns:
            [`ImageFeatures`]: on the device of the weights, computed in float32 even where autocast or TF32 is on.

        Raises:
            ValueError: If the images have another shape or dtype.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0:
            raise ValueError(
                f"`images` has shape {tuple(images.shape)} and dtype {images.dtype}, allowed: (B, 3, H, W) of uint8."
            )
        with full_float32(self.device.type):
            return self.extract(images.to(self.device))


class InceptionFeatureExtractor(FeatureExtractor):
    """
    The Inception-v3 of the published protocol: TensorFlow's graph of 2015-12-05, as torch-fidelity
    (https://github.com/toshas/torch-fidelity) has converted it, with TensorFlow 1's bilinear resizing to 299 x 299
    pixels. What else is called Inception-v3, such as torchvision's, gives other numbers.

    - `features`: the 2048 pooled ones of FID (Heusel et al., arXiv 1706.08500).
    - `spatial_features`: 2023 of sFID (Nash et al., arXiv 2103.03841) as the evaluator of ADM (arXiv 2105.05233) takes
      them: the first 7 channels of the first branch of the block that TensorFlow calls mixed_6, 17 x 17 positions.
    - `logits`: 1008, without the bias, as the Inception score (Salimans et al., arXiv 1606.03498) is computed.

    Args:
        weights_path (`str` or `os.PathLike`, *optional*):
            torch-fidelity's file of weights (`weights-inception-2015-12-05-6726825d.pth`, 96 MB). By default it is
            taken from torch's hub cache, and downloaded there if need be. Other tensors of the same names and shapes
            are accepted too: figures from them are not FID.

    Attributes:
        label (`str`): "Inception" if the SHA-256 of the file begins as published, wherever it came from; otherwise
            "Inception with weights" and the first 8 digits of its SHA-256.

    Raises:
        FileNotFoundError: If `weights_path` does not exist.
        FeatureWeightsUnavailable: If the file is not in the cache and cannot be downloaded; says what to place where.
        ValueError: If the file cannot be read, or its tensors are not those of the network. Nothing in it is executed.
    """

    num_features = 2048
    num_spatial_features = 17 * 17 * NUM_SPATIAL_CHANNELS
    num_classes = 1008

    def __init__(self, weights_path: str | os.PathLike | None = None) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

        super().__init__()
        path = locate_weights(URL_INCEPTION_V3, weights_path, "weights_path", "The Inception network of FID")
        with path.open("rb") as file:
            file_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        is_published = file_sha256.startswith(Path(URL_INCEPTION_V3).stem.rsplit("-", 1)[1])
        self.label = "Inception" if is_published else f"Inception with weights {file_sha256[:8]}"
        # torch-fidelity reads its file as a pickle that may execute code, so it gets a copy of the tensors alone
        tensors = io.BytesIO()
        torch.save(read_weights(path), tensors)
        tensors.seek(0)
        try:
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=tensors
            )
        except RuntimeError as error:
            raise ValueError(
                f"The weights in {os.fspath(path)!r} are not those of torch-fidelity's Inception-v3: {error}"
            ) from error
        self.sha256 = weights_sha256(self.network)

    def description(self) -> dict[str, Any]:
        return {
            "name": "Inception-v3 of 2015-12-05 (torch-fidelity)",
            "weights_sha256": self.sha256,
            "preprocessing": "TensorFlow 1's bilinear resizing to 299 x 299 pixels, (x - 128) / 128",
            "features": "pooled, 2048",
            "spatial_features": "mixed_6/conv, first 7 channels",
            "logits": "1008, without bias",
        }

    def extract(self, images: torch.Tensor) -> ImageFeatures:
        maps: list[torch.Tensor] = []
        branch = self.network.Mixed_6d.branch1x1  # after its ReLU
        hook = branch.register_forward_hook(lambda module, inputs, output: maps.append(output))
        try:
            features, logits = self.network(images)
        finally:
            hook.remove()
        return ImageFeatures(features=features, spatial_features=_flatten_map(maps[0]), logits=logits)


class TransformersFeatureExtractor(FeatureExtractor):
    """
    A vision model of transformers. Its image processor resizes, crops and normalises, with the 8-bit resizing of
    torchvision.

    - `features` of an image classifier (a config whose architecture is `...ForImageClassification`): what its last
      linear layer gets, from which it computes the logits. Of any other model: its `pooler_output`; where it has none,
      or the file has no weights for it, the mean over the patch tokens, or over the positions of the last feature map.
    - `spatial_features` of a model with feature maps of shape `(B, C, H, W)`: the last but one of its hidden states,
      which for a ResNet is the output of the last but one stage, averaged to at most 7 x 7 positions; the first 7
      channels. `None` for models of tokens, such as ViTs.
    - `logits`: of image classifiers, else `None`.

    Args:
        name_or_path (`str` or `os.PathLike`):
            A folder or a Hub repository with config.json, preprocessor_config.json and model.safetensors. The vision
            model of an image-text model (CLIP, SigLIP) is taken.
        label (`str`, *optional*): By default the last part of `name_or_path`.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        token (`str`, *optional*): For private or gated repositories; by default that of `hf auth login`.
        image_processor ([`~transformers.BaseImageProcessor`], *optional*): Instead of that of `name_or_path`.

    Raises:
        FeatureWeightsUnavailable: If there is no such model with safetensors, or it cannot be downloaded.
        ValueError: If it is no model of transformers, weights are missing, or the model gives no features.
    """

    def __init__(
        self,
        name_or_path: str | os.PathLike,
        *,
        label: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        image_processor: "BaseImageProcessor | None" = None,
    ) -> None:
        from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

        super().__init__()
        name = os.fspath(name_or_path)
        hub_options = {"revision": revision or "main", "token": token, "trust_remote_code": False}
        try:
            config = AutoConfig.from_pretrained(name, **hub_options)
            architectures = config.architectures or []
            is_classifier = any(architecture.endswith("ForImageClassification") for architecture in architectures)
            auto_class = AutoModelForImageClassification if is_classifier else AutoModel
            model, loading = auto_class.from_pretrained(
                name, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **hub_options
            )
            self.processor = image_processor or AutoImageProcessor.from_pretrained(name, **hub_options)
        except OSError as error:
            raise FeatureWeightsUnavailable(
                f"The feature extractor {name!r} could not be loaded ({error}). Allowed: 'inception', 'dinov2', a "
                "folder with config.json, preprocessor_config.json and model.safetensors, or a Hub id that can be "
                f"downloaded or is in the cache, {HF_HUB_CACHE} (`hf download` on a machine with network fills it)."
            ) from error
        except ValueError as error:  # a folder of something else
            raise ValueError(
                f"The feature extractor {name!r} could not be loaded ({error}). Allowed: 'inception', 'dinov2', a "
                "folder or a Hub id of a vision model of transformers without code of its own."
            ) from error
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"The weights of the feature extractor {name!r} do not fit its config: {error}"
            ) from error
        lacks_pooler = any(key.startswith("pooler.") for key in loading["missing_keys"])
        missing = sorted(key for key in loading["missing_keys"] if not key.startswith("pooler."))
        if missing:
            raise ValueError(f"The feature extractor {name!r} lacks weights of its model: {', '.join(missing)}.")
        if lacks_pooler:
            model.pooler = None  # it would be random
        self.model = model if is_classifier else getattr(model, "vision_model", model)
        self.model.requires_grad_(False)
        self.train(False)
        self.classifier = _find_classifier(model, name) if is_classifier else None
        self.label = label or os.path.basename(os.path.abspath(name))
        self.sha256 = weights_sha256(self.model)

        example = self(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
        self.num_features = example.features.shape[1]
        self.num_spatial_features = None if example.spatial_features is None else example.spatial_features.shape[1]
        self.num_classes = None if example.logits is None else example.logits.shape[1]

    def description(self) -> dict[str, Any]:
        return {
            "name": type(self.model).__name__,
            "weights_sha256": self.sha256,
            "preprocessing": json.loads(self.processor.to_json_string()),
            "features": self.num_features,
            "spatial_features": self.num_spatial_features,
            "logits": self.num_classes,
        }

    def extract(self, images: torch.Tensor) -> ImageFeatures:
        pixel_values = self.processor(images, return_tensors="pt", input_data_format="channels_first")["pixel_values"]
        pixel_values = pixel_values.to(self.device)
        if self.classifier is None:
            outputs = self.model(pixel_values, output_hidden_states=True)
            features, logits = self._pool(outputs, pixel_values), None
        else:
            inputs: list[torch.Tensor] = []
            hook = self.classifier.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
            try:
                outputs = self.model(pixel_values, output_hidden_states=True)
            finally:
                hook.remove()
            features, logits = inputs[0], outputs.logits
        spatial_features = None
        if len(outputs.hidden_states) > 1 and outputs.hidden_states[-2].ndim == 4:
            feature_map = outputs.hidden_states[-2]
            sides = [min(side, SPATIAL_SIDE) for side in feature_map.shape[2:]]
            spatial_features = _flatten_map(F.adaptive_avg_pool2d(feature_map, sides))
        return ImageFeatures(features=features, spatial_features=spatial_features, logits=logits)

    def _pool(self, outputs: Any, pixel_values: torch.Tensor) -> torch.Tensor:
        """One vector per image, `(B, D)`."""
        if outputs.get("pooler_output") is not None:
            return outputs.pooler_output.flatten(1)
        hidden_states = outputs.last_hidden_state
        if hidden_states.ndim == 4:
            return hidden_states.mean((2, 3))
        patch_size = self.model.config.patch_size
        num_patches = (pixel_values.shape[2] // patch_size) * (pixel_values.shape[3] // patch_size)
        if hidden_states.shape[1] < num_patches:
            raise ValueError(
                f"{type(self.model).__name__} has neither `pooler_output` nor one token per patch "
                f"({hidden_states.shape[1]} tokens for {num_patches} patches), so that it gives no features."
            )
        return hidden_states[:, -num_patches:].mean(1)


def load_feature_extractor(
    name: str,
    *,
    weights_path: str | os.PathLike | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> FeatureExtractor:
    """
    A feature extractor by its name.

    Args:
        name (`str`): One of
            - `"inception"`: [`InceptionFeatureExtractor`], for published FID, sFID and Inception scores;
            - `"dinov2"`: `facebook/dinov2-large`, that is DINOv2 ViT-L/14, with the preprocessing of Stein et al.
              (arXiv 2306.04675): images of any shape are resized to 224 x 224 pixels (bicubic, antialiased, 8-bit),
              and the features are the class token after the last norm;
            - a folder or Hub repository of any other model: [`TransformersFeatureExtractor`].
        weights_path (`str` or `os.PathLike`, *optional*): For `"inception"` only, see there.
        revision, token (`str`, *optional*): For the Hub, see [`TransformersFeatureExtractor`].

    Returns:
        [`FeatureExtractor`]: on the CPU.

    Raises:
        ValueError: If `weights_path` is given for another extractor than Inception, or as the extractors say.
        OSError: If weights are missing and cannot be downloaded.
    """
    if name == "inception":
        return InceptionFeatureExtractor(weights_path)
    if weights_path is not None:
        raise ValueError(f"`weights_path` is {os.fspath(weights_path)!r}, allowed: None for {name!r}.")
    if name == "dinov2":
        from transformers import BitImageProcessor
        from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

        image_processor = BitImageProcessor(
            size={"height": 224, "width": 224},
            resample=3,  # bicubic
            do_center_crop=False,
            image_mean=IMAGENET_DEFAULT_MEAN,
            image_std=IMAGENET_DEFAULT_STD,
        )
        return TransformersFeatureExtractor(
            "facebook/dinov2-large", label="DINOv2", revision=revision, token=token, image_processor=image_processor
        )
    return TransformersFeatureExtractor(name, revision=revision, token=token)


def weights_sha256(model: nn.Module) -> str:
    """
    A hash of weights that does not depend on the file or files which they came from.

    Args:
        model (`nn.Module`): The network.

    Returns:
        `str`: SHA-256 over names, dtypes, shapes and bytes of the tensors of the state dict, ordered by name.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _flatten_map(feature_map: torch.Tensor) -> torch.Tensor:
    """First channels of `(B, C, H, W)` as `(B, H * W * channels)`."""
    return feature_map[:, :NUM_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


def _find_classifier(model: nn.Module, name: str) -> nn.Linear:
    """The last linear layer of an image classifier."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers or layers[-1].out_features != model.config.num_labels:
        raise ValueError(
            f"The feature extractor {name!r} is a {type(model).__name__} whose last layer gives no logits for its "
            f"{model.config.num_labels} classes, allowed: image classifiers that end in a linear layer."
        )
    return layers[-1]
