"""benchmarks/side_by_side.py, generation.py, scaling.py and check_ratios.py: what they compute from what they time."""

import importlib
import json
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from softvq_hf.models.transformer_dit_1d import DiTTransformer1DModel
from softvq_hf.schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture
def load(monkeypatch):
    """Imports a script by its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("side_by_side", "official_loops", "generation", "scaling", "check_ratios")
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


# side_by_side.py


def test_calls_are_timed_in_turn(load):
    side_by_side = load("side_by_side")
    calls = []
    contestants = {
        "a": side_by_side.Contestant(lambda: calls.append("a"), items=2),
        "b": side_by_side.Contestant(lambda: calls.append("b")),
    }
    timings = side_by_side.time_in_turn(contestants, rounds=3, device=CPU, warmup=1)
    assert "".join(calls) == "ba" + "ab" + "ba" + "ab"
    assert {name: len(seconds) for name, seconds in timings.seconds.items()} == {"a": 3, "b": 3}


def test_ratios_are_those_of_each_round(load):
    side_by_side = load("side_by_side")
    timings = side_by_side.Timings({"a": 4, "b": 1}, {"a": [1.0, 2.0, 4.0], "b": [1.0, 4.0, 4.0]})
    assert timings.rate("a") == side_by_side.Spread(median=2.0, min=1.0, max=4.0)
    assert timings.ratio("a", "b") == side_by_side.Spread(median=4.0, min=4.0, max=8.0)
    assert str(timings.ratio("a", "b")) == "4 (4 to 8)"


def test_what_lasts_longer_takes_longer(load):
    side_by_side = load("side_by_side")
    contestants = {name: side_by_side.Contestant(partial(time.sleep, s)) for name, s in {"a": 0.01, "b": 0.04}.items()}
    ratio = side_by_side.time_in_turn(contestants, rounds=3, device=CPU, warmup=0).ratio("a", "b")
    assert 1 < ratio.median < 6


@pytest.mark.parametrize(("name", "value"), [("rounds", 0), ("warmup", -1)])
def test_rounds_out_of_range(load, name, value):
    with pytest.raises(ValueError, match=f"`{name}` is {value}, allowed"):
        load("side_by_side").time_in_turn({}, **{"rounds": 1, "device": CPU, name: value})


def test_working_memory_is_that_of_the_call(load):
    def fill():
        tensor = torch.ones(64 * 2**20 // 4)
        time.sleep(0.1)
        return tensor.sum()

    assert 48 * 2**20 < load("side_by_side").working_memory(fill, CPU) < 256 * 2**20


def test_random_models_are_finite(load):
    config = {"num_tokens": 4, "in_channels": 2, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    model = load("side_by_side").random_model(DiTTransformer1DModel, config, CPU, torch.bfloat16)
    assert model.dtype == torch.bfloat16 and not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    sample = model(torch.zeros(1, 4, 2, dtype=torch.bfloat16), 500, torch.tensor([1])).sample
    assert torch.isfinite(sample).all() and sample.std() > 0


# generation.py


@pytest.fixture
def generation(load):
    return load("generation")


@pytest.fixture
def systems(generation, tiny_pipeline):
    """A tiny pipeline, and what thrift leaves out on its models."""
    pipeline = tiny_pipeline()
    per_sample = generation.PerSamplePipeline(**pipeline.components)
    official = partial(generation.sample_in_full_batches, pipeline, 2.0)
    return {
        "sit_xl_64": generation.System(pipeline, partial(generation.in_pipeline, pipeline, 2.0)),
        "per_sample_64": generation.System(per_sample, partial(generation.in_pipeline, per_sample, 2.0)),
        "official_64": generation.System(pipeline, official, copies=2),
    }


@pytest.fixture
def arguments(generation, tmp_path):
    return generation.GenerationBenchmarkArguments(
        output_dir=str(tmp_path), tokens=[64], device="cpu", dtype="float32", batch_sizes=[1, 2], measured_steps=10
    )


def test_thrift_changes_no_latents(generation, systems, arguments):
    differences = generation.check_equal(arguments, systems)
    assert set(differences) == {"official_64", "per_sample_64"}
    assert max(differences.values()) < 1e-5


def test_thrift_of_mar_changes_no_latents(generation, arguments, tiny_mar_pipeline):
    pipeline = tiny_mar_pipeline()
    systems = {
        "mar_b_64": generation.System(
            pipeline, partial(generation.in_mar_pipeline, pipeline, 2.0, num_mar_steps=3), 1, 3
        ),
        "official_mar_b_64": generation.System(
            pipeline, partial(generation.sample_mar_in_full, pipeline, 2.0, num_mar_steps=3), 1, 3
        ),
        "eager_mar_b_64": generation.System(
            pipeline, partial(generation.in_mar_pipeline, pipeline, 2.0, num_mar_steps=3), 1, 3
        ),
    }
    differences = generation.check_equal(arguments, systems)
    assert differences.keys() == {"official_mar_b_64", "eager_mar_b_64"}
    assert differences["official_mar_b_64"] < 1e-4 and differences["eager_mar_b_64"] == 0
    assert [generation.num_samples(system, 50) for system in systems.values()] == [6, 6, 6]
    generator = torch.Generator().manual_seed(0)
    latents = systems["official_mar_b_64"].sample(labels=[1, 2], num_inference_steps=1, generator=generator)
    assert latents.shape == (2, 10, 6) and torch.isfinite(latents).all()


def test_systems_that_differ_are_not_timed(generation, systems, arguments, tiny_pipeline):
    other = tiny_pipeline()
    with torch.no_grad():
        other.transformer.proj_out.bias.add_(0.1)
    systems["official_64"] = generation.System(other, partial(generation.sample_in_full_batches, other, 2.0))
    with pytest.raises(ValueError, match="The latents of official_64 and sit_xl_64 differ by"):
        generation.check_equal(arguments, systems)


def test_official_loop_doubles_every_batch(generation, tiny_pipeline):
    pipeline = tiny_pipeline()
    batches = []
    pipeline.transformer.register_forward_pre_hook(lambda _, arguments: batches.append(len(arguments[0])))
    generator = torch.Generator().manual_seed(0)
    generation.sample_in_full_batches(pipeline, 2.0, [0, 1, 2], 10, generator)
    assert batches == [6] * 3 + [12] * 7


def test_modulation_of_each_sample_is_left_to_the_transformer(systems):
    """Each system's call of the transformer gets a modulation, or none."""
    given = {}
    for name in ("sit_xl_64", "per_sample_64"):
        pipeline = systems[name].pipeline
        hook = pipeline.transformer.register_forward_pre_hook(
            lambda _, arguments, options, name=name: given.update({name: "modulation" in options}), with_kwargs=True
        )
        systems[name].sample(labels=[1], num_inference_steps=2, generator=torch.Generator())
        hook.remove()
    assert given == {"sit_xl_64": True, "per_sample_64": False}


