"""Image data sets from all sources, with broken files, several workers, and a stream."""

import io
import logging
import tarfile
import traceback
from itertools import islice
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from softvq_hf.data import (
    ImageDataset,
    StreamingImageDataset,
    UnreadableImagesError,
    collate_images,
    load_image_dataset,
)
from softvq_hf.data.images import ShardRows, check_unreadable, decode_image
from softvq_hf.data.photographs import load_photograph


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def picture(number: int, size: tuple[int, int] = (40, 32)) -> PIL.Image.Image:
    """Noise whose mean tells its number."""
    noise = np.random.default_rng(number).integers(0, 40, (size[1], size[0], 3))
    return PIL.Image.fromarray((noise + 5 * number % 200).astype(np.uint8))


def make_image_folder(folder: Path, per_class: int = 4, classes: tuple[str, ...] = ("ant", "bee")) -> Path:
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            picture(label * per_class + number).save(folder / name / f"{number:03d}.png")
    return folder


def make_dataset() -> datasets.Dataset:
    images = [picture(i) for i in range(6)]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["ant", "bee", "cat"]))
    return datasets.Dataset.from_dict({"image": images, "label": [0, 1, 2, 0, 1, 2]}, features=features)


def load(source, **options) -> ImageDataset:
    return load_image_dataset(str(source), **{"resolution": 16, "train": False, **options})


def everything(dataset, batch_size: int = 3, **options) -> dict:
    """One pass through a DataLoader, by image."""
    images = {}
    for batch in DataLoader(dataset, batch_size=batch_size, collate_fn=collate_images, **options):
        images |= dict(zip(batch["image_id"], batch["pixel_values"], strict=True))
    return images


# Sources


def test_image_folder_with_splits(tmp_path):
    make_image_folder(tmp_path / "train", per_class=4)
    make_image_folder(tmp_path / "val", per_class=2)
    train, validation = load(tmp_path), load(tmp_path, split="validation")
    assert isinstance(train, ImageDataset)
    assert (len(train), len(validation)) == (8, 4)
    assert train.id2label == {0: "ant", 1: "bee"} and train.num_classes == 2
    item = train[5]
    assert item["pixel_values"].shape == (3, 16, 16) and item["pixel_values"].dtype == torch.float32
    assert item["class_labels"] == 1 and item["image_id"] == "bee/001.png"
    with pytest.raises(ValueError, match="'test'.*'train', 'validation'"):
        load(tmp_path, split="test")


def test_image_folder_with_metadata(tmp_path):
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\n0.png,wasp\n1.png,ant\n2.png,wasp\n")
    dataset = load(tmp_path)
    assert dataset.id2label == {0: "ant", 1: "wasp"}
    assert [dataset[i]["class_labels"] for i in range(3)] == [1, 0, 1]


def test_parquet_folder(tmp_path):
    for shard in range(2):
        make_dataset().shard(2, shard, contiguous=True).to_parquet(tmp_path / f"train-{shard:05d}-of-00002.parquet")
    dataset = load(tmp_path)
    assert len(dataset) == 6 and dataset.num_classes == 3
    assert [dataset[i]["class_labels"] for i in range(6)] == [0, 1, 2, 0, 1, 2]
    means = [dataset[i]["pixel_values"].mean() for i in range(6)]
    assert means == sorted(means)


def test_saved_dataset(tmp_path):
    dataset = make_dataset()
    datasets.DatasetDict(train=dataset, validation=dataset.select([1, 2])).save_to_disk(tmp_path / "both")
    dataset.save_to_disk(tmp_path / "one")
    assert len(load(tmp_path / "both")) == 6 and len(load(tmp_path / "both", split="validation")) == 2
    assert len(load(tmp_path / "one")) == 6
    with pytest.raises(ValueError, match="'test'.*train, validation"):
        load(tmp_path / "both", split="test")
    with pytest.raises(ValueError, match="'validation'.*has: train"):
        load(tmp_path / "one", split="validation")


def test_a_hub_id_that_cannot_be_reached_is_explained(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="'nobody/no-such-images' is no local folder.*Hub.*'photographs'"):
        load("nobody/no-such-images")


def test_empty_sources(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="the local folder gives.*data files"):
        load(tmp_path / "empty")
    make_dataset().select([]).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="splits is empty"):
        load(tmp_path / "saved")
    make_dataset().select([]).save_to_disk(tmp_path / "one_file", num_shards=1)
    with pytest.raises(ValueError, match="The split 'train' of .* is empty"):
        load(tmp_path / "one_file")
    (tmp_path / "parquet").mkdir()
    make_dataset().select([]).to_parquet(tmp_path / "parquet" / "train.parquet")
    with pytest.raises(ValueError, match="cannot be loaded with `split` 'train'.*no data"):
        load(tmp_path / "parquet")
    with pytest.raises(ValueError, match="missing.*cannot be loaded"):
        load(tmp_path / "missing")


# Columns


def test_usual_column_names_are_found(tmp_path):
    dataset = make_dataset().rename_columns({"image": "img", "label": "fine_label"})
    coarse = datasets.Dataset.from_dict(
        {"coarse_label": [0] * 6}, features=datasets.Features(coarse_label=datasets.ClassLabel(names=["insect"]))
    )
    datasets.concatenate_datasets([dataset, coarse], axis=1).save_to_disk(tmp_path)
    assert load(tmp_path).num_classes == 3
    assert load(tmp_path, label_column="coarse_label").id2label == {0: "insect"}


