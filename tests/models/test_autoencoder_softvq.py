"""`AutoencoderSoftVQ` as a model: sizes, exactness of its memory switches, precision, saving and bad input."""

import copy

import pytest
import torch

from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ, TokenGaussianDistribution


TINY = {
    "sample_size": 32,
    "encoder_patch_size": 8,
    "decoder_patch_size": 16,
    "num_latent_tokens": 8,
    "latent_channels": 4,
    "codebook_size": 16,
    "num_codebooks": 2,
    "encoder_hidden_size": 32,
    "encoder_num_layers": 2,
    "encoder_num_attention_heads": 2,
    "decoder_hidden_size": 24,
    "decoder_num_layers": 2,
    "decoder_num_attention_heads": 3,
    "layer_scale_init_value": 0.5,
}
QUANTIZERS = ["softvq", "vq", "kl", "none"]
SIDES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16)}


def tiny_model(**changes) -> AutoencoderSoftVQ:
    return AutoencoderSoftVQ(**TINY | changes)


def images(batch_size: int = 3, size: tuple[int, int] = (32, 32)) -> torch.Tensor:
    return torch.rand(batch_size, 3, *size) * 2 - 1


# Millions of parameters of encoder, decoder and codebook as published; the published decoders count a patch embedding
# which they never use (16 * 16 * 3 * width + width) and which this library does not carry.
PUBLISHED = {
    ("b", "b", 64, 256): (85.96, 86.50, 1.05, 173.56),
    ("b", "l", 64, 256): (85.96, 304.27, 1.05, 391.33),
    ("l", "l", 64, 256): (303.54, 304.27, 1.05, 608.92),
    ("b", "b", 32, 256): (85.91, 86.48, 2.10, 174.59),
    ("b", "l", 32, 256): (85.91, 304.23, 2.10, 392.36),
    ("l", "l", 32, 256): (303.48, 304.23, 2.10, 609.94),
    ("b", "l", 64, 512): (86.55, 305.05, 1.05, 392.71),
    ("l", "l", 32, 512): (304.26, 305.02, 2.10, 611.51),
}


def transformer_parameters(width: int, layers: int, num_tokens: int, num_patches: int) -> int:
    """Blocks, final norm, class token, position tables: what both sides have."""
    block = 12 * width**2 + 13 * width + 2 * width
    return layers * block + 2 * width + width + (1 + num_patches) * width + num_tokens * width


