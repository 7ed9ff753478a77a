"""Figures of tokenizers and generators, as modules of Hugging Face `evaluate`: of pairs of images (PSNR, SSIM, LPIPS),
of sets of images (Fréchet distance, Inception score, kernel distance, precision and recall) and of latents (use of the
codebook, statistics, rate).

Every metric is importable and loadable by its path, `evaluate.load("src/softvq_hf/metrics/psnr.py")`, takes batches,
keeps an amount of memory that does not depend on the number of samples, and works over several processes under
accelerate: see [`StreamingMetric`].
"""

from softvq_hf.metrics.codebook_usage import CodebookUsage, codebook_statistics
from softvq_hf.metrics.feature_sample import FeatureSample
from softvq_hf.metrics.features import (
    FeatureExtractor,
    FeatureWeightsUnavailable,
    ImageFeatures,
    InceptionFeatureExtractor,
    TransformersFeatureExtractor,
    load_feature_extractor,
)
from softvq_hf.metrics.frechet_distance import FrechetDistance
from softvq_hf.metrics.gaussian import GaussianAccumulator, GaussianStatistics, frechet_distance
from softvq_hf.metrics.images import ROUNDINGS, check_images, to_uint8
from softvq_hf.metrics.inception_score import InceptionScore
from softvq_hf.metrics.kernel_distance import KernelDistance
from softvq_hf.metrics.latent_statistics import LatentStatistics, effective_rank
from softvq_hf.metrics.lpips import LPIPS
from softvq_hf.metrics.precision_recall import PrecisionRecall
from softvq_hf.metrics.psnr import PSNR
from softvq_hf.metrics.rate import Rate, rate
from softvq_hf.metrics.ssim import SSIM
from softvq_hf.metrics.streaming import StreamingMetric


__all__ = [
    "CodebookUsage",
    "FeatureExtractor",
    "FeatureSample",
    "FeatureWeightsUnavailable",
    "FrechetDistance",
    "GaussianAccumulator",
    "GaussianStatistics",
    "ImageFeatures",
    "InceptionFeatureExtractor",
    "InceptionScore",
    "KernelDistance",
    "LPIPS",
    "LatentStatistics",
    "PSNR",
    "PrecisionRecall",
    "ROUNDINGS",
    "Rate",
    "SSIM",
    "StreamingMetric",
    "TransformersFeatureExtractor",
    "check_images",
    "codebook_statistics",
    "effective_rank",
    "frechet_distance",
    "load_feature_extractor",
    "rate",
    "to_uint8",
]
