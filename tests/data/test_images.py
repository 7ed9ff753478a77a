"""Image data sets from all sources, with broken files, several workers, and a stream."""

import json
import logging
import os
import subprocess
import sys
import traceback
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader

from softvq_hf.data import (
    ImageDataset,
    StreamingImageDataset,
    UnreadableImagesError,
    collate_images,
    load_image_dataset,
)
from softvq_hf.data.images import check_unreadable


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)  # 5 s at the end of every stream


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


def test_a_stream_needs_named_classes(tmp_path):
    make_dataset().remove_columns("label").add_column("label", [0, 1] * 3).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match="`streaming`.*ClassLabel"):
        load(tmp_path, streaming=True)
    assert len(stream_means(load(tmp_path, streaming=True, label_column=None))) == 6


STREAM_ON_TWO_PROCESSES = """
import json, sys
from pathlib import Path
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from softvq_hf.data import collate_images, load_image_dataset

accelerator = Accelerator(cpu=True)
dataset = load_image_dataset(sys.argv[1], resolution=16, train=False, streaming=True)
loader = DataLoader(dataset, batch_size=2, collate_fn=collate_images)
loader = prepare_data_loader(
    loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
)
means = [round(float(image.mean()), 4) for batch in loader for image in batch["pixel_values"]]
Path(sys.argv[2], f"{accelerator.process_index}.json").write_text(json.dumps(means))
accelerator.end_training()
"""


def test_two_processes_share_a_stream(tmp_path):
    make_parquet_stream(tmp_path / "images")
    script = tmp_path / "script.py"
    script.write_text(STREAM_ON_TWO_PROCESSES)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run(
        [*torchrun, str(script), str(tmp_path / "images"), str(tmp_path)],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert len(first) == len(second) == 12
    assert sorted(first + second) == sorted(stream_means(load(tmp_path / "images", streaming=True)))


def test_a_prepared_stream_skips_batches(tmp_path):
    make_parquet_stream(tmp_path)
    accelerator = Accelerator(cpu=True)
    stream = load(tmp_path, streaming=True, train=True)
    loader = prepare_data_loader(
        DataLoader(stream, batch_size=4, collate_fn=collate_images),
        accelerator.device,
        num_processes=1,
        process_index=0,
        put_on_device=True,
        dispatch_batches=False,
    )
    loader.set_epoch(3)
    whole = [batch["pixel_values"] for batch in loader]
    loader.set_epoch(3)
    rest = [batch["pixel_values"] for batch in accelerator.skip_first_batches(loader, 2)]
    assert len(whole) == 6 and len(rest) == 4
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], rest, strict=True))