@pytest.mark.parametrize("sample_size", [256, 512])
@pytest.mark.parametrize("num_latent_tokens", [32, 64])
@pytest.mark.parametrize(("encoder", "decoder"), [("s", "s"), ("b", "b"), ("b", "l"), ("l", "l")])
def test_published_sizes(encoder, decoder, num_latent_tokens, sample_size):
    size = {}
    for side, name in (("encoder", encoder), ("decoder", decoder)):
        for key, value in zip(("hidden_size", "num_layers", "num_attention_heads"), SIDES[name], strict=True):
            size[f"{side}_{key}"] = value
    latent_channels = 2048 // num_latent_tokens
    with torch.device("meta"):
        model = AutoencoderSoftVQ(
            sample_size=sample_size, num_latent_tokens=num_latent_tokens, latent_channels=latent_channels, **size
        )

    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())

    num_patches = (sample_size // 16) ** 2
    (enc_width, enc_layers, _), (dec_width, dec_layers, _) = SIDES[encoder], SIDES[decoder]
    patch = 16 * 16 * 3
    shared = (num_latent_tokens, num_patches)
    expected_encoder = (
        transformer_parameters(enc_width, enc_layers, *shared)
        + (patch + 1) * enc_width
        + num_latent_tokens * enc_width
    )
    expected_decoder = transformer_parameters(dec_width, dec_layers, *shared) + dec_width + patch * (dec_width + 1)
    assert count(model.encoder) == expected_encoder
    assert count(model.decoder) == expected_decoder
    assert count(model.quantize) == 4 * 8192 * latent_channels
    projections = (enc_width + 1) * latent_channels + (latent_channels + 1) * dec_width
    assert count(model) == expected_encoder + expected_decoder + count(model.quantize) + projections

    if (published := PUBLISHED.get((encoder, decoder, num_latent_tokens, sample_size))) is not None:
        unused = (patch + 1) * dec_width
        ours = (count(model.encoder), count(model.decoder) + unused, count(model.quantize), count(model) + unused)
        assert tuple(round(number / 1e6, 2) for number in ours) == published
    # the exact totals of SoftVQ-B-64, tensor by tensor, so that the formulas above are anchored
    if (encoder, decoder, num_latent_tokens, sample_size) == ("b", "b", 64, 256):
        assert count(model.encoder) == 85_961_472 and count(model.decoder) == 85_913_088


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_outputs(quantizer):
    model = tiny_model(quantizer=quantizer)
    output = model(images())
    assert output.sample.shape == (3, 3, 32, 32) and output.latent.shape == (3, 8, 4)
    expected_losses = {"softvq": {"entropy_loss"}, "kl": {"kl_loss"}, "none": set()}
    expected_losses["vq"] = {"entropy_loss", "vq_loss", "commit_loss"}
    assert {key for key in output if key.endswith("_loss")} == expected_losses[quantizer]
    assert all(output[key].shape == () for key in output if key.endswith("_loss"))
    expected_indices = {"softvq": (3, 2, 4), "vq": (3, 1, 8)}.get(quantizer)
    assert (None if output.indices is None else tuple(output.indices.shape)) == expected_indices

    model.eval()
    output = model(images())
    assert not any(key.endswith("_loss") for key in output)
    encoded = model.encode(pixels := images())
    assert isinstance(encoded.latent_dist, TokenGaussianDistribution) == (quantizer == "kl")
    assert torch.equal(model.encode(pixels, return_dict=False)[0], encoded.latent)
    assert torch.equal(model.decode(encoded.latent, return_dict=False)[0], model(pixels).sample)
    assert torch.equal(model(pixels, return_dict=False)[0], model(pixels).sample)


def test_every_parameter_gets_a_gradient():
    for quantizer in QUANTIZERS:
        model = tiny_model(quantizer=quantizer, num_register_tokens=2)
        output = model(images())
        (output.sample.square().mean() + sum(output[key] for key in output if key.endswith("_loss"))).backward()
        without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert without == []


def test_indices_belong_to_their_tokens():
    """Each token is quantized on its own: the indices of an image do not depend on its neighbours in the batch."""
    model = tiny_model().eval()
    pixels = images(4)
    together = model.encode(pixels).indices
    alone = torch.cat([model.encode(image).indices for image in pixels.split(1)])
    assert torch.equal(together, alone)
    # one-hot posteriors: the mix at a low temperature is the codeword of the index
    model.quantize.tau = 1e-4
    encoded = model.encode(pixels)
    entries = model.quantize.get_codebook_entry(encoded.indices)
    torch.testing.assert_close(encoded.latent, entries, atol=1e-2, rtol=0)
    assert len(encoded.indices.unique()) > 1


def test_posterior_draws_follow_the_generator():
    model = tiny_model(quantizer="kl").eval()
    pixels = images(2)
    first = model(pixels, sample_posterior=True, generator=torch.Generator().manual_seed(1)).latent
    again = model(pixels, sample_posterior=True, generator=torch.Generator().manual_seed(1)).latent
    other = model(pixels, sample_posterior=True, generator=torch.Generator().manual_seed(2)).latent
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(model(pixels).latent, model.encode(pixels).latent_dist.mode())


@pytest.mark.parametrize("registers", [(0, None), (4, None), (4, 0), (0, 4)])
def test_register_tokens(registers):
    model = tiny_model(num_register_tokens=registers[0], decoder_num_register_tokens=registers[1])
    decoder_registers = registers[0] if registers[1] is None else registers[1]
    for side, count, patches in ((model.encoder, registers[0], 16), (model.decoder, decoder_registers, 4)):
        assert side.positions.num_prefix_tokens == 1 + count
        assert side.positions.position_embedding.shape[1] == (patches if count else patches + 1)
    assert model(images()).sample.shape == (3, 3, 32, 32)


def test_images_need_not_be_square():
    model = tiny_model(sample_size=[32, 48])
    pixels = images(2, (32, 48))
    assert model(pixels).sample.shape == pixels.shape
    with pytest.raises(ValueError, match=r"\(batch, 3, 32, 48\)"):
        model(images(2, (48, 32)))
    # patches come out where they went in: with the decoder replaced by its pixel head, rows stay rows
    head = model.decoder.pixel_head
    with torch.no_grad():
        head.proj.weight.zero_()
        head.proj.bias.copy_(torch.arange(16 * 16 * 3, dtype=torch.float32))
        sample = head(torch.zeros(1, 6, 24))
    pixel = torch.arange(16 * 16 * 3, dtype=torch.float32).reshape(16, 16, 3).permute(2, 0, 1)
    assert torch.equal(sample[0, :, 16:32, 32:48], pixel)


def test_gradient_checkpointing_keeps_the_gradients():
    model = tiny_model()
    checkpointed = copy.deepcopy(model)
    checkpointed.enable_gradient_checkpointing()
    calls = []
    for block in checkpointed.encoder.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    pixels = images()
    for each in (model, checkpointed):
        output = each(pixels)
        (output.sample.square().mean() + output.entropy_loss).backward()
    assert len(calls) == 2 * len(checkpointed.encoder.blocks), "blocks are not run a second time in the backward pass"
    for (name, expected), actual in zip(model.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, msg=name)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("train", [False, True])
def test_slicing_is_exact(quantizer, train):
    model = tiny_model(quantizer=quantizer).train(train)
    pixels = images(3)
    with torch.no_grad():
        whole = model(pixels)
        model.enable_slicing()
        sliced = model(pixels)
        model.disable_slicing()
    for key in ("sample", "latent", "indices", "entropy_loss", "kl_loss"):
        torch.testing.assert_close(sliced[key] if key in sliced else None, whole[key] if key in whole else None)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_compiles_into_one_graph(quantizer):
    torch._dynamo.reset()
    model = tiny_model(quantizer=quantizer).eval()
    pixels = images(2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(pixels).sample, model(pixels).sample)
        decode = torch.compile(model.decode, fullgraph=True, backend="aot_eager")
        latent = model.encode(pixels).latent
        torch.testing.assert_close(decode(latent).sample, model.decode(latent).sample)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_exports(quantizer):
    model = tiny_model(quantizer=quantizer).eval()
    pixels = images(2)
    exported = torch.export.export(model, args=(pixels,)).module()
    torch.testing.assert_close(exported(pixels).sample, model(pixels).sample, check_stride=False)


def test_compiles_in_training():
    torch._dynamo.reset()
    model = tiny_model()
    twin = copy.deepcopy(model)
    pixels = images(2)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for each in (model, compiled):
        output = each(pixels)
        (output.sample.square().mean() + output.entropy_loss).backward()
    for expected, actual in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_half_precision_stays_finite_and_near(dtype, quantizer):
    model = tiny_model(quantizer=quantizer)
    pixels = images()
    with torch.no_grad():
        expected = model(pixels).sample
        output = model.to(dtype)(pixels.to(dtype))
    assert output.sample.dtype == dtype and output.latent.dtype == dtype
    for key in output:
        if isinstance(output[key], torch.Tensor):
            assert torch.isfinite(output[key].float()).all(), key
    if quantizer != "vq":  # a nearest codeword may change
        torch.testing.assert_close(output.sample.float(), expected, atol=0.1, rtol=0.1)


def test_similarities_stay_in_full_precision_under_autocast():
    model = tiny_model()
    latent = torch.randn(2, 8, 4)
    expected = model.quantize(latent)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = model.quantize(latent)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_save_and_load_is_exact(quantizer, tmp_path):
    model = tiny_model(quantizer=quantizer, scaling_factor=13.77, shift_factor=-0.0031).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoencoderSoftVQ.from_pretrained(tmp_path)
    assert not loaded.training
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
        k: v for k, v in model.config.items() if k[0] != "_"
    }
    pixels = images()
    assert torch.equal(loaded(pixels).sample, model(pixels).sample)
    half = AutoencoderSoftVQ.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.config.scaling_factor == 13.77