@pytest.mark.parametrize(
    ("scheduler", "steps", "expected"),
    [(FlowMatchEulerDiscreteScheduler(), 50, 85), (StochasticInterpolantScheduler(), 250, 422)],
)
def test_number_of_samples_through_the_transformer(generation, tiny_pipeline, scheduler, steps, expected):
    system = generation.System(tiny_pipeline(scheduler), sample=None)
    assert generation.num_samples(system, steps) == expected
    assert generation.num_samples(replace(system, copies=2), steps) == 2 * expected


def test_measured_steps_are_scaled_to_the_protocol(generation, systems, arguments):
    timings = generation.Timings({})
    for name, seconds in {"sit_xl_64": 1.7, "official_64": 3.4, "per_sample_64": 1.7}.items():
        for batch_size in (1, 2):
            timings.seconds[f"{name}.sample@{batch_size}"] = [seconds, seconds]
    for batch_size in (1, 2):  # all have the same decoder
        timings.seconds[f"sit_xl_64.decode@{batch_size}"] = [1.5, 0.5]
    whole = generation.scale_to_protocol(arguments, systems, timings)
    assert whole.seconds["sit_xl_64.latents@1"] == pytest.approx([8.5, 8.5])  # 17 samples in 10 steps, 85 in 50
    assert whole.seconds["sit_xl_64@1"] == pytest.approx([10.0, 9.0])
    ratios = generation.compare(arguments, systems, whole)
    assert ratios["sit_xl_64.vs_official_64.latents"].median == pytest.approx(2.0)
    assert ratios["sit_xl_64.vs_official_64"].max == pytest.approx(17.5 / 9)
    assert ratios["sit_xl_64.vs_per_sample_64.latents.batch_2"].median == pytest.approx(1.0)


