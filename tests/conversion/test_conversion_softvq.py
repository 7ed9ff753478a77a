"""The official tokenizers, tiny: every intermediate, latent, index, reconstruction, loss and gradient."""

import re

import pytest
import torch
import torch.nn.functional as F
from diffusers import VQModel
from torch import nn

from softvq_hf.conversion import convert_checkpoint
from softvq_hf.conversion.softvq import convert_softvq


TOLERANCE = {"atol": 1e-5, "rtol": 0.0}


@pytest.fixture
def reference(golden):
    """`reference(name) -> (model, inputs, outputs, description, official weights)`."""

    def load(name: str):
        description, tensors = golden(name)
        parts = {"weights": {}, "input": {}, "output": {}}
        for key, tensor in tensors.items():
            kind, name = key.split(".", 1)
            parts[kind][name] = tensor
        config = {k: description[k] for k in ("encoder_override", "decoder_override")} | description["config"]
        model = convert_softvq(parts["weights"], config)
        return model, parts["input"], parts["output"], config, parts["weights"]

    return load


def record(module: torch.nn.Module, name: str, into: dict) -> None:
    module.register_forward_hook(lambda _, args, output: into.update({name: output, f"{name}.input": args[0]}))


def test_softvq_intermediates(reference):
    model, inputs, outputs, *_ = reference("softvq_tokenizer")
    seen = {}
    for name, module in {
        "enc_patch_embed": model.encoder.patch_embed,
        "enc_block0": model.encoder.blocks[0],
        "enc_norm_all": model.encoder.norm,
        "encoder": model.encoder,
        "quant_conv": model.quant_conv,
        "post_quant_conv": model.post_quant_conv,
        "dec_block0": model.decoder.blocks[0],
        "dec_norm_all": model.decoder.norm,
        "dec_patches": model.decoder.pixel_head.proj,
    }.items():
        record(module, name, seen)
    with torch.no_grad():
        encoded = model.encode(inputs["image"])
        sample = model.decode(encoded.latent).sample
    seen["enc_patch_embed"] = seen["enc_patch_embed"].flatten(2).transpose(1, 2)
    seen["enc_input"] = seen["enc_block0.input"]
    seen["dec_input"] = seen["dec_block0.input"]
    seen["dec_patches"] = seen["dec_patches"][:1]
    for name in (
        "enc_patch_embed enc_input enc_block0 enc_norm_all encoder quant_conv post_quant_conv dec_input dec_block0"
        " dec_norm_all dec_patches"
    ).split():
        torch.testing.assert_close(seen[name], outputs[name], msg=lambda m, n=name: f"{n}: {m}", **TOLERANCE)
    torch.testing.assert_close(encoded.latent, outputs["z_q"], **TOLERANCE)
    torch.testing.assert_close(sample, outputs["reconstruction"], **TOLERANCE)
    assert torch.equal(encoded.indices, outputs["indices"])
    assert encoded.entropy_loss is None
    with torch.no_grad():
        torch.testing.assert_close(
            model.decode(inputs["latent"]).sample, outputs["decode_of_input_latent"], **TOLERANCE
        )


def test_softvq_quantizer(reference):
    model, _, outputs, *_ = reference("softvq_tokenizer")
    with torch.no_grad():
        quantized, probs, _ = model.quantize(outputs["quant_conv"])
        torch.testing.assert_close(probs, outputs["probs"], **TOLERANCE)
        torch.testing.assert_close(probs.amax(-1).mean(), outputs["max_probs"], **TOLERANCE)
        cosine = F.cosine_similarity(quantized, F.normalize(outputs["quant_conv"], dim=-1), dim=-1).mean()
        torch.testing.assert_close(cosine, outputs["zq_z_cos"], **TOLERANCE)
        model.quantize.codebook_l2_norm = not model.quantize.codebook_l2_norm
        quantized, probs, _ = model.quantize(outputs["quant_conv"])
        torch.testing.assert_close(quantized, outputs["other_l2_z_q"], **TOLERANCE)
        torch.testing.assert_close(probs.amax(-1).mean(), outputs["other_l2_max_probs"], **TOLERANCE)


