"""What the timing scripts share: calls timed in turn, ratios round by round, and their record as JSON and Markdown.

The speed of a machine drifts, and other programs disturb it. Contestants are therefore called in turn, round after
round, and compared within each round; the median over the rounds is the result, smallest and largest are its spread.
"""

import ctypes
import gc
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from softvq_hf.training.logging import hardware_record, library_versions, write_atomically


@dataclass
class Contestant:
    """
    Something to time.

    Attributes:
        call (`Callable`): One call; what it returns is thrown away.
        items (`float`): What a call gets done, such as the number of its images.
    """

    call: Callable[[], object]
    items: float = 1.0


@dataclass
class Spread:
    """Median, smallest and largest of several measurements."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.min:.3g} to {self.max:.3g})"


@dataclass
class Timings:
    """
    Seconds of every call, by contestant and round.

    Attributes:
        items (`dict`): Of a call, by contestant.
        seconds (`dict`): Of the calls, one for each round, by contestant.
    """

    items: dict[str, float]
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def rate(self, name: str) -> Spread:
        """Items per second."""
        return Spread.of([self.items[name] / seconds for seconds in self.seconds[name]])

    def ratio(self, name: str, baseline: str) -> Spread:
        """How many times the rate of `baseline` that of `name` is, compared round by round."""
        return Spread.of(
            [
                (self.items[name] / own) / (self.items[baseline] / other)
                for own, other in zip(self.seconds[name], self.seconds[baseline], strict=True)
            ]
        )


def default_device() -> str:
    """The accelerator, where there is one, or the CPU."""
    return str(torch.accelerator.current_accelerator(check_available=True) or "cpu")


def default_dtype(device: str) -> str:
    """bfloat16 where there are instructions for products of such matrices, on CPUs AMX or AVX-512 BF16; or float32."""
    capabilities = torch.cpu.get_capabilities()
    is_fast = device != "cpu" or capabilities.get("amx_bf16", False) or capabilities.get("avx512_bf16", False)
    return "bfloat16" if is_fast else "float32"


def random_model(
    model_class: type[torch.nn.Module], config: Mapping[str, Any], device: torch.device, dtype: torch.dtype
) -> torch.nn.Module:
    """A frozen model in eval mode, made on `device` at once: parameters N(0, 0.02), buffers zero."""
    with torch.device("meta"):
        model = torch.nn.Module.to(model_class(**config), dtype)  # diffusers' own `to` would warn of any cast
    model = model.to_empty(device=device).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    for buffer in model.buffers():
        buffer.zero_()
    return model


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done what it was asked to."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def time_in_turn(
    contestants: Mapping[str, Contestant],
    rounds: int,
    device: torch.device,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """
    Time contestants in turn. The order is reversed from round to round.

    Args:
        contestants (`Mapping` of `str` to [`Contestant`]): By name.
        rounds (`int`): Timed calls of each.
        device (`torch.device`): Where they compute.
        warmup (`int`, *optional*, defaults to 1): Calls of each before, which do not count.
        clock (`Callable`, *optional*, defaults to `time.perf_counter`):
            Seconds; `time.process_time` counts those of all threads of this process.

    Returns:
        [`Timings`]

    Raises:
        ValueError: If `rounds` is smaller than 1 or `warmup` negative.
    """
    if rounds < 1:
        raise ValueError(f"`rounds` is {rounds}, allowed: integers from 1 on.")
    if warmup < 0:
        raise ValueError(f"`warmup` is {warmup}, allowed: integers from 0 on.")
    names = list(contestants)
    timings = Timings({name: contestants[name].items for name in names}, {name: [] for name in names})
    with tqdm(total=(rounds + warmup) * len(names), leave=False) as progress:
        for i in range(-warmup, rounds):
            for name in names if i % 2 == 0 else reversed(names):
                progress.set_description(name)
                synchronize(device)
                started = clock()
                contestants[name].call()
                synchronize(device)
                if i >= 0:
                    timings.seconds[name].append(clock() - started)
                progress.update()
    return timings


def square_product(size: int, device: torch.device, dtype: torch.dtype) -> Contestant:
    """Ten products of square matrices; its items are their operations."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def multiply() -> None:
        for _ in range(10):
            torch.mm(left, right)

    return Contestant(multiply, 10 * 2 * size**3)


def working_memory(call: Callable[[], object], device: torch.device) -> int:
    """
    The most bytes that a call holds beyond what was held before it: what `device` has allocated, or, on the CPU, the
    resident set of the process, looked at every 5 ms. The C library would keep what was freed before, and so hide what
    the call takes: with glibc it is made to give that back to the system first.
    """
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
        call()
        return torch.accelerator.max_memory_allocated(device) - before

    process, done, peak = psutil.Process(), threading.Event(), 0

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, process.memory_info().rss)

    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    before = process.memory_info().rss
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return max(peak - before, 0)


def weights_bytes(*models: torch.nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(tensor.nbytes for model in models for tensor in (*model.parameters(), *model.buffers()))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table with one line for each row; numbers are to be formatted before."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def write_report(
    output_dir: str | Path,
    name: str,
    table: str,
    ratios: Mapping[str, Spread],
    settings: Mapping[str, Any],
    measurements: Mapping[str, Any],
) -> None:
    """
    Write `name`.json and `name`.md, and print the table.

    Args:
        output_dir (`str` or `Path`): Folder; it is made if needed.
        name (`str`): Of the benchmark.
        table (`str`): Markdown.
        ratios (`Mapping` of `str` to [`Spread`]): What `make bench` compares with stored ones; higher is better.
        settings (`Mapping`): What was measured, such as sizes and dtypes; JSON.
        measurements (`Mapping`): Everything else; JSON.
    """
    record = {
        "benchmark": name,
        "ratios": {key: asdict(ratio) for key, ratio in ratios.items()},
        "settings": dict(settings),
        "measurements": dict(measurements),
        "versions": library_versions(),
        "hardware": hardware_record(Accelerator(cpu=not torch.accelerator.is_available()))
        | {"threads": torch.get_num_threads(), "cpu_capability": torch.backends.cpu.get_cpu_capability()},
        "command": sys.argv,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(output_dir / f"{name}.json", text + "\n")
    write_atomically(output_dir / f"{name}.md", table)
    print(table)