def test_batches_of_too_many_tokens_are_left_out(generation, tiny_pipeline, arguments):
    system = generation.System(tiny_pipeline(), sample=None)
    assert generation.batch_sizes(arguments, system) == [1, 2]
    arguments = replace(arguments, max_batch_tokens=256, batch_sizes=[1, 25, 26])
    assert generation.batch_sizes(arguments, system) == [1, 25]  # of 10 tokens each


def test_all_systems_have_their_real_shapes(generation, tmp_path):
    """On the meta device, where nothing is computed."""
    arguments = generation.GenerationBenchmarkArguments(
        output_dir=str(tmp_path), mar=True, device="meta", dtype="bfloat16"
    )
    systems = generation.build_systems(arguments)
    tokens = {name: system.num_tokens for name, system in systems.items()}
    of_tokens = {"sit_xl": 0, "per_sample": 0, "official": 0, "mar_b": 64, "official_mar_b": 64, "sit_b": 64}
    expected = {f"{name}_{n}": n for name, only in of_tokens.items() for n in (32, 64) if only in (0, n)}
    assert tokens == expected | {"sit_xl_2d": 256, "dit_xl_diffusers": 256}
    assert generation.flops_of_sample(systems["sit_xl_64"]) / 2e9 == pytest.approx(29.03 - 0.223 - 0.0016, abs=0.003)
    assert systems["mar_b_64"].pipeline.transformer.num_parameters() == 207_543_872


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_ours_are_compiled_in_the_given_mode(generation, tmp_path, monkeypatch, mode):
    """But MAR without CUDA graphs, and neither what they are compared with."""
    modes = {}
    for pipeline_class in (generation.SoftVQPipeline, generation.MARPipeline):
        monkeypatch.setattr(
            pipeline_class, "enable_fast_sampling", lambda self, *arguments: modes.update({id(self): arguments})
        )
    arguments = generation.GenerationBenchmarkArguments(
        output_dir=str(tmp_path), mar=True, compile=True, compile_mode=mode, device="meta", dtype="bfloat16"
    )
    for name, system in generation.build_systems(arguments).items():
        is_ours = name.startswith(("sit_", "per_sample", "mar_"))
        expected = ("default" if name.startswith("mar_") else mode, False) if is_ours else None
        assert modes.get(id(system.pipeline)) == expected, name


@pytest.mark.parametrize(("resolution", "expected"), [(256, 0.012), (512, 0.16)])
def test_operations_of_decoding_beside_sampling(generation, tmp_path, resolution, expected):
    """64 tokens; 50 steps of the ODE take 85 samples through the transformer."""
    arguments = generation.GenerationBenchmarkArguments(
        output_dir=str(tmp_path), resolution=resolution, tokens=[64], device="meta", dtype="bfloat16"
    )
    system = generation.build_systems(arguments)["sit_xl_64"]
    with generation.FlopCounterMode(display=False) as counter:
        system.decode(1)
    sampling = 85 * generation.flops_of_sample(system)
    assert counter.get_total_flops() / sampling == pytest.approx(expected, rel=0.05)