def test_softvq_loss_and_gradients(reference):
    model, inputs, outputs, config, _ = reference("softvq_tokenizer")
    model.train()
    output = model(inputs["image"])
    entropy_loss = config["entropy_loss_ratio"] * output.entropy_loss
    torch.testing.assert_close(entropy_loss, outputs["train_entropy_loss"], **TOLERANCE)
    loss = F.mse_loss(output.sample, inputs["image"]) + entropy_loss
    torch.testing.assert_close(loss, outputs["train_total_mse_plus_entropy"], **TOLERANCE)
    loss.backward()
    for name, parameter in {
        "decoder_mask_token": model.decoder.positions.mask_token,
        "encoder_latent_tokens": model.encoder.positions.latent_tokens,
        "quant_conv_weight": model.quant_conv.weight,
        "quantize_embedding": model.quantize.embedding,
    }.items():
        torch.testing.assert_close(parameter.grad, outputs[f"grad_{name}"], **TOLERANCE)


def test_entropy_terms_of_both_quantizers(golden):
    from softvq_hf.models.autoencoder_softvq import codebook_entropy_loss

    _, tensors = golden("softvq_losses")
    affinity = tensors["input.affinity"]
    torch.testing.assert_close(codebook_entropy_loss(affinity, 1e-6), tensors["output.entropy_softvq"], **TOLERANCE)
    torch.testing.assert_close(codebook_entropy_loss(affinity, 1e-5), tensors["output.entropy_vq"], **TOLERANCE)


def test_kl(reference):
    model, inputs, outputs, config, _ = reference("softvq_tokenizer_kl")
    model.train()
    with torch.no_grad():
        encoded = model.encode(inputs["image"])
        posterior = encoded.latent_dist
        torch.testing.assert_close(model.encoder(inputs["image"]), outputs["encoder"], **TOLERANCE)
        for name in ("mean", "logvar", "std"):
            torch.testing.assert_close(getattr(posterior, name), outputs[name], **TOLERANCE)
        torch.testing.assert_close(posterior.kl(), outputs["kl_per_sample"], atol=1e-5, rtol=1e-6)
        torch.testing.assert_close(
            encoded.kl_loss * config["kl_loss_weight"], outputs["kl_loss_weighted"], **TOLERANCE
        )
        drawn = posterior.mean + posterior.std * inputs["noise"]
        torch.testing.assert_close(drawn, outputs["z_sample"], **TOLERANCE)
        torch.testing.assert_close(model.decode(drawn).sample, outputs["reconstruction_sample"], **TOLERANCE)
        torch.testing.assert_close(model(inputs["image"]).sample, outputs["reconstruction_mode"], **TOLERANCE)
    assert encoded.indices is None


def test_vq(reference):
    model, inputs, outputs, config, _ = reference("softvq_tokenizer_vq")
    model.train()
    output = model(inputs["image"])
    torch.testing.assert_close(output.latent, outputs["z_q"], **TOLERANCE)
    torch.testing.assert_close(output.sample, outputs["reconstruction"], **TOLERANCE)
    assert torch.equal(output.indices.flatten(), outputs["indices"])
    commit_loss = config["commit_loss_beta"] * output.commit_loss
    entropy_loss = config["entropy_loss_ratio"] * output.entropy_loss
    torch.testing.assert_close(output.vq_loss, outputs["train_vq_loss"], **TOLERANCE)
    torch.testing.assert_close(commit_loss, outputs["train_commit_loss"], **TOLERANCE)
    torch.testing.assert_close(entropy_loss, outputs["train_entropy_loss"], **TOLERANCE)
    (F.mse_loss(output.sample, inputs["image"]) + output.vq_loss + commit_loss + entropy_loss).backward()
    torch.testing.assert_close(model.quantize.embedding.grad, outputs["grad_quantize_embedding"], **TOLERANCE)
    torch.testing.assert_close(model.quant_conv.weight.grad, outputs["grad_quant_conv_weight"], **TOLERANCE)
    with torch.no_grad():
        entries = model.quantize.get_codebook_entry(output.indices)
        torch.testing.assert_close(model.decode(entries).sample, outputs["decode_code"], **TOLERANCE)


