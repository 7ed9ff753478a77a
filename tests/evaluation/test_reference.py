"""References: measured, written, read, and refused."""

import json
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from softvq_hf.evaluation.arguments import EvaluationDataArguments
from softvq_hf.evaluation.reference import (
    ReferenceArguments,
    build_dataset_reference,
    build_reference,
    load_reference,
    make_reference,
    save_reference,
)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (30, 3, 8, 8), generator=generator, dtype=torch.uint8)


def build(images, extractor, batch_size=7, **options):
    indices = torch.arange(len(images)).split(batch_size)
    return build_reference([(images[part], part) for part in indices], extractor, resolution=8, **options)


def assert_same(first, second):
    for name in ("statistics", "spatial_statistics"):
        for left, right in zip(vars(getattr(first, name)).values(), vars(getattr(second, name)).values(), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(first.features, second.features)


def test_statistics_are_those_of_numpy(mean_colours, images):
    extractor = mean_colours("x")
    reference = build(images, extractor)
    features = extractor(images).features.double().numpy()
    np.testing.assert_allclose(reference.statistics.mean, features.mean(0), rtol=1e-6)
    np.testing.assert_allclose(reference.statistics.covariance, np.cov(features.T), rtol=1e-5, atol=1e-9)
    assert reference.spatial_statistics.count == reference.num_images == 30
    assert sorted(reference.features.tolist()) == sorted(features.tolist())


def test_size_of_batches_does_not_count(mean_colours, images):
    assert_same(build(images, mean_colours("x"), batch_size=1), build(images, mean_colours("x"), batch_size=16))


def test_number_of_features(mean_colours, images):
    assert build(images, mean_colours("x"), num_features=5).features.shape == (5, 12)
    assert build(images, mean_colours("x"), num_features=0).features is None


def test_too_few_images(mean_colours, images):
    with pytest.raises(ValueError, match=r"The reference has 1 image\(s\), allowed: 2 or more"):
        build(images[:1], mean_colours("x"))


def test_images_in_0_to_1_cast_to_8_bits_are_noticed(mean_colours, images):
    with pytest.raises(ValueError, match="`reference` holds no value above 1 in any of 30 8-bit images"):
        build(images.bool().byte(), mean_colours("x"))


def test_round_trip(accelerator, mean_colours, images, tmp_path):
    reference = build(images, mean_colours("x"), dataset={"name": "noise"})
    save_reference(reference, tmp_path / "new" / "reference.npz")
    loaded = load_reference(accelerator, tmp_path / "new" / "reference.npz", mean_colours("x"), 8)
    assert_same(reference, loaded)
    assert loaded.num_images == 30 and loaded.protocol == reference.protocol and loaded.notes == []
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["reference.npz"]
    with np.load(tmp_path / "new" / "reference.npz") as archive:  # the names of ADM's evaluator
        assert archive["mu"].shape == archive["mu_s"].shape == (12,) and archive["sigma"].shape == (12, 12)


def test_another_protocol_is_refused_with_the_differences(accelerator, mean_colours, images, tmp_path):
    save_reference(build(images, mean_colours("x")), tmp_path / "reference.npz")
    with pytest.raises(ValueError) as error:
        load_reference(accelerator, tmp_path / "reference.npz", mean_colours("x", scale=2.0), 16)
    assert "made with another protocol" in str(error.value)
    assert "`feature_extractor.scale` is 1.0 there and 2.0 here" in str(error.value)
    assert "`resolution` is 8 there and 16 here" in str(error.value)
    assert "crop" not in str(error.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("batch_size", [1, 8, 100])
def test_images_of_a_file(accelerator, mean_colours, images, tmp_path, save, batch_size):
    save(tmp_path / "images.npz", images.permute(0, 2, 3, 1).numpy(), np.arange(30))
    reference = load_reference(accelerator, tmp_path / "images.npz", mean_colours("x"), 8, batch_size=batch_size)
    assert_same(reference, build(images, mean_colours("x")))
    assert reference.num_images == 30 and "crop of the images in images.npz could not be checked" in reference.notes[0]


def test_statistics_of_a_file_win_for_inception(accelerator, mean_colours, images, tmp_path):
    """As in ADM's VIRTUAL_imagenet256_labeled.npz: statistics of the whole set beside some of its images."""
    extractor = mean_colours("Inception")
    whole = build(images, extractor)
    arrays = {"mu": whole.statistics.mean, "sigma": whole.statistics.covariance}
    arrays |= {"mu_s": whole.spatial_statistics.mean, "sigma_s": whole.spatial_statistics.covariance}
    np.savez(tmp_path / "adm.npz", images[:10].permute(0, 2, 3, 1).numpy(), **arrays)
    reference = load_reference(accelerator, tmp_path / "adm.npz", extractor, 8)
    assert torch.equal(reference.statistics.mean, whole.statistics.mean)
    assert torch.equal(reference.spatial_statistics.covariance, whole.spatial_statistics.covariance)
    assert reference.num_images is None and len(reference.features) == 10
    assert "could not be checked" in reference.notes[0]
    # another network measures the images itself
    own = load_reference(accelerator, tmp_path / "adm.npz", mean_colours("x"), 8)
    assert_same(own, build(images[:10], mean_colours("x")))


def test_statistics_alone(accelerator, mean_colours, tmp_path):
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(12), sigma=np.eye(12))
    reference = load_reference(accelerator, tmp_path / "statistics.npz", mean_colours("x"), 8)
    assert reference.spatial_statistics is None and reference.features is None and reference.num_images is None
    assert "does not say how its mu and sigma were measured" in reference.notes[0]


def write_no_archive(path):
    path.write_bytes(b"no archive")


def write_one_array(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(12))


def write_archive_of(**members):
    """Writes an archive of these bytes."""

    def write(path):
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(f"{name}.npy", data)

    return write


def write_damaged(save, name):
    """Writes an archive whose member `name` is damaged in the middle."""

    def write(path):
        images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
        save(path, arr_0=images, mu=np.random.default_rng(0).normal(size=12), sigma=np.eye(12))
        with zipfile.ZipFile(path) as archive:
            member = archive.getinfo(f"{name}.npy")
        data = bytearray(path.read_bytes())
        middle = member.header_offset + 60 + member.compress_size // 2
        data[middle : middle + 8] = bytes(number ^ 255 for number in data[middle : middle + 8])
        path.write_bytes(data)

    return write


NOT_SEMIDEFINITE = np.eye(12)
NOT_SEMIDEFINITE[0, 1] = NOT_SEMIDEFINITE[1, 0] = 2


def write_objects(path):
    np.savez(path, mu=np.array([object()], dtype=object), sigma=np.eye(1))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "allowed: an .npz file that exists"),
        (write_no_archive, "cannot be read"),
        (write_objects, "cannot be read"),  # it would execute what it holds
        (write_one_array, "cannot be read: it is no archive"),
        (write_archive_of(mu=b"no array", sigma=b"no array"), "cannot be read: mu and sigma is no array"),
        (write_archive_of(mu=b"\x93NUMPY\x01\x00"), "cannot be read: EOF"),
        (write_archive_of(arr_0=b"no array"), "cannot be read: the magic string"),
        (write_damaged(np.savez, "mu"), "cannot be read: Bad CRC-32"),
        (write_damaged(np.savez, "arr_0"), "cannot be read: Bad CRC-32"),
        (write_damaged(np.savez_compressed, "arr_0"), "cannot be read: "),
        (lambda path: np.savez(path, mu=np.zeros(12, complex), sigma=np.eye(12)), "mu of dtype complex128, allowed"),
        (lambda path: np.savez(path, mu=np.zeros(12), sigma=np.full((12, 12), "x")), "sigma of dtype <U1, allowed"),
        (lambda path: np.savez(path, mu=np.zeros(12), sigma=NOT_SEMIDEFINITE), "the eigenvalue -1 beside 3, allowed"),
        (lambda path: np.savez(path, x=1), "holds x, allowed: mu and sigma, or images as arr_0"),
        (
            lambda path: np.savez(path, mu=np.zeros(2048), sigma=np.eye(2048)),
            r"mu of shape \(2048,\).*another network",
        ),
        (lambda path: np.savez(path, mu=np.zeros(12), sigma=np.eye(11)), "mu and sigma that are not valid"),
        (lambda path: np.savez(path, mu=np.full(12, np.nan), sigma=np.eye(12)), "not finite"),
        (lambda path: np.savez(path, np.zeros((2, 16, 16, 3), np.uint8)), "16 x 16 pixels, allowed: 8 x 8"),
        (lambda path: np.savez(path, np.zeros((2, 8, 8, 3), np.float32)), "dtype float32, allowed"),
        (lambda path: np.savez(path, np.zeros((2, 3, 8, 8), np.uint8)), r"allowed: \(N, H, W, 3\)"),
        (lambda path: np.savez(path, np.zeros((0, 8, 8, 3), np.uint8)), r"has 0 image\(s\)"),
    ],
)
def test_files_that_are_refused(accelerator, mean_colours, tmp_path, write, message):
    write(tmp_path / "reference.npz")
    with pytest.raises(ValueError, match=message) as error:
        load_reference(accelerator, tmp_path / "reference.npz", mean_colours("x"), 8)
    assert "reference.npz" in str(error.value) or "The reference has 0" in str(error.value)


