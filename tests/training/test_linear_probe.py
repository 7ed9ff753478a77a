"""`training/linear_probe.py`: classifiers on cached latents whose classes are known."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from softvq_hf.data import load_cached_latents
from softvq_hf.data.latents import shard_path, tokenizer_fingerprint, write_latent_shard, write_metadata
from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ
from softvq_hf.training.logging import library_versions


NUM_CLASSES = 8
TOKENS, CHANNELS = 8, 4
LINEAR = ["--global_batch_size=16", "--num_train_epochs=20", "--lr_warmup_epochs=2"]


@pytest.fixture
def write_latents(tmp_path, tokenizer_dir):
    """
    Writes a folder of cached latents: `write_latents("train", seed, latent=None, **metadata)`. By default the class
    turns the mean of the tokens, with noise.
    """
    tokenizer = AutoencoderSoftVQ.from_pretrained(tokenizer_dir)

    def write(name: str, seed: int, latent=None, num_images=64, num_classes=NUM_CLASSES, **changes) -> Path:
        folder, generator = tmp_path / name, np.random.default_rng(seed)
        label = np.arange(num_images) % num_classes
        noise = generator.normal(size=(2, num_images, TOKENS, CHANNELS)) * 3
        angle = 2 * np.pi * label / num_classes
        centre = np.stack([np.cos(angle), np.sin(angle), 0 * angle, 0 * angle], axis=1)[:, None]
        if latent is None:
            latent = 2 * centre + noise[0]
        id2label = {i: f"class {i}" for i in range(num_classes)}
        image_id = [str(i) for i in range(num_images)]
        write_latent_shard(
            shard_path(folder, 0, 1),
            latent.astype(np.float32),
            (2 * centre + noise[1]).astype(np.float32),
            label.tolist(),
            image_id,
            id2label,
            [],
        )
        dataset = {"source": "owner/images", "config_name": None, "revision": None, "split": name, "max_samples": None}
        metadata = {
            "tokenizer": {"name_or_path": "owner/tokenizer", "fingerprint": tokenizer_fingerprint(tokenizer)},
            "dataset": dataset,
            "num_shards": 1,
            "id2label": {str(i): class_name for i, class_name in id2label.items()},
            "statistics": {},
        }
        write_metadata(folder, {**metadata, **changes})
        tokenizer.save_pretrained(folder / "vae")
        return folder

    return write


@pytest.fixture
def flags(write_latents, tmp_path):
    """Flags of a run on 64 training and 27 validation latents."""
    folders = (write_latents("train", 0), write_latents("validation", 1, num_images=27))
    return [f"--latents_dir={folders[0]}", f"--validation_latents_dir={folders[1]}"]


def read_result(output_dir: Path) -> dict:
    return json.loads((output_dir / "result.json").read_text())


def pooled(folder: Path, pooling: str) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of a folder."""
    dataset = load_cached_latents(folder, train=False)
    latents = torch.stack([item["latents"] for item in dataset]).double()
    labels = np.array([item["class_labels"] for item in dataset])
    return (latents.mean(1) if pooling == "mean" else latents.flatten(1)).numpy(), labels


def test_knn_at_a_low_temperature_is_the_nearest_neighbour(flags, run_main, tmp_path):
    accuracies = []
    for name, options in {"cold": ["--temperature=1e-40"], "nearest": ["--num_neighbors=1"]}.items():
        run_main("linear_probe", *flags, "--method=knn", *options, f"--output_dir={tmp_path / name}")
        accuracies.append(read_result(tmp_path / name)["metrics"]["top1_accuracy"])
    assert accuracies[0] == accuracies[1] < 1