def test_plain_autoencoder(reference):
    model, inputs, outputs, *_ = reference("softvq_tokenizer_ae")
    seen = {}
    record(model.decoder.norm, "dec_norm_all", seen)
    with torch.no_grad():
        output = model(inputs["image"])
        torch.testing.assert_close(model.encoder(inputs["image"]), outputs["encoder"], **TOLERANCE)
        torch.testing.assert_close(output.latent, outputs["latent"], **TOLERANCE)
        torch.testing.assert_close(seen["dec_norm_all"], outputs["dec_norm_all"], **TOLERANCE)
        torch.testing.assert_close(output.sample, outputs["reconstruction"], **TOLERANCE)
        torch.testing.assert_close(
            model.decode(inputs["latent"]).sample, outputs["decode_of_input_latent"], **TOLERANCE
        )


@torch.no_grad()
def test_maetok(reference):
    model, inputs, outputs, *_ = reference("maetok")
    seen = {"decode_of_input_latent": model.decode(inputs["latent"]).sample}
    record(model.encoder.blocks[0], "enc_block0", seen)
    record(model.decoder.blocks[0], "dec_block0", seen)
    record(model.decoder.norm, "dec_norm_all", seen)
    seen["latent"] = model.encode(inputs["image"]).latent
    seen["reconstruction"] = model.decode(seen["latent"]).sample
    seen["enc_input"], seen["dec_input"] = seen["enc_block0.input"], seen["dec_block0.input"]
    for side, name in (("encoder", "enc"), ("decoder", "dec")):
        cos, sin = getattr(model, side).rope((4, 4), 0, 0, torch.device("cpu"))
        seen[f"{name}_rope_cos"], seen[f"{name}_rope_sin"] = cos.transpose(1, 2), sin.transpose(1, 2)
    seen["encoder"] = model.encoder(inputs["image"])
    block_output = seen["enc_block0"]
    mask = inputs["mask"].bool()
    seen["masked_encoder"] = model.encoder(inputs["image"], mask)
    seen["enc_block0"] = block_output
    masked_latent = model.quant_conv(seen["masked_encoder"])

    assert outputs.keys() <= seen.keys()
    for name, expected in outputs.items():
        torch.testing.assert_close(seen[name], expected, msg=lambda m, n=name: f"{n}: {m}", **TOLERANCE)
    torch.testing.assert_close(model.encode(inputs["image"], mask=mask).latent, masked_latent, **TOLERANCE)
    assert not torch.allclose(seen["masked_encoder"], seen["encoder"], atol=1e-2)


@torch.no_grad()
def test_axial_rope_needs_no_frequencies(reference):
    *_, config, weights = reference("maetok")
    weights = {key: tensor for key, tensor in weights.items() if not key.endswith(".freqs")}
    model = convert_softvq(weights, config | {"rope_mixed": False})
    assert model.config.position_embedding_type == "rope_axial"


@torch.no_grad()
def test_register_tokens(reference):
    _, inputs, _, config, weights = reference("softvq_tokenizer")
    for side, width in (("encoder", 32), ("decoder", 36)):
        weights[f"{side}.model.reg_token"] = torch.randn(1, 4, width)
        weights[f"{side}.model.pos_embed"] = torch.randn(1, 16, width)
        config[f"{side}_model"] = "vit_small_patch14_reg4_dinov2.lvd142m"
    model = convert_softvq(weights, config)
    seen = {}
    record(model.encoder.patch_embed, "patches", seen)
    record(model.encoder.blocks[0], "encoder", seen)
    record(model.decoder.blocks[0], "decoder", seen)
    sample = model(inputs["image"]).sample
    patches = seen["patches"].flatten(2).transpose(1, 2)
    mask_tokens = weights["decoder.mask_token"].expand(len(patches), 16, -1)
    for side, image_tokens in (("encoder", patches), ("decoder", mask_tokens)):
        prefix = torch.cat([weights[f"{side}.model.cls_token"], weights[f"{side}.model.reg_token"]], dim=1)
        expected = torch.cat(
            [prefix.expand(len(patches), -1, -1), image_tokens + weights[f"{side}.model.pos_embed"]], dim=1
        )
        torch.testing.assert_close(seen[f"{side}.input"][:, : 5 + 16], expected, **TOLERANCE)
    assert sample.shape == inputs["image"].shape