MEASURED = {
    "feature_extractor": {"name": "MeanColours", "scale": 1.0},
    "resolution": 8,
    "crop": "ADM centre crop",
    "dataset": None,
}


def write_measured(path, **changes):
    """A file as of `save_reference`, for `MeanColours("x")` at 8 pixels, but for `changes`; `None` leaves out."""
    arrays = {"mu": np.zeros(12), "sigma": np.eye(12), "features": np.zeros((30, 12), np.float32)}
    arrays |= {"num_images": 30, "protocol": json.dumps(MEASURED), "notes": "[]", **changes}
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": "{broken"}, "protocol or notes that are not JSON"),
        ({"protocol": np.arange(3)}, "protocol or notes that are not JSON"),
        ({"protocol": "[]"}, r"holds the protocol \[\] .* allowed: a JSON object"),
        ({"protocol": "{}"}, "`resolution` is not given there and 8 here"),
        ({"notes": "1"}, "and the notes 1, allowed"),
        ({"protocol": json.dumps({**MEASURED, "dataset": 3})}, "protocol whose dataset is 3, allowed: a JSON object"),
        ({"sigma": NOT_SEMIDEFINITE}, "the eigenvalue -1 beside 3, allowed: 0 or more"),
        ({"num_images": np.nan}, "holds num_images nan, allowed: an integer from 2 on"),
        ({"num_images": -5}, "holds num_images -5, allowed: an integer from 2 on"),
        ({"num_images": None}, "has a protocol, but lacks num_images"),
        ({"mu": None, "arr_0": np.zeros((30, 8, 8, 3), np.uint8)}, "has a protocol, but lacks mu"),
        ({"num_images": "many"}, "holds num_images many, allowed: an integer from 2 on"),
        ({"num_images": 1}, "holds num_images 1, allowed: an integer from 2 on"),
        ({"features": np.zeros((30, 11), np.float32)}, r"features of shape \(30, 11\) and dtype float32"),
        ({"features": np.zeros((31, 12), np.float32)}, r"features of shape \(31, 12\) and dtype float32"),
        ({"features": np.zeros((30, 12), np.int64)}, r"features of shape \(30, 12\) and dtype int64"),
        ({"features": np.full((30, 12), np.nan, np.float32)}, "that are not finite"),
        ({"features": np.float32(1)}, r"features of shape \(\)"),
        ({"sigma": np.eye(11)}, "mu and sigma that are not valid"),
    ],
)
def test_malformed_files_of_our_own_are_refused_and_named(accelerator, mean_colours, tmp_path, changes, message):
    write_measured(tmp_path / "reference.npz")
    assert load_reference(accelerator, tmp_path / "reference.npz", mean_colours("x"), 8).num_images == 30
    write_measured(tmp_path / "reference.npz", **changes)
    with pytest.raises(ValueError, match=message) as error:
        load_reference(accelerator, tmp_path / "reference.npz", mean_colours("x"), 8)
    assert "reference.npz" in str(error.value)


