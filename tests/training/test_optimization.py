"""Optimizers, schedules and clipping."""

import math
import sys

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from softvq_hf.training.arguments import TrainingArguments
from softvq_hf.training.optimization import (
    OnePassEMA,
    build_ema,
    build_lr_scheduler,
    build_optimizer,
    clip_gradients,
    end_batch,
    scaled_learning_rate,
)
from softvq_hf.training.state import TrainerState


def arguments(**values) -> TrainingArguments:
    return TrainingArguments(**{"output_dir": "x", "max_train_steps": 100, **values})


def learning_rates(args: TrainingArguments, learning_rate: float, steps: int) -> list[float]:
    optimizer = build_optimizer(args, [torch.nn.Parameter(torch.zeros(1))], learning_rate)
    scheduler = build_lr_scheduler(args, optimizer, max_train_steps=steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_published_schedule():
    """The cosine counts from the first step, warm-up included; the floor is reached at the end."""
    args = arguments(
        learning_rate=1e-4, lr_scheduler="cosine_with_min_lr", lr_warmup_steps=10, lr_warmup_start=1e-5, min_lr=1e-5
    )
    rates = learning_rates(args, 1e-4, steps=101)
    assert rates[0] == pytest.approx(1e-5) and rates[5] == pytest.approx(5.5e-5)
    for step in (10, 37, 50, 100):
        expected = 1e-5 + 9e-5 * 0.5 * (1 + math.cos(math.pi * step / 101))
        assert rates[step] == pytest.approx(expected)
    # at another global batch size the whole curve scales
    assert learning_rates(args, 2e-4, steps=101) == pytest.approx([2 * rate for rate in rates])


def test_schedules_of_diffusers():
    assert learning_rates(arguments(), 1e-4, 5) == [1e-4] * 5
    rates = learning_rates(arguments(lr_scheduler="cosine", lr_warmup_steps=2), 1e-4, 10)
    assert rates[:3] == pytest.approx([0.0, 5e-5, 1e-4]) and rates[-1] < 1e-5


def test_optimizers_by_name(monkeypatch):
    parameters = [torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1), requires_grad=False)]
    adam = build_optimizer(arguments(optimizer="adam", adam_beta2=0.95), parameters, 1e-3)
    adamw = build_optimizer(arguments(optimizer="adamw", adam_weight_decay=0.1), parameters, 1e-3)
    assert type(adam) is torch.optim.Adam and adam.defaults["betas"] == (0.9, 0.95)
    assert adam.defaults["weight_decay"] == 0 and adamw.defaults["weight_decay"] == 0.1
    assert type(adamw) is torch.optim.AdamW and len(adamw.param_groups[0]["params"]) == 1
    assert adam.defaults["fused"] and adamw.defaults["fused"]
    assert type(build_optimizer(arguments(optimizer="adamw_fused"), parameters, 1e-3)) is torch.optim.AdamW

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as where it is not installed
    with pytest.raises(ValueError, match="`--optimizer` is 'adamw_8bit', which needs bitsandbytes"):
        build_optimizer(arguments(optimizer="adamw_8bit"), parameters, 1e-3)
    with pytest.raises(ValueError, match="all parameters are frozen"):
        build_optimizer(arguments(), parameters[1:], 1e-3)
    with pytest.raises(ValueError, match="`--adam_weight_decay` is 0.1, allowed with `--optimizer adam_8bit`: 0"):
        arguments(optimizer="adam_8bit", adam_weight_decay=0.1)


def test_learning_rate_follows_the_global_batch():
    args = arguments(train_batch_size=16, gradient_accumulation_steps=2, lr_base_batch_size=256)
    assert scaled_learning_rate(args, 1e-4, num_processes=4) == pytest.approx(5e-5)
    assert scaled_learning_rate(arguments(), 1e-4, num_processes=4) == 1e-4


