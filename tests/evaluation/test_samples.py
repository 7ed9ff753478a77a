"""Samples for figures: every image a function of seed and number, shards that an interrupted run adds to, the .npz."""

import hashlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from softvq_hf.evaluation.samples import SampleFolder, draw_labels, generate_samples, image_generator, plan_samples
from softvq_hf.schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler


SETTINGS = {"num_images": 21, "seed": 3, "num_inference_steps": 2, "guidance_scale": 2.0, "shard_size": 4}

# Made by several processes, or to be killed: a script of its own.
SCRIPT = """
import json, sys
from accelerate import Accelerator
from softvq_hf.evaluation.samples import generate_samples, plan_samples
from softvq_hf.pipelines.pipeline_softvq import SoftVQPipeline

pipeline, output_dir, batch_size, settings = sys.argv[1:]
pipeline, accelerator = SoftVQPipeline.from_pretrained(pipeline), Accelerator(cpu=True)
samples = plan_samples(pipeline, output_dir, accelerator, **json.loads(settings))
generate_samples(pipeline, samples, accelerator, batch_size=int(batch_size))
"""


@pytest.fixture
def random_pipeline(tiny_pipeline):
    """`tiny_pipeline` with random weights all over: a fresh transformer predicts zero, whatever the class."""

    def build(scheduler=None, **transformer_config):
        pipeline = tiny_pipeline(scheduler, **transformer_config)
        for parameter in pipeline.transformer.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        return pipeline

    return build


@pytest.fixture
def generate(tmp_path, fresh_accelerate):
    """Generates in this process: `generate(pipeline, "folder", **settings) -> SampleFolder`."""

    def run(pipeline, folder: str, mixed_precision: str = "no", batch_size: int = 32, **settings) -> SampleFolder:
        fresh_accelerate()
        accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
        samples = plan_samples(pipeline, tmp_path / folder, accelerator, **{**SETTINGS, **settings})
        generate_samples(pipeline, samples, accelerator, batch_size=batch_size)
        return samples

    return run


@pytest.fixture
def start_script(tmp_path, random_pipeline):
    """Starts processes that generate into `tmp_path / folder`: `start_script(folder, num_processes, **settings)`."""
    random_pipeline().save_pretrained(tmp_path / "pipeline")
    (tmp_path / "generate.py").write_text(SCRIPT)

    def start(folder: str, num_processes: int, batch_size: int, **settings) -> subprocess.Popen:
        command = [sys.executable]
        if num_processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
        command += [tmp_path / "generate.py", tmp_path / "pipeline", tmp_path / folder, batch_size]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return subprocess.Popen([*map(str, command), json.dumps({**SETTINGS, **settings})], env=env)

    return start


def read_images(samples: SampleFolder) -> np.ndarray:
    return np.concatenate([samples.read(shard) for shard in range(samples.num_shards)])


def test_images_are_those_of_the_pipeline(random_pipeline, generate):
    pipeline = random_pipeline()
    samples = generate(pipeline, "samples")
    assert samples.num_shards == 6
    assert samples.path(5).name == "00005-of-00006.npy" and samples.read(5).shape == (1, 16, 16, 3)
    class_labels = draw_labels("iid", 21, 4, seed=3)
    images = read_images(samples)
    for index in (0, 7, 20):
        alone = pipeline(
            int(class_labels[index]),
            guidance_scale=2.0,
            num_inference_steps=2,
            generator=image_generator(3, index),
            output_type="np",
        ).images[0]
        assert np.abs(images[index] - alone * 255).max() <= 0.501
    assert len(np.unique(images.reshape(21, -1), axis=0)) == 21
    unguided = read_images(generate(pipeline, "unguided", guidance_scale=1.0))
    assert (images != unguided).mean() > 0.3