def test_images_of_a_file_that_was_cut_off(accelerator, mean_colours, tmp_path):
    """The archive is whole, its array is not."""
    with zipfile.ZipFile(tmp_path / "images.npz", "w") as archive, archive.open("arr_0.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": (30, 8, 8, 3)})
        member.write(bytes(10 * 8 * 8 * 3))
    with pytest.raises(ValueError, match="images.npz' ends in the middle of arr_0"):
        load_reference(accelerator, tmp_path / "images.npz", mean_colours("x"), 8, batch_size=4)


def test_unreadable_images_are_counted_and_named(accelerator, mean_colours, image_folder, tmp_path):
    folder = image_folder(20)
    (folder / "val" / "007.png").write_bytes(b"no image")
    data = EvaluationDataArguments(dataset=str(folder))
    reference = build_dataset_reference(accelerator, data, mean_colours("x"), 32, batch_size=1)
    assert reference.num_images == 19 and reference.protocol["num_unreadable"] == 1
    assert reference.notes == ["Reference: 1 images could not be read and are left out: val/007.png."]
    save_reference(reference, tmp_path / "reference.npz")
    loaded = load_reference(accelerator, tmp_path / "reference.npz", mean_colours("x"), 32)
    assert loaded.notes == reference.notes and loaded.protocol == reference.protocol


@pytest.mark.slow
def test_two_processes_measure_what_one_does(softvq_hf_command, image_folder, tiny_classifier_dir, tmp_path):
    """21 images in batches of 4, of a folder and of a file, one of the former unreadable."""
    folder = image_folder(21)
    (folder / "val" / "007.png").write_bytes(b"no image")
    flags = ["--dataset", folder, "--resolution=32", "--batch_size=4", "--feature_extractor", tiny_classifier_dir]
    references = []
    for num_processes in (1, 2):
        file = tmp_path / f"{num_processes}.npz"
        run = softvq_hf_command("evaluate", "reference", *flags, "--output_file", file, num_processes=num_processes)
        assert run.returncode == 0, run.stderr[-4000:]
        assert run.stdout.count("Reference of 20 images written to") == 1
        with np.load(file) as archive:
            references.append({name: archive[name] for name in archive.files})
    one, two = references
    assert one.keys() == two.keys() and one["features"].shape == (20, 16)
    for name in ("protocol", "notes", "num_images"):
        assert one[name] == two[name]
    for name in ("mu", "sigma", "mu_s", "sigma_s", "features"):
        np.testing.assert_allclose(one[name], two[name], rtol=1e-9, atol=1e-12)


