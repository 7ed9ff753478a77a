"""Feature extractors: Inception as torch-fidelity has it, and models of transformers."""

import email.message
import hashlib
import io
import json
import os
import pathlib
import shutil

import numpy as np
import PIL.Image
import pytest
import skimage.data
import torch
from safetensors.torch import load_file, save_file
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from transformers import (
    AutoConfig,
    AutoModel,
    BitImageProcessor,
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from softvq_hf.metrics import (
    FeatureWeightsUnavailable,
    InceptionFeatureExtractor,
    TransformersFeatureExtractor,
    load_feature_extractor,
)
from softvq_hf.metrics.features import weights_sha256


PROCESSOR = {"size": {"height": 32, "width": 32}, "do_center_crop": False, "resample": 3}
VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
CONVOLUTIONAL = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Three photographs, 60 x 80 pixels."""
    photograph = torch.from_numpy(np.array(skimage.data.astronaut())).permute(2, 0, 1)
    return torch.stack([photograph[:, 100 * i : 100 * i + 60, 50 * i : 50 * i + 80] for i in range(3)])


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory) -> str:
    """Random weights in the form of torch-fidelity's file."""
    path = str(tmp_path_factory.mktemp("inception") / "inception.pth")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as monkeypatch:  # the class cannot be made without a file of weights
        monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state_dict: None)
        torch.save({}, path)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=path)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), path)
    return path


def test_inception_is_that_of_torch_fidelity(inception_weights, images):
    library = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=inception_weights
    )
    maps = []
    library.Mixed_6d.register_forward_hook(lambda module, inputs, output: maps.append(output))
    features, logits = library(images)

    extractor = InceptionFeatureExtractor(inception_weights)
    output = extractor(images)
    assert torch.equal(output.features, features) and features.shape == (3, 2048)
    assert torch.equal(output.logits, logits) and logits.shape == (3, 1008)
    # the first branch's channels come first in the block's output
    assert torch.equal(output.spatial_features, maps[0][:, :7].permute(0, 2, 3, 1).reshape(3, 17 * 17 * 7))
    assert features.std() > 0.01 and logits.std() > 0.01 and output.spatial_features.std() > 0.01
    sizes = (extractor.num_features, extractor.num_spatial_features, extractor.num_classes)
    assert sizes == (2048, 2023, 1008)


@pytest.mark.parametrize("is_published", [False, True])
@pytest.mark.parametrize("source", ["weights_path", "cache"])
def test_only_the_published_weights_are_called_inception(
    source, is_published, inception_weights, tmp_path, monkeypatch
):
    """Wherever the file came from."""
    sha256 = hashlib.sha256(pathlib.Path(inception_weights).read_bytes()).hexdigest()
    url = URL_INCEPTION_V3.replace("6726825d", sha256[:8]) if is_published else URL_INCEPTION_V3
    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.URL_INCEPTION_V3", url)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    if source == "cache":
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / url.rsplit("/", 1)[1]).symlink_to(inception_weights)
    extractor = load_feature_extractor("inception", weights_path=None if source == "cache" else inception_weights)
    assert extractor.label == ("Inception" if is_published else f"Inception with weights {sha256[:8]}")


def test_inception_describes_its_weights(inception_weights, tmp_path):
    description = InceptionFeatureExtractor(inception_weights).description()
    weights = torch.load(inception_weights, weights_only=True)
    save_file(weights, tmp_path / "same.safetensors")
    torch.save({**weights, "fc.weight": weights["fc.weight"] + 1e-6}, tmp_path / "other.pth")
    assert InceptionFeatureExtractor(tmp_path / "same.safetensors").description() == description
    other = InceptionFeatureExtractor(tmp_path / "other.pth").description()
    assert [key for key in description if other[key] != description[key]] == ["weights_sha256"]
    assert json.loads(json.dumps(description)) == description