def test_two_generators_of_this_library_are_no_ratio_of_make_bench(generation, systems, arguments):
    systems = dict.fromkeys(("sit_xl_64", "mar_b_64", "official_mar_b_64"), systems["sit_xl_64"])
    arguments = replace(arguments, batch_sizes=[2])
    whole = generation.Timings({})
    for name, seconds in {"sit_xl_64": 1.0, "mar_b_64": 2.0, "official_mar_b_64": 3.0}.items():
        for part in ("", ".latents"):
            whole.seconds[f"{name}{part}@2"], whole.items[f"{name}{part}@2"] = [seconds], 2
    ratios = generation.compare(arguments, systems, whole)
    assert {name: ratio.median for name, ratio in ratios.items()} == {
        "mar_b_64.vs_official_mar_b_64": 1.5,
        "mar_b_64.vs_official_mar_b_64.latents": 1.5,
    }
    generators = generation.compare_generators(arguments, systems, whole)
    assert {name: ratio.median for name, ratio in generators.items()} == {
        "mar_b_64.vs_sit_xl_64": 0.5,
        "mar_b_64.vs_sit_xl_64.latents": 0.5,
    }


def test_a_whole_run(generation, systems, arguments, monkeypatch):
    """`main` on tiny models: every ratio, the share of the peak, memory, and the report."""
    monkeypatch.setattr(generation, "build_systems", lambda _: systems | {"sit_xl_2d": systems["sit_xl_64"]})
    generation.main(replace(arguments, measured_steps=2, rounds=2, matmul_size=64))
    report = json.loads((Path(arguments.output_dir) / "generation.json").read_text())
    others = ("per_sample_64", "official_64", "sit_xl_2d")
    batches = [f"{part}{batch}" for part in ("", ".latents") for batch in ("", ".batch_1", ".batch_2")]
    expected = {f"sit_xl_64.vs_{other}{batch}" for other in others for batch in batches}
    assert report["ratios"].keys() == expected
    assert all(ratio["min"] > 0 for ratio in report["ratios"].values())
    assert report["measurements"]["sit_xl_64"]["samples_through_transformer"] == 85
    assert report["measurements"]["sit_xl_64"]["official_memory_bytes"] > 0
    assert report["measurements"]["sit_xl_64"]["peak_share"]["min"] > 0
    assert report["measurements"]["official_64"]["peak_share"] is None
    assert "| sit_xl_2d |" in (Path(arguments.output_dir) / "generation.md").read_text()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"matmul_size": 0}, "`--matmul_size` is 0, allowed: integers from 1 on"),
        ({"tokens": [128], "resolution": 512}, r"`--tokens` is \[128\], allowed at `--resolution` 512: \[32, 64\]"),
        ({"rounds": 0}, "`--rounds` is 0, allowed: integers from 1 on"),
        ({"num_inference_steps": 0}, "`--num_inference_steps` is 0, allowed: integers from 1 on"),
        ({"guidance_scale": float("nan")}, "`--guidance_scale` is nan, allowed"),
        ({"skip": ["eager_64"]}, r"`--skip` is \['eager_64'\], allowed: some of"),
        ({"short": True, "mar": True, "resolution": 512}, "`--mar` is true, allowed: with `--resolution` 256"),
        ({"measured_steps": 51}, "`--measured_steps` is 51, allowed: 1 to `--num_inference_steps`, 50"),
        ({"guidance_scale": 1.0}, "`--guidance_scale` is 1.0, allowed"),
        ({"batch_sizes": [0]}, r"`--batch_sizes` is \[0\], allowed"),
        ({"skip": ["plain_32"]}, r"`--skip` is \['plain_32'\], allowed: some of"),
        ({"skip": ["sit_xl_64"]}, r"`--skip` is \['sit_xl_64'\], allowed: some of"),
        ({"num_mar_steps": 0}, "`--num_mar_steps` is 0, allowed: integers from 1 on"),
        ({"mar": True, "tokens": [32]}, "`--mar` is true, allowed: with `--resolution` 256 and 64 in `--tokens`"),
        ({"compile_mode": "reduce-overhead"}, "`--compile_mode` is reduce-overhead, allowed: with `--compile`"),
        (
            {"compile_mode": "max-autotune", "freeze_weights": True},
            "`--compile_mode` is max-autotune, allowed with `--freeze_weights`: those without CUDA graphs",
        ),
        ({"max_batch_tokens": 255}, "`--max_batch_tokens` is 255, allowed: 256 or more"),
    ],
)
def test_generation_arguments_that_cannot_work(generation, tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        generation.GenerationBenchmarkArguments(output_dir=str(tmp_path), **values)


# scaling.py


def test_exponents_and_model_are_found_again(load):
    scaling = load("scaling")
    assert scaling.fit_exponent({1: 3.0, 2: 6.0 * 2**0.5, 4: 24.0}) == pytest.approx(1.5)
    features = np.array([[1.0, 2.0], [5.0, 1.0], [3.0, 3.0]])
    assert scaling.fit_model(features, features @ [2.0, 0.5]) == pytest.approx([2.0, 0.5])


def test_operations_and_bytes_are_counted(load):
    scaling = load("scaling")
    one, other = torch.zeros(8, 16), torch.zeros(16, 4)
    workload = scaling.Workload(lambda device: lambda: one.to(device).mm(other.to(device)), 1)
    operations, _ = workload.count()
    assert operations == 2 * 8 * 16 * 4
    with scaling.ByteCounter() as counter:
        one.mm(other)
        one.view(16, 8)  # moves nothing
    assert counter.total == 4 * (8 * 16 + 16 * 4 + 8 * 4)


def test_images_per_second_of_another_machine(load, tmp_path):
    """A machine with twice the operations and bytes per second makes twice the images."""
    scaling = load("scaling")
    options = {"output_dir": str(tmp_path), "short": True, "batch_size": 1, "device": "cpu", "dtype": "float32"}
    workload = scaling.Workload(
        lambda device: lambda: torch.zeros(64, 64, device=device) @ torch.zeros(64, 64, device=device), 3
    )
    scaling.build_series = lambda args: {"tokens": {64: workload, 256: workload}, "steps": {4: workload, 8: workload}}
    scaling.measure_machine = lambda args, rounds: {"operations_per_second": 1e9, "bytes_per_second": 1e9}
    scaling.main(scaling.ScalingArguments(**options, operations_per_second=2e9, bytes_per_second=2e9))
    point = json.loads((tmp_path / "scaling.json").read_text())["measurements"]["steps"]["points"]["8"]
    assert point["images_per_second_elsewhere"] == pytest.approx(2 * point["predicted_images_per_second"])
    assert "At the given P and W" in (tmp_path / "scaling.md").read_text()
    scaling.main(scaling.ScalingArguments(**options))
    assert "At the given P and W" not in (tmp_path / "scaling.md").read_text()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"operations_per_second": 1e12}, "`--bytes_per_second` is None, allowed: both of operations_per_second and"),
        ({"operations_per_second": 0.0, "bytes_per_second": 1e9}, "`--operations_per_second` is 0.0, allowed: finite"),
    ],
)
def test_another_machine_is_a_whole_one(load, tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        load("scaling").ScalingArguments(output_dir=str(tmp_path), **values)


@pytest.mark.parametrize(("num_tokens", "expected"), [(32, 14.57), (64, 29.03), (256, 118.62), (1024, 524.5)])
def test_operations_of_a_transformer_are_the_published_ones(load, tmp_path, num_tokens, expected):
    """Multiplications of SiT-XL for one sample, in 10^9; operations are twice as many."""
    scaling = load("scaling")
    args = scaling.ScalingArguments(output_dir=str(tmp_path), num_layers=28, device="cpu", dtype="float32")
    operations, _ = scaling.Workload(partial(scaling.call_transformer, args, num_tokens, 1), 1).count()
    assert operations / 2e9 == pytest.approx(expected, rel=1e-3)


# check_ratios.py


def test_ratios_that_fall_are_reported(load):
    measured = {
        "a": {"median": 2.0, "min": 1.9, "max": 2.1},
        "b": {"median": 1.0, "min": 0.9, "max": 1.4},
        "c": {"median": 3.0, "min": 3.0, "max": 3.0},
    }
    measured["d"] = {"median": 0.9, "min": 0.8, "max": 0.99}  # within the tolerance, but fast no longer
    measured["e"] = measured["d"]  # hardly faster before
    stored = {"a": 2.2, "b": 2.0, "d": 1.1, "e": 1.09, "gone": 1.0}
    rows, faults = load("check_ratios").compare(measured, stored, tolerance=0.25)
    assert rows == [
        ["a", "2", "2.2"],
        ["b", "1", "2"],
        ["c", "3", "nothing"],
        ["d", "0.9", "1.1"],
        ["e", "0.9", "1.09"],
    ]
    assert faults == [
        "b has fallen from 2 to 1, at most 1.4.",
        "c is not stored. `--update lowest` stores it.",
        "d has fallen from 1.1 to 0.9, at most 0.99.",
        "gone was not measured.",
    ]


def test_ratios_are_stored_and_compared(load, tmp_path, monkeypatch, capsys):
    check_ratios = load("check_ratios")
    monkeypatch.setattr(check_ratios, "STORED", tmp_path / "ratios.json")
    monkeypatch.setattr(check_ratios, "FOLDER", tmp_path)
    ratio = {"median": 4.0, "min": 3.9, "max": 4.1}
    script = "import json, sys; folder = sys.argv[sys.argv.index('--output_dir') + 1]\n"
    script += f"json.dump({{'ratios': {{'fast': {ratio}}}}}, open(folder + '/data.json', 'w'))\n"
    (tmp_path / "data.py").write_text(script)
    arguments = {"output_dir": str(tmp_path), "scripts": ["data"]}

    assert check_ratios.main(check_ratios.CheckRatiosArguments(**arguments, update="measured")) == 0
    stored = json.loads((tmp_path / "ratios.json").read_text())
    assert [by_script["data"] for by_script in stored.values()] == [{"fast": 4.0}]
    assert check_ratios.main(check_ratios.CheckRatiosArguments(**arguments)) == 0

    stored = {dtype: {"data": {"fast": 6.0}} for dtype in stored}
    (tmp_path / "ratios.json").write_text(json.dumps(stored))
    assert check_ratios.main(check_ratios.CheckRatiosArguments(**arguments)) == 1
    assert "data: fast has fallen from 6 to 4" in capsys.readouterr().err

    for before in (6.0, 3.0, None):
        earlier = {} if before is None else {"fast": before}
        (tmp_path / "ratios.json").write_text(json.dumps({dtype: {"data": earlier} for dtype in stored}))
        assert check_ratios.main(check_ratios.CheckRatiosArguments(**arguments, update="lowest")) == 0
        lowest = json.loads((tmp_path / "ratios.json").read_text())
        assert lowest == {dtype: {"data": {"fast": min(before or 4.0, 4.0)}} for dtype in stored}

    (tmp_path / "tokenizer.py").write_text("import sys; sys.exit(3)")
    arguments["scripts"] = ["tokenizer", "data"]
    assert check_ratios.main(check_ratios.CheckRatiosArguments(**arguments, update="measured")) == 1
    assert "tokenizer ended with exit status 3." in capsys.readouterr().err
    assert json.loads((tmp_path / "ratios.json").read_text()) == {dtype: {"data": {"fast": 4.0}} for dtype in stored}
