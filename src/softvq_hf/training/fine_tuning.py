"""Fine-tuning a trained tokenizer: with parts frozen or adapted by LoRA (arXiv 2106.09685), at another resolution."""

import copy

import torch
from peft import LoraConfig

from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ, resample_position_embedding


TUNING_METHODS = ("full", "frozen", "lora")


def set_tuning(
    tokenizer: AutoencoderSoftVQ, encoder_tuning: str = "full", decoder_tuning: str = "full", lora_rank: int = 8
) -> None:
    """
    Choose what of a tokenizer is trained. What is not trained has `requires_grad` `False`.

    The encoder's side is all that makes latents: `encoder`, `quant_conv` and the codebook. The decoder's side is
    `post_quant_conv` and `decoder`. Each is tuned by one of:

    - "full": every weight, but for those that were frozen before;
    - "frozen": none. With a frozen encoder the latents of an image stay bit-equal, and so do the quantizer's losses;
      generators that were trained on these latents go on working with the new decoder;
    - "lora": adapters on the two linear layers of each block's MLP, as in the official code (rank 8). All other
      weights of the side stay as they are, the codebook and the projections among them. The scale (`lora_alpha` over
      rank) is 1; the official one is not known. Adapters start without effect.

    Call it before the optimizer is built, before the tokenizer is wrapped, and before weights with adapters are loaded
    into it.

    Args:
        tokenizer ([`AutoencoderSoftVQ`]): The tokenizer, changed in place; with "lora" through
            [`~diffusers.loaders.PeftAdapterMixin.add_adapter`], as the adapter "default".
        encoder_tuning (`str`, *optional*, defaults to `"full"`): "full", "frozen" or "lora".
        decoder_tuning (`str`, *optional*, defaults to `"full"`): "full", "frozen" or "lora".
        lora_rank (`int`, *optional*, defaults to 8): Rank of the adapters.

    Raises:
        ValueError: If a method is unknown, both sides are frozen, the rank is below 1, or "lora" is chosen for a
            tokenizer that has adapters. Nothing has been changed then.
    """
    for name, method in (("encoder_tuning", encoder_tuning), ("decoder_tuning", decoder_tuning)):
        if method not in TUNING_METHODS:
            raise ValueError(f"`{name}` is {method!r}, allowed: {', '.join(TUNING_METHODS)}.")
    if encoder_tuning == decoder_tuning == "frozen":
        raise ValueError(
            "`encoder_tuning` and `decoder_tuning` are 'frozen', allowed: at most one of them; nothing would be left"
            " to train."
        )
    if lora_rank < 1:
        raise ValueError(f"`lora_rank` is {lora_rank}, allowed: 1 or more.")
    methods = {"encoder": encoder_tuning, "decoder": decoder_tuning}
    adapted = [side for side, method in methods.items() if method == "lora"]
    if adapted:
        _check_without_adapters(tokenizer)

    if encoder_tuning != "full":
        tokenizer.encoder.requires_grad_(False)
        tokenizer.quant_conv.requires_grad_(False)
        if tokenizer.quantize is not None:
            tokenizer.quantize.requires_grad_(False)
    if decoder_tuning != "full":
        tokenizer.post_quant_conv.requires_grad_(False)
        tokenizer.decoder.requires_grad_(False)

    if adapted:
        trained = [parameter for parameter in tokenizer.parameters() if parameter.requires_grad]
        mlp_linears = rf"({'|'.join(adapted)})\.blocks\.\d+\.ff\.linear_[12]"
        tokenizer.add_adapter(LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=mlp_linears))
        for parameter in trained:  # peft has frozen all but the adapters
            parameter.requires_grad_(True)


def merged_tokenizer(tokenizer: AutoencoderSoftVQ) -> AutoencoderSoftVQ:
    """
    A copy of a tokenizer with its LoRA adapters added to the weights they adapt: saved by `save_pretrained`, it loads
    as any other tokenizer, without peft.

    The adapters alone are saved by `tokenizer.save_lora_adapter(folder)`, and the tokenizer that training started from
    takes them by `load_lora_adapter(folder, prefix=None, use_safetensors=True)`. Where the other side was tuned in
    full, the adapters hold their own side's change only.

    Args:
        tokenizer ([`AutoencoderSoftVQ`]): A tokenizer with adapters; it is not changed.

    Returns:
        [`AutoencoderSoftVQ`]: on the same device, in the same mode.
    """
    merged = copy.deepcopy(tokenizer)
    merged.fuse_lora()
    merged.unload_lora()
    return merged


@torch.no_grad()
def resize_tokenizer(tokenizer: AutoencoderSoftVQ, sample_size: int | tuple[int, int]) -> AutoencoderSoftVQ:
    """
    A copy of a tokenizer for images of another size, as a start for fine-tuning: 512 pixels from 256, for example.

    The position tables of encoder and decoder are resampled to the new grids of patches, as those of DINOv2 are when
    an encoder starts from it: bicubic with antialiasing, in float32; the row of the class token is kept. Everything
    else is copied, so the number of latent tokens stays the same. With rotary positions the encoder's table is the
    only one; the frequencies count patches and are not stretched, so a rotary decoder has to learn places beyond its
    old grid first. The latents change: measure their statistics (`scaling_factor`, `shift_factor`) again.

    Args:
        tokenizer ([`AutoencoderSoftVQ`]): A tokenizer without adapters; it is not changed.
        sample_size (`int` or `tuple[int, int]`):
            New height and width in pixels: multiples of both patch sizes. The "siren" pixel head allows one size only.

    Returns:
        [`AutoencoderSoftVQ`]: on the same device, of the same dtype and in the same mode, all weights trainable.

    Raises:
        ValueError: If the tokenizer cannot have this `sample_size`, or has adapters.
    """
    _check_without_adapters(tokenizer)
    with torch.device("meta"):  # all weights are given below
        resized = AutoencoderSoftVQ.from_config(tokenizer.config, sample_size=sample_size)
    weights = copy.deepcopy(tokenizer.state_dict())
    for side in ("encoder", "decoder"):
        positions = getattr(tokenizer, side).positions
        new_grid_size = getattr(resized, side).positions.grid_size
        if positions.position_embedding is None or new_grid_size == positions.grid_size:
            continue
        prefix, grid = positions.position_embedding.tensor_split([int(positions.embeds_cls_token)], dim=1)
        grid = resample_position_embedding(grid, positions.grid_size, new_grid_size)
        weights[f"{side}.positions.position_embedding"] = torch.cat([prefix, grid.to(prefix.dtype)], dim=1)
    resized.load_state_dict(weights, assign=True)
    return resized.train(tokenizer.training)


def _check_without_adapters(tokenizer: AutoencoderSoftVQ) -> None:
    adapters = list(getattr(tokenizer, "peft_config", {}))
    if adapters:
        raise ValueError(
            f"`tokenizer` has the adapters {', '.join(adapters)}, allowed: a tokenizer without, such as"
            " `merged_tokenizer` makes of it."
        )
