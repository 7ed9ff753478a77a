"""Efficient image tokenizers and the generators on top of them, native to diffusers.

The public names are imported eagerly: diffusers takes a component's class from a module that is imported already.
"""

from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ
from softvq_hf.models.transformer_dit_1d import DiTTransformer1DModel
from softvq_hf.pipelines.pipeline_softvq import SoftVQPipeline
from softvq_hf.schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler


__version__ = "0.1.0.dev0"

__all__ = ["AutoencoderSoftVQ", "DiTTransformer1DModel", "SoftVQPipeline", "StochasticInterpolantScheduler"]