def test_images_of_mar(tiny_mar_pipeline, generate):
    pipeline = tiny_mar_pipeline()
    settings = {"guidance_schedule": "constant", "num_diffusion_steps": 3, "temperature": 0.9}
    samples = generate(pipeline, "samples", **settings)
    for index in (0, 7, 20):
        alone = pipeline(
            int(samples.class_labels[index]),
            guidance_scale=2.0,
            num_inference_steps=2,
            generator=image_generator(3, index),
            output_type="np",
            **settings,
        ).images[0]
        assert np.abs(read_images(samples)[index] - alone * 255).max() <= 0.501
    with pytest.raises(ValueError, match="temperature.*0.9.*1.0"):
        generate(pipeline, "samples", **settings | {"temperature": 1.0})
    with pytest.raises(ValueError, match="`num_diffusion_steps` is 2000, allowed: up to"):
        generate(pipeline, "others", num_diffusion_steps=2000)
    with pytest.raises(
        TypeError, match="`guidance_interval` is no argument of a MARPipeline, allowed: guidance_scale"
    ):
        generate(pipeline, "others", guidance_interval=(0.0, 0.5))


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(),
        StochasticInterpolantScheduler(),
        DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False, timestep_spacing="linspace"),
    ],
    ids=["ode", "sde", "ddpm"],
)
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_images_do_not_depend_on_the_batch_size(random_pipeline, generate, scheduler, batch_size):
    chain = {"timestep_scale": 1.0} if isinstance(scheduler, DDPMScheduler) else {}
    pipeline = random_pipeline(scheduler, **chain)
    expected = read_images(generate(pipeline, "expected", batch_size=4)).astype(int)
    images = read_images(generate(pipeline, "samples", batch_size=batch_size)).astype(int)
    assert np.abs(images - expected).max() <= 1  # kernels may round otherwise, right between two grey levels
    assert (images != expected).mean() < 1e-3
    other_seed = read_images(generate(pipeline, "other", batch_size=4, seed=4)).astype(int)
    assert (other_seed != expected).mean() > 0.5


@pytest.mark.slow
def test_two_processes_make_the_images_of_one(random_pipeline, generate, start_script, tmp_path):
    expected = generate(random_pipeline(), "expected", batch_size=3)
    assert start_script("samples", num_processes=2, batch_size=3).wait(timeout=120) == 0
    for shard in range(expected.num_shards):
        path = expected.path(shard)
        assert path.read_bytes() == (tmp_path / "samples" / "images" / path.name).read_bytes()
    assert (tmp_path / "samples/plan.json").read_bytes() == (tmp_path / "expected/plan.json").read_bytes()


