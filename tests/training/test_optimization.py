"""Optimizers, schedules and clipping."""

import math
import sys

import pytest
import torch
from accelerate import Accelerator

from softvq_hf.training.arguments import TrainingArguments
from softvq_hf.training.optimization import (
    build_lr_scheduler,
    build_optimizer,
    clip_gradients,
    scaled_learning_rate,
)


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
    fused = build_optimizer(arguments(optimizer="adamw_fused"), parameters, 1e-3)
    assert type(fused) is torch.optim.AdamW and fused.defaults["fused"] and not adamw.defaults["fused"]

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as where it is not installed
    with pytest.raises(ValueError, match="`--optimizer` is 'adamw_8bit', which needs bitsandbytes"):
        build_optimizer(arguments(optimizer="adamw_8bit"), parameters, 1e-3)
    with pytest.raises(ValueError, match="all parameters are frozen"):
        build_optimizer(arguments(), parameters[1:], 1e-3)
    with pytest.raises(ValueError, match="`--adam_weight_decay` is 0.1, allowed with `--optimizer adam_fused`: 0"):
        arguments(optimizer="adam_fused", adam_weight_decay=0.1)


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
