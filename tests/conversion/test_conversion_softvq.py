"""The official tokenizers, tiny: every intermediate, latent, index, reconstruction, loss and gradient."""

import pytest
import torch
import torch.nn.functional as F

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
    "name", ["softvq_tokenizer", "softvq_tokenizer_kl", "softvq_tokenizer_vq", "softvq_tokenizer_ae"]
)
def test_no_key_can_be_missing(reference, name):
    *_, config, weights = reference(name)
    for key in weights:
        if key.startswith("decoder.model.patch_embed") or key == "quantize.codebook_used":
            continue  # training left them behind, nothing uses them
        with pytest.raises(ValueError, match=key.removesuffix(".weight")):
            convert_softvq({other: tensor for other, tensor in weights.items() if other != key}, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": None}, "lacks image_size"),
        ({"decoder_model": "resnet50"}, "decoder_model.*'resnet50'"),
        ({"enc_type": "cnn"}, "enc_type.*'cnn'"),
        ({"use_rope": True}, "use_rope"),
        ({"to_pixel": "siren"}, "to_pixel.*'siren'"),
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