@torch.no_grad()
def test_giant_feed_forward(reference):
    _, inputs, _, config, weights = reference("softvq_tokenizer")
    for i in range(2):
        block = f"encoder.model.blocks.{i}.mlp"
        weights[f"{block}.fc1.weight"], weights[f"{block}.fc1.bias"] = torch.randn(170, 32), torch.randn(170)
        weights[f"{block}.fc2.weight"] = torch.randn(32, 85)
    model = convert_softvq(weights, config | {"encoder_model": "vit_giant_patch14_dinov2.lvd142m"})
    seen = {}
    record(model.encoder.blocks[1].ff, "ff", seen)
    model.encode(inputs["image"])
    packed = F.linear(seen["ff.input"], weights[f"{block}.fc1.weight"], weights[f"{block}.fc1.bias"])
    hidden_states = F.silu(packed[..., :85]) * packed[..., 85:]
    expected = F.linear(hidden_states, weights[f"{block}.fc2.weight"], weights[f"{block}.fc2.bias"])
    torch.testing.assert_close(seen["ff"], expected, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_convolutional_pixel_head(reference):
    _, inputs, _, config, weights = reference("softvq_tokenizer")
    widths = [36, 128, 64, 32, 16, 3]
    layers = [nn.Identity(), nn.Conv2d(36, 128, 1)]
    for before, after in zip(widths[1:], widths[2:], strict=False):
        layers += [nn.ReLU(), nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(before, after, 3, padding=1)]
    head = nn.Sequential(*layers)
    assert [i for i, layer in enumerate(head) if isinstance(layer, nn.Conv2d)] == [1, 4, 7, 10, 13]
    weights = {key: tensor for key, tensor in weights.items() if not key.startswith("decoder.to_pixel.")}
    weights |= {f"decoder.to_pixel.model.{key}": tensor for key, tensor in head.state_dict().items()}
    model = convert_softvq(weights, config | {"to_pixel": "conv"})
    seen = {}
    record(model.decoder.norm, "norm", seen)
    sample = model(inputs["image"]).sample
    tokens = seen["norm"][:, 1:17].transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(sample, head(tokens), **TOLERANCE)
    assert model.decoder.last_layer is model.decoder.pixel_head.convs[-1].weight


@torch.no_grad()
def test_siren_pixel_head(reference):
    _, inputs, _, config, weights = reference("softvq_tokenizer")
    weights = {key: tensor for key, tensor in weights.items() if not key.startswith("decoder.to_pixel.")}
    first, second = nn.Linear(36, 72), nn.Linear(72, 3 * 64)
    for i, layer in enumerate((first, second)):
        weights[f"decoder.to_pixel.model.{i}.linear.weight"] = layer.weight
        weights[f"decoder.to_pixel.model.{i}.linear.bias"] = layer.bias
    weights["decoder.model.pos_embed"] = torch.randn(1, 65, 36)
    model = convert_softvq(weights, config | {"to_pixel": "siren", "dec_patch_size": 8})
    seen = {}
    record(model.decoder.norm, "norm", seen)
    sample = model(inputs["image"]).sample
    expected = torch.sin(30 * second(torch.sin(30 * first(seen["norm"][:, 1:65])))).reshape(2, 3, 64, 64)
    torch.testing.assert_close(sample, expected, **TOLERANCE)


def test_convolutional_tokenizer_is_a_vq_model_of_diffusers(golden):
    description, tensors = golden("softvq_tokenizer_cnn")
    config = {k: description[k] for k in ("encoder_override", "decoder_override")} | description["config"]
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    expected = {key.removeprefix("output."): value for key, value in tensors.items() if key.startswith("output.")}
    model = convert_checkpoint("softvq", weights, config)
    assert type(model) is VQModel and not model.training

    seen = {}
    record(model.encoder.conv_in, "enc_conv_in", seen)
    record(model.encoder.mid_block.resnets[0], "enc_mid0", seen)
    record(model.encoder.mid_block.attentions[0], "enc_mid_attn", seen)
    record(model.decoder.mid_block, "dec_mid2", seen)
    record(model.encoder, "encoder", seen)
    with torch.no_grad():
        seen["quant_conv"] = model.encode(tensors["input.image"]).latents
        seen["z_q"], _, (_, _, indices) = model.quantize(seen["quant_conv"])
        seen["reconstruction"] = model.decode(seen["quant_conv"]).sample
        seen["decode_code"] = model.decode(seen["z_q"]).sample  # quantizing twice changes nothing
    for name, tensor in seen.items():
        if not name.endswith(".input"):
            torch.testing.assert_close(tensor, expected[name], msg=lambda m, n=name: f"{n}: {m}", **TOLERANCE)
    assert torch.equal(indices.flatten(), expected["indices"])

    for key in set(weights) - {"quantize.codebook_used"}:
        with pytest.raises(ValueError, match=re.escape(key)):
            convert_checkpoint("softvq", {k: v for k, v in weights.items() if k != key}, config)
    with pytest.raises(ValueError, match="gives `ch_mult`"):
        convert_checkpoint("softvq", weights, config | {"decoder_ch_mult": [1, 2]})
    with pytest.raises(ValueError, match=r"config\['vq_mean'\]"):
        convert_checkpoint("softvq", weights, config | {"vq_mean": 0.5})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_rope": False}, "'use_ape'.* and .*'use_rope'"),
        ({"use_rope": False, "use_ape": True}, "'dec_cls_token'"),
        ({"rope_mixed": False}, "unexpected: decoder.freqs, encoder.freqs"),
        ({"dec_cls_token": True}, "missing: decoder.model.cls_token"),
        ({"decoder_model": "vit_small_patch14_dinov2.lvd142m"}, "unexpected: decoder.model.blocks.0.adaLN"),
        ({"encoder_model": "vit_small_patch14_dinov2_movqv2"}, "encoder_model.*'vit_small_patch14_dinov2_movqv2'"),
        ({"encoder_override": {"embed_dim": 32, "depth": 2, "num_heads": 4}}, None),
        ({"image_size": 32}, "mis-shaped: encoder.model.pos_embed"),
        (
            {"encoder_override": {"embed_dim": 48, "depth": 2, "num_heads": 2}},
            r"mis-shaped: .*encoder.freqs \(is \(2, 2, 16\), should be \(2, 2, 24\)\), encoder.latent_pos_embed",
        ),
    ],
)
def test_maetok_config_that_contradicts_the_weights(reference, change, message):
    *_, config, weights = reference("maetok")
    if message is None:
        # the number of heads leaves no trace in the shapes of the weights
        assert convert_softvq(weights, config | change).config.encoder_num_attention_heads == 4
        return
    with pytest.raises(ValueError, match=message):
        convert_softvq(weights, config | change)


