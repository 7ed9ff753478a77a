"""The losses of a batch of `training/train_softvq.py`."""

import pytest
import torch
from accelerate import Accelerator

from softvq_hf.losses import build_discriminator
from softvq_hf.training.randomness import batch_generators
from softvq_hf.training.tokenizer import TokenizerWithHeads, build_tokenizer, discriminator_losses, tokenizer_losses
from softvq_hf.training.tokenizer_arguments import SoftVQTrainingArguments


@pytest.fixture
def arguments(tokenizer_config):
    def build(**values):
        return SoftVQTrainingArguments(
            **{"output_dir": "x", "dataset_name": "photographs", "resolution": 32, "max_train_steps": 10},
            model=tokenizer_config,
            **values,
        )

    return build


class MeanProduct(torch.nn.Linear):
    """A perceptual loss that tells in which dtype its products are computed."""

    def __init__(self):
        super().__init__(32, 4)

    def forward(self, sample, target, sample_generators):
        product = super().forward(sample - target)
        self.dtype = product.dtype
        return product.square().mean()


@pytest.mark.parametrize(("mixed_precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_the_perceptual_loss_has_the_precision_of_the_tokenizer(mixed_precision, dtype, arguments, accelerator_states):
    args = arguments(perceptual_weight=0.5, reconstruction_weight=2.0, entropy_weight=0.25)
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    model = accelerator.prepare(TokenizerWithHeads(args, build_tokenizer(args), {}))
    perceptual_loss, images = MeanProduct(), torch.rand(2, 3, 32, 32) * 2 - 1
    inputs = (images, batch_generators(0, 1, 0, 0, 2), 1)
    output, losses = tokenizer_losses(args, accelerator, model, {}, perceptual_loss, None, 0.0, *inputs)
    assert perceptual_loss.dtype == dtype
    assert losses.keys() == {"loss", "reconstruction", "perceptual", "entropy", "max_probability"}
    assert losses["reconstruction"] == (output.sample - images).square().mean()
    parts = 2.0 * losses["reconstruction"] + 0.5 * losses["perceptual"] + 0.25 * losses["entropy"]
    torch.testing.assert_close(losses["loss"], parts)


def test_broken_reconstructions_do_not_reach_the_discriminator(arguments):
    """Where they are not finite it is shown the originals."""
    args = arguments(discriminator="patchgan")
    discriminator = build_discriminator("patchgan")
    real = torch.rand(2, 3, 32, 32) * 2 - 1
    fake = (real + 0.1).requires_grad_()
    with torch.no_grad():
        fake[1] = torch.nan
    losses = discriminator_losses(args, discriminator, None, 0.5, real, fake, batch_generators(0, 1, 0, 0, 2))
    losses["discriminator_loss"].backward()
    assert fake.grad is None
    assert losses["discriminator_loss"] == 0.5 * losses["discriminator"]
    assert all(tensor.isfinite().all() for tensor in discriminator.state_dict().values())
    assert all(parameter.grad.isfinite().all() for parameter in discriminator.parameters())