def test_the_only_image_and_label_columns_are_found(tmp_path):
    make_dataset().rename_columns({"image": "photo", "label": "kind"}).save_to_disk(tmp_path)
    assert load(tmp_path)[2]["class_labels"] == 2


def test_missing_and_ambiguous_columns_list_all(tmp_path):
    two = make_dataset().rename_columns({"image": "left", "label": "kind"})
    other = make_dataset().rename_columns({"image": "right", "label": "sort"})
    datasets.concatenate_datasets([two, other], axis=1).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=r"`image_column` is 'image'.*left \(Image\), kind \(ClassLabel\), right"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"`label_column` is 'label'.*sort \(ClassLabel\)"):
        load(tmp_path, image_column="left")
    with pytest.raises(ValueError, match="`image_column` is 'middle'"):
        load(tmp_path, image_column="middle")
    assert len(load(tmp_path, image_column="right", label_column="sort")) == 6


def test_columns_of_a_wrong_type(tmp_path):
    dataset = make_dataset().add_column("score", [0.5] * 6)
    dataset.save_to_disk(tmp_path / "scores")
    with pytest.raises(ValueError, match=r"`label_column` is 'score'.*score \(Value\)"):
        load(tmp_path / "scores", label_column="score")
    dataset.rename_columns({"image": "photo", "score": "image"}).save_to_disk(tmp_path / "renamed")
    with pytest.raises(ValueError, match="`image_column` is 'image', which holds no images"):
        load(tmp_path / "renamed")


def test_unlabeled_images(tmp_path):
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
    with pytest.raises(ValueError, match=r"`label_column` is 'label'.*image \(Image\).*`label_column=None`"):
        load(tmp_path)
    dataset = load(tmp_path, label_column=None)
    assert set(dataset[0]) == {"pixel_values", "image_id"} and dataset.num_classes == 0
    assert set(collate_images([dataset[0], dataset[1]])) == {"pixel_values", "image_id"}


@pytest.mark.parametrize("label", [-1, None])
def test_missing_labels(tmp_path, label):
    dataset = make_dataset().remove_columns("label").add_column("label", [0, 1, label, 0, 1, 1])
    dataset.save_to_disk(tmp_path)
    with pytest.raises(ValueError, match="have no label"):
        load(tmp_path)


def test_integer_and_string_labels(tmp_path):
    unlabeled = make_dataset().remove_columns("label")
    unlabeled.add_column("label", [0, 3, 1, 0, 3, 1]).save_to_disk(tmp_path / "integers")
    dataset = load(tmp_path / "integers")
    assert dataset.id2label == {0: "0", 1: "1", 2: "2", 3: "3"} and dataset[1]["class_labels"] == 3
    unlabeled.add_column("label", ["b", "c", "a", "b", "c", "a"]).save_to_disk(tmp_path / "strings")
    dataset = load(tmp_path / "strings")
    assert dataset.id2label == {0: "a", 1: "b", 2: "c"}
    assert [dataset[i]["class_labels"] for i in range(6)] == [1, 2, 0, 1, 2, 0]


def test_undecoded_image_columns(tmp_path):
    paths = []
    for number in range(4):
        paths.append(str(tmp_path / f"{number}.png"))
        picture(number).save(paths[-1])
    contents = [{"bytes": Path(path).read_bytes(), "path": None} for path in paths]
    datasets.Dataset.from_dict({"image": paths, "label": [0, 1, 0, 1]}).save_to_disk(tmp_path / "paths")
    datasets.Dataset.from_dict({"image": contents, "label": [0, 1, 0, 1]}).save_to_disk(tmp_path / "contents")
    for source in ("paths", "contents"):
        assert torch.equal(load(tmp_path / source)[3]["pixel_values"], load(tmp_path / "paths")[3]["pixel_values"])


def test_max_samples_keeps_all_classes(tmp_path):
    make_image_folder(tmp_path, per_class=6, classes=("a", "b", "c"))
    dataset = load(tmp_path, max_samples=6)
    assert [dataset[i]["class_labels"] for i in range(6)] == [0, 0, 1, 1, 2, 2]
    assert len(load(tmp_path, max_samples=100)) == 18
    with pytest.raises(ValueError, match="`max_samples` is 0"):
        load(tmp_path, max_samples=0)


# Random draws


def test_draws_are_keyed_by_seed_epoch_and_index(tmp_path):
    make_image_folder(tmp_path)
    options = {"train": True, "resolution": 24}
    first, second, other = load(tmp_path, **options), load(tmp_path, **options), load(tmp_path, seed=1, **options)
    assert all(torch.equal(first[i]["pixel_values"], second[i]["pixel_values"]) for i in range(8))
    assert not all(torch.equal(first[i]["pixel_values"], other[i]["pixel_values"]) for i in range(8))
    second.set_epoch(1)
    assert not all(torch.equal(first[i]["pixel_values"], second[i]["pixel_values"]) for i in range(8))
    fixed = load(tmp_path, resolution=24)
    before = fixed[3]["pixel_values"]
    fixed.set_epoch(5)
    assert torch.equal(before, fixed[3]["pixel_values"])