SCRIPT = """
import sys
from accelerate import Accelerator
from softvq_hf.evaluation.reference import load_reference, save_reference
from softvq_hf.metrics.features import load_feature_extractor

images, classifier, output_file = sys.argv[1:]
accelerator = Accelerator(cpu=True)
reference = load_reference(accelerator, images, load_feature_extractor(classifier), 8, batch_size=4)
if accelerator.is_main_process:
    save_reference(reference, output_file)
accelerator.wait_for_everyone()
"""


@pytest.mark.slow
def test_images_of_a_file_are_shared_by_two_processes(images, tiny_classifier_dir, tmp_path):
    np.savez(tmp_path / "images.npz", images.permute(0, 2, 3, 1).numpy())
    (tmp_path / "load.py").write_text(SCRIPT)
    references = []
    for num_processes in (1, 2):
        file = tmp_path / f"{num_processes}.npz"
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
        command += [tmp_path / "load.py", tmp_path / "images.npz", tiny_classifier_dir, file]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        subprocess.run([sys.executable, *map(str, command)], check=True, env=env, timeout=300)
        with np.load(file) as archive:
            references.append({name: archive[name] for name in archive.files})
    one, two = references
    assert one["num_images"] == two["num_images"] == 30
    for name in ("mu", "sigma", "mu_s", "sigma_s", "features"):
        np.testing.assert_allclose(one[name], two[name], rtol=1e-9, atol=1e-12)


def test_images_of_a_data_set(accelerator, mean_colours, image_folder):
    folder = image_folder(20)
    data = EvaluationDataArguments(dataset=str(folder))
    extractor = mean_colours("x")
    reference = build_dataset_reference(accelerator, data, extractor, 32, batch_size=6)
    dataset = data.load_dataset(32)
    pixel_values = torch.stack([dataset[i]["pixel_values"] for i in range(20)])
    images = ((pixel_values + 1) * 127.5).round().to(torch.uint8)
    torch.testing.assert_close(
        reference.statistics.mean, extractor(images).features.double().mean(0), rtol=1e-6, atol=0
    )
    assert reference.protocol["dataset"] == {
        "name": "images",
        "config_name": None,
        "split": "validation",
        "revision": None,
        "max_samples": None,
    }
    assert (reference.protocol["resolution"], reference.protocol["crop"]) == (32, "ADM centre crop")


def test_make_reference(fresh_accelerate, image_folder, tiny_classifier_dir, tmp_path):
    args = ReferenceArguments(
        dataset=str(image_folder(20)),
        resolution=32,
        feature_extractor=[str(tiny_classifier_dir)],
        output_file=str(tmp_path / "reference.npz"),
        batch_size=8,
        num_features=10,
    )
    reference = make_reference(args)
    with zipfile.ZipFile(tmp_path / "reference.npz") as archive:
        assert {"mu.npy", "sigma.npy", "mu_s.npy", "sigma_s.npy", "features.npy"} <= set(archive.namelist())
    with np.load(tmp_path / "reference.npz") as archive:
        np.testing.assert_array_equal(archive["mu"], reference.statistics.mean)
        assert archive["features"].shape == (10, 16) and archive["num_images"] == 20
        assert json.loads(archive["protocol"].item())["feature_extractor"]["name"] == "ResNetForImageClassification"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resolution": 0}, "`--resolution` is 0, allowed: integers from 1 on"),
        ({"batch_size": 0}, "`--batch_size` is 0"),
        ({"num_features": -1}, "`--num_features` is -1, allowed: integers from 0 on"),
        ({"output_file": "reference.json"}, "allowed: a file whose name ends in .npz"),
        ({"feature_extractor": ["none"]}, "allowed for a reference: one network"),
        ({"feature_extractor": ["inception", "dinov2"]}, "allowed for a reference: one network"),
        ({"max_samples": 0}, "`--max_samples` is 0"),
        ({"max_unreadable_fraction": 2.0}, "`--max_unreadable_fraction` is 2.0"),
        ({"dataloader_num_workers": -1}, "`--dataloader_num_workers` is -1"),
    ],
)
def test_argument_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        ReferenceArguments(**{"dataset": "x", "resolution": 8, "output_file": "x.npz", **arguments})
