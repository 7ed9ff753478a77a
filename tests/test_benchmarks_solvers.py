"""benchmarks/solvers.py and benchmarks/quantization.py on tiny pipelines."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load_benchmark(name):
    sys.path.insert(0, str(BENCHMARKS))  # they import each other, as scripts do
    try:
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # its dataclasses look their types up there
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


solvers = load_benchmark("solvers")


@pytest.fixture
def folder(tiny_pipeline, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    return str(tmp_path / "pipeline")


def test_reference_is_what_the_pipeline_computes_in_float32(tiny_pipeline):
    pipeline = tiny_pipeline(FlowMatchHeunDiscreteScheduler())
    noise, class_ids, labels = torch.randn(2, 10, 6), [0, 3], torch.tensor([0, 3])
    arguments = {"guidance_scale": 2.5, "guidance_interval": (0.2, 0.7)}
    states = []
    latents = pipeline(
        class_ids,
        num_inference_steps=30,
        latents=noise,
        output_type="latent",
        callback_on_step_end=lambda pipeline, i, t, tensors: states.append(tensors["latents"]) or {},
        **arguments,
    ).images

    transformer = pipeline.transformer.double()
    setting = solvers.Setting(**arguments)
    reference = solvers.solve_reference(transformer, noise, labels, setting, num_steps=30)
    with torch.no_grad():  # the last step of the scheduler is Euler's
        slope = transformer(states[-2].double(), 1000 / 30, labels).sample
        end_slope = transformer(latents.double(), 0.0, labels).sample
    corrected = latents - (end_slope - slope) / 60
    assert reference.dtype == torch.float64
    torch.testing.assert_close(corrected, reference, rtol=0, atol=1e-5)

    unguided = solvers.solve_reference(transformer, noise, labels, solvers.Setting(), num_steps=30)
    assert (unguided - reference).abs().max() > 0.01


def test_latent_errors_are_relative():
    reference = torch.full((2, 3, 4), 2.0, dtype=torch.float64)
    latents = reference.clone()
    latents[1] += 0.5
    assert solvers.latent_errors(latents, reference).tolist() == pytest.approx([0, 0.25])
    assert solvers.root_mean_square(torch.tensor([0.0, 0.25])) == pytest.approx(0.25 / math.sqrt(2))


def test_solvers(folder, tmp_path, capsys):
    args = solvers.SolversArguments(
        output_dir=str(tmp_path / "out"),
        pipeline=folder,
        num_calls=[10, 20],
        reference_steps=100,
        num_images=2,
        device="cpu",
    )
    solvers.main(args)

    record = json.loads((tmp_path / "out" / "solvers.json").read_text())
    assert set(record["measurements"]) == {"conditional", "guided", "interval"}
    for result in record["measurements"].values():
        assert set(result["solvers"]) == set(solvers.SOLVERS)
        errors = {solver: [run["latent_error"] for run in runs] for solver, runs in result["solvers"].items()}
        for solver, (few, many) in errors.items():
            assert 0 < many < few, solver
        assert errors["unipc_2"][1] < 0.3 * errors["euler"][1]
        assert result["reference_error"] < 0.1 * min(many for _, many in errors.values())
        psnr = {solver: [run["psnr"] for run in runs] for solver, runs in result["solvers"].items()}
        assert psnr["unipc_2"][1] > psnr["euler"][1] > psnr["euler"][0]
        assert [run["calls"] for run in result["solvers"]["heun"]] == [9, 19]
        assert [run["steps"] for run in result["solvers"]["unipc_2"]] == [10, 20]

    solver_names = [solver for solver in solvers.SOLVERS if solver != "euler"]
    assert set(record["ratios"]) == {
        f"{solver}.{setting}.vs_euler" for solver in solver_names for setting in record["measurements"]
    }
    euler, unipc = (record["measurements"]["guided"]["solvers"][name][1] for name in ("euler", "unipc_2"))
    ratios = [a / b for a, b in zip(euler["latent_errors"], unipc["latent_errors"], strict=True)]
    assert record["ratios"]["unipc_2.guided.vs_euler"]["max"] == pytest.approx(max(ratios))
    table = (tmp_path / "out" / "solvers.md").read_text()
    assert table.count("\n") == 2 + 3 * len(solvers.SOLVERS) and table in capsys.readouterr().out
    assert (tmp_path / "out" / "solvers.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_calls": [10, 40]}, r"`--num_calls` is \[10, 40\], allowed: integers from 1 on, 20 among them"),
        ({"num_calls": [0, 20]}, r"`--num_calls` is \[0, 20\]"),
        ({"reference_steps": 199}, "`--reference_steps` is 199, allowed: integers from 200 on"),
        ({"num_images": 0}, "`--num_images` is 0, allowed: integers from 1 on"),
        ({"guidance_scale": 1.0}, "`--guidance_scale` is 1.0, allowed: finite numbers above 1"),
        ({"guidance_scale": float("inf")}, "`--guidance_scale` is inf, allowed: finite numbers above 1"),
    ],
)
def test_bad_arguments_of_solvers(arguments, message):
    with pytest.raises(ValueError, match=message):
        solvers.SolversArguments(output_dir="out", **arguments)


def test_solvers_refuse_what_euler_solves_exactly(tiny_pipeline, tmp_path):
    """A model that training starts from predicts a velocity of 0."""
    pipeline = tiny_pipeline()
    pipeline.transformer.initialize_weights()
    pipeline.save_pretrained(tmp_path / "new")
    folders = {"output_dir": str(tmp_path / "out"), "pipeline": str(tmp_path / "new")}
    args = solvers.SolversArguments(**folders, short=True, device="cpu")
    with pytest.raises(ValueError, match="whose ODE Euler's method solves exactly .*, allowed: pipelines whose"):
        solvers.main(args)


def test_equal_images_have_the_largest_psnr(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(solvers, "decode", lambda pipeline, latents: torch.zeros(len(latents), 3, 4, 4))
    args = solvers.SolversArguments(output_dir=str(tmp_path / "out"), pipeline=folder, short=True, device="cpu")
    solvers.main(args)
    record = json.loads((tmp_path / "out" / "solvers.json").read_text())
    runs = record["measurements"]["guided"]["solvers"]["heun"]
    assert [run["psnr"] for run in runs] == pytest.approx([200.0, 200.0])


def test_solvers_refuse_a_chain(tiny_pipeline, tmp_path):
    from diffusers import DDIMScheduler

    tiny_pipeline(DDIMScheduler(), timestep_scale=1.0).save_pretrained(tmp_path / "chain")
    args = solvers.SolversArguments(output_dir=str(tmp_path / "out"), pipeline=str(tmp_path / "chain"))
    with pytest.raises(ValueError, match="`--pipeline` is .*, whose scheduler is a DDIMScheduler, allowed"):
        solvers.main(args)


def test_quantization(folder, tmp_path):
    pytest.importorskip("torchao")
    quantization = load_benchmark("quantization")
    args = quantization.QuantizationArguments(
        output_dir=str(tmp_path / "out"), pipeline=folder, batch_size=2, rounds=1, device="cpu"
    )
    quantization.main(args)
    record = json.loads((tmp_path / "out" / "quantization.json").read_text())
    variants = record["measurements"]["variants"]
    assert list(variants) == list(quantization.VARIANTS)
    assert variants["float32"]["velocity_error"] == variants["float32"]["latent_error"] == 0
    assert variants["float32"]["bytes"] == 2 * variants["bfloat16"]["bytes"]
    sizes = [variants[name]["bytes"] for name in ("int8_all", "int8", "int8_without_modulation", "bfloat16")]
    assert sizes == sorted(sizes) and len(set(sizes)) == 4
    for name in ("bfloat16", "int8", "float8"):
        assert 0 < variants[name]["velocity_error"] < 0.1 and 0 < variants[name]["latent_error"] < 0.1
    ratio = record["ratios"]["int8.weights_vs_bfloat16"]["median"]
    assert ratio == variants["bfloat16"]["bytes"] / variants["int8"]["bytes"]
    assert (tmp_path / "out" / "quantization.md").read_text().count("\n") == 2 + len(variants)


def test_bytes_of_quantized_weights():
    torchao = pytest.importorskip("torchao.quantization")
    quantization = load_benchmark("quantization")
    layer = torch.nn.Linear(64, 32, dtype=torch.bfloat16)
    assert quantization.stored_bytes(layer.weight) == 2 * 64 * 32
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
    assert is_traceable_wrapper_subclass(layer.weight)
    assert layer.weight.nbytes == 2 * 64 * 32  # of the dtype it stands for
    assert 64 * 32 < quantization.stored_bytes(layer.weight) < 64 * 32 + 32 * 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`--batch_size` is 0, allowed: integers"),
        ({"rounds": 0}, "`--rounds` is 0, allowed: integers"),
    ],
)
def test_bad_arguments_of_quantization(arguments, message):
    pytest.importorskip("torchao")
    with pytest.raises(ValueError, match=message):
        load_benchmark("quantization").QuantizationArguments(output_dir="out", **arguments)
