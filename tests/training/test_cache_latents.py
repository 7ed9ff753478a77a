"""`training/cache_latents.py`: right latents, on any number of processes, across interruptions, and never mixed."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
import torch

from softvq_hf.data import load_cached_latents, load_image_dataset
from softvq_hf.data.latents import (
    LatentMoments,
    read_metadata,
    read_shard_metadata,
    shard_path,
    tokenizer_fingerprint,
    write_latent_shard,
    write_metadata,
)
from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ


@pytest.fixture
def tokenizer(tmp_path, tokenizer_config) -> Path:
    """A saved tokenizer whose latents nobody has measured."""
    AutoencoderSoftVQ(sample_size=32, **tokenizer_config).save_pretrained(tmp_path / "fresh")
    return tmp_path / "fresh"


@pytest.fixture
def run_script(run_main, tokenizer, tmp_path):
    """Caches 20 crops in shards of 6; `changes` replace arguments, `None` leaves one out."""

    def run(output_dir: str = "latents", **changes) -> Path:
        arguments = {
            "pretrained_model_name_or_path": tokenizer,
            "dataset_name": "photographs",
            "max_train_samples": 20,
            "batch_size": 4,
            "shard_size": 6,
            "output_dir": tmp_path / output_dir,
        }
        arguments |= changes
        run_main("cache_latents", *(f"--{name}={value}" for name, value in arguments.items() if value is not None))
        return tmp_path / output_dir

    return run


def shard_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "data").iterdir())}


def test_latents_are_those_of_the_images(run_script, tokenizer):
    folder = run_script()
    assert list(shard_files(folder)) == [f"train-{shard:05d}-of-00004.arrow" for shard in range(4)]
    rows = datasets.load_dataset(str(folder), split="train", cache_dir=str(folder / "cache"))
    assert set(rows.column_names) == {"latent", "latent_flip", "label", "image_id"}

    images = load_image_dataset("photographs", resolution=32, train=False, max_samples=20)
    assert rows["label"][:] == [images[i]["class_labels"] for i in range(20)]
    assert rows["image_id"][:] == [images[i]["image_id"] for i in range(20)]
    pixel_values = torch.stack([images[i]["pixel_values"] for i in range(20)])
    model = AutoencoderSoftVQ.from_pretrained(tokenizer).eval()
    with torch.no_grad():
        latent, latent_flip = model.encode(pixel_values).latent, model.encode(pixel_values.flip(-1)).latent
    torch.testing.assert_close(torch.tensor(rows["latent"][:]), latent, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.tensor(rows["latent_flip"][:]), latent_flip, rtol=0, atol=1e-6)
    assert (latent - latent_flip).abs().max() > 1e-3

    # the statistics over images and mirror images become the normalisation of the tokenizer's copy
    both = torch.cat([latent, latent_flip]).double()
    copy = AutoencoderSoftVQ.from_pretrained(folder / "vae").eval()
    assert copy.config.shift_factor == pytest.approx(both.mean().item(), abs=1e-7)
    assert copy.config.scaling_factor == pytest.approx(1 / both.std(correction=0).item(), rel=1e-5)
    scaled = copy.scale_latent(both.float())
    assert scaled.mean().abs() < 1e-4 and scaled.std().item() == pytest.approx(1, abs=1e-3)
    metadata = read_metadata(folder)
    assert metadata["statistics"]["count"] == both.numel() == 2 * 20 * 8 * 4
    assert metadata["id2label"]["2"] == "coffee" and metadata["unreadable"] == []

    dataset = load_cached_latents(folder, train=False)
    assert len(dataset) == 20 and dataset.num_classes == 8 and dataset.id2label[2] == "coffee"
    assert dataset.latent_shape == (8, 4) and dataset.tokenizer_dir == str(folder / "vae")
    assert (dataset.shift_factor, dataset.scaling_factor) == (copy.config.shift_factor, copy.config.scaling_factor)
    for index in (0, 7, 19):
        torch.testing.assert_close(dataset[index]["latents"], latent[index], rtol=0, atol=1e-6)
        assert dataset[index]["class_labels"] == index % 8
        assert dataset[index]["image_id"] == images[index]["image_id"]


def test_the_mirror_image_is_drawn_by_seed_epoch_and_index(run_script):
    folder = run_script(max_train_samples=100, shard_size=50)
    plain = load_cached_latents(folder, train=False)
    first, second = load_cached_latents(folder, seed=3), load_cached_latents(folder, seed=3)

    def mirrored(dataset) -> list[bool]:
        return [not torch.equal(dataset[i]["latents"], plain[i]["latents"]) for i in range(100)]

    assert mirrored(first) == mirrored(second) and 30 < sum(mirrored(first)) < 70
    assert mirrored(load_cached_latents(folder, seed=4)) != mirrored(first)
    second.set_epoch(1)
    assert mirrored(second) != mirrored(first)

    # what is not the latent is the latent of the mirror image, also through workers
    rows = datasets.load_dataset(str(folder), split="train", cache_dir=str(folder / "cache"))
    loader = torch.utils.data.DataLoader(first, batch_size=10, num_workers=2)
    latents = torch.cat([batch["latents"] for batch in loader])
    assert latents.dtype == torch.float32 and latents.shape == (100, 8, 4)
    for index, flipped in enumerate(mirrored(first)):
        expected = rows[index]["latent_flip" if flipped else "latent"]
        assert torch.equal(latents[index], torch.tensor(expected))
    with pytest.raises(IndexError, match="0 to 99"):
        first[100]


def test_two_processes_and_an_interruption_give_the_same_files(run_script, launch, tokenizer, tmp_path):
    whole = run_script("whole")
    flags = [f"--pretrained_model_name_or_path={tokenizer}", "--dataset_name=photographs", "--max_train_samples=20"]
    flags += ["--batch_size=4", "--shard_size=6", f"--output_dir={tmp_path / 'shared'}"]
    launch("cache_latents", *flags, num_processes=2)
    shared = tmp_path / "shared"
    assert shard_files(shared) == shard_files(whole)
    assert {**read_metadata(shared), "seconds": 0} == {**read_metadata(whole), "seconds": 0}

    # Killed in the middle: two shards are finished, one was being written. One process goes on.
    shutil.rmtree(shared / "vae")
    shard_path(shared, 1, 4).unlink()
    unfinished = shard_path(shared, 3, 4)
    unfinished.with_suffix(".unfinished").write_bytes(unfinished.read_bytes()[:500])
    unfinished.unlink()
    metadata = read_metadata(shared)
    metadata.pop("statistics")
    write_metadata(shared, metadata)
    finished = shard_path(shared, 0, 4).stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"not finished \(2 of 4 shards: train-00001-of-00004.arrow, .*goes on"):
        load_cached_latents(shared)
    run_script("shared")
    assert shard_files(shared) == shard_files(whole)
    assert shard_path(shared, 0, 4).stat().st_mtime_ns == finished  # not encoded again
    assert {**read_metadata(shared), "seconds": 0} == {**read_metadata(whole), "seconds": 0}
    assert len(load_cached_latents(shared)) == 20


def test_a_finished_folder_is_left_as_it_is(run_script):
    folder = run_script()
    before, metadata = shard_files(folder), read_metadata(folder)
    run_script()
    assert shard_files(folder) == before and read_metadata(folder) == metadata


def test_latents_of_two_tokenizers_are_not_mixed(run_script, tokenizer_config, tmp_path):
    folder = run_script()
    before = shard_files(folder)
    other = AutoencoderSoftVQ(sample_size=32, **tokenizer_config)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"holds latents of the tokenizer '.*fresh'.*with those of '.*other'"):
        run_script(pretrained_model_name_or_path=tmp_path / "other")
    assert shard_files(folder) == before

    # nor is the decoder of another one taken
    other.save_pretrained(folder / "vae")
    with pytest.raises(ValueError, match="vae is another one"):
        load_cached_latents(folder)


@pytest.mark.parametrize("name", ["shift_factor", "scaling_factor"])
def test_statistics_of_other_latents_are_refused(run_script, name):
    folder = run_script()
    tokenizer = AutoencoderSoftVQ.from_pretrained(folder / "vae")
    cached = tokenizer.config[name]
    tokenizer.register_to_config(**{name: cached + 1})
    tokenizer.save_pretrained(folder / "vae")
    with pytest.raises(ValueError, match=f"were cached with the `{name}` {cached}, but .* has .*, allowed: the same"):
        load_cached_latents(folder)
    assert getattr(load_cached_latents(run_script()), name) == cached  # what the error advises

    tokenizer.save_pretrained(folder / "vae")
    metadata = json.loads((folder / "latents.json").read_text())
    del metadata["statistics"][name]  # as in folders of earlier versions
    (folder / "latents.json").write_text(json.dumps(metadata))
    assert getattr(load_cached_latents(folder), name) == tokenizer.config[name]


@pytest.mark.parametrize(
    "change, named",
    [
        ({"max_train_samples": 21}, "dataset .*'max_samples': 20.*'max_samples': 21"),
        ({"train_split": "validation"}, "dataset .*'train'.*'validation'"),
        ({"latent_dtype": "float16"}, "latent_dtype float32.*latent_dtype float16"),
        ({"mixed_precision": "bf16"}, "mixed_precision no.*mixed_precision bf16"),
        ({"shard_size": 7}, "shard_size 6.*shard_size 7"),
    ],
)
def test_latents_made_in_two_ways_are_not_mixed(run_script, change, named):
    run_script()
    with pytest.raises(ValueError, match=f"which holds latents with {named}"):
        run_script(**change)


def test_a_tokenizer_with_statistics_keeps_them(run_script, tokenizer_dir, capsys):
    folder = run_script(pretrained_model_name_or_path=tokenizer_dir)
    dataset = load_cached_latents(folder)
    assert (dataset.shift_factor, dataset.scaling_factor) == (0.1, 2.0)
    measured = read_metadata(folder)["statistics"]
    assert measured["std"] != pytest.approx(0.5)
    assert (
        f"keeps its shift_factor 0.1 and scaling_factor 2.0; measured here: {measured['mean']}"
        in capsys.readouterr().err
    )


def test_kl_latents_are_means(run_script, tokenizer_config, tmp_path):
    config = {**tokenizer_config, "quantizer": "kl"}
    model = AutoencoderSoftVQ(sample_size=32, **config).eval()
    model.save_pretrained(tmp_path / "kl")
    folder = run_script(pretrained_model_name_or_path=tmp_path / "kl")
    image = load_image_dataset("photographs", resolution=32, train=False)[3]["pixel_values"]
    with torch.no_grad():
        mean = model.encode(image[None]).latent_dist.mode()[0]
    torch.testing.assert_close(load_cached_latents(folder, train=False)[3]["latents"], mean, rtol=0, atol=1e-6)


def test_half_precision(run_script):
    full = load_cached_latents(run_script("full"), train=False)
    for name, changes in (("stored", {"latent_dtype": "float16"}), ("encoded", {"mixed_precision": "bf16"})):
        folder = run_script(name, **changes)
        half = load_cached_latents(folder, train=False)
        assert half[5]["latents"].dtype == torch.float32
        difference = (half[5]["latents"] - full[5]["latents"]).abs().max()
        assert 0 < difference < 0.05 * full[5]["latents"].abs().max()
    stored = datasets.Dataset.from_file(str(shard_path(folder.parent / "stored", 0, 4)))
    assert stored.features["latent"].dtype == "float16"


def test_unreadable_images_are_left_out(run_script, tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(4):
            noise = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
            PIL.Image.fromarray(noise).save(tmp_path / "images" / name / f"{number}.png")
    for number in (0, 1):  # one whole shard
        (tmp_path / "images" / "ant" / f"{number}.png").write_text("no image")
    changes = {"dataset_name": None, "train_data_dir": tmp_path / "images", "max_train_samples": None, "shard_size": 2}
    folder = run_script(**changes, cache_dir=tmp_path / "cache")
    dataset = load_cached_latents(folder)
    assert len(dataset) == 6 and [dataset[i]["class_labels"] for i in range(6)] == [0, 0, 1, 1, 1, 1]
    assert read_metadata(folder)["unreadable"] == ["ant/0.png", "ant/1.png"]
    assert read_metadata(folder)["num_images"] == 8


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dataset_name": None}, "Neither `--dataset_name` nor `--train_data_dir`"),
        ({"train_data_dir": "no/such/folder", "dataset_name": None}, "`--train_data_dir` is 'no/such/folder'"),
        ({"resolution": 64}, "`--resolution` is 64 .*32 x 32"),
        ({"batch_size": 0}, "`--batch_size` is 0"),
        ({"shard_size": 0}, "`--shard_size` is 0"),
        ({"dataloader_num_workers": -1}, "`--dataloader_num_workers` is -1"),
        ({"train_split": "test"}, "`split` is 'test'"),
        ({"output_dir": "/proc/latents"}, "`--output_dir` is '/proc/latents'"),
    ],
)
def test_bad_arguments(run_script, change, message):
    with pytest.raises(ValueError, match=message):
        run_script(**change)


def test_a_folder_without_latents(tmp_path):
    with pytest.raises(ValueError, match="has no latents.json"):
        load_cached_latents(tmp_path)
    with pytest.raises(ValueError, match="`seed` is -1"):
        load_cached_latents(tmp_path, seed=-1)


def test_data_of_unknown_origin_is_not_added_to(run_script, tmp_path):
    folder = run_script()
    (folder / "latents.json").unlink()
    with pytest.raises(ValueError, match="has data but no latents.json"):
        run_script()


# The parts


def test_statistics_merge_like_the_whole():
    generator = np.random.default_rng(0)
    parts = [generator.normal(1000.0, 0.01, size).astype(np.float32) for size in ((5, 3, 2), (40, 3, 2), (1, 3, 2))]
    merged = LatentMoments()
    for part in parts:
        merged = merged.merge(LatentMoments.of(part))
    values = np.concatenate(parts).astype(np.float64)
    assert merged.count == values.size
    assert merged.mean == pytest.approx(values.mean(), rel=1e-14)
    assert merged.std == pytest.approx(values.std(), rel=1e-9)
    assert merged.merge(LatentMoments()) == merged


def test_fingerprint_sees_weights_and_configuration_but_not_statistics(tokenizer_config, tmp_path):
    torch.manual_seed(1)
    model = AutoencoderSoftVQ(sample_size=32, **tokenizer_config)
    fingerprint = tokenizer_fingerprint(model)
    model.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(AutoencoderSoftVQ.from_pretrained(tmp_path)) == fingerprint
    model.register_to_config(shift_factor=0.3, scaling_factor=7.0)
    assert tokenizer_fingerprint(model) == fingerprint
    model.register_to_config(tau=0.5)
    assert tokenizer_fingerprint(model) != fingerprint
    model.register_to_config(tau=tokenizer_config.get("tau", 0.07))
    assert tokenizer_fingerprint(model) == fingerprint
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-6
    assert tokenizer_fingerprint(model) != fingerprint


def test_shard_round_trip_and_infinite_latents(tmp_path):
    latent = np.random.default_rng(0).normal(size=(3, 4, 2)).astype(np.float32)
    arguments = {"label": [1, 0, 1], "image_id": ["a", "b", "c"], "id2label": {0: "x", 1: "y"}, "unreadable": ["d"]}
    path = shard_path(tmp_path, 0, 1)
    write_latent_shard(path, latent, -latent, **arguments)
    stored = datasets.Dataset.from_file(str(path))
    np.testing.assert_array_equal(np.array(stored["latent_flip"][:], dtype=np.float32), -latent)
    assert stored.features["label"].names == ["x", "y"]
    statistics, unreadable = read_shard_metadata(path)
    assert statistics.mean == pytest.approx(0, abs=1e-8) and unreadable == ["d"]
    assert json.loads(pa.ipc.open_stream(path).schema.metadata[b"softvq_hf"])["unreadable"] == ["d"]
    latent[1, 2, 0] = np.inf
    with pytest.raises(ValueError, match="image b is not finite as float32"):
        write_latent_shard(path, latent, latent, **arguments)
