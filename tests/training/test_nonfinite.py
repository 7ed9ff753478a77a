"""Batches that are not finite: left out, counted, named, and too many of them."""

import logging
import math

import pytest
from accelerate import Accelerator

from softvq_hf.training.arguments import TrainingArguments
from softvq_hf.training.nonfinite import check_finite
from softvq_hf.training.state import TrainerState


def test_counts_names_and_stops(accelerator_states, caplog):
    accelerator = Accelerator(cpu=True)
    args = TrainingArguments(output_dir="x", max_train_steps=10, max_nonfinite_batches=2)
    state = TrainerState(step=6)
    assert check_finite(accelerator, args, state, {"loss": 1.0, "entropy": -2.0}, ["a.png"])
    assert state.nonfinite_batches == 0

    with caplog.at_level(logging.WARNING):
        assert not check_finite(accelerator, args, state, {"loss": math.nan, "kl": math.inf, "l": 0.0}, ["a.png", 7])
    assert "loss = nan, kl = inf at step 7, on the images a.png, 7" in caplog.text
    assert "1 so far, 2 allowed" in caplog.text
    assert not check_finite(accelerator, args, state, {"grad_norm": math.inf}, ["b.png"])
    with pytest.raises(FloatingPointError, match=r"loss = nan at step 7, on the images c\.png: number 3 of its kind"):
        check_finite(accelerator, args, state, {"loss": math.nan}, ["c.png"])


def test_none_is_allowed(accelerator_states):
    args = TrainingArguments(output_dir="x", max_train_steps=10, max_nonfinite_batches=0)
    with pytest.raises(FloatingPointError, match="`--max_nonfinite_batches` is 0"):
        check_finite(Accelerator(cpu=True), args, TrainerState(), {"loss": math.nan}, ["a.png"])
