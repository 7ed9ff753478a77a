"""All figures of one network together."""

import pytest
import torch

from softvq_hf.evaluation.arguments import FeatureArguments
from softvq_hf.evaluation.distribution import DistributionMetrics, name_figures
from softvq_hf.evaluation.reference import Reference, build_reference
from softvq_hf.metrics.frechet_distance import FrechetDistance
from softvq_hf.metrics.inception_score import InceptionScore
from softvq_hf.metrics.kernel_distance import KernelDistance
from softvq_hf.metrics.precision_recall import PrecisionRecall


@pytest.fixture
def images():
    """Two sets of images: `(60, 3, 8, 8)` and a darker one of 50."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (60, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return torch.randint(0, 200, (50, 3, 8, 8), generator=generator, dtype=torch.uint8), real


def add_in_batches(metrics, predictions, references, batch_size):
    for indices in torch.arange(len(predictions)).split(batch_size):
        metrics.add(predictions=predictions[indices], indices=indices)
    if references is not None:
        for indices in torch.arange(len(references)).split(batch_size):
            metrics.add(references=references[indices], indices=indices)
    return metrics.compute()


def test_figures_are_those_of_the_metrics(accelerator, mean_colours, images):
    predictions, references = images
    extractor = mean_colours("Inception")
    result = add_in_batches(DistributionMetrics(extractor, subset_size=20), predictions, references, 7)
    assert result["label"] == "Inception" and result["notes"] == []
    assert (result["num_predictions"], result["num_references"]) == (50, 60)
    both = {"predictions": predictions, "references": references}
    expected = {
        "fid": FrechetDistance(extractor).compute(**both)["frechet_distance"],
        "sfid": FrechetDistance(extractor, spatial=True).compute(**both)["frechet_distance"],
        "kid": KernelDistance(extractor, subset_size=20).compute(**both)["kernel_distance"],
        "inception_score": InceptionScore(extractor).compute(predictions=predictions)["inception_score"],
        **{name: PrecisionRecall(extractor).compute(**both)[name] for name in ("precision", "recall")},
    }
    assert {name: result["metrics"][name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert result["metrics"].keys() == expected.keys() | {"inception_score_std", "kid_std"}


@pytest.mark.parametrize("batch_size", [1, 8, 50])
def test_size_of_batches_does_not_count(accelerator, mean_colours, images, batch_size):
    results = [
        add_in_batches(DistributionMetrics(mean_colours("x"), subset_size=20), *images, size)
        for size in (batch_size, 13)
    ]
    assert results[0]["metrics"] == pytest.approx(results[1]["metrics"], rel=1e-6)


def test_a_reference_stands_for_its_images(accelerator, mean_colours, images):
    predictions, references = images
    extractor = mean_colours("x")
    reference = build_reference([(references, torch.arange(60))], extractor, resolution=8)
    with_reference = DistributionMetrics(extractor, reference=reference, subset_size=20)
    result = add_in_batches(with_reference, predictions, None, 13)
    expected = add_in_batches(DistributionMetrics(extractor, subset_size=20), predictions, references, 13)
    assert result["metrics"] == pytest.approx(expected["metrics"], rel=1e-6)
    assert result["num_references"] == 60
    with pytest.raises(ValueError, match="`references` are given to metrics that have a `reference`"):
        with_reference.add(references=references, indices=torch.arange(60))


def test_other_networks_do_not_give_fid(accelerator, mean_colours, images):
    result = add_in_batches(DistributionMetrics(mean_colours("tiny")), *images, 13)
    table = name_figures([result], prefix="r")
    assert {"fd (tiny)", "spatial_fd (tiny)", "classifier_score (tiny)", "kernel_distance (tiny)"} <= table.keys()
    assert not any("fid" in name or "inception" in name or "kid" in name for name in table)


def test_names_of_inception(accelerator, mean_colours, images):
    result = add_in_batches(DistributionMetrics(mean_colours("Inception")), *images, 13)
    assert {"gfid", "sfid", "inception_score", "kid", "precision", "recall"} <= name_figures([result], "g").keys()
    assert {"rfid", "sfid"} <= name_figures([result], "r").keys()


def test_what_cannot_be_had_is_none_and_noted(accelerator, mean_colours, images):
    class FeaturesOnly(mean_colours):
        num_spatial_features = None
        num_classes = None

        def extract(self, images):
            found = super().extract(images)
            found.spatial_features = found.logits = None
            return found

    predictions, references = images
    result = add_in_batches(DistributionMetrics(FeaturesOnly("x")), predictions[:3], references[:3], 3)
    missing = {name for name, value in result["metrics"].items() if value is None}
    assert missing == result["metrics"].keys() - {"fd"}
    words = " ".join(result["notes"])
    for reason in (
        "3 predictions for the 12 features of the Fréchet distance",
        "no feature maps",
        "no logits",
        "subsets have 1000 images, there are 3",
        "no neighbour number 3",
    ):
        assert reason in words


def test_few_images_are_noted_by_figure(accelerator, mean_colours, images):
    """12 images are few for 12 spatial features, but not for 3 others."""

    class FewFeatures(mean_colours):
        num_features = 3

        def extract(self, images):
            found = super().extract(images)
            found.features = images.float().mean((2, 3))
            return found

    result = add_in_batches(DistributionMetrics(FewFeatures("x"), subset_size=5), *(side[:12] for side in images), 6)
    assert [note for note in result["notes"] if "so few" in note] == [
        f"x: 12 {side} for the 12 features of the spatial Fréchet distance: over so few images it is far too high, and"
        " can only be compared with one over as many."
        for side in ("predictions", "references")
    ]


def test_without_real_images_there_is_the_classifier_score(accelerator, mean_colours, images):
    extractor = mean_colours("Inception")
    result = add_in_batches(DistributionMetrics(extractor, has_references=False), images[0], None, 7)
    expected = InceptionScore(extractor).compute(predictions=images[0])
    names = ("inception_score", "inception_score_std")
    assert result["metrics"] == pytest.approx({name: expected[name] for name in names})
    assert (result["num_predictions"], result["num_references"]) == (50, None)
    assert result["notes"] == ["Inception: No real images: only the classifier score."]


@pytest.mark.parametrize("side", ["predictions", "references"])
def test_images_in_0_to_1_cast_to_8_bits_are_noticed(accelerator, mean_colours, images, side):
    images = dict(zip(("predictions", "references"), images, strict=True))
    images[side] = images[side].bool().byte()
    with pytest.raises(ValueError, match=f"`{side}` holds no value above 1 in any of {len(images[side])} 8-bit"):
        add_in_batches(DistributionMetrics(mean_colours("x")), images["predictions"], images["references"], 13)


def test_reference_of_mean_and_covariance_only(accelerator, mean_colours, images):
    predictions, references = images
    extractor = mean_colours("Inception")
    statistics = build_reference([(references, torch.arange(60))], extractor, resolution=8).statistics
    metrics = DistributionMetrics(extractor, reference=Reference(statistics), subset_size=20)
    result = add_in_batches(metrics, predictions, None, 13)
    assert result["metrics"]["fid"] > 0
    assert all(result["metrics"][name] is None for name in ("sfid", "kid", "precision", "recall"))
    assert "the reference has statistics, but no features" in " ".join(result["notes"])


@pytest.mark.parametrize(
    "options",
    [{}, {"num_splits": 100, "subset_size": 100, "num_neighbors": 100}, {"reference": "statistics"}],
    ids=["all figures", "too few images for some", "reference without features"],
)
def test_what_was_added_is_forgotten(accelerator, mean_colours, images, options):
    """Figures that are left out keep nothing either."""
    predictions, references = images
    extractor = mean_colours("x")
    if "reference" in options:
        measured = build_reference([(references, torch.arange(60))], extractor, resolution=8, num_features=0)
        options, references = {"reference": measured}, None
    metrics = DistributionMetrics(extractor, **options)
    first = add_in_batches(metrics, predictions, references, 13)
    second = add_in_batches(metrics, predictions.flip(0), references, 13)
    fresh = add_in_batches(DistributionMetrics(extractor, **options), predictions.flip(0), references, 13)
    assert second == fresh
    assert second["num_predictions"] == 50 and first["metrics"].keys() == second["metrics"].keys()
    assert all(sample.count == 0 for sample in metrics.samples.values())
    assert metrics.inception_score.accumulators["predictions"].counts.sum() == 0


def test_features_beyond_the_capacity(accelerator, mean_colours, images):
    """A uniform sample of either side, also of the features of a reference."""
    predictions, references = images
    extractor = mean_colours("x")
    reference = build_reference([(references, torch.arange(60))], extractor, resolution=8)
    options = {"capacity": 30, "subset_size": 30, "num_subsets": 1}
    own = add_in_batches(DistributionMetrics(extractor, **options), predictions, references, 7)
    given = add_in_batches(DistributionMetrics(extractor, reference=reference, **options), predictions, None, 7)
    assert given["metrics"] == pytest.approx(own["metrics"], rel=1e-6)
    whole = add_in_batches(DistributionMetrics(extractor, subset_size=30, num_subsets=1), predictions, references, 7)
    assert own["metrics"]["kernel_distance"] != whole["metrics"]["kernel_distance"]
    assert (own["num_predictions"], own["num_references"]) == (50, 60)


def test_gaps_in_the_numbers_of_images(accelerator, mean_colours, images):
    """Images that could not be read leave a split of the classifier score empty; the others count."""
    predictions, references = images
    metrics = DistributionMetrics(mean_colours("x"))
    indices = torch.tensor([number for number in range(60) if number % 10 != 3][:50])
    metrics.add(predictions=predictions, indices=indices)
    metrics.add(references=references, indices=torch.arange(60))
    assert metrics.compute()["metrics"]["classifier_score"] >= 1


def test_too_few_images(accelerator, mean_colours, images):
    with pytest.raises(ValueError, match="2 or more"):
        add_in_batches(DistributionMetrics(mean_colours("x")), images[0][:1], images[1], 1)


def test_load_feature_extractors(tiny_classifier_dir, tmp_path):
    assert FeatureArguments(feature_extractor=["none"]).load_feature_extractors(torch.device("cpu")) == []
    args = FeatureArguments(feature_extractor=[str(tiny_classifier_dir)])
    (extractor,) = args.load_feature_extractors(torch.device("cpu"))
    assert (extractor.label, extractor.num_features) == ("tiny_classifier", 16)


def test_networks_must_have_names_of_their_own(tiny_classifier_dir, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tiny_classifier").symlink_to(tiny_classifier_dir)
    twice = FeatureArguments(feature_extractor=[str(tiny_classifier_dir), str(tmp_path / "other" / "tiny_classifier")])
    with pytest.raises(ValueError, match="allowed: networks of different names"):
        twice.load_feature_extractors(torch.device("cpu"))
    for name, label in (("Inception", "Inception"), ("DINOv2", "DINOv2"), ("dinov2", "DINOv2")):
        (tmp_path / name).symlink_to(tiny_classifier_dir)
        with pytest.raises(ValueError, match=f"those of {label} belong to one network"):
            FeatureArguments(feature_extractor=[str(tmp_path / name)]).load_feature_extractors(torch.device("cpu"))


def test_inception_without_weights(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("softvq_hf.metrics.weights.urllib.request.urlopen", _no_network)
    with pytest.raises(OSError, match=r"weights-inception-2015-12-05-6726825d.pth.*--inception_weights"):
        FeatureArguments().load_feature_extractors(torch.device("cpu"))


def test_other_networks_that_are_not_there(image_folder, monkeypatch):
    """Weights of Inception do not help. A folder of something else is no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = str(image_folder(1))
    with pytest.raises(ValueError, match=f"The feature extractor '{folder}' could not be loaded"):
        FeatureArguments(feature_extractor=[folder]).load_feature_extractors(torch.device("cpu"))
    with pytest.raises(OSError, match="The feature extractor 'nobody/no-such-network' could not be loaded") as error:
        FeatureArguments(feature_extractor=["nobody/no-such-network"]).load_feature_extractors(torch.device("cpu"))
    assert str(error.value).endswith("`--feature_extractor none` does without.")
    assert "--inception_weights" not in str(error.value)


def _no_network(*args, **kwargs):
    raise OSError("no network")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"feature_extractor": []}, "`--feature_extractor` is empty"),
        ({"feature_extractor": ["none", "inception"]}, "allowed: none by itself"),
        ({"feature_extractor": ["dinov2", "dinov2"]}, "allowed: each name once"),
        (
            {"feature_extractor": ["dinov2"], "inception_weights": __file__},
            "allowed with `--feature_extractor dinov2`",
        ),
        ({"inception_weights": "nowhere.pth"}, "allowed: a file that exists"),
    ],
)
def test_argument_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        FeatureArguments(**arguments)
