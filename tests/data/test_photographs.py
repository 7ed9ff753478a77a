"""The built-in photographs: there without a network, held-out regions held out, crops drawn as promised."""

import socket

import numpy as np
import pytest
import torch

from softvq_hf.data import PhotographDataset, collate_images, load_image_dataset
from softvq_hf.data.photographs import PHOTOGRAPHS, load_photograph
from softvq_hf.data.transforms import adm_center_crop, to_pixel_values


def test_items():
    dataset = load_image_dataset("photographs", resolution=64, train=True)
    assert isinstance(dataset, PhotographDataset)
    assert dataset.num_classes == 8 and dataset.id2label[2] == "coffee" and list(dataset.id2label) == list(range(8))
    assert len(dataset) == 8 * 512
    batch = collate_images([dataset[i] for i in range(16)])
    assert batch["pixel_values"].shape == (16, 3, 64, 64) and batch["pixel_values"].dtype == torch.float32
    assert batch["pixel_values"].min() >= -1 and batch["pixel_values"].max() <= 1
    assert batch["class_labels"].tolist() == [*range(8), *range(8)]
    assert len(set(batch["image_id"])) == 16


def test_photographs_are_colourful_and_different():
    means = []
    for name in PHOTOGRAPHS:
        pixels = np.array(load_photograph(name), dtype=np.float64)
        assert np.abs(pixels[..., 0] - pixels[..., 2]).mean() > 5, name  # red and blue differ: no grey picture
        means.append(pixels.mean(axis=(0, 1)))
    assert len(np.unique(np.round(means, 3), axis=0)) == 8


@pytest.mark.parametrize("resolution", [32, 64, 256])
def test_training_and_validation_regions_share_no_pixel(resolution):
    used = {}
    for split in ("train", "validation"):
        dataset = PhotographDataset(split, resolution=resolution, train=split == "train")
        used[split] = {name: np.zeros(load_photograph(name).size, dtype=bool) for name in PHOTOGRAPHS}
        for epoch in range(2):
            dataset.set_epoch(epoch)
            for index in range(min(len(dataset), 512)):
                left, top, right, bottom = dataset.crop_box(index)
                assert right - left == bottom - top
                name = dataset.id2label[index % 8]
                assert 0 <= left < right <= load_photograph(name).width
                assert 0 <= top < bottom <= load_photograph(name).height
                used[split][name][left:right, top:bottom] = True
    for name in PHOTOGRAPHS:
        assert not (used["train"][name] & used["validation"][name]).any()
        assert used["train"][name].mean() > 0.3 and used["validation"][name].mean() > 0.1


def test_crop_sides_vary_within_their_range():
    dataset = PhotographDataset("train", resolution=64, train=True)
    sides = [
        dataset.crop_box(index)[2] - dataset.crop_box(index)[0] for index in range(0, 2048, 8)
    ]  # astronaut, s = 512
    assert min(sides) >= 64 and max(sides) <= 192
    assert min(sides) < 75 and max(sides) > 180


def test_an_item_is_its_crop():
    dataset = PhotographDataset("validation", resolution=64, train=False)
    crop = load_photograph("cat").crop(dataset.crop_box(9))
    torch.testing.assert_close(dataset[9]["pixel_values"], to_pixel_values(adm_center_crop(crop, 64)), rtol=0, atol=0)


def test_training_crops_are_keyed_by_seed_epoch_and_index():
    first = PhotographDataset("train", resolution=32, train=True, seed=1)
    second = PhotographDataset("train", resolution=32, train=True, seed=1)
    other_seed = PhotographDataset("train", resolution=32, train=True, seed=2)
    assert torch.equal(first[5]["pixel_values"], second[5]["pixel_values"])
    assert not torch.equal(first[5]["pixel_values"], other_seed[5]["pixel_values"])
    second.set_epoch(1)
    assert not torch.equal(first[5]["pixel_values"], second[5]["pixel_values"])
    second.set_epoch(0)
    assert torch.equal(first[5]["pixel_values"], second[5]["pixel_values"])


@pytest.mark.parametrize("split", ["train", "validation"])
def test_crops_stand_still_without_train(split):
    first = PhotographDataset(split, resolution=32, train=False, seed=1)
    second = PhotographDataset(split, resolution=32, train=False, seed=2)
    second.set_epoch(3)
    assert torch.equal(first[5]["pixel_values"], second[5]["pixel_values"])


def test_max_samples_and_bad_arguments():
    assert len(load_image_dataset("photographs", resolution=32, train=True, max_samples=10)) == 10
    with pytest.raises(IndexError, match="0 to 9"):
        load_image_dataset("photographs", resolution=32, train=True, max_samples=10)[10]
    with pytest.raises(ValueError, match="'test'.*train, validation"):
        load_image_dataset("photographs", split="test", resolution=32, train=True)
    with pytest.raises(ValueError, match="`streaming`"):
        load_image_dataset("photographs", resolution=32, train=True, streaming=True)
    with pytest.raises(ValueError, match="`resolution` is 0"):
        load_image_dataset("photographs", resolution=0, train=True)


def test_nothing_is_downloaded(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load_photograph.cache_clear()
    dataset = load_image_dataset("photographs", resolution=16, train=True)
    assert [dataset[i]["class_labels"] for i in range(8)] == list(range(8))