@pytest.mark.slow
def test_a_killed_run_goes_on(random_pipeline, generate, start_script, tmp_path):
    settings = {"num_images": 200, "batch_size": 2}
    process = start_script("samples", num_processes=1, **settings)
    images = tmp_path / "samples" / "images"
    deadline = time.monotonic() + 300  # on a busy machine the imports alone take long
    while len(list(images.glob("*.npy"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = {path.name: path.stat().st_mtime_ns for path in images.glob("*.npy")}
    assert 3 <= len(there) < 50

    pipeline = random_pipeline()
    resumed, expected = generate(pipeline, "samples", **settings), generate(pipeline, "expected", **settings)
    assert {path.name: path.stat().st_mtime_ns for path in images.glob("*.npy") if path.name in there} == there
    assert sorted(path.name for path in images.glob("*.npy")) == [expected.path(shard).name for shard in range(50)]
    np.testing.assert_array_equal(read_images(resumed), read_images(expected))


def test_shards_that_are_missing_are_made_anew(random_pipeline, generate):
    pipeline = random_pipeline()
    samples = generate(pipeline, "samples")
    before = read_images(samples).copy()
    for shard in (1, 4):
        samples.path(shard).unlink()
    kept = samples.path(2).stat().st_mtime_ns
    np.testing.assert_array_equal(read_images(generate(pipeline, "samples")), before)
    assert samples.path(2).stat().st_mtime_ns == kept


def test_what_killed_runs_have_begun_is_deleted(random_pipeline, generate):
    samples = generate(random_pipeline(), "samples")
    for name in ("samples.4711.unfinished", "images/00001-of-00006.4711.unfinished"):
        (samples.output_dir / name).write_bytes(b"half of it")
    before = read_images(samples).copy()
    generate(random_pipeline(), "samples")
    assert list(samples.output_dir.rglob("*.unfinished")) == []
    np.testing.assert_array_equal(read_images(samples), before)


def test_an_error_does_not_stand_behind_the_progress_bar(random_pipeline, generate, capsys):
    pipeline = random_pipeline()
    torch.nn.init.constant_(next(pipeline.transformer.parameters()), math.nan)
    try:
        generate(pipeline, "samples")
    except ValueError:
        assert capsys.readouterr().err.endswith("\n")
    else:
        pytest.fail("images were not finite")


def flip_a_pixel(path):
    data = bytearray(path.read_bytes())
    data[-100] ^= 255
    path.write_bytes(data)


def make_an_archive(path):
    with path.open("wb") as file:
        np.savez(file, np.zeros((4, 16, 16, 3), np.uint8))


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_pixel,
        make_an_archive,
        lambda path: path.write_bytes(path.read_bytes()[:-5]),
        lambda path: path.write_bytes(b""),
        lambda path: path.with_suffix(".sha256").unlink(),
        lambda path: path.with_suffix(".sha256").write_bytes(b"\xff"),
    ],
)
def test_shards_that_are_damaged_are_made_anew(random_pipeline, generate, caplog, damage):
    pipeline = random_pipeline()
    samples = generate(pipeline, "samples")
    before = read_images(samples).copy()
    npz = samples.write_npz()
    kept = samples.path(2).stat().st_mtime_ns
    damage(samples.path(1))
    with caplog.at_level("WARNING"):
        samples = generate(pipeline, "samples")
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert f"{samples.path(1)} is damaged: " in record.message and "It is made again." in record.message
    np.testing.assert_array_equal(read_images(samples), before)
    assert samples.path(2).stat().st_mtime_ns == kept
    assert samples.path(1).stat().st_mtime_ns > npz.stat().st_mtime_ns  # so that the .npz is written again


def test_checksums_are_those_of_sha256sum(random_pipeline, generate):
    samples = generate(random_pipeline(), "samples")
    line = samples.path(2).with_suffix(".sha256").read_text()
    assert line == f"{hashlib.sha256(samples.path(2).read_bytes()).hexdigest()}  00002-of-00006.npy\n"


@pytest.mark.parametrize("text", ["x{", "", "[]", "null", "3", b"\xff"])
def test_a_damaged_plan_is_named(random_pipeline, generate, tmp_path, text):
    samples = generate(random_pipeline(), "samples")
    made = samples.path(0).stat().st_mtime_ns
    path = tmp_path / "samples/plan.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="samples/plan.json is damaged: .*Use another folder, or delete this one"):
        generate(random_pipeline(), "samples")
    assert samples.path(0).stat().st_mtime_ns == made


def test_a_plan_makes_nothing(random_pipeline, accelerator, tmp_path):
    samples = plan_samples(random_pipeline(), tmp_path / "samples", accelerator, **SETTINGS)
    assert samples.num_images == 21 and not any((tmp_path / "samples").iterdir())


def test_a_run_with_another_plan_is_refused(random_pipeline, generate, tmp_path):
    pipeline = random_pipeline()
    samples = generate(pipeline, "samples")
    plan = (tmp_path / "samples/plan.json").read_bytes()
    message = r"another plan: `seed` is 3 there and 5 here; `rounding` is round there and truncate here. Use"
    with pytest.raises(ValueError, match=message):
        generate(pipeline, "samples", seed=5, rounding="truncate")

    with torch.no_grad():
        pipeline.transformer.proj_out.bias += 1e-6
    with pytest.raises(ValueError, match=r"another plan: `pipeline.transformer` is \w{64} there and \w{64} here. Use"):
        generate(pipeline, "samples")
    pipeline = random_pipeline(FlowMatchEulerDiscreteScheduler(shift=2.0))
    with pytest.raises(ValueError, match="`pipeline.scheduler.shift` is 1.0 there and 2.0 here"):
        generate(pipeline, "samples")
    pipeline = random_pipeline()
    pipeline.vae.register_to_config(scaling_factor=5.0)
    with pytest.raises(ValueError, match="`pipeline.scaling_factor` is 4.0 there and 5.0 here"):
        generate(pipeline, "samples")
    with pytest.raises(ValueError, match="`mixed_precision` is no there and bf16 here"):
        generate(random_pipeline(), "samples", mixed_precision="bf16")
    assert (tmp_path / "samples/plan.json").read_bytes() == plan

    (tmp_path / "samples/plan.json").unlink()
    with pytest.raises(ValueError, match="has images but no plan.json"):
        generate(random_pipeline(), "samples")
    assert samples.path(0).is_file()


def test_a_folder_that_was_moved_and_other_batches_go_on(random_pipeline, generate, tmp_path):
    samples = generate(random_pipeline(), "samples")
    samples.path(3).unlink()
    (tmp_path / "samples").rename(tmp_path / "moved")
    assert read_images(generate(random_pipeline(), "moved", batch_size=5)).shape == (21, 16, 16, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images": 0}, "`num_images` is 0, allowed: integers from 1 on."),
        ({"seed": -1}, "`seed` is -1, allowed: integers from 0 on."),
        ({"shard_size": 0}, "`shard_size` is 0, allowed: integers from 1 on."),
        ({"labels": "uniform"}, "`labels` is 'uniform', allowed: 'iid', 'balanced'."),
        ({"rounding": "floor"}, "`rounding` is 'floor', allowed: 'round', 'truncate'."),
        ({"guidance_interval": (0.5, 0.2)}, r"`guidance_interval` is \(0.5, 0.2\), allowed"),
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0, allowed: integers from 1 on."),
    ],
)
def test_wrong_arguments(random_pipeline, generate, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(random_pipeline(), "samples", **arguments)
    assert not (tmp_path / "samples").exists()


def test_wrong_batch_size(random_pipeline, generate, tmp_path):
    with pytest.raises(ValueError, match="`batch_size` is 0, allowed: integers from 1 on."):
        generate(random_pipeline(), "samples", batch_size=0)
    assert not any((tmp_path / "samples").iterdir())


def test_guidance_needs_a_null_class(random_pipeline, generate):
    with pytest.raises(ValueError, match="`guidance_scale` is 2.0, allowed: at most 1 for this transformer"):
        generate(random_pipeline(class_dropout_prob=0.0), "samples")


def test_latents_that_are_not_finite_are_named(random_pipeline, generate):
    """One class is broken; its images in the first batch that has any are named."""
    pipeline = random_pipeline()
    class_labels = draw_labels("iid", 21, 4, seed=3)
    with torch.no_grad():
        pipeline.transformer.class_embedder.weight[class_labels[2]] = torch.nan
    broken = [index for index in range(4) if class_labels[index] == class_labels[2]]
    images, classes = (", ".join(map(str, numbers)) for numbers in (broken, class_labels[broken]))
    with pytest.raises(ValueError, match=f"with `seed` 3 the images {images}, of the classes {classes}\\.$"):
        generate(pipeline, "samples", batch_size=4)


def test_images_that_are_not_finite_are_named(random_pipeline, generate):
    pipeline = random_pipeline()
    with torch.no_grad():
        next(pipeline.vae.decoder.parameters()).fill_(torch.inf)
    with pytest.raises(ValueError, match="with `seed` 3 the images 0, 1, of the classes"):
        generate(pipeline, "samples", batch_size=2)


def test_a_damaged_shard_is_named(random_pipeline, generate):
    samples = generate(random_pipeline(), "samples")
    path = samples.path(2)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=f"{path.name} is damaged: .* Delete it"):
        samples.read(2)
    make_an_archive(path)
    with pytest.raises(ValueError, match=f"{path.name} is damaged: the magic string"):
        samples.read(2)
    np.save(path, np.zeros((3, 16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match=r"uint8 of shape \(3, 16, 16, 3\) in place of uint8 of shape \(4, 16"):
        samples.read(2)


def test_rounding(random_pipeline, generate):
    pipeline = random_pipeline()
    rounded = read_images(generate(pipeline, "rounded")).astype(int)
    truncated = read_images(generate(pipeline, "truncated", rounding="truncate")).astype(int)
    assert set(np.unique(rounded - truncated)) == {0, 1}
    assert (rounded - truncated).mean() == pytest.approx(0.5, abs=0.1)


def test_labels():
    iid = draw_labels("iid", 1000, 7, seed=0)
    assert set(iid) == set(range(7)) and iid.dtype == np.int64
    np.testing.assert_array_equal(draw_labels("iid", 500, 7, seed=0), iid[:500])
    assert (draw_labels("iid", 1000, 7, seed=1) != iid).any()
    assert np.ptp(np.bincount(iid)) > 1

    balanced = draw_labels("balanced", 1000, 7, seed=0)
    assert sorted(np.bincount(balanced)) == [142, 143, 143, 143, 143, 143, 143]
    assert (np.sort(balanced) != balanced).any() and set(balanced[:50]) == set(range(7))
    np.testing.assert_array_equal(draw_labels("balanced", 1000, 7, seed=0), balanced)
    assert (draw_labels("balanced", 1000, 7, seed=1) != balanced).any()
    assert sorted(draw_labels("balanced", 3, 1000, seed=0)) == [0, 1, 2]


def test_noise_of_all_images_differs_and_is_normal():
    noise = torch.stack([torch.randn(256, generator=image_generator(0, index)) for index in range(2000)])
    assert len(noise.unique(dim=0)) == 2000
    assert noise.mean().abs() < 0.01 and (noise.std() - 1).abs() < 0.01
    correlation = torch.corrcoef(noise.double())
    assert correlation.diagonal(1).mean().abs() < 4 / (256 * 2000) ** 0.5  # neighbours
    assert (torch.corrcoef(noise.double().T) - torch.eye(256)).abs().max() < 6 / 2000**0.5  # numbers of one place
    torch.testing.assert_close(torch.randn(256, generator=image_generator(0, 7)), noise[7])
    assert not torch.equal(torch.randn(256, generator=image_generator(1, 7)), noise[7])
    image_generator(0, 2**32 - 1)


def test_npz(random_pipeline, generate):
    samples = generate(random_pipeline(), "samples", labels="balanced")
    path = samples.write_npz()
    images = read_images(samples)
    with np.load(path, allow_pickle=False) as archive:
        assert archive.files == ["arr_0", "arr_1"]
        assert archive["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(archive["arr_0"], images)
        np.testing.assert_array_equal(archive["arr_1"], draw_labels("balanced", 21, 4, seed=3))

    # read from front to back, as the evaluation scripts of ADM do
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
        assert np.lib.format.read_magic(member) == (1, 0)
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(member)
        assert (shape, fortran_order, dtype) == ((21, 16, 16, 3), False, np.uint8)
        assert member.read() == images.tobytes()

    whole = io.BytesIO()
    np.savez(whole, images, samples.class_labels)
    assert path.stat().st_size <= len(whole.getvalue()) + 1024
    assert not list(path.parent.glob("*.unfinished"))


def test_npz_that_is_there_is_written_again_for_new_shards_only(random_pipeline, generate):
    pipeline = random_pipeline()
    samples = generate(pipeline, "samples")
    path = samples.write_npz()
    written = path.stat().st_ino
    samples.write_npz()
    assert path.stat().st_ino == written
    samples.path(3).unlink()
    path.write_bytes(b"from before")
    os.utime(path, ns=(0, samples.path(0).stat().st_mtime_ns))
    generate(pipeline, "samples").write_npz()
    with np.load(path) as archive:
        np.testing.assert_array_equal(archive["arr_0"], read_images(samples))


def test_batches(random_pipeline, generate):
    samples = generate(random_pipeline(), "samples")
    batches = list(samples.batches([5, 1], batch_size=3))
    assert [indices.tolist() for indices, _ in batches] == [[20], [4, 5, 6], [7]]
    images = read_images(samples)
    for indices, batch in batches:
        assert batch.dtype == torch.uint8 and batch.shape[1:] == (3, 16, 16)
        np.testing.assert_array_equal(batch.permute(0, 2, 3, 1).numpy(), images[indices.numpy()])


def test_only_finished_files_have_their_names(tmp_path):
    plan = {"num_images": 4, "num_classes": 2, "labels": "iid", "seed": 0, "height": 2, "width": 2, "shard_size": 4}
    samples = SampleFolder(tmp_path, plan)

    class Interrupted(np.ndarray):
        def tobytes(self, *args, **kwargs):
            raise KeyboardInterrupt

        def tofile(self, *args, **kwargs):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        samples.write(0, np.zeros((4, 2, 2, 3), np.uint8).view(Interrupted))
    unfinished = f"00000-of-00001.{os.getpid()}.unfinished"  # another process has a file of its own
    assert [Path(path).name for path in (tmp_path / "images").iterdir()] == [unfinished]