def test_latents_are_normalised_and_back():
    model = tiny_model(scaling_factor=12.5, shift_factor=0.25)
    latent = torch.randn(2, 8, 4)
    assert torch.equal(model.scale_latent(latent), (latent - 0.25) * 12.5)
    torch.testing.assert_close(model.unscale_latent(model.scale_latent(latent)), latent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantizer": "fsq"}, "`quantizer` is 'fsq', allowed: 'softvq', 'vq', 'kl', 'none'"),
        ({"num_codebooks": 3}, "`num_latent_tokens` is 8, allowed: multiples of `num_codebooks` 3"),
        ({"sample_size": 33}, "`sample_size` is 33, allowed: multiples of `encoder_patch_size` 8"),
        ({"sample_size": 24}, "multiples of `decoder_patch_size` 16"),
        ({"sample_size": [32, 32, 32]}, "`sample_size`"),
        ({"encoder_hidden_size": 33}, "`encoder_hidden_size` is 33, allowed: multiples"),
        ({"decoder_hidden_size": 25}, "`decoder_hidden_size` is 25, allowed: multiples"),
        ({"num_latent_tokens": 0}, "`num_latent_tokens` is 0"),
        ({"latent_channels": 2.5}, "`latent_channels` is 2.5"),
        ({"tau": 0.0}, "`tau` is 0.0, allowed: finite numbers above 0"),
        ({"tau": "0.1"}, "`tau` is '0.1', allowed: finite numbers above 0"),
        ({"shift_factor": float("nan")}, "`shift_factor` is nan, allowed: finite numbers"),
        ({"codebook_size": True}, "`codebook_size` is True"),
        ({"scaling_factor": 0.0}, "`scaling_factor` is 0.0"),
        ({"num_register_tokens": -1}, "`num_register_tokens` is -1"),
        ({"pixel_head": "quadratic"}, "`pixel_head` is 'quadratic'"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        tiny_model(**change)


@pytest.mark.parametrize(
    ("pixel_values", "message"),
    [
        (torch.zeros(1, 3, 32, 48), r"`pixel_values` has shape \(1, 3, 32, 48\), allowed: \(batch, 3, 32, 32\)"),
        (torch.zeros(1, 1, 32, 32), r"\(1, 1, 32, 32\)"),
        (torch.zeros(3, 32, 32), r"\(3, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "dtype torch.uint8, allowed: floating-point"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.float64), "dtype torch.float64, allowed: torch.float32"),
        (torch.full((1, 3, 32, 32), float("nan")), "`pixel_values` holds NaN or infinite"),
        (torch.full((1, 3, 32, 32), float("inf")), "`pixel_values` holds NaN or infinite"),
    ],
)
def test_bad_images(pixel_values, message):
    model = tiny_model()
    for method in (model.encode, model):
        with pytest.raises(ValueError, match=message):
            method(pixel_values)


@pytest.mark.parametrize(
    ("latent", "message"),
    [
        (torch.zeros(1, 7, 4), r"`latent` has shape \(1, 7, 4\), allowed: \(batch, 8, 4\)"),
        (torch.zeros(1, 8, 5), r"\(1, 8, 5\)"),
        (torch.zeros(8, 4), r"\(8, 4\)"),
        (torch.zeros(1, 8, 4, dtype=torch.long), "torch.int64"),
        (torch.zeros(1, 8, 4, dtype=torch.float16), "dtype torch.float16, allowed: torch.float32"),
        (torch.full((1, 8, 4), float("nan")), "`latent` holds NaN"),
    ],
)
def test_bad_latents(latent, message):
    with pytest.raises(ValueError, match=message):
        tiny_model().decode(latent)