@pytest.mark.parametrize("streaming", [False, True])
def test_generators_see_centre_crops_and_their_mirrors(tmp_path, streaming):
    make_parquet_stream(tmp_path)
    centre = [item["pixel_values"] for item in load(tmp_path)]
    dataset = load(tmp_path, train=True, center_crop=True, streaming=streaming)
    flipped = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        for item in dataset:
            pixel_values = item["pixel_values"]
            as_it_is = any(torch.equal(pixel_values, image) for image in centre)
            flipped.append(not as_it_is)
            assert as_it_is or any(torch.equal(pixel_values.flip(-1), image) for image in centre)
    assert 0 < sum(flipped) < len(flipped)


def test_workers_change_nothing_and_see_the_epoch(tmp_path):
    make_image_folder(tmp_path)
    dataset = load(tmp_path, train=True)
    loader = DataLoader(dataset, batch_size=3, num_workers=2, persistent_workers=True, collate_fn=collate_images)
    for epoch in range(2):
        dataset.set_epoch(epoch)
        by_workers = torch.cat([batch["pixel_values"] for batch in loader])
        by_main = torch.stack([dataset[i]["pixel_values"] for i in range(len(dataset))])
        assert torch.equal(by_workers, by_main)


def test_a_loader_prepared_by_accelerate(tmp_path):
    make_image_folder(tmp_path)
    dataset = load(tmp_path, train=True)
    accelerator = Accelerator(
        cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0)
    )
    loader = accelerator.prepare(DataLoader(dataset, batch_size=4, shuffle=True, collate_fn=collate_images))
    passes = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        loader.set_epoch(epoch)
        passes.append(torch.cat([batch["pixel_values"] for batch in loader]))
    assert torch.equal(passes[0], passes[2]) and not torch.equal(passes[0], passes[1])


# Faster, with pixels that differ a little


def encode(image: PIL.Image.Image, format: str = "JPEG", **options) -> dict:
    """A value of an undecoded image column."""
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return {"bytes": file.getvalue(), "path": None}


@pytest.mark.parametrize(
    "size, draft_side, decoded_size",
    [
        ((400, 304), 152, (200, 152)),
        ((400, 304), 153, (400, 304)),
        ((400, 304), 76, (100, 76)),
        ((304, 400), 10, (38, 50)),  # not below 1/8
        ((404, 302), 20, (202, 151)),  # whole numbers only
        ((401, 304), 20, (401, 304)),
        ((16, 16), 32, (16, 16)),
    ],
)
def test_jpeg_files_are_decoded_at_the_smallest_size_that_is_enough(size, draft_side, decoded_size):
    for mode in ("RGB", "L", "CMYK"):
        value = encode(picture(0, size).convert(mode))
        drafted = decode_image(value, draft_side)
        assert drafted.size == decoded_size and drafted.mode == "RGB"
        assert decode_image(value).size == size