@pytest.mark.parametrize("pooling, num_features", [("mean", CHANNELS), ("flatten", TOKENS * CHANNELS)])
def test_neighbours_are_those_of_scikit_learn(run_main, flags, tmp_path, pooling, num_features):
    knn = ["--method=knn", "--num_neighbors=5", "--temperature=0.2", "--global_batch_size=7"]
    run_main("linear_probe", *flags, *knn, f"--pooling={pooling}", f"--output_dir={tmp_path}")
    result = read_result(tmp_path)

    (features, labels), (queries, query_labels) = (pooled(tmp_path / s, pooling) for s in ("train", "validation"))
    mean, std = features.mean(0), features.std(0)
    features, queries = ((x - mean) / std for x in (features, queries))
    features, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (features, queries))
    # the squared distance of unit vectors is 2 - 2 cos
    neighbours = KNeighborsClassifier(5, weights=lambda distance: np.exp((1 - distance**2 / 2) / 0.2))
    probabilities = neighbours.fit(features, labels).predict_proba(queries)
    right = probabilities[np.arange(27), query_labels][:, None]
    ranks = (probabilities > right).sum(1)
    assert result["metrics"]["top1_accuracy"] == ((ranks == 0) & (right[:, 0] > 0)).mean()
    assert result["metrics"]["top5_accuracy"] == ((ranks < 5) & (right[:, 0] > 0)).mean()
    assert 0.3 < result["metrics"]["top1_accuracy"] < result["metrics"]["top5_accuracy"] < 1
    assert result["protocol"]["num_features"] == num_features and result["protocol"]["num_neighbors"] == 5
    assert result["protocol"]["num_images"] == 27 and result["protocol"]["num_train_images"] == 64
    assert "learning_rate" not in result["protocol"] and result["notes"] == []


def test_linear_probe_learns_what_is_linear(run_main, flags, tmp_path):
    run_main("linear_probe", *flags, *LINEAR, f"--output_dir={tmp_path / 'first'}")
    first = read_result(tmp_path / "first")
    assert first["metrics"]["top1_accuracy"] > 0.4 and first["metrics"]["top5_accuracy"] > 0.9  # chance: 1/8 and 5/8
    assert first["model"] == "owner/tokenizer" and first["task"] == "image-classification"
    assert first["dataset"]["name"] == "owner/images" and first["dataset"]["split"] == "validation"
    assert first["protocol"]["num_train_epochs"] == 20 and first["protocol"]["pooling"] == "mean"
    assert first["versions"].items() >= library_versions().items()
    run_main("linear_probe", *flags, *LINEAR, f"--output_dir={tmp_path / 'second'}")
    assert read_result(tmp_path / "second")["metrics"] == first["metrics"]


def test_a_swap_of_tokens_is_seen_by_flattened_latents_only(run_main, write_latents, tmp_path):
    """Two classes of the same mean token: first half positive, second negative, or the other way round."""
    sign = np.where(np.arange(64) % 2 == 0, 1.0, -1.0)[:, None, None]
    halves = np.repeat([[1.0], [-1.0]], TOKENS // 2, axis=0)
    folders = []
    for seed, name in enumerate(("train", "validation")):
        noise = np.random.default_rng(seed).normal(size=(64, TOKENS, CHANNELS)) * 0.5
        noise -= noise.mean(1, keepdims=True) * 0.999
        folders.append(write_latents(name, seed, latent=sign * halves + noise, num_classes=2))
    flags = [f"--latents_dir={folders[0]}", f"--validation_latents_dir={folders[1]}", "--method=knn"]
    accuracies = {}
    for pooling in ("mean", "flatten"):
        run_main("linear_probe", *flags, f"--pooling={pooling}", "--num_neighbors=9", f"--output_dir={tmp_path}")
        metrics = read_result(tmp_path)["metrics"]
        assert metrics.keys() == {"top1_accuracy"}  # of two classes, five are all
        accuracies[pooling] = metrics["top1_accuracy"]
    assert accuracies["flatten"] == 1 and accuracies["mean"] < 0.75


def test_a_channel_that_never_varies(run_main, write_latents, tmp_path):
    latent = np.random.default_rng(0).normal(size=(64, TOKENS, CHANNELS))
    latent[..., 2] = 0.1
    flags = [f"--latents_dir={write_latents('train', 0, latent=latent)}"]
    flags.append(f"--validation_latents_dir={write_latents('validation', 0, latent=latent)}")
    run_main("linear_probe", *flags, "--method=knn", "--num_neighbors=1", f"--output_dir={tmp_path}")
    assert read_result(tmp_path)["metrics"]["top1_accuracy"] == 1  # the nearest one is itself


@pytest.mark.slow
@pytest.mark.parametrize("method", [LINEAR, ["--method=knn", "--num_neighbors=5", "--global_batch_size=16"]])
def test_two_processes_give_the_same(run_main, launch, flags, tmp_path, method):
    run_main("linear_probe", *flags, *method, f"--output_dir={tmp_path / 'one'}")
    launch("linear_probe", *flags, *method, f"--output_dir={tmp_path / 'two'}", num_processes=2)
    one, two = read_result(tmp_path / "one"), read_result(tmp_path / "two")
    assert two["hardware"]["num_processes"] == 2
    assert two["metrics"] == one["metrics"] and two["protocol"] == one["protocol"]


def test_the_same_split_is_noted(run_main, flags, tmp_path):
    train = flags[0].removeprefix("--latents_dir=")
    flags = [f"--latents_dir={train}", f"--validation_latents_dir={train}", "--method=knn", f"--output_dir={tmp_path}"]
    run_main("linear_probe", *flags)
    (note,) = read_result(tmp_path)["notes"]
    assert "of the same split" in note


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--global_batch_size=65", "`--global_batch_size` is 65, allowed: up to the 64 latents"),
        ("--global_batch_size=0", "`--global_batch_size` is 0, allowed: integers from 1 on"),
        ("--num_train_epochs=5", "`--lr_warmup_epochs` is 10, allowed: up to `--num_train_epochs`, 5"),
        ("--learning_rate=nan", "`--learning_rate` is nan, allowed: finite numbers above 0"),
        ("--temperature=0", "`--temperature` is 0.0, allowed: finite numbers above 0"),
        ("--momentum=1", r"`--momentum` is 1.0, allowed: \[0, 1\)"),
        ("--seed=-1", "`--seed` is -1, allowed: integers from 0 on"),
        ("--latents_dir=nowhere", "`latents_dir` is 'nowhere', which has no latents.json"),
    ],
)
def test_refuses_arguments(run_main, flags, tmp_path, flag, message):
    with pytest.raises(ValueError, match=message):
        run_main("linear_probe", *flags, f"--output_dir={tmp_path}", flag)


