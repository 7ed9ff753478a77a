"""What all metrics of this package share: `evaluate` modules that reduce every batch at once, instead of writing it to
a file until the end, and that work over several processes."""

import copy
import inspect
from abc import ABC, abstractmethod
from typing import Any, Protocol

import evaluate
import torch
from accelerate import PartialState
from accelerate.utils import gather_object


# What an error of images that were added before ends with.
RESET = " `reset()` forgets those of earlier batches."


class Accumulator(Protocol):
    """What a metric keeps of the samples it has seen. Its size does not depend on their number."""

    def merge(self, other: "Accumulator") -> None:
        """Take in what another process has accumulated."""


class StreamingMetric(evaluate.Metric, ABC):
    """
    A metric of `evaluate` whose memory does not grow with the number of samples.

    [`~StreamingMetric.add_batch`] updates accumulators at once. [`~StreamingMetric.compute`] merges those of all
    processes, in the order of their ranks, where the script runs under accelerate: every process calls it, and every
    process gets the result. `evaluate`'s own `num_process` and `process_id`, which merge files, are not used.

    A metric implements `_info`, [`~StreamingMetric.new_accumulators`], [`~StreamingMetric.update`] and
    [`~StreamingMetric.result`]. Where the order of the samples counts, it takes `indices`, the number of each sample
    in the data set.

    Args:
        kwargs: As in `evaluate.Metric`, such as `config_name`; `evaluate.load(path, **kwargs)` passes them.

    Raises:
        ValueError: If `num_process` is given, or a name that neither the metric nor `evaluate.Metric` knows.
    """

    def __init__(self, **kwargs: Any) -> None:
        known = [
            name
            for constructor in (type(self), evaluate.Metric)
            for name, parameter in inspect.signature(constructor).parameters.items()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        unknown = sorted(kwargs.keys() - set(known))
        if unknown:
            raise ValueError(
                f"{type(self).__name__} has no argument {', '.join(f'`{name}`' for name in unknown)}, allowed: "
                f"{', '.join(f'`{name}`' for name in known)}."
            )
        if kwargs.get("num_process", 1) != 1:
            raise ValueError(
                f"`num_process` is {kwargs['num_process']}, allowed: 1. Under accelerate processes find each other."
            )
        super().__init__(**kwargs)
        self.reset()

    @abstractmethod
    def new_accumulators(self) -> dict[str, Accumulator]:
        """Empty accumulators by name."""

    @abstractmethod
    def update(self, predictions: Any, references: Any, **kwargs: Any) -> None:
        """Check a batch and take it into `self.accumulators`. A batch that is refused leaves them as they were."""

    @abstractmethod
    def result(self, accumulators: dict[str, Accumulator]) -> dict[str, Any]:
        """The metric by name, from the accumulators of all processes together."""

    def reset(self) -> None:
        """Forget what was added."""
        self.accumulators = self.new_accumulators()

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add one sample; the arguments are those of [`~StreamingMetric.add_batch`], without their batch dimension."""
        self.add_batch(
            predictions=None if prediction is None else [prediction],
            references=None if reference is None else [reference],
            **{name: [value] for name, value in kwargs.items()},
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """
        Add a batch of samples.

        Args:
            predictions: What is measured; see the metric.
            references: What it is compared with; see the metric.
            kwargs: More inputs that the metric knows.

        Raises:
            ValueError: If the metric refuses the batch. It is as before then, and can go on.
        """
        self.update(predictions, references, **kwargs)

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any]:
        """
        The metric of all that was added, on all processes. What was added is forgotten, as in `evaluate`.

        Args:
            predictions, references, kwargs: A last batch, as in [`~StreamingMetric.add_batch`]; optional. What was
                added before it is copied, to go back to.

        Returns:
            `dict`: figures by name.

        Raises:
            ValueError: If there are too few samples, or they have no such metric. The last batch is taken back then;
                what was added before it stays, until [`~StreamingMetric.reset`].
        """
        earlier = self.accumulators
        if predictions is not None or references is not None:
            earlier = copy.deepcopy(earlier)
            self.add_batch(predictions=predictions, references=references, **kwargs)
        try:
            result = self.result(self._merge_processes())
        except ValueError:
            self.accumulators = earlier
            raise
        self.reset()
        return result

    def _merge_processes(self) -> dict[str, Accumulator]:
        """The accumulators of all processes together."""
        # without `cpu` accelerate takes each of several CPU processes for the only one
        if PartialState(cpu=not torch.accelerator.is_available()).num_processes == 1:
            return self.accumulators
        accumulators = self.new_accumulators()
        for state in gather_object([self.accumulators]):
            for name, accumulator in accumulators.items():
                accumulator.merge(state[name])
        return accumulators
