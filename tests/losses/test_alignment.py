"""Alignment to a frozen teacher: the official values and gradients, and what the teacher is shown and gives back."""

import pytest
import torch
from torch import nn
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    AltCLIPConfig,
    AltCLIPModel,
    AutoModel,
    BertConfig,
    BertModel,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    MetaClip2Config,
    MetaClip2Model,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)
from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

from softvq_hf.losses.alignment import ALIGNMENT_MODES, AlignmentLoss, FrozenTeacher, load_teacher


TEACHER_CONFIG = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 70,
    "patch_size": 14,
}


@pytest.fixture(params=["dinov2", "dinov2_with_registers"])
def teacher_folder(request, tmp_path):
    if request.param == "dinov2":
        model = Dinov2Model(Dinov2Config(**TEACHER_CONFIG))
    else:
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**TEACHER_CONFIG, num_register_tokens=3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


@pytest.fixture
def official(golden):
    description, tensors = golden("softvq_losses")

    def build(mode):
        loss = AlignmentLoss(6, 24, hidden_dim=description["config"]["repa_proj_dim"], mode=mode)
        prefix = "input.projection."
        weights = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        loss.projection.load_state_dict(weights)
        return loss, description["config"]["repa_loss_weight"]

    return build, tensors


# The reference's permutation is given as numbers: shuffled teacher tokens in mode avg_1d are mode avg_1d_shuffle.
@pytest.mark.parametrize(
    ("mode", "case"),
    [("global", "global"), ("avg_1d", "avg_1d"), ("avg_1d", "avg_1d_shuffle"), ("repeat", "repeat")],
)
def test_official_value_and_gradient(official, mode, case):
    build, tensors = official
    alignment_loss, weight = build(mode)
    latent, teacher_tokens = tensors["input.align_latents"].clone().requires_grad_(), tensors["input.align_teacher"]
    if case == "avg_1d_shuffle":
        teacher_tokens = teacher_tokens[:, tensors["input.align_permutation"]]
    loss = weight * alignment_loss(latent, teacher_tokens)
    loss.backward()
    torch.testing.assert_close(loss, tensors[f"output.align_{case}"], atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(latent.grad, tensors[f"output.align_{case}_grad_latents"], atol=1e-7, rtol=1e-5)
    assert all(parameter.grad.abs().sum() > 0 for parameter in alignment_loss.parameters())


def test_shuffle_follows_the_generator(official):
    build, tensors = official
    latent, teacher_tokens = tensors["input.align_latents"], tensors["input.align_teacher"]
    shuffled, pooled = build("avg_1d_shuffle")[0], build("avg_1d")[0]
    permutation = torch.randperm(32, generator=torch.Generator().manual_seed(2))
    value = shuffled(latent, teacher_tokens, generator=torch.Generator().manual_seed(2))
    assert torch.equal(value, pooled(latent, teacher_tokens[:, permutation]))
    assert not torch.equal(value, shuffled(latent, teacher_tokens, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("mode", ALIGNMENT_MODES)
def test_bounds_and_half_precision(mode):
    alignment_loss = AlignmentLoss(4, 5, hidden_dim=8, mode=mode)
    latent = torch.randn(2, 3, 4)
    with torch.no_grad():
        # A projection that copies one latent channel everywhere points the same way as the teacher's constant tokens.
        for parameter in alignment_loss.parameters():
            parameter.zero_()
        alignment_loss.projection[4].bias.fill_(2.0)
    torch.testing.assert_close(alignment_loss(latent, torch.ones(2, 6, 5)), torch.tensor(-1.0))
    torch.testing.assert_close(alignment_loss(latent, -torch.ones(2, 6, 5)), torch.tensor(1.0))
    assert alignment_loss.bfloat16()(latent.bfloat16(), torch.ones(2, 6, 5).bfloat16()).dtype == torch.float32


def test_bad_alignment_input():
    with pytest.raises(ValueError, match="`mode` is 'mean', allowed: global, avg_1d, avg_1d_shuffle, repeat"):
        AlignmentLoss(4, 5, mode="mean")
    with pytest.raises(ValueError, match="`hidden_dim` is 0"):
        AlignmentLoss(4, 5, hidden_dim=0)
    alignment_loss = AlignmentLoss(4, 5, hidden_dim=8)
    with pytest.raises(ValueError, match="`teacher_tokens` has 16 tokens, .* multiples of the 3 tokens of `latent`"):
        alignment_loss(torch.zeros(2, 3, 4), torch.zeros(2, 16, 5))
    with pytest.raises(ValueError, match="`latent` has shape"):
        alignment_loss(torch.zeros(2, 3, 7), torch.zeros(2, 6, 5))
    for shape in [(1, 6, 5), (2, 6, 4), (2, 5)]:
        with pytest.raises(ValueError, match="`teacher_tokens` has shape"):
            alignment_loss(torch.zeros(2, 3, 4), torch.zeros(shape))


def test_official_teacher_input(golden):
    _, tensors = golden("softvq_losses")
    teacher = FrozenTeacher(Dinov2Model(Dinov2Config(**{**TEACHER_CONFIG, "patch_size": 8})), resolution=24)
    torch.testing.assert_close(
        teacher.preprocess(tensors["input.image"]), tensors["output.teacher_input"], atol=1e-6, rtol=0
    )


def test_teacher_gives_normalised_patch_tokens_in_raster_order(teacher_folder):
    teacher = load_teacher(str(teacher_folder), resolution=70)
    assert (teacher.num_tokens, teacher.hidden_size) == (25, 16)
    images = (torch.rand(2, 3, 70, 70) * 2 - 1).requires_grad_()
    tokens = teacher(images)
    assert tokens.shape == (2, 25, 16) and not tokens.requires_grad

    model = AutoModel.from_pretrained(teacher_folder).requires_grad_(False)
    images = images.detach()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixel_values = ((images + 1) / 2 - mean[:, None, None]) / std[:, None, None]
    hidden_states = model.layernorm(model(pixel_values=pixel_values, output_hidden_states=True).hidden_states[-1])
    torch.testing.assert_close(tokens, hidden_states[:, hidden_states.shape[1] - 25 :], atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens, model(pixel_values=pixel_values).last_hidden_state[:, -25:], atol=1e-6, rtol=0)

    # Without positions and attention a change of the second row's first patch changes that token alone.
    changed = images.clone()
    changed[:, :, 14:28, :14] = 0
    with torch.no_grad():
        for layer in teacher.model.encoder.layer:
            layer.attention.o_proj.weight.zero_()
    difference = (teacher(changed) - teacher(images)).abs().sum((0, 2))
    assert difference.nonzero().flatten().tolist() == [5]


def test_teacher_is_frozen_and_is_no_part_of_the_loss(teacher_folder):
    teacher = load_teacher(str(teacher_folder), resolution=70)
    assert not teacher.train().training and not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    alignment_loss = AlignmentLoss(4, teacher.hidden_size, hidden_dim=8)
    assert set(alignment_loss.state_dict()) == {
        f"projection.{i}.{name}" for i in (0, 2, 4) for name in ("weight", "bias")
    }
    latent = torch.randn(1, 5, 4, requires_grad=True)
    alignment_loss(latent, teacher(torch.zeros(1, 3, 70, 70))).backward()
    assert latent.grad.abs().sum() > 0
    assert teacher.bfloat16()(torch.zeros(1, 3, 70, 70)).dtype == torch.bfloat16


def test_patch_size_of_the_published_tokenizers(teacher_folder):
    """Images of 64 pixels at patch size 16 reach a patch-14 teacher as 56 pixels: 4x4 interpolated positions."""
    teacher = load_teacher(str(teacher_folder), resolution=64, patch_size=16)
    assert teacher.num_tokens == 16
    images = nn.functional.interpolate(torch.rand(2, 3, 4, 4) * 2 - 1, size=(64, 64), mode="bilinear")
    assert teacher.preprocess(images).shape == (2, 3, 56, 56)
    tokens = teacher(images)
    assert tokens.shape == (2, 16, 16) and tokens.isfinite().all()
    smaller = nn.functional.interpolate(images, size=(56, 56), mode="bicubic", antialias=True)
    assert torch.equal(tokens, load_teacher(str(teacher_folder), resolution=56)(smaller))


def test_teachers_that_do_not_fit(teacher_folder, tmp_path):
    with pytest.raises(ValueError, match="`resolution` is 64, allowed: multiples of the teacher's `patch_size`, 14"):
        load_teacher(str(teacher_folder), resolution=64)
    with pytest.raises(ValueError, match=r"`images` has shape \(1, 3, 56, 56\), allowed: \(B, 3, 70, 70\)"):
        load_teacher(str(teacher_folder), resolution=70)(torch.zeros(1, 3, 56, 56))
    with pytest.raises(OSError, match="The teacher '.*nowhere' could not be loaded .* Hub id .* cache, /"):
        load_teacher(str(tmp_path / "nowhere"), resolution=64)
    incomplete = AutoModel.from_pretrained(teacher_folder)
    state_dict = incomplete.state_dict()
    del state_dict["layernorm.weight"]
    incomplete.save_pretrained(tmp_path / "incomplete", state_dict=state_dict)
    with pytest.raises(ValueError, match=r"incomplete' lacks weights of its model: layernorm\.weight"):
        load_teacher(str(tmp_path / "incomplete"), resolution=70)


TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VISION = {**TINY, "image_size": 32, "patch_size": 8}
TEXT = {**TINY, "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1}


def two_towers(config_class, model_class, vision=VISION, **text):
    return model_class(config_class(text_config={**TEXT, **text}, vision_config=vision))


TEACHERS = {
    "vit": lambda: ViTModel(ViTConfig(**VISION)),
    "deit": lambda: DeiTModel(DeiTConfig(**VISION)),
    "dinov3": lambda: DINOv3ViTModel(DINOv3ViTConfig(**VISION, num_register_tokens=3)),
    "clip": lambda: two_towers(CLIPConfig, CLIPModel),
    "clip vision": lambda: CLIPVisionModel(CLIPVisionConfig(**VISION)),
    "chinese_clip": lambda: two_towers(ChineseCLIPConfig, ChineseCLIPModel),
    "altclip": lambda: two_towers(AltCLIPConfig, AltCLIPModel, project_dim=16),
    "metaclip_2": lambda: two_towers(MetaClip2Config, MetaClip2Model),
    "siglip": lambda: two_towers(SiglipConfig, SiglipModel),
    "siglip vision": lambda: SiglipVisionModel(SiglipVisionConfig(**VISION)),
    "siglip2": lambda: two_towers(Siglip2Config, Siglip2Model, {**TINY, "num_patches": 16, "patch_size": 8}),
    "aimv2": lambda: Aimv2VisionModel(Aimv2VisionConfig(**VISION)),
}


def final_norm_tokens(vision_model, images, grid_size):
    """Patch tokens by another way: the output of the last block and the norm that follows it."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    inputs = {"pixel_values": ((images + 1) / 2 - mean[:, None, None]) / std[:, None, None]}
    if vision_model.config.model_type == "siglip2_vision_model":
        inputs = {
            "pixel_values": torch.stack([convert_image_to_patches(x, patch_size=8) for x in inputs["pixel_values"]]),
            "pixel_attention_mask": torch.ones(len(images), grid_size**2, dtype=torch.long),
            "spatial_shapes": torch.tensor([[grid_size, grid_size]] * len(images)),
        }
    norms = [getattr(vision_model, name, None) for name in ("post_layernorm", "layernorm", "norm", "rms_norm")]
    (norm,) = [module for module in norms if module is not None]
    with torch.no_grad():
        blocks = vision_model.eval()(**inputs, output_hidden_states=True).hidden_states
        return norm(blocks[-1])[:, -(grid_size**2) :]


@pytest.mark.parametrize("name", TEACHERS)
def test_every_architecture_gives_its_patch_tokens_after_the_final_norm(name, tmp_path):
    model = TEACHERS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path, resolution=32)
    assert (teacher.num_tokens, teacher.hidden_size) == (16, 16)
    assert not any("text" in key for key in teacher.state_dict())  # the image-text model is gone but for its eyes
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    expected = final_norm_tokens(getattr(model, "vision_model", model), images, grid_size=4)
    torch.testing.assert_close(teacher(images), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
    assert teacher.bfloat16()(images).dtype == torch.bfloat16


@pytest.mark.parametrize("name", sorted(set(TEACHERS) - {"aimv2"}))
def test_every_architecture_at_another_resolution_and_patch_size(name):
    """Images of 96 pixels at patch size 16: 6x6 patches of 8 pixels, where the model has 4x4 positions."""
    model = TEACHERS[name]()
    model = getattr(model, "vision_model", model)
    teacher = FrozenTeacher(model, resolution=96, patch_size=16)
    images = torch.rand(2, 3, 96, 96) * 2 - 1
    assert teacher.preprocess(images).shape == (2, 3, 48, 48)
    tokens = teacher(images)
    assert tokens.shape == (2, 36, 16) and tokens.isfinite().all()
    # Where the patches are: a change of the images' second row moves its token most, without attention only that one.
    for module in model.modules():
        for projection in ("o_proj", "out_proj"):
            if isinstance(getattr(module, projection, None), nn.Linear):
                nn.init.zeros_(getattr(module, projection).weight)
    changed = images.clone()
    changed[:, :, 20:28, 4:12] += 1  # the antialiased resize keeps this within its patch
    difference = (teacher(changed) - teacher(images)).abs().sum((0, 2))
    assert difference.argmax() == 6


def test_positions_that_cannot_be_interpolated():
    with pytest.raises(
        ValueError, match="`resolution` is 64 with `patch_size` 8, allowed: 32; .* 'aimv2_vision_model'"
    ):
        FrozenTeacher(TEACHERS["aimv2"](), resolution=64)
    with pytest.raises(ValueError, match="`resolution` is 96 with `patch_size` 16, allowed: 64"):
        FrozenTeacher(TEACHERS["aimv2"](), resolution=96, patch_size=16)
    assert FrozenTeacher(TEACHERS["aimv2"](), resolution=64, patch_size=16).num_tokens == 16


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: BertModel(BertConfig(**TINY, vocab_size=20)), "model type 'bert', allowed: vision models"),
        (lambda: ViTMAEModel(ViTMAEConfig(**VISION)), "model type 'vit_mae', allowed: vision models with a token for"),
        (
            lambda: ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2, image_size=32)),
            r"output of shape \(1, 8, 4, 4\) for 8x8 patches, allowed: \(1, N, D\) with N = 64 plus 0 or 1 tokens",
        ),
    ],
    ids=["no vision model", "random patches", "no tokens"],
)
def test_models_without_patch_tokens(model, message):
    with pytest.raises(ValueError, match=message):
        FrozenTeacher(model(), resolution=32)


def test_alignment_of_a_generator_is_repa():
    """Hidden states with a token for each of the teacher's: minus the mean cosine after Linear, SiLU, three times."""
    alignment_loss = AlignmentLoss(12, 5, hidden_dim=2048, mode="repeat")
    hidden_states, teacher_tokens = torch.randn(2, 9, 12, requires_grad=True), torch.randn(2, 9, 5)
    linears = [module for module in alignment_loss.projection if isinstance(module, nn.Linear)]
    assert [linear.out_features for linear in linears] == [2048, 2048, 5]
    student = linears[2](nn.functional.silu(linears[1](nn.functional.silu(linears[0](hidden_states)))))
    cosines = [
        student[b, n] @ teacher_tokens[b, n] / (student[b, n].norm() * teacher_tokens[b, n].norm())
        for b in range(2)
        for n in range(9)
    ]
    loss = alignment_loss(hidden_states, teacher_tokens)
    torch.testing.assert_close(loss, -torch.stack(cosines).mean(), atol=1e-6, rtol=0)
    loss.backward()
    assert hidden_states.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_the_dtype_of_autocast_give_the_same_tokens(teacher_folder, dtype):
    teacher = load_teacher(teacher_folder, 64, patch_size=16)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.autocast("cpu", dtype):
        expected = teacher(images)
        assert teacher.cast_linear_weights(dtype) is teacher
        assert torch.equal(teacher(images), expected) and expected.dtype == torch.float32
    assert {module.weight.dtype for module in teacher.modules() if isinstance(module, nn.Linear)} == {dtype}
    assert not torch.equal(teacher.float()(images), expected)  # autocast had an effect
