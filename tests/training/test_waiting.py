"""A training step is computed without waiting for the device: here it is the meta device, which holds no values, so
whatever reads one is an error; and copies to it are counted."""

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Dinov2Config, Dinov2Model

from softvq_hf.losses import FrozenTeacher, LeCAMRegularizer, build_discriminator
from softvq_hf.schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler
from softvq_hf.training.generator_arguments import SiTTrainingArguments
from softvq_hf.training.randomness import batch_generators
from softvq_hf.training.tokenizer import TokenizerWithHeads, build_tokenizer, discriminator_losses, tokenizer_losses
from softvq_hf.training.tokenizer_arguments import SoftVQTrainingArguments
from softvq_hf.training.transformer import TransformerWithLoss, build_transformer


class CopiesToDevice(TorchDispatchMode):
    """Counts copies from the CPU to the meta device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default:
            self.count += (args[0].device.type, result.device.type) == ("cpu", "meta")
        return result


def softvq_losses(tokenizer_config, batch_size):
    """All losses of a batch that work on the meta device, backwards too, and the number of copies to it."""
    args = SoftVQTrainingArguments(
        **{"output_dir": "x", "dataset_name": "photographs", "resolution": 32, "max_train_steps": 10},
        **{"model": {**tokenizer_config, "encoder_mask_token": True}, "mask_ratio_min": 0.4, "mask_ratio_max": 0.6},
        **{"discriminator": "patchgan", "adaptive_adversarial_weight": True, "augment_discriminator": True},
        **{
            "lecam_weight": 0.001,
            "consistency_weight": 4.0,
            "alignment_teacher": "x",
            "alignment_mode": "avg_1d_shuffle",
        },
    )
    dinov2 = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    teachers = {"alignment": FrozenTeacher(Dinov2Model(dinov2), 32)}
    model = TokenizerWithHeads(args, build_tokenizer(args), teachers).to("meta")
    teachers["alignment"].to("meta")
    discriminator, lecam = build_discriminator("patchgan").to("meta"), LeCAMRegularizer().to("meta")
    pixel_values = torch.zeros(batch_size, 3, 32, 32, device="meta")
    generators = batch_generators(0, 1, 0, 0, batch_size)
    with CopiesToDevice() as copies:
        output, losses = tokenizer_losses(
            *(args, Accelerator(cpu=True), model, teachers, None, discriminator, 0.2, pixel_values, generators, 1)
        )
        losses["loss"].backward()
        losses |= discriminator_losses(args, discriminator, lecam, 0.2, pixel_values, output.sample, generators)
        losses["discriminator_loss"].backward()
    assert all(loss.device.type == "meta" and loss.shape == () for loss in losses.values())
    return losses.keys(), copies.count


def test_losses_of_the_tokenizer_and_the_discriminator(tokenizer_config, accelerator_states):
    names, copies = softvq_losses(tokenizer_config, batch_size=2)
    assert {"generator", "adaptive_weight", "alignment", "entropy", "lecam", "consistency"} <= names
    assert copies > 0 and softvq_losses(tokenizer_config, batch_size=5)[1] == copies


@pytest.mark.parametrize("objective", ["flow_matching", "ddpm"])
def test_losses_of_the_transformer(objective, transformer_config):
    args = SiTTrainingArguments(
        **{"output_dir": "x", "latents_dir": "x", "max_train_steps": 10, "model": transformer_config},
        objective=objective,
    )
    transformer = build_transformer(args, latent_shape=(8, 4), num_classes=5)
    scheduler = StochasticInterpolantScheduler()
    if objective == "ddpm":
        scheduler = DDPMScheduler(variance_type="learned_range")
    model = TransformerWithLoss(args, transformer, scheduler, None).to("meta")
    counts = []
    for batch_size in (2, 5):
        labels = torch.zeros(batch_size, dtype=torch.long, device="meta")
        with CopiesToDevice() as copies:
            generators = batch_generators(0, 1, 0, 0, batch_size)
            model(torch.zeros(batch_size, 8, 4, device="meta"), labels, generators)["loss"].backward()
        counts.append(copies.count)
    assert counts[0] == counts[1] > 0