def test_leftovers_of_maetok_training_are_dropped(reference):
    *_, config, weights = reference("maetok")
    extras = ["encoder.freqs_t_x", "decoder.freqs_t_y", "decoder.model.pos_embed", "hog_generator.weight_x"]
    for name in ("hog", "dino", "clip"):
        extras += [f"decoder_{name}.mask_token", f"post_quant_conv_{name}.weight", f"to_pixel_{name}.model.bias"]
    model = convert_softvq(weights | {key: torch.ones(3) for key in extras}, config)
    assert model.config.encoder_mask_token
    weights.pop("encoder.mask_token")
    with pytest.raises(ValueError, match="missing: encoder.mask_token"):
        convert_softvq(weights, config)
    assert not convert_softvq(weights, config | {"enc_token_drop": 0.0}).config.encoder_mask_token


def test_wrapped_keys_statistics_and_training_leftovers(reference):
    model, inputs, outputs, config, weights = reference("softvq_tokenizer")
    wrapped = {f"module._orig_mod.{key}": tensor for key, tensor in weights.items()}
    wrapped["module.repa_model.norm.weight"] = torch.ones(3)
    wrapped["module.projection.0.weight"] = torch.ones(3)
    converted = convert_softvq(wrapped, config | {"vq_mean": 0.01, "vq_std": 0.05, "repa_layer_indices": [1]})
    assert not converted.training and converted.dtype == torch.float32
    assert converted.config.shift_factor == 0.01 and converted.config.scaling_factor == pytest.approx(20.0)
    with torch.no_grad():
        sample = converted.decode(converted.encode(inputs["image"]).latent).sample
    torch.testing.assert_close(sample, outputs["reconstruction"], **TOLERANCE)