def test_gradients_are_clipped_or_only_measured(accelerator_states):
    accelerator = Accelerator(cpu=True)
    parameter = torch.nn.Parameter(torch.zeros(2))
    model = torch.nn.ParameterList([parameter])
    optimizer = accelerator.prepare(torch.optim.SGD([parameter], lr=1.0))
    for max_norm, expected in ((0.0, [3.0, 4.0]), (1.0, [0.6, 0.8]), (10.0, [3.0, 4.0])):
        parameter.grad = torch.tensor([3.0, 4.0])
        assert clip_gradients(accelerator, model, optimizer, max_norm).item() == pytest.approx(5.0)
        torch.testing.assert_close(parameter.grad, torch.tensor(expected), atol=1e-5, rtol=0)


def test_a_batch_is_read_once_and_an_update_is_made_of_whole_batches(accelerator_states, monkeypatch):
    """Losses of all batches and norms of both models; the steps come with the last batch, or not at all."""
    accelerator = Accelerator(cpu=True)
    models = [torch.nn.Linear(2, 1, bias=False) for _ in range(2)]
    optimizers = [accelerator.prepare(torch.optim.SGD(model.parameters(), lr=1.0)) for model in models]
    trained = {name: (models[i], optimizers[i]) for i, name in enumerate(("grad_norm", "discriminator_grad_norm"))}
    args, state, reads = arguments(max_grad_norm=0.0), TrainerState(), []
    for name in ("tolist", "item"):
        read = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda tensor, read=read: reads.append(tensor) or read(tensor))

    def batch(is_last: bool, is_finite: bool, loss: float = 1.0):
        accelerator.gradient_state._set_sync_gradients(is_last)
        for model in models:
            model(torch.tensor([3.0, 4.0])).sum().backward()
        reads.clear()
        losses = {"loss": torch.tensor(loss), "entropy": torch.tensor(2.0)}
        result = end_batch(accelerator, args, state, trained, losses, is_finite, ["a.png"])
        assert len(reads) == 1
        return result

    weights = [model.weight.clone() for model in models]
    assert batch(is_last=False, is_finite=True) == ({"loss": 1.0, "entropy": 2.0}, True)
    assert all(torch.equal(model.weight, weight) for model, weight in zip(models, weights, strict=True))
    values, is_finite = batch(is_last=True, is_finite=True)
    assert is_finite and values == {"loss": 1.0, "entropy": 2.0, "grad_norm": 10.0, "discriminator_grad_norm": 10.0}
    for model, weight in zip(models, weights, strict=True):
        torch.testing.assert_close(model.weight, weight - 2 * torch.tensor([[3.0, 4.0]]))
        assert model.weight.grad is None

    weights = [model.weight.clone() for model in models]
    _, is_finite = batch(is_last=False, is_finite=True, loss=math.nan)
    assert not is_finite
    values, is_finite = batch(is_last=True, is_finite=is_finite)
    assert not is_finite and values["grad_norm"] == 10.0 and state.nonfinite_batches == 1
    assert all(torch.equal(model.weight, weight) for model, weight in zip(models, weights, strict=True))
    assert all(model.weight.grad is None for model in models)


def test_averages_are_those_of_diffusers():
    """Those of trained weights, at every update; frozen ones stay."""
    weights = [torch.nn.Parameter(torch.randn(40, 30)) for _ in range(3)]
    weights[1].requires_grad_(False)
    frozen = weights[1].clone()
    expected = EMAModel(weights, decay=0.9, min_decay=0.9)
    expected.optimization_step = 1
    ema = build_ema(arguments(ema_decay=0.9), torch.nn.ParameterList(weights))
    assert isinstance(ema, OnePassEMA)
    for _ in range(3):
        for weight in (weights[0], weights[2]):
            weight.data.add_(torch.randn_like(weight))
        ema.step(weights)
        expected.step(weights)
        assert ema.optimization_step == expected.optimization_step
        for own, other in zip(ema.shadow_params, expected.shadow_params, strict=True):
            torch.testing.assert_close(own, other, atol=1e-6, rtol=0)
    assert torch.equal(ema.shadow_params[1], frozen) and not torch.equal(ema.shadow_params[0], weights[0])
    assert build_ema(arguments(use_ema=False), torch.nn.ParameterList(weights)) is None
    with pytest.raises(ValueError):
        ema.step(weights[:2])
