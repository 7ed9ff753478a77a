"""The networks that an evaluation looks through, by the arguments that name them."""

import hashlib
from pathlib import Path

import torch
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

from softvq_hf.evaluation.arguments import FeatureArguments
from softvq_hf.metrics.features import FeatureExtractor, FeatureWeightsUnavailable, load_feature_extractor


def load_feature_extractors(args: FeatureArguments, device: torch.device) -> list[FeatureExtractor]:
    """
    The networks that `args` name, in that order; none for "none".

    Args:
        args ([`FeatureArguments`]): `feature_extractor` and `inception_weights`.
        device (`torch.device`): Where they go.

    Returns:
        `list[FeatureExtractor]`: "Inception" is the label of Inception with the published weights only, by the hash in
        the name of their file. With others its figures are not FID, and their hash is in the label.

    Raises:
        ValueError: If one is no such network, or two would have the same label.
        OSError: If weights are missing and cannot be downloaded.
    """
    extractors = []
    for name in args.feature_extractor:
        if name == "inception":
            extractors.append(_load_inception(args.inception_weights).to(device))
        elif name != "none":
            extractors.append(load_feature_extractor(name).to(device))
            if extractors[-1].label == "Inception":
                raise ValueError(
                    f"`--feature_extractor` is {name!r}, allowed: another name of the folder. Figures are called after"
                    " it, and those of Inception belong to one network."
                )
    labels = [extractor.label for extractor in extractors]
    if len(set(labels)) < len(labels):
        raise ValueError(
            f"`--feature_extractor` is {' '.join(args.feature_extractor)}, whose figures would be called after"
            f" {', '.join(labels)}, allowed: networks of different names."
        )
    return extractors


def _load_inception(weights_path: str | None) -> FeatureExtractor:
    try:
        extractor = load_feature_extractor("inception", weights_path=weights_path)
    except FeatureWeightsUnavailable as error:
        raise FeatureWeightsUnavailable(
            f"{error} For an evaluation that is `--inception_weights`; `--feature_extractor none` does without."
        ) from error
    if weights_path is not None:
        with Path(weights_path).open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if not sha256.startswith(Path(URL_INCEPTION_V3).stem.rsplit("-", 1)[1]):
            extractor.label = f"Inception with weights {sha256[:8]}"
    return extractor
