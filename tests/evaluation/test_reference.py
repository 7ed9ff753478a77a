"""References: measured, written, read, and refused."""

import json
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
    assert "feature_extractor.scale is 1.0 there and 2.0 here" in str(error.value)
    assert "resolution is 8 there and 16 here" in str(error.value)
    assert "crop" not in str(error.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("batch_size", [1, 8, 100])
def test_images_of_a_file(accelerator, mean_colours, images, tmp_path, save, batch_size):
    save(tmp_path / "images.npz", images.permute(0, 2, 3, 1).numpy(), np.arange(30))
    reference = load_reference(accelerator, tmp_path / "images.npz", mean_colours("x"), 8, batch_size=batch_size)
    assert_same(reference, build(images, mean_colours("x")))
    assert reference.num_images == 30 and "crop of the images in images.npz could not be checked" in reference.notes[0]


def test_images_are_shared_by_two_processes(mean_colours, images, tmp_path):
    """Every process reads its own batches, together all of them."""
    from types import SimpleNamespace

    from softvq_hf.evaluation.reference import _npz_images

    np.savez(tmp_path / "images.npz", images.permute(0, 2, 3, 1).numpy())
    found = torch.full_like(images, 0)
    seen = []
    for process_index in range(2):
        process = SimpleNamespace(num_processes=2, process_index=process_index)
        for batch, indices in _npz_images(process, tmp_path / "images.npz", 8, 4):
            found[indices] = batch
            seen += indices.tolist()
    assert torch.equal(found, images) and sorted(seen) == list(range(30))


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


def write_objects(path):
    np.savez(path, mu=np.array([object()], dtype=object), sigma=np.eye(1))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "allowed: an .npz file that exists"),
        (write_no_archive, "cannot be read"),
        (write_objects, "cannot be read"),  # it would execute what it holds
        (lambda path: np.savez(path, x=1), "holds x, allowed: mu and sigma, or images as arr_0"),
        (
            lambda path: np.savez(path, mu=np.zeros(2048), sigma=np.eye(2048)),
            r"mu of shape \(2048,\).*another network",
        ),
        (lambda path: np.savez(path, mu=np.zeros(12), sigma=np.eye(11)), "mu and sigma that are none"),
        (lambda path: np.savez(path, mu=np.full(12, np.nan), sigma=np.eye(12)), "not finite"),
        (lambda path: np.savez(path, np.zeros((2, 16, 16, 3), np.uint8)), "16 x 16 pixels, allowed: 8 x 8"),
        (lambda path: np.savez(path, np.zeros((2, 8, 8, 3), np.float32)), "dtype float32, allowed"),
        (lambda path: np.savez(path, np.zeros((2, 3, 8, 8), np.uint8)), r"allowed: \(N, H, W, 3\)"),
        (lambda path: np.savez(path, np.zeros((0, 8, 8, 3), np.uint8)), r"has 0 image\(s\)"),
    ],
)
def test_files_that_are_refused(accelerator, mean_colours, tmp_path, write, message):
    write(tmp_path / "reference.npz")
    with pytest.raises(ValueError, match=message):
        load_reference(accelerator, tmp_path / "reference.npz", mean_colours("x"), 8)


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