def test_other_formats_have_no_smaller_size():
    for format in ("PNG", "GIF", "BMP"):
        value = encode(picture(0, (64, 64)), format)
        np.testing.assert_array_equal(np.array(decode_image(value, 16)), np.array(decode_image(value)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_smaller_sizes_are_turned_upright(orientation):
    exif = PIL.Image.Exif()
    exif[PIL.Image.ExifTags.Base.Orientation] = orientation
    image = load_photograph("cat").crop((0, 0, 400, 240))
    value = encode(image, quality=95, exif=exif)
    drafted, full = decode_image(value, 60), decode_image(value)
    assert drafted.size == (full.width // 4, full.height // 4)
    difference = np.array(drafted).astype(int) - np.array(full.reduce(4))
    assert np.abs(difference).mean() < 2


def test_broken_jpeg_files_are_found_at_smaller_sizes_too():
    value = encode(load_photograph("cat").crop((0, 0, 256, 256)))
    value["bytes"] = value["bytes"][: len(value["bytes"]) // 2]
    with pytest.raises(OSError, match="truncated"):
        decode_image(value, 32)


def make_photographs(folder: Path) -> Path:
    """JPEG files with sides of four times 64 pixels and more, a small one, one with odd sides, and a PNG file."""
    for name, label in (("astronaut", "person"), ("coffee", "thing"), ("rocket", "thing"), ("cat", "animal")):
        (folder / label).mkdir(exist_ok=True, parents=True)
        photograph = load_photograph(name)
        photograph.crop((0, 0, 400, 296)).save(folder / label / f"{name}.jpg", quality=90)
        photograph.crop((0, 0, 400, 260)).resize((120, 78)).save(folder / label / f"{name}_small.jpg")
        photograph.crop((0, 0, 399, 297)).save(folder / label / f"{name}_odd.jpg")
        photograph.crop((0, 0, 400, 296)).save(folder / label / f"{name}_png.png")
    return folder


@pytest.mark.parametrize("crop", [{"train": False}, {"train": True, "center_crop": True}, {"train": True}])
def test_jpeg_draft_is_within_its_tolerance(tmp_path, crop):
    make_photographs(tmp_path)
    exact = load(tmp_path, resolution=64, **crop)
    draft = load(tmp_path, resolution=64, jpeg_draft=True, **crop)
    for item, expected in zip(draft, exact, strict=True):
        assert item["image_id"] == expected["image_id"]
        assert item["pixel_values"].shape == (3, 64, 64)
        difference = (item["pixel_values"] - expected["pixel_values"]).abs() * 127.5
        if Path(item["image_id"]).stem in ("astronaut", "coffee", "rocket", "cat"):
            assert 0.1 < difference.mean() < 2 and difference.max() < 40
            assert 10 * torch.log10(255**2 / difference.square().mean()) > 38
        else:
            assert difference.max() == 0


@pytest.mark.parametrize("crop", [{"train": False}, {"train": True}])
def test_fast_resize_is_within_its_tolerance(tmp_path, crop):
    make_photographs(tmp_path)
    exact = load(tmp_path, resolution=64, **crop)
    fast = load(tmp_path, resolution=64, fast_resize=True, **crop)
    differences = []
    for item, expected in zip(fast, exact, strict=True):
        assert item["pixel_values"].dtype == torch.float32 and item["pixel_values"].is_contiguous()
        differences.append((item["pixel_values"] - expected["pixel_values"]).abs() * 127.5)
    assert 0 < torch.stack(differences).max() < 2.01 and torch.stack(differences).mean() < 0.05


@pytest.mark.parametrize("train", [False, True])
def test_streams_are_as_fast(tmp_path, train):
    make_photographs(tmp_path / "images")
    saved = datasets.load_dataset(str(tmp_path / "images"), split="train")
    saved.save_to_disk(tmp_path / "saved", num_shards=2)
    options = {"resolution": 64, "train": train, "center_crop": True}
    fast = {"jpeg_draft": True, "fast_resize": True}
    stored = load(tmp_path / "saved", **options, **fast)
    exact = load(tmp_path / "saved", **options)
    stream = list(load(tmp_path / "saved", streaming=True, **options, **fast))
    assert len(stream) == len(stored) == 16

    def nearest(item, others):
        """How far the nearest one is, mirrored or not."""
        pixel_values = item["pixel_values"]
        return min(
            float((mirrored - other["pixel_values"]).abs().max())
            for other in others
            for mirrored in (pixel_values, pixel_values.flip(-1))
        )

    assert max(nearest(item, stored) for item in stream) == 0
    assert max(nearest(item, exact) for item in stream) > 3 / 127.5  # jpeg_draft
    assert sum(0 < nearest(item, exact) < 3 / 127.5 for item in stream) > 4  # fast_resize


# Unreadable images


def break_files(folder: Path, *numbers: int) -> None:
    """Truncate a JPEG, write text, write nothing, in turn."""
    for number in numbers:
        path = folder / "ant" / f"{number:03d}.jpg"
        (folder / "ant" / f"{number:03d}.png").unlink()
        picture(number, (200, 200)).save(path, quality=95)
        content = path.read_bytes()
        path.write_bytes([content[: len(content) // 2], b"no image", b""][number % 3])


def test_unreadable_images_are_replaced_in_training(tmp_path, caplog):
    make_image_folder(tmp_path, per_class=10)
    break_files(tmp_path, 0, 1, 2)
    dataset = load(tmp_path, train=True)
    with caplog.at_level(logging.WARNING):
        images = [dataset[i] for i in range(len(dataset))]
        images += [dataset[i] for i in range(len(dataset))]
    assert [item["image_id"] for item in images[:4]] == ["ant/003.png"] * 4
    assert all(item["pixel_values"].shape == (3, 16, 16) for item in images)
    assert dataset.num_unreadable == 3
    named = [record.getMessage() for record in caplog.records if record.name == "softvq_hf.data.images"]
    assert len(named) == 3  # each once
    for number in range(3):
        assert f"ant/00{number}.jpg" in named[number] and f"number {number + 1}" in named[number]


def test_every_batch_lists_the_unreadable_images_it_met(tmp_path):
    make_image_folder(tmp_path, per_class=10)
    break_files(tmp_path, 1, 2)
    for train in (True, False):
        batches = list(DataLoader(load(tmp_path, train=train), batch_size=2, collate_fn=collate_images))
        listed = [batch.get("unreadable") for batch in batches]
        # in training, image 1 is replaced by image 3 for both itself and image 2
        first, second = (["ant/001.jpg", "ant/002.jpg"], ["ant/002.jpg"])
        assert listed == [first if train else ["ant/001.jpg"], second] + [None] * 8


def test_good_images_of_odd_kinds(tmp_path):
    make_image_folder(tmp_path, per_class=1)
    folder = tmp_path / "ant"
    picture(1).save(folder / "a_png.jpg", format="PNG")
    picture(2).convert("CMYK").save(folder / "b_cmyk.jpg")
    picture(3).convert("P").save(folder / "c_palette.png")
    PIL.Image.fromarray(np.full((20, 30), 40000, np.uint16)).save(folder / "d_16_bit.png")
    red, blue = (PIL.Image.new("RGB", (20, 20), name) for name in ("red", "blue"))
    for name in ("e_animated.gif", "f_animated.webp", "g_animated.png"):
        options = {"lossless": True} if name.endswith("webp") else {}
        red.save(folder / name, save_all=True, append_images=[blue] * 3, **options)
    images = everything(load(tmp_path, max_unreadable_fraction=0.0))
    assert len(images) == 9
    assert torch.allclose(images["ant/d_16_bit.png"], torch.full((3, 16, 16), round(40000 / 257) / 127.5 - 1))
    for name in ("e_animated.gif", "f_animated.webp", "g_animated.png"):  # the first frame
        assert images[f"ant/{name}"][0].min() > 0.9 and images[f"ant/{name}"][1:].max() < -0.9


def test_decompression_bombs_are_not_decoded(tmp_path, monkeypatch, caplog):
    make_image_folder(tmp_path)
    picture(0, (60, 60)).save(tmp_path / "ant" / "bomb.png")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1500)  # the others have 1280; an error from twice as many on
    dataset = load(tmp_path)
    unreadable = [i for batch in DataLoader(dataset, collate_fn=collate_images) for i in batch.get("unreadable", ())]
    assert unreadable == ["ant/bomb.png"] and "DecompressionBombError" in caplog.text


def test_unreadable_images_are_left_out_of_validation(tmp_path, caplog):
    make_image_folder(tmp_path, per_class=10)
    break_files(tmp_path, 0, 1)
    dataset = load(tmp_path)
    batches = list(DataLoader(dataset, batch_size=2, collate_fn=collate_images))
    assert batches[0]["pixel_values"].shape == (0, 3, 16, 16)
    assert batches[0]["class_labels"].shape == (0,) and batches[0]["image_id"] == []
    assert sum(len(batch["image_id"]) for batch in batches) == 18
    assert "ant/001.jpg" in caplog.text


def test_workers_count_together(tmp_path):
    make_image_folder(tmp_path, per_class=10)
    break_files(tmp_path, 0, 1, 2)
    dataset = load(tmp_path)
    assert len(everything(dataset, num_workers=2)) == 17
    assert dataset.num_unreadable == 3


def test_too_many_unreadable_images_stop_training(tmp_path):
    make_image_folder(tmp_path, per_class=10)
    break_files(tmp_path, 0, 1, 2, 3, 4, 5)
    with pytest.raises(UnreadableImagesError, match="of 20 in the data set.*`max_unreadable_fraction` is 0.01"):
        everything(load(tmp_path, train=True))
    with pytest.raises(UnreadableImagesError):
        everything(load(tmp_path, train=True, max_unreadable_fraction=0.25))
    assert len(everything(load(tmp_path, max_unreadable_fraction=0.3))) == 14


def test_too_many_unreadable_images_stop_the_workers(tmp_path):
    make_image_folder(tmp_path, per_class=10)
    break_files(tmp_path, 0, 1, 2, 3, 4, 5)
    message = ""
    try:  # pytest.raises would keep the loader alive, and wait for its workers later
        everything(load(tmp_path, train=True), num_workers=2)
    except UnreadableImagesError as error:
        message = str(error)
        traceback.clear_frames(error.__traceback__)
    assert "of 20 in the data set" in message


def test_one_unreadable_image_is_too_many_where_none_is_allowed(tmp_path):
    make_image_folder(tmp_path)
    break_files(tmp_path, 2)
    with pytest.raises(UnreadableImagesError):
        everything(load(tmp_path, max_unreadable_fraction=0.0))


@pytest.mark.parametrize("train", [True, False])
def test_no_readable_image_at_all(tmp_path, train):
    make_image_folder(tmp_path, per_class=3)
    for path in tmp_path.rglob("*.png"):
        path.write_text("no image")
    with pytest.raises(UnreadableImagesError, match="6 of the 6"):
        everything(load(tmp_path, train=train, max_unreadable_fraction=1.0))


def test_a_missing_file_is_an_unreadable_image(tmp_path):
    make_image_folder(tmp_path)
    dataset = load(tmp_path, train=True)
    (tmp_path / "ant" / "001.png").unlink()
    assert dataset[1]["image_id"] == "ant/002.png"


def test_when_the_share_is_exceeded():
    check_unreadable(100, 9000, 10000, 0.01)
    with pytest.raises(UnreadableImagesError, match="101 of the 9000"):
        check_unreadable(101, 9000, 10000, 0.01)
    check_unreadable(71, 5000, 10000, 0.01)  # 50 expected, 7.1 deviation
    with pytest.raises(UnreadableImagesError):
        check_unreadable(72, 5000, 10000, 0.01)
    check_unreadable(4, 99, None, 0.01)
    check_unreadable(16, 1000, None, 0.01)  # 10 expected, 3.2 deviation
    with pytest.raises(UnreadableImagesError):
        check_unreadable(20, 1000, None, 0.01)
    with pytest.raises(ValueError, match="`max_unreadable_fraction` is 1.5"):
        load_image_dataset("photographs", resolution=16, train=True, max_unreadable_fraction=1.5)


# Streams


def make_parquet_stream(folder: Path, shards: int = 4, per_shard: int = 6) -> Path:
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["ant", "bee"]))
    for shard in range(shards):
        numbers = range(shard * per_shard, (shard + 1) * per_shard)
        rows = {"image": [picture(i) for i in numbers], "label": [i % 2 for i in numbers]}
        dataset = datasets.Dataset.from_dict(rows, features=features)
        dataset.to_parquet(folder / f"train-{shard:05d}-of-{shards:05d}.parquet")
    return folder


def stream_means(dataset, **options) -> list[float]:
    loader = DataLoader(dataset, batch_size=4, collate_fn=collate_images, **options)
    return [round(float(image.mean()), 4) for batch in loader for image in batch["pixel_values"]]


def test_stream(tmp_path):
    make_parquet_stream(tmp_path)
    stream = load(tmp_path, streaming=True)
    assert isinstance(stream, StreamingImageDataset) and stream.id2label == {0: "ant", 1: "bee"}
    stored = load(tmp_path)
    expected = [round(float(stored[i]["pixel_values"].mean()), 4) for i in range(24)]
    assert stream_means(stream) == expected
    assert sorted(stream_means(stream, num_workers=2)) == sorted(expected)
    assert stream_means(load(tmp_path, streaming=True, max_samples=5)) == expected[:5]
    assert next(iter(stream))["class_labels"] == 0


def test_training_stream_is_shuffled_by_seed_and_epoch(tmp_path):
    make_parquet_stream(tmp_path)
    stream = load(tmp_path, streaming=True, train=True)
    first, again = stream_means(stream), stream_means(load(tmp_path, streaming=True, train=True))
    assert first == again and len(first) == 24
    stream.set_epoch(1)
    second = stream_means(stream)
    assert second != first
    workers = DataLoader(stream, batch_size=4, num_workers=2, persistent_workers=True, collate_fn=collate_images)
    by_epoch = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        by_epoch.append(torch.cat([batch["pixel_values"] for batch in workers]))
    assert torch.equal(by_epoch[0], by_epoch[2]) and not torch.equal(by_epoch[0], by_epoch[1])


def test_streams_of_other_sources(tmp_path):
    make_image_folder(tmp_path / "folder")
    make_dataset().save_to_disk(tmp_path / "saved")
    assert len(stream_means(load(tmp_path / "folder", streaming=True))) == 8
    assert len(stream_means(load(tmp_path / "saved", streaming=True))) == 6
    with pytest.raises(ValueError, match="train"):
        load(tmp_path / "folder", streaming=True, split="test")


def test_a_stream_leaves_unreadable_images_out(tmp_path, caplog):
    make_image_folder(tmp_path, per_class=6)
    break_files(tmp_path, 0, 1, 2)
    assert len(stream_means(load(tmp_path, streaming=True))) == 9
    assert all(f"ant/00{number}.jpg" in caplog.text for number in range(3))
    with pytest.raises(UnreadableImagesError):
        stream_means(load(tmp_path, streaming=True, max_unreadable_fraction=0.0))
    for path in [*tmp_path.rglob("*.png")]:
        path.write_text("no image")
    with pytest.raises(UnreadableImagesError, match="None of the 12"):
        stream_means(load(tmp_path, streaming=True))


def test_a_stream_lists_unreadable_images_also_at_its_end(tmp_path):
    make_image_folder(tmp_path, per_class=4, classes=("bee", "ant"))
    break_files(tmp_path, 1, 2)
    for path in (tmp_path / "bee").glob("*"):  # the end
        path.unlink()
    for train in (False, True):
        for num_workers in (0, 2):
            stream = load(tmp_path, streaming=True, train=train, label_column=None)
            batches = list(DataLoader(stream, batch_size=2, collate_fn=collate_images, num_workers=num_workers))
            assert sorted(i for b in batches for i in b["image_id"]) == ["ant/000.png", "ant/003.png"]
            assert sorted(i for b in batches for i in b.get("unreadable", ())) == ["ant/001.jpg", "ant/002.jpg"]
    picture(0).save(tmp_path / "ant" / "000.png")
    (tmp_path / "ant" / "003.png").unlink()
    last = list(load(tmp_path, streaming=True, label_column=None))[-1]
    assert last["unreadable"] == ["ant/001.jpg", "ant/002.jpg"] and last["pixel_values"].shape == (0, 3, 16, 16)


def test_labels_of_a_stream(tmp_path):
    unlabeled = make_dataset().remove_columns("label")
    unlabeled.add_column("label", [0, 3] * 3).save_to_disk(tmp_path / "integers")
    with pytest.raises(ValueError, match="`label_column` is 'label'.*`streaming`.*ClassLabel.*`num_classes`"):
        load(tmp_path / "integers", streaming=True)
    stream = load(tmp_path / "integers", streaming=True, num_classes=4)
    assert stream.num_classes == 4 and stream.id2label[3] == "3"
    assert [item["class_labels"] for item in stream] == [0, 3] * 3
    with pytest.raises(ValueError, match="label 3, allowed: 0 to 2"):
        list(load(tmp_path / "integers", streaming=True, num_classes=3))
    assert len(stream_means(load(tmp_path / "integers", streaming=True, label_column=None))) == 6
    unlabeled.add_column("label", ["a", "b"] * 3).save_to_disk(tmp_path / "strings")
    with pytest.raises(ValueError, match="string labels need `streaming=False`"):
        load(tmp_path / "strings", streaming=True, num_classes=2)


def test_number_of_classes(tmp_path):
    make_dataset().save_to_disk(tmp_path / "named")
    assert load(tmp_path / "named", num_classes=3).num_classes == 3
    for options in ({}, {"streaming": True}, {"label_column": None}):
        with pytest.raises(ValueError, match="`num_classes` is 5, allowed: [03]"):
            load(tmp_path / "named", num_classes=5, **options)
    make_dataset().remove_columns("label").add_column("label", [0, 3] * 3).save_to_disk(tmp_path / "integers")
    assert load(tmp_path / "integers", num_classes=7).num_classes == 7
    with pytest.raises(ValueError, match="`num_classes` is 3, allowed: 4"):
        load(tmp_path / "integers", num_classes=3)
    with pytest.raises(ValueError, match="`num_classes` is 0"):
        load(tmp_path / "integers", num_classes=0)


def make_webdataset(folder: Path, per_shard: tuple[int, ...] = (3, 5)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, rows in enumerate(per_shard):
        with tarfile.open(folder / f"train-{shard:04d}.tar", "w") as tar:
            for _ in range(rows):
                content = io.BytesIO()
                picture(number).save(content, format="PNG")
                for name, data in (("png", content.getvalue()), ("cls", str(number % 3).encode())):
                    info = tarfile.TarInfo(f"{number:05d}.{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                number += 1
    return folder


def test_webdataset_shards(tmp_path):
    make_webdataset(tmp_path)
    dataset = load(tmp_path)
    assert len(dataset) == 8 and dataset.id2label == {0: "0", 1: "1", 2: "2"}
    stream = load(tmp_path, streaming=True, num_classes=3)
    assert stream.num_shards == 2
    items = list(stream)
    assert [item["image_id"] for item in items] == [f"{number:05d}.png" for number in range(8)]
    for number, item in enumerate(items):
        assert item["image_id"] == dataset[number]["image_id"]
        assert item["class_labels"] == dataset[number]["class_labels"] == number % 3
        assert torch.equal(item["pixel_values"], dataset[number]["pixel_values"])
    with pytest.raises(ValueError, match="`label_column` is 'cls'.*`num_classes` is needed"):
        load(tmp_path, streaming=True)


# Sharing of a stream


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("num_shards", "num_readers"), [(1, 1), (1, 3), (3, 4), (4, 4), (5, 2), (6, 4), (7, 3)])
def test_readers_share_all_rows(num_shards, num_readers, train):
    """Each row goes to one reader, for unequal shards too."""
    numbers = datasets.Dataset.from_dict({"number": list(range(41))}).to_iterable_dataset(num_shards=num_shards)
    shards = np.random.default_rng(0).permutation(num_shards).tolist() if train else list(range(num_shards))
    found = []
    for reader in range(num_readers):
        rows = list(ShardRows(numbers, shards, reader, num_readers, 3 if train else 1, ShardRows.START))
        if not train and num_readers == 1:
            assert [row["number"] for _, _, row in rows] == list(range(41))
        found += [row["number"] for _, _, row in rows]
        assert len({(shard, index) for shard, index, _ in rows}) == len(rows)
    assert sorted(found) == list(range(41))


def test_readers_have_equal_parts():
    numbers = datasets.Dataset.from_dict({"number": list(range(700))}).to_iterable_dataset(num_shards=7)
    for num_readers in (2, 3, 5, 7, 14, 20):
        counts = [
            len(list(ShardRows(numbers, list(range(7)), reader, num_readers, 1, ShardRows.START)))
            for reader in range(num_readers)
        ]
        assert sum(counts) == 700 and max(counts) - min(counts) <= 7


@pytest.mark.parametrize("num_workers", [2, 3])
def test_workers_share_a_stream(tmp_path, num_workers):
    make_webdataset(tmp_path, per_shard=(3, 7, 1))
    for options in ({}, {"train": True, "shuffle_buffer_size": 2}, {"max_samples": 6}):
        stream = load(tmp_path, streaming=True, label_column=None, **options)
        loader = DataLoader(stream, batch_size=2, num_workers=num_workers, collate_fn=collate_images)
        found = [image_id for batch in loader for image_id in batch["image_id"]]
        assert sorted(found) == [f"{number:05d}.png" for number in range(options.get("max_samples", 11))]


def test_crops_do_not_depend_on_the_workers(tmp_path):
    make_webdataset(tmp_path, per_shard=(3, 7, 1))
    stream = load(tmp_path, streaming=True, train=True, label_column=None, shuffle_buffer_size=4)
    stream.set_epoch(3)
    alone, shared = everything(stream), everything(stream, num_workers=2)
    assert list(alone) != list(shared)
    assert all(torch.equal(alone[image_id], shared[image_id]) for image_id in alone)


def test_a_training_stream_mixes_shards(tmp_path):
    make_parquet_stream(tmp_path, shards=4, per_shard=16)
    stream = load(tmp_path, streaming=True, train=True, shuffle_buffer_size=16)
    shards = [int(item["image_id"].split("/")[0].removeprefix("shard-")) for item in stream]
    assert all(set(shards[place : place + 16]) == {0, 1, 2, 3} for place in (0, 16, 32, 48))
    assert all(shards.count(shard) == 16 for shard in range(4))
    with pytest.raises(ValueError, match="`shuffle_buffer_size` is 0"):
        load(tmp_path, streaming=True, train=True, shuffle_buffer_size=0)


# Position in a stream


def same_items(items, others) -> bool:
    return len(items) == len(others) and all(
        item.keys() == other.keys()
        and all(
            torch.equal(item[key], other[key]) if isinstance(item[key], torch.Tensor) else item[key] == other[key]
            for key in item
        )
        for item, other in zip(items, others, strict=True)
    )


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def make_stream_source(kind: str, folder: Path) -> Path:
    if kind == "parquet":
        return make_parquet_stream(folder, shards=3, per_shard=5)
    if kind == "webdataset":
        return make_webdataset(folder, per_shard=(3, 7, 4))
    if kind == "folder":
        make_image_folder(folder, per_class=7)
        break_files(folder, 1, 2, 6)
        return folder
    datasets.concatenate_datasets([make_dataset()] * 2).save_to_disk(folder)
    return folder


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", ["parquet", "webdataset", "folder", "saved"])
def test_a_stream_goes_on_from_every_position(tmp_path, kind, train):
    make_stream_source(kind, tmp_path)

    def build() -> StreamingImageDataset:
        return load(tmp_path, streaming=True, train=train, label_column=None, shuffle_buffer_size=4, seed=1)

    stream, items, states = build(), [], []
    stream.set_epoch(2)
    for item in stream:
        items.append(item)
        states.append(through_a_file(stream.state_dict()))
    assert len(items) >= 11
    for number, state in enumerate(states, start=1):
        resumed = build()
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        assert same_items(list(resumed), items[number:])
        assert len(list(resumed)) == len(items)  # the pass after it is a whole one
    resumed = build()
    resumed.load_state_dict(states[4])
    second = list(islice(resumed, 3))
    again = build()
    again.load_state_dict(through_a_file(resumed.state_dict()))  # interrupted twice
    assert same_items(second + list(again), items[5:])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stateful_loader_of_a_stream(tmp_path, num_workers):
    """Batches that workers have prefetched are not lost, in the first pass and in a later one."""
    make_webdataset(tmp_path, per_shard=(5, 9, 6))

    def build() -> tuple[StreamingImageDataset, StatefulDataLoader]:
        stream = load(tmp_path, streaming=True, train=True, num_classes=3, shuffle_buffer_size=3)
        options = {"num_workers": num_workers, "persistent_workers": num_workers > 0, "collate_fn": collate_images}
        return stream, StatefulDataLoader(stream, batch_size=2, **options)

    stream, loader = build()
    passes = []
    for epoch in range(2):
        stream.set_epoch(epoch)
        passes.append([])
        for batch in loader:
            passes[-1].append((batch, through_a_file(loader.state_dict())))
    for epoch, number in ((0, 1), (0, 4), (1, 1), (1, 6), (1, len(passes[1]))):
        _, resumed = build()
        resumed.load_state_dict(passes[epoch][number - 1][1])
        assert same_items(list(resumed), [batch for batch, _ in passes[epoch][number:]])


def test_a_position_fits_one_division_only(tmp_path):
    make_parquet_stream(tmp_path, shards=3)
    stream = load(tmp_path, streaming=True, train=True)
    next(iter(stream))
    state = stream.state_dict()
    for name in ("reader", "num_readers", "num_shards"):
        with pytest.raises(ValueError, match=f"`{name}` 17, this run has {state[name]}"):
            stream.load_state_dict({**state, name: 17})


def rows_with_a_log(paths: list[Path], log: list[Path]):
    """A stream of `datasets` with one shard per file, that writes down what it reads."""
    for path in paths:
        for row in range(10):
            with open(log[0], "a") as file:
                file.write(f"{path.name}/{row}\n")
            yield {"image": {"bytes": path.read_bytes(), "path": None}}


def test_a_stream_reads_little_ahead_and_nothing_twice(tmp_path):
    paths = [tmp_path / f"{number:02d}.png" for number in range(40)]
    for number, path in enumerate(paths):
        picture(number).save(path)
    log = tmp_path / "log.txt"
    features = datasets.Features(image=datasets.Image(decode=False))
    rows = datasets.IterableDataset.from_generator(
        rows_with_a_log, gen_kwargs={"paths": paths, "log": (log,)}, features=features
    )
    options = {"max_samples": None, "resolution": 16, "train": True, "center_crop": False, "image_column": "image"}
    options |= {"label_column": None, "id2label": {}, "label_ids": None, "seed": 0, "max_unreadable_fraction": 0}
    options |= {"jpeg_draft": False, "fast_resize": False}
    stream = StreamingImageDataset(rows, shuffle_buffer_size=20, **options)
    assert stream.num_shards == 40
    items = iter(stream)
    for number in range(350):
        next(items)
        if number in (0, 19, 20, 349):
            assert len(log.read_text().splitlines()) <= number + 1 + 20
    log.unlink()
    stream.load_state_dict(stream.state_dict())
    next(iter(stream))
    # the rows of the block, and those before them in the ten open shards, however far the stream was
    assert len(log.read_text().splitlines()) <= 20 + 10 * 10