def test_inception_without_weights_says_what_to_place_where(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", refuse_connection)
    with pytest.raises(FeatureWeightsUnavailable) as error:
        load_feature_extractor("inception")
    file = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    assert f"Download {URL_INCEPTION_V3} on a machine with network and put it at {file}" in str(error.value)


def refuse_connection(*args, **kwargs):
    raise OSError("no network")


def test_downloaded_inception_of_another_hash_is_refused(tmp_path, monkeypatch, inception_weights):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("softvq_hf.metrics.weights.urllib.request.urlopen", lambda *args, **kwargs: open(os.devnull))
    monkeypatch.setattr("torch.hub.urlopen", lambda request: PublishedFile(inception_weights))
    with pytest.raises(FeatureWeightsUnavailable, match='invalid hash value .expected "6726825d"'):
        load_feature_extractor("inception")
    assert list((tmp_path / "checkpoints").iterdir()) == []


class PublishedFile(io.FileIO):
    """A file as `urlopen` gives it."""

    def info(self) -> email.message.Message:
        return email.message.Message()


def test_inception_takes_weights_from_the_cache(tmp_path, monkeypatch, inception_weights, images):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth").symlink_to(inception_weights)
    expected = load_feature_extractor("inception", weights_path=inception_weights)(images[:1])
    assert torch.equal(load_feature_extractor("inception")(images[:1]).features, expected.features)


class Payload:
    """What a pickle executes when it is opened without care."""

    def __init__(self, file) -> None:
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


def test_inception_executes_nothing_of_a_file(tmp_path):
    torch.save({"fc.bias": Payload(tmp_path / "executed")}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="weights.pth' cannot be read"):
        InceptionFeatureExtractor(tmp_path / "weights.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"fc.bias": torch.zeros(1008)}, "(?s)are not those of torch-fidelity's Inception-v3: .*Missing key"),
        ([torch.zeros(1)], "holds no state dict"),
        ({"epoch": 3}, "holds no state dict"),
        ({1: torch.zeros(1)}, "holds no state dict"),
    ],
)
def test_inception_refuses_other_files(content, message, tmp_path):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=message):
        InceptionFeatureExtractor(tmp_path / "weights.pth")


def test_inception_refuses_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="`weights_path` is .*nowhere.pth', allowed: an existing file"):
        InceptionFeatureExtractor(tmp_path / "nowhere.pth")
    (tmp_path / "broken.pth").write_bytes(b"<html>404</html>")
    whole = io.BytesIO()
    torch.save({"fc.bias": torch.zeros(3)}, whole, _use_new_zipfile_serialization=False)
    junk = {"tensors": whole.getvalue()[:-8], "short": b"\x80\x02M", "empty": b"", "text": b"\x80\x02X\x01\0\0\0\xff."}
    for name, content in junk.items():
        (tmp_path / f"{name}.pth").write_bytes(content)
    (tmp_path / "broken.safetensors").write_bytes(b"<html>404</html>")
    for name in ("broken.pth", "broken.safetensors", *(f"{name}.pth" for name in junk)):
        with pytest.raises(ValueError, match=f"{name}' cannot be read"):
            InceptionFeatureExtractor(tmp_path / name)


