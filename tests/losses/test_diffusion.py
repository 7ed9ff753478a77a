"""DDPM loss of DiT: official terms at every kind of step, what each term moves, tables, fixed variance, bad input."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from softvq_hf.conversion import convert_checkpoint
from softvq_hf.conversion.sit import convert_dit
from softvq_hf.losses.diffusion import diffusion_loss, exact_betas, token_diffusion_loss
from softvq_hf.models.transformer_dit_1d import DiTTransformer1DModel


def ddpm_scheduler(**config):
    return DDPMScheduler(**{"variance_type": "learned_range", "clip_sample": False, **config})


SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


@pytest.fixture
def tiny_inputs():
    generator = torch.Generator().manual_seed(1)
    transformer = DiTTransformer1DModel(
        num_tokens=4,
        in_channels=3,
        out_channels=6,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_classes=5,
        timestep_scale=1.0,
    ).eval()
    return {
        "transformer": transformer,
        "scheduler": ddpm_scheduler(),
        "latents": torch.randn(6, 4, 3, generator=generator),
        "class_labels": torch.arange(6) % 5,
        "timesteps": torch.tensor([0, 1, 250, 500, 998, 999]),
        "noise": torch.randn(6, 4, 3, generator=generator),
    }


class Given(torch.nn.Module):
    """Predicts what it was given."""

    def __init__(self, sample):
        super().__init__()
        self.sample = sample

    def forward(self, hidden_states, timestep, class_labels):
        return type("Output", (), {"sample": self.sample})


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("suffix", ["", "_2d"], ids=["1d", "2d"])
def test_official_terms(golden, suffix, schedule):
    description, tensors = golden("dit")
    prefix = f"weights{suffix}."
    weights = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    transformer = convert_dit(weights, description[f"config{suffix}"])
    prefix = f"input{suffix}."
    inputs = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    seen = []
    transformer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    assert inputs["t_train"].tolist() == [0, 1, 500, 999]
    terms = diffusion_loss(
        transformer,
        ddpm_scheduler(beta_schedule=SCHEDULES[schedule]),
        inputs["x_start"],
        inputs["y_train"],
        inputs["t_train"],
        inputs["train_noise"],
    )

    torch.testing.assert_close(seen[0], tensors[f"output{suffix}.x_t_{schedule}"], atol=1e-6, rtol=0)
    assert terms.keys() == {"loss", "mse", "vb"}
    for name, value in terms.items():
        expected = tensors[f"output{suffix}.train_{name}_{schedule}"]
        torch.testing.assert_close(value[:3], expected[:3], atol=1e-6, rtol=0)
        # At t = 999 of the cosine schedule 1 / sqrt(alphas_cumprod) is 20291, which amplifies rounding; vb is 1.86.
        torch.testing.assert_close(value[3], expected[3], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_betas_are_exact(golden, schedule):
    _, tensors = golden("dit")
    scheduler = ddpm_scheduler(beta_schedule=SCHEDULES[schedule])
    betas = exact_betas(scheduler)
    torch.testing.assert_close(betas.float(), scheduler.betas, atol=1e-8, rtol=1e-6)
    # the chain of the kept steps, in float64
    kept = (1 - betas).cumprod(0)[tensors[f"output.timestep_map_{schedule}"]]
    spaced = 1 - kept / torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    torch.testing.assert_close(spaced, tensors[f"output.spaced_betas_{schedule}"], atol=1e-12, rtol=1e-11)

    trained = ddpm_scheduler(beta_schedule="scaled_linear", trained_betas=betas.tolist())
    assert torch.equal(exact_betas(trained), betas)


def test_variance_term_does_not_move_the_noise(tiny_inputs):
    prediction = torch.randn(6, 4, 6, requires_grad=True)
    terms = diffusion_loss(**{**tiny_inputs, "transformer": Given(prediction)})
    gradients = {
        name: torch.autograd.grad(value.sum(), prediction, retain_graph=True)[0].chunk(2, dim=-1)
        for name, value in terms.items()
    }
    noise, variance = 0, 1
    assert not gradients["vb"][noise].any() and not gradients["mse"][variance].any()
    assert torch.equal(gradients["loss"][noise], gradients["mse"][noise])
    assert torch.equal(gradients["loss"][variance], gradients["vb"][variance])
    for sample in range(6):
        assert gradients["mse"][noise][sample].any() and gradients["vb"][variance][sample].any()
    torch.testing.assert_close(gradients["mse"][noise], (prediction[..., :3] - tiny_inputs["noise"]).detach() / 6)


def test_perfect_prediction_of_noise_and_posterior_variance(tiny_inputs):
    noise = tiny_inputs["noise"]
    terms = diffusion_loss(
        **{**tiny_inputs, "transformer": Given(torch.cat([noise, torch.full_like(noise, -1)], dim=-1))}
    )
    torch.testing.assert_close(terms["mse"], torch.zeros(6), atol=0, rtol=0)
    torch.testing.assert_close(terms["vb"][1:], torch.zeros(5), atol=1e-6, rtol=0)
    assert terms["vb"][0] > 0  # bits that even the right distribution needs for a bin

    # the other bound is the variance of one step, KL of two normals with one mean
    terms = diffusion_loss(
        **{**tiny_inputs, "transformer": Given(torch.cat([noise, torch.full_like(noise, 1)], dim=-1))}
    )
    betas = exact_betas(tiny_inputs["scheduler"])
    alphas_cumprod = (1 - betas).cumprod(0)
    for sample, t in enumerate(tiny_inputs["timesteps"].tolist()[1:], start=1):
        ratio = ((1 - alphas_cumprod[t - 1]) / (1 - alphas_cumprod[t])).item()  # posterior variance / beta
        assert terms["vb"][sample].item() == pytest.approx(
            (ratio - 1 - math.log(ratio)) / 2 / math.log(2), abs=1e-6, rel=1e-3
        )


def test_first_step_is_the_likelihood_of_a_bin(tiny_inputs):
    # noise 0, predicted as 0: the mean is the latent, which lies in the middle of its bin
    latents = torch.tensor([-1.0, -0.2, 0.3, 1.0]).reshape(1, 4, 1).expand(1, 4, 3)
    inputs = {**tiny_inputs, "latents": latents, "class_labels": torch.zeros(1, dtype=torch.int64)}
    inputs |= {"timesteps": torch.zeros(1, dtype=torch.int64), "noise": torch.zeros(1, 4, 3)}
    vb = diffusion_loss(**{**inputs, "transformer": Given(torch.cat([torch.zeros(1, 4, 3), torch.ones(1, 4, 3)], -1))})
    std = exact_betas(tiny_inputs["scheduler"])[0].sqrt()
    upper = torch.special.ndtr(1 / 255 / std)
    bits = -torch.stack([upper.log2(), (2 * upper - 1).log2()]).mean()  # two open bins, two closed ones
    assert vb["vb"].item() == pytest.approx(bits.item(), abs=2e-3)  # the tanh approximation


def test_fixed_variance_has_the_squared_error_alone(tiny_inputs):
    prediction = torch.randn(6, 4, 3)
    scheduler = ddpm_scheduler(variance_type="fixed_large")
    terms = diffusion_loss(**{**tiny_inputs, "scheduler": scheduler, "transformer": Given(prediction)})
    assert terms.keys() == {"loss", "mse"}
    expected = (prediction - tiny_inputs["noise"]).square().mean((1, 2))
    torch.testing.assert_close(terms["loss"], expected)
    assert torch.equal(terms["loss"], terms["mse"])


def test_samples_do_not_mix(tiny_inputs):
    terms = diffusion_loss(**tiny_inputs)
    part = {key: value[1:3] if torch.is_tensor(value) else value for key, value in tiny_inputs.items()}
    for name, value in diffusion_loss(**part).items():
        assert terms[name].shape == (6,)
        torch.testing.assert_close(value, terms[name][1:3], atol=1e-6, rtol=1e-6)


def test_half_precision_latents_are_trained_on_in_float32(tiny_inputs):
    latents = tiny_inputs["latents"].bfloat16()
    terms = diffusion_loss(**{**tiny_inputs, "latents": latents})
    expected = diffusion_loss(**{**tiny_inputs, "latents": latents.float()})
    assert all(value.dtype == torch.float32 and torch.equal(value, expected[name]) for name, value in terms.items())


def test_force_drop_ids_reach_the_transformer(tiny_inputs):
    dropped = diffusion_loss(**tiny_inputs, force_drop_ids=torch.ones(6, dtype=torch.bool))
    null_class = diffusion_loss(**{**tiny_inputs, "class_labels": torch.full((6,), 5)})
    assert torch.equal(dropped["loss"], null_class["loss"])
    assert not torch.equal(dropped["loss"], diffusion_loss(**tiny_inputs)["loss"])


def test_loss_falls_when_the_transformer_learns(tiny_inputs):
    transformer = tiny_inputs["transformer"]
    transformer.initialize_weights()
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        terms = diffusion_loss(**tiny_inputs)
        terms["loss"].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append({name: value.mean().item() for name, value in terms.items()})
    # an untrained DiT predicts zero, whose error on unit noise is 1
    assert losses[0]["mse"] == pytest.approx(tiny_inputs["noise"].square().mean().item(), rel=1e-5)
    assert losses[-1]["mse"] < 0.8 * losses[0]["mse"] and losses[-1]["vb"] < losses[0]["vb"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"noise": torch.zeros(6, 4)}, ValueError, r"`noise` has shape \(6, 4\)"),
        ({"timesteps": torch.tensor(5)}, ValueError, r"`timesteps` has shape \(\), allowed: \(6,\)"),
        ({"timesteps": torch.rand(6)}, TypeError, "`timesteps` is of dtype torch.float32, allowed: integers"),
        ({"timesteps": torch.arange(995, 1001)}, ValueError, "`timesteps` reach from 995 to 1000, allowed: 0 to 999"),
        ({"timesteps": torch.arange(-1, 5)}, ValueError, "`timesteps` reach from -1 to 4"),
        ({"scheduler": ddpm_scheduler(prediction_type="sample")}, ValueError, "`prediction_type` 'sample'"),
        ({"scheduler": ddpm_scheduler(variance_type="fixed_large")}, ValueError, "`variance_type` 'fixed_large'"),
        ({"scheduler": ddpm_scheduler(variance_type="learned")}, ValueError, "`variance_type` 'learned', allowed"),
        ({"scheduler": ddpm_scheduler(beta_schedule="sigmoid")}, ValueError, "`beta_schedule` 'sigmoid', allowed"),
        ({"scheduler": ddpm_scheduler(rescale_betas_zero_snr=True)}, ValueError, "`rescale_betas_zero_snr` True"),
        ({"transformer": Given(torch.zeros(6, 4, 3))}, ValueError, r"returned shape \(6, 4, 3\) .* 'learned_range'"),
    ],
)
def test_bad_input(tiny_inputs, change, error, message):
    with pytest.raises(error, match=message):
        diffusion_loss(**{**tiny_inputs, **change})


def test_betas_of_another_scheduler_with_the_same_chain():
    assert torch.equal(exact_betas(DDIMScheduler()), exact_betas(DDPMScheduler()))


# Single tokens (MAR)

COSINE = {"beta_schedule": "squaredcos_cap_v2"}


def test_official_terms_of_single_tokens(official_denoiser):
    model, tensors, _ = official_denoiser
    losses = token_diffusion_loss(
        model, ddpm_scheduler(**COSINE), *(tensors[f"input.{name}"] for name in ("x", "c", "t", "noise"))
    )
    for name, official in {"mse": "mse", "vb": "vb", "loss": "loss_per_row"}.items():
        torch.testing.assert_close(losses[name], tensors[f"output.forward.{official}"], atol=1e-5, rtol=1e-5)
    mask = tensors["input.mask"]
    loss = (losses["loss"] * mask).sum() / mask.sum()
    torch.testing.assert_close(loss, tensors["output.forward.loss_masked"], atol=1e-5, rtol=0)
    loss.backward()
    denoiser = model.denoiser
    for name, layer in {
        "cond_embed": denoiser.condition_embedder,
        "input_proj": denoiser.proj_in,
        "final_layer.linear": denoiser.proj_out,
    }.items():
        expected = tensors[f"output.forward.grad.{name}.weight"]
        torch.testing.assert_close(layer.weight.grad, expected, atol=1e-6, rtol=1e-4)


def test_official_gradients_reach_the_transformer(golden):
    description, tensors = golden("mar")
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    model = convert_checkpoint("mar", weights, description["config"])
    inputs = {key.removeprefix("input.train."): value for key, value in tensors.items() if "input.train" in key}
    tokens, mask = model.patchify(inputs["latents"]), inputs["mask"].bool()
    conditions = model(
        tokens, inputs["labels"], (~mask).nonzero()[:, 1].view(len(mask), -1), force_drop_ids=inputs["label_drop"]
    ).conditions
    rows = mask.flatten().repeat(2).nonzero()[:, 0]  # the tokens twice, as whole blocks; masked ones alone
    repeated = (values.flatten(0, 1).repeat(2, 1)[rows] for values in (tokens, conditions))
    losses = token_diffusion_loss(model, ddpm_scheduler(**COSINE), *repeated, inputs["t"][rows], inputs["noise"][rows])
    loss = losses["loss"].mean()
    torch.testing.assert_close(loss, tensors["output.train.loss"], atol=1e-5, rtol=0)
    loss.backward()
    gradients = {
        "class_emb.weight": model.class_embedder.weight.grad[:-1],
        "mask_token": model.mask_token.grad,
        "z_proj.weight": model.proj_in.weight.grad,
        "diffusion_pos_embed_learned": model.condition_pos_embed.grad,
        "decoder_blocks.1.mlp.fc2.weight": model.decoder_blocks[1].ff.net[2].weight.grad,
        "encoder_blocks.0.attn.qkv.weight": torch.cat(
            [getattr(model.encoder_blocks[0].attn, name).weight.grad for name in ("to_q", "to_k", "to_v")]
        ),
        "diffloss.net.res_blocks.0.adaLN_modulation.1.weight": model.denoiser.blocks[0].modulation.weight.grad,
    }
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, tensors[f"output.train.grad.{name}"], atol=1e-6, rtol=1e-4, msg=name)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
    torch.testing.assert_close(norm, tensors["output.train.grad_norm"], atol=1e-5, rtol=1e-5)


def test_no_tokens(official_denoiser):
    model, tensors, _ = official_denoiser
    nothing = (tensors[name][:0] for name in ("input.x", "input.c", "input.t", "input.x"))
    with pytest.raises(ValueError, match="`timesteps` is empty, allowed: at least one sample"):
        token_diffusion_loss(model, ddpm_scheduler(**COSINE), *nothing)


def test_one_condition_for_each_token(official_denoiser):
    model, tensors, _ = official_denoiser
    with pytest.raises(ValueError, match="`conditions` holds 5 rows, allowed: 12, one for each token"):
        token_diffusion_loss(
            model,
            ddpm_scheduler(**COSINE),
            tensors["input.x"],
            tensors["input.c"][:5],
            tensors["input.t"],
            tensors["input.noise"],
        )


def test_no_gradient_flows_into_tokens(official_denoiser):
    model, tensors, _ = official_denoiser
    tokens, conditions = (tensors[name].clone().requires_grad_() for name in ("input.x", "input.c"))
    losses = token_diffusion_loss(
        model, ddpm_scheduler(**COSINE), tokens, conditions, tensors["input.t"], tensors["input.noise"]
    )
    losses["loss"].sum().backward()
    assert tokens.grad is None and conditions.grad.abs().sum() > 0