def test_every_key_at_fault_is_listed(reference):
    *_, config, weights = reference("softvq_tokenizer")
    broken = dict(weights)
    del broken["encoder.model.blocks.1.attn.qkv.bias"], broken["decoder.mask_token"]
    broken["encoder.model.extra"] = torch.ones(1)
    broken["quant_conv.weight"] = torch.ones(5, 32)
    with pytest.raises(ValueError) as error:
        convert_softvq(broken, config)
    for text in (
        "2 missing: decoder.mask_token, encoder.model.blocks.1.attn.qkv.bias",
        "1 unexpected: encoder.model.extra",
        "1 mis-shaped: quant_conv.weight (is (5, 32), should be (6, 32))",
    ):
        assert text in str(error.value)


@pytest.mark.parametrize(
    "name", ["softvq_tokenizer", "softvq_tokenizer_kl", "softvq_tokenizer_vq", "softvq_tokenizer_ae", "maetok"]
)
def test_no_key_can_be_missing(reference, name):
    *_, config, weights = reference(name)
    for key in weights:
        if key.startswith("decoder.model.patch_embed") or re.search("codebook_used|freqs_t", key):
            continue  # training left them behind, nothing uses them
        if name == "maetok" and key == "decoder.model.pos_embed":
            continue  # a decoder with rotary positions carries it along
        with pytest.raises(ValueError, match=key.removesuffix(".weight")):
            convert_softvq({other: tensor for other, tensor in weights.items() if other != key}, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_model": None}, "lacks encoder_model"),
        ({"image_size": None}, "mis-shaped: .*encoder.model.pos_embed"),
        ({"num_latent_tokens": None}, "mis-shaped: .*encoder.latent_tokens"),
        ({"decoder_model": "resnet50"}, "decoder_model.*'resnet50'"),
        ({"enc_type": "cnn"}, "enc_type.*'cnn'"),
        ({"enc_type": "cnn", "dec_type": "cnn"}, "no `quantize.embedding.weight`, allowed: VQ"),
        ({"use_rope": True, "rope_mixed": True}, "missing: decoder.freqs, encoder.freqs"),
        ({"to_pixel": "identity"}, "to_pixel.*'identity'"),
        ({"to_pixel": "siren"}, "`sample_size` is 64"),
        ({"to_pixel": "conv"}, "missing: decoder.to_pixel.model.1.bias"),
        ({"encoder_model": "vit_base_patch16_clip_224.openai"}, "encoder_model.*clip"),
        ({"vq_std": 0.0}, "vq_std"),
        ({"num_codebooks": 3}, "num_codebooks"),
    ],
)
def test_config_that_cannot_be_converted(reference, change, message):
    *_, config, weights = reference("softvq_tokenizer")
    config = {key: value for key, value in (config | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        convert_softvq(weights, config)


def test_weights_one_level_deeper_are_refused(reference):
    *_, config, weights = reference("softvq_tokenizer")
    with pytest.raises(TypeError, match="'ema' or 'model'"):
        convert_softvq({"model": weights}, config)
