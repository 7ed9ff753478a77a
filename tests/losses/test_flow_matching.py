"""Flow-matching loss of SiT: official times, model inputs, losses and gradients; the densities of the times."""

import math

import pytest
import torch

from softvq_hf.conversion.sit import convert_sit
from softvq_hf.losses.flow_matching import flow_matching_loss, lognormal_times, sample_flow_times
from softvq_hf.models.transformer_dit_1d import DiTTransformer1DModel
from softvq_hf.schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler


@pytest.fixture
def tiny_inputs():
    generator = torch.Generator().manual_seed(1)
    transformer = DiTTransformer1DModel(
        num_tokens=4, in_channels=3, num_layers=1, num_attention_heads=2, attention_head_dim=8, num_classes=5
    ).eval()
    return {
        "transformer": transformer,
        "scheduler": StochasticInterpolantScheduler(),
        "latents": torch.randn(6, 4, 3, generator=generator),
        "class_labels": torch.arange(6) % 5,
        "times": torch.rand(6, generator=generator),
        "noise": torch.randn(6, 4, 3, generator=generator),
    }


@pytest.mark.parametrize("weighting", ["uniform", "lognormal"])
@pytest.mark.parametrize("path_type", ["linear", "cosine"])
@pytest.mark.parametrize("suffix", ["", "_2d"], ids=["1d", "2d"])
def test_official_loss_and_gradients(golden, suffix, path_type, weighting):
    description, tensors = golden("sit_loss")
    prefix = f"weights{suffix}."
    weights = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    transformer = convert_sit(weights, description[f"config{suffix}"])
    prefix = f"input{suffix}."
    inputs = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    case = f"output{suffix}.{path_type}_{weighting}"

    latents = (inputs["latents_raw"] - inputs["vq_mean"]) / inputs["vq_std"]
    times = inputs["u"] if weighting == "uniform" else lognormal_times(inputs["n"], path_type)
    torch.testing.assert_close(times, tensors[f"{case}.time"], atol=1e-6, rtol=0)

    seen = {}

    def record(module, args, kwargs, output):
        seen.update(model_input=args[0], model_output=output.sample)

    transformer.register_forward_hook(record, with_kwargs=True)
    scheduler = StochasticInterpolantScheduler(path_type=path_type)
    loss = flow_matching_loss(transformer, scheduler, latents, inputs["y"], times, inputs["noise"])
    loss.mean().backward()

    torch.testing.assert_close(seen["model_input"], tensors[f"{case}.model_input"], atol=2e-6, rtol=0)
    torch.testing.assert_close(seen["model_output"], tensors[f"{case}.model_output"], atol=1e-5, rtol=0)
    # Losses reach 13. Both networks round: in float64 the official output is 4e-6 away from its own float32 one.
    torch.testing.assert_close(loss, tensors[f"{case}.loss"], atol=0, rtol=1e-6)
    torch.testing.assert_close(
        transformer.proj_out.weight.grad, tensors[f"{case}.grad.final_layer.linear.weight"], atol=1e-5, rtol=1e-5
    )
    attn = transformer.transformer_blocks[0].attn
    qkv_bias_grad = torch.cat([attn.to_q.bias.grad, attn.to_k.bias.grad, attn.to_v.bias.grad])
    torch.testing.assert_close(qkv_bias_grad, tensors[f"{case}.grad.blocks.0.attn.qkv.bias"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weighting", ["uniform", "lognormal"])
@pytest.mark.parametrize("path_type", ["linear", "cosine"])
@pytest.mark.parametrize("suffix", ["", "_2d"], ids=["1d", "2d"])
def test_official_loss_of_the_official_prediction(golden, suffix, path_type, weighting):
    _, tensors = golden("sit_loss")
    case = f"output{suffix}.{path_type}_{weighting}"
    prediction = tensors[f"{case}.model_output"]

    class Official(torch.nn.Module):
        def forward(self, hidden_states, timestep, class_labels):
            return type("Output", (), {"sample": prediction})

    loss = flow_matching_loss(
        Official(),
        StochasticInterpolantScheduler(path_type=path_type),
        tensors[f"output{suffix}.latents"],
        tensors[f"input{suffix}.y"],
        tensors[f"{case}.time"],
        tensors[f"input{suffix}.noise"],
    )
    torch.testing.assert_close(loss, tensors[f"{case}.loss"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_lognormal_times_have_a_lognormal_noise_to_data_ratio(path_type):
    times = sample_flow_times(20_000, "lognormal", path_type, generator=torch.Generator().manual_seed(0)).double()
    ratio = times / (1 - times) if path_type == "linear" else torch.tan(times * math.pi / 2)
    log_ratio = ratio.log()
    assert abs(log_ratio.mean().item()) < 0.03
    assert abs(log_ratio.std().item() - 1) < 0.03


def test_uniform_times_fill_the_unit_interval():
    times = sample_flow_times(20_000, "uniform", "linear", generator=torch.Generator().manual_seed(0))
    counts = torch.histc(times, bins=10, min=0.0, max=1.0)
    assert counts.sum() == 20_000
    assert counts.min() > 1_800


@pytest.mark.parametrize("weighting", ["uniform", "lognormal"])
def test_times_follow_the_generator_alone(weighting):
    first = sample_flow_times(8, weighting, "linear", generator=torch.Generator().manual_seed(3))
    torch.rand(100)
    second = sample_flow_times(8, weighting, "linear", generator=torch.Generator().manual_seed(3))
    other = sample_flow_times(8, weighting, "linear", generator=torch.Generator().manual_seed(4))
    assert first.shape == (8,) and first.dtype == torch.float32
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("weighting", ["uniform", "lognormal"])
def test_times_of_one_generator_per_sample(weighting):
    times = sample_flow_times(3, weighting, "linear", [torch.Generator().manual_seed(seed) for seed in (7, 8, 9)])
    one_by_one = [sample_flow_times(1, weighting, "linear", torch.Generator().manual_seed(seed)) for seed in (7, 8, 9)]
    assert torch.equal(times, torch.cat(one_by_one)) and len(times.unique()) == 3
    with pytest.raises(ValueError, match="`generator` has 2 entries, allowed: 3"):
        sample_flow_times(3, weighting, "linear", [torch.Generator(), torch.Generator()])


def test_perfect_prediction_has_no_loss(tiny_inputs):
    velocity = tiny_inputs["noise"] - tiny_inputs["latents"]

    class Oracle(torch.nn.Module):
        def forward(self, hidden_states, timestep, class_labels):
            return type("Output", (), {"sample": velocity})

    loss = flow_matching_loss(**{**tiny_inputs, "transformer": Oracle()})
    torch.testing.assert_close(loss, torch.zeros(6), atol=1e-12, rtol=0)


def test_samples_do_not_mix(tiny_inputs):
    loss = flow_matching_loss(**tiny_inputs)
    part = {key: value[2:4] if torch.is_tensor(value) else value for key, value in tiny_inputs.items()}
    assert loss.shape == (6,)
    torch.testing.assert_close(flow_matching_loss(**part), loss[2:4], atol=1e-6, rtol=1e-6)


def test_half_precision_latents_are_trained_on_in_float32(tiny_inputs):
    latents = tiny_inputs["latents"].bfloat16()
    loss = flow_matching_loss(**{**tiny_inputs, "latents": latents})
    expected = flow_matching_loss(**{**tiny_inputs, "latents": latents.float()})
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)


def test_force_drop_ids_reach_the_transformer(tiny_inputs):
    dropped = flow_matching_loss(**tiny_inputs, force_drop_ids=torch.ones(6, dtype=torch.bool))
    null_class = flow_matching_loss(**{**tiny_inputs, "class_labels": torch.full((6,), 5)})
    assert torch.equal(dropped, null_class)
    assert not torch.equal(dropped, flow_matching_loss(**tiny_inputs))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, "uniform", "linear"), "`batch_size` is 0"),
        ((4, "logit_normal", "linear"), "`weighting` is 'logit_normal'"),
        ((4, "uniform", "vp"), "`path_type` is 'vp'"),
        ((4, "lognormal", "vp"), "`path_type` is 'vp'"),
    ],
)
def test_unknown_times(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_flow_times(*arguments)


def test_mismatched_shapes(tiny_inputs):
    with pytest.raises(ValueError, match=r"`noise` has shape \(6, 4\)"):
        flow_matching_loss(**{**tiny_inputs, "noise": torch.zeros(6, 4)})
    with pytest.raises(ValueError, match=r"`times` has shape \(\), allowed: \(6,\)"):
        flow_matching_loss(**{**tiny_inputs, "times": torch.tensor(0.5)})


def test_transformer_with_learned_variance(tiny_inputs):
    transformer = DiTTransformer1DModel(
        num_tokens=4, in_channels=3, out_channels=6, num_layers=1, num_attention_heads=2, attention_head_dim=8
    )
    with pytest.raises(ValueError, match="`transformer` returned shape .* `out_channels` equal to `in_channels`"):
        flow_matching_loss(**{**tiny_inputs, "transformer": transformer})