def save(model, folder, processor: BitImageProcessor | None = None) -> str:
    """A folder of a model with random weights and its image processor."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    (processor or BitImageProcessor(**PROCESSOR)).save_pretrained(folder)
    return str(folder)


def preprocess(images: torch.Tensor) -> torch.Tensor:
    """What `PROCESSOR` says, by PIL and numpy."""
    processor = BitImageProcessor(**PROCESSOR)
    resized = [PIL.Image.fromarray(image.permute(1, 2, 0).numpy()).resize((32, 32), 3) for image in images]
    arrays = (np.stack([np.array(image) for image in resized]) / 255 - processor.image_mean) / processor.image_std
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float()


@pytest.mark.parametrize(
    ("model", "num_spatial_features"),
    [
        (ResNetForImageClassification(ResNetConfig(**CONVOLUTIONAL, embedding_size=8, num_labels=5)), 2 * 2 * 7),
        (ConvNextForImageClassification(ConvNextConfig(**CONVOLUTIONAL, num_labels=5)), 2 * 2 * 7),
        (ViTForImageClassification(ViTConfig(**VIT, image_size=32, patch_size=8, num_labels=5)), None),
        (Dinov2ForImageClassification(Dinov2Config(**VIT, image_size=32, patch_size=8, num_labels=5)), None),
    ],
    ids=lambda argument: type(argument).__name__,
)
def test_features_of_a_classifier_are_what_its_last_layer_gets(model, num_spatial_features, tmp_path, images):
    folder = save(model, tmp_path / "tiny_classifier")
    extractor = load_feature_extractor(folder)
    output = extractor(images)
    with torch.no_grad():
        expected = model.eval()(preprocess(images), output_hidden_states=True)
        linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
        assert torch.allclose(linear(output.features), output.logits, atol=1e-5)
    # torchvision's bicubic resizing and PIL's differ by a level here and there
    assert torch.allclose(output.logits, expected.logits, atol=0.05 * expected.logits.std().item())
    assert output.features.std() > 1e-3 and (output.logits[0] - output.logits[1]).abs().max() > 1e-3
    assert output.features.shape == (3, extractor.num_features)
    assert output.logits.shape == (3, extractor.num_classes) == (3, 5)
    assert extractor.label == "tiny_classifier"
    assert extractor.num_spatial_features == num_spatial_features
    if num_spatial_features is None:
        assert output.spatial_features is None
    else:
        stage = expected.hidden_states[-2]
        assert stage.shape[2:] == (2, 2)
        expected_map = stage[:, :7].permute(0, 2, 3, 1).flatten(1)
        assert torch.allclose(output.spatial_features, expected_map, atol=0.05 * expected_map.std().item())


def test_large_maps_are_averaged_to_7_by_7(tmp_path, images):
    model = ResNetModel(
        ResNetConfig(hidden_sizes=[4, 8], depths=[1, 1], embedding_size=4, downsample_in_first_stage=False)
    )
    processor = BitImageProcessor(size={"height": 112, "width": 112}, do_center_crop=False)
    extractor = TransformersFeatureExtractor(save(model, tmp_path, processor))
    assert model(torch.zeros(1, 3, 112, 112), output_hidden_states=True).hidden_states[-2].shape[1:] == (4, 28, 28)
    assert extractor.num_spatial_features == 7 * 7 * 4
    assert extractor(images).spatial_features.shape == (3, 7 * 7 * 4)


def test_features_of_other_models_are_the_pooled_ones(tmp_path, images):
    dinov2 = Dinov2Model(Dinov2Config(**VIT, image_size=32, patch_size=8))
    output = TransformersFeatureExtractor(save(dinov2, tmp_path / "dinov2"))(images)
    with torch.no_grad():
        class_tokens = dinov2.eval()(preprocess(images)).last_hidden_state[:, 0]
    assert torch.allclose(output.features, class_tokens, atol=0.05 * class_tokens.std().item())
    assert output.logits is None and output.spatial_features is None

    resnet = ResNetModel(ResNetConfig(**CONVOLUTIONAL, embedding_size=8))
    output = TransformersFeatureExtractor(save(resnet, tmp_path / "resnet"))(images)
    with torch.no_grad():
        means = resnet.eval()(preprocess(images)).last_hidden_state.mean((2, 3))
    assert torch.allclose(output.features, means, atol=0.05 * means.std().item())


def test_features_without_a_pooler_are_the_mean_of_the_patch_tokens(tmp_path, images):
    vit = ViTModel(ViTConfig(**VIT, image_size=32, patch_size=8), add_pooling_layer=False)
    folder = save(vit, tmp_path)
    output = TransformersFeatureExtractor(folder)(images)
    with torch.no_grad():
        means = vit.eval()(preprocess(images)).last_hidden_state[:, 1:].mean(1)
    assert torch.allclose(output.features, means, atol=0.05 * means.std().item())
    # transformers would draw the pooler's weights at random
    again = TransformersFeatureExtractor(folder)
    assert torch.equal(again(images).features, output.features)


def test_image_text_models_give_their_vision_model(tmp_path, images):
    vision, text = {**VIT, "image_size": 32, "patch_size": 8}, {**VIT, "vocab_size": 10}
    clip = CLIPModel(CLIPConfig(vision_config=vision, text_config=text))
    output = TransformersFeatureExtractor(save(clip, tmp_path))(images)
    with torch.no_grad():
        expected = clip.eval().vision_model(preprocess(images)).pooler_output
    assert torch.allclose(output.features, expected, atol=0.05 * expected.std().item())


@pytest.fixture
def classifier_dir(tmp_path) -> str:
    model = ResNetForImageClassification(ResNetConfig(**CONVOLUTIONAL, embedding_size=8, num_labels=5))
    return save(model, tmp_path / "classifier")


def test_features_do_not_depend_on_the_batch_or_on_autocast(classifier_dir, images):
    extractor = load_feature_extractor(classifier_dir)
    output = extractor(images)
    alone = torch.cat([extractor(image[None]).features for image in images])
    assert torch.allclose(alone, output.features, rtol=1e-4, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(extractor(images).features, output.features)
    assert output.features.dtype == torch.float32 and not output.features.requires_grad


def test_extractors_stay_in_eval_mode(classifier_dir, images):
    extractor = load_feature_extractor(classifier_dir)
    features = extractor(images).features
    extractor.train()
    assert torch.equal(extractor(images).features, features)


def test_descriptions_tell_extractors_apart(classifier_dir, tmp_path, images):
    extractor = load_feature_extractor(classifier_dir)
    description = extractor.description()
    assert json.loads(json.dumps(description)) == description
    assert description["weights_sha256"] == weights_sha256(extractor.model)

    moved = shutil.copytree(classifier_dir, tmp_path / "moved")
    assert load_feature_extractor(str(moved)).description() == description

    processor = BitImageProcessor(**{**PROCESSOR, "resample": 2})
    other = TransformersFeatureExtractor(classifier_dir, image_processor=processor)
    assert [key for key in description if other.description()[key] != description[key]] == ["preprocessing"]
    assert not torch.equal(other(images).features, extractor(images).features)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 3, 32, 32), "dtype torch.float32, allowed: .* uint8"),
        (torch.zeros(3, 32, 32, dtype=torch.uint8), r"shape \(3, 32, 32\)"),
        (torch.zeros(2, 32, 32, 3, dtype=torch.uint8), r"shape \(2, 32, 32, 3\)"),
        (torch.zeros(0, 3, 32, 32, dtype=torch.uint8), r"shape \(0, 3, 32, 32\)"),
    ],
)
def test_other_images_are_refused(images, message, classifier_dir):
    with pytest.raises(ValueError, match=f"`images` has .*{message}"):
        load_feature_extractor(classifier_dir)(images)


def test_dinov2_has_the_preprocessing_of_its_paper(monkeypatch, tmp_path, images):
    model = Dinov2Model(Dinov2Config(**VIT, image_size=224, patch_size=14))
    folder = save(model, tmp_path)
    for auto_class in (AutoConfig, AutoModel):  # a tiny DINOv2 in place of the large one
        from_pretrained = auto_class.from_pretrained
        monkeypatch.setattr(auto_class, "from_pretrained", redirect(from_pretrained, "facebook/dinov2-large", folder))
    extractor = load_feature_extractor("dinov2")
    assert extractor.label == "DINOv2"
    preprocessing = extractor.description()["preprocessing"]
    assert preprocessing["size"] == {"height": 224, "width": 224} and preprocessing["resample"] == 3
    resized = np.stack(
        [np.array(PIL.Image.fromarray(image.permute(1, 2, 0).numpy()).resize((224, 224), 3)) for image in images]
    )
    pixel_values = (resized / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(pixel_values).permute(0, 3, 1, 2).float()).last_hidden_state[:, 0]
    assert torch.allclose(extractor(images).features, expected, atol=0.02 * expected.std().item())


def redirect(from_pretrained, name: str, folder: str):
    """`from_pretrained` that finds a folder under the name of a repository."""
    return lambda requested, **kwargs: from_pretrained(folder if requested == name else requested, **kwargs)


def test_missing_models_say_what_is_allowed(tmp_path, monkeypatch, classifier_dir):
    with pytest.raises(
        FeatureWeightsUnavailable, match="nowhere' could not be loaded .* Allowed: 'inception', 'dinov2'"
    ):
        load_feature_extractor(str(tmp_path / "nowhere"))
    os.remove(os.path.join(classifier_dir, "preprocessor_config.json"))
    with pytest.raises(FeatureWeightsUnavailable, match="preprocessor_config.json"):
        load_feature_extractor(classifier_dir)


def test_weights_other_than_safetensors_are_not_opened(classifier_dir):
    weights = load_file(os.path.join(classifier_dir, "model.safetensors"))
    os.remove(os.path.join(classifier_dir, "model.safetensors"))
    torch.save(weights, os.path.join(classifier_dir, "pytorch_model.bin"))
    with pytest.raises(FeatureWeightsUnavailable, match="could not be loaded"):
        load_feature_extractor(classifier_dir)


def test_incomplete_and_misshapen_weights_are_refused(classifier_dir):
    file = os.path.join(classifier_dir, "model.safetensors")
    weights = load_file(file)
    save_file({**weights, "classifier.1.bias": torch.zeros(6)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="do not fit its config"):
        load_feature_extractor(classifier_dir)
    del weights["classifier.1.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights of its model: classifier.1.weight"):
        load_feature_extractor(classifier_dir)


def test_classifiers_without_a_last_layer_are_refused(tmp_path):
    model = ResNetForImageClassification(ResNetConfig(**CONVOLUTIONAL, embedding_size=8, num_labels=0))
    with pytest.raises(ValueError, match="whose last layer gives no logits for its 0 classes"):
        load_feature_extractor(save(model, tmp_path))


def test_weights_path_is_for_inception_only(classifier_dir):
    with pytest.raises(ValueError, match="`weights_path` is 'file.pth', allowed: None for 'dinov2'"):
        load_feature_extractor("dinov2", weights_path="file.pth")


def test_code_of_a_model_is_not_executed(classifier_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *args: "y")  # transformers asks, unless it is told
    (pathlib.Path(classifier_dir) / "config.json").write_text(
        json.dumps({"model_type": "other", "auto_map": {"AutoConfig": "code.OtherConfig"}})
    )
    (pathlib.Path(classifier_dir) / "code.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    with pytest.raises(ValueError, match="custom code"):
        load_feature_extractor(classifier_dir)
    assert not (tmp_path / "executed").exists()