@pytest.mark.parametrize(
    "method, given, message",
    [
        ("linear", ["--num_neighbors=5"], "`--method` is 'linear', which takes no `--num_neighbors`; `--method knn`"),
        ("knn", ["--learning_rate=0.2"], "`--method` is 'knn', which takes no `--learning_rate`; `--method linear`"),
        ("knn", ["--num_train_epochs=20", "--seed=1"], "takes no `--num_train_epochs` and no `--seed`;"),
    ],
)
def test_refuses_arguments_of_the_other_method(run_main, flags, tmp_path, method, given, message):
    with pytest.raises(ValueError, match=message):
        run_main("linear_probe", *flags, f"--method={method}", *given, f"--output_dir={tmp_path}")


def test_refuses_more_neighbours_than_latents(run_main, flags, tmp_path):
    with pytest.raises(ValueError, match="`--num_neighbors` is 65, allowed: up to the 64 latents"):
        run_main("linear_probe", *flags, "--method=knn", "--num_neighbors=65", f"--output_dir={tmp_path}")


def test_refuses_a_learning_rate_that_diverges(run_main, flags, tmp_path):
    with pytest.raises(ValueError, match="`--learning_rate` is 1e\\+40, with which the loss is .* lower it"):
        run_main("linear_probe", *flags, *LINEAR, "--learning_rate=1e40", f"--output_dir={tmp_path}")


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"tokenizer": {"name_or_path": "owner/other", "fingerprint": "f" * 64}},
            "`--validation_latents_dir` is .* 'owner/other' \\(ffffffffffff\\), allowed: .* 'owner/tokenizer'",
        ),
        ({"id2label": {"0": "cat", "1": "dog"}}, "has 2 classes, allowed: the 8 of `--latents_dir`"),
    ],
)
def test_refuses_folders_that_do_not_belong_together(run_main, write_latents, flags, tmp_path, changes, message):
    other = write_latents("other", 2, **changes)
    with pytest.raises(ValueError, match=message):
        run_main("linear_probe", flags[0], f"--validation_latents_dir={other}", f"--output_dir={tmp_path}")


def test_refuses_a_single_class(run_main, write_latents, tmp_path):
    folder = write_latents("train", 0, num_classes=1)
    with pytest.raises(ValueError, match=r"`--latents_dir` has 1 class\(es\), allowed: 2 or more"):
        run_main(
            "linear_probe", f"--latents_dir={folder}", f"--validation_latents_dir={folder}", f"--output_dir={tmp_path}"
        )
