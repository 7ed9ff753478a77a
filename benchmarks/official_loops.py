"""The official sampling loops of SoftVQ-VAE and MAR, with all that they compute twice or for nothing, on the models of
this library: what `generation.py` times its pipelines beside."""

import torch

from softvq_hf.pipelines.pipeline_mar import MARPipeline
from softvq_hf.pipelines.pipeline_softvq import SoftVQPipeline


# Times between which the protocol guides; 1 is noise, 0 is data.
GUIDANCE_INTERVAL = (0.0, 0.7)


@torch.no_grad()
def sample_in_full_batches(
    pipeline: SoftVQPipeline,
    guidance_scale: float,
    labels: list[int],
    num_inference_steps: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """
    Latents by the official loop of SoftVQ-VAE: the script gives noise and labels to the sampler twice, the second time
    with the null class, and the sampler doubles guided batches again; half of the result is thrown away. The state is
    float64, the transformer computes the modulation of each sample.
    """
    device, scheduler, transformer = pipeline.device, pipeline.scheduler, pipeline.transformer
    null_class = transformer.config.num_classes
    times = pipeline.prepare_timesteps(num_inference_steps, torch.device("cpu"))
    noise = torch.randn(len(labels), *pipeline.latent_shape, generator=generator, device=device)
    latents = torch.cat([noise, noise]).double()
    labels = torch.tensor(labels + [null_class] * len(labels), device=device)
    null_labels = torch.full_like(labels, null_class)
    low, high = GUIDANCE_INTERVAL
    for t, time in zip(scheduler.timesteps, times, strict=True):
        guided = low <= time <= high
        model_input = torch.cat([latents, latents]) if guided else latents
        velocity = transformer(
            model_input.to(transformer.dtype),
            timestep=t.to(device=device, dtype=torch.float32).expand(len(model_input)),
            class_labels=torch.cat([labels, null_labels]) if guided else labels,
            return_dict=False,
        )[0].double()
        if guided:
            conditional, unconditional = velocity.chunk(2)
            velocity = unconditional + guidance_scale * (conditional - unconditional)
        latents = scheduler.step(velocity, t, latents, return_dict=False)[0].double()
    return latents[: len(noise)].float()


@torch.no_grad()
def sample_mar_in_full(
    pipeline: MARPipeline,
    guidance_scale: float,
    num_mar_steps: int,
    labels: list[int],
    num_inference_steps: int,
    generator: torch.Generator,
    orders: torch.Tensor | None = None,
    token_noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Latents by the official loop of MAR: the decoder gives conditions for all positions, of which those of the step are
    taken; the chain of tokens computes what it makes of times and conditions for each row in each of its steps, and
    draws noise for both halves of the guided batch.
    """
    transformer, scheduler, device = pipeline.transformer, pipeline.scheduler, pipeline.device
    num_tokens, channels = transformer.num_tokens, transformer.token_channels
    if orders is None:
        orders = torch.rand(len(labels), num_tokens, generator=generator, device=device).argsort(dim=1)
    null_labels = [transformer.config.num_classes] * len(labels)
    class_labels = torch.tensor(labels + null_labels, device=device)
    scheduler.set_timesteps(100)
    latents = torch.zeros(len(labels), num_tokens, channels, device=device)
    num_unknown = num_tokens
    for remaining, scale in pipeline.plan_steps(num_mar_steps, guidance_scale, "linear"):
        visible = orders[:, num_unknown:].sort(dim=1).values
        predicted = orders[:, remaining:num_unknown].sort(dim=1).values
        conditions = transformer(
            latents.repeat(2, 1, 1).to(transformer.dtype), class_labels, visible_positions=visible.repeat(2, 1)
        ).conditions
        index = predicted.repeat(2, 1)[:, :, None]
        conditions = conditions.gather(1, index.expand(-1, -1, conditions.shape[-1])).flatten(0, 1)

        index = predicted[:, :, None].expand(-1, -1, channels)
        if token_noise is None:
            noise = torch.randn(101, 2 * len(labels), predicted.shape[1], channels, generator=generator, device=device)
        else:
            noise = token_noise.gather(2, index.expand(101, -1, -1, -1)).repeat(1, 2, 1, 1)
        noise = noise.flatten(1, 2)
        tokens = noise[0]
        for i, timestep in enumerate(scheduler.timesteps.tolist()):
            half = tokens.chunk(2)[0]
            rows = torch.full((len(tokens),), timestep, device=device)
            conditioning = transformer.embed_timesteps(rows) + transformer.embed_conditions(conditions)
            prediction = transformer.denoise(
                torch.cat([half, half]).to(transformer.dtype), conditioning=conditioning
            ).float()
            predicted_noise, variance = prediction.chunk(2, dim=1)
            conditional, unconditional = predicted_noise.chunk(2)
            guided = unconditional + scale * (conditional - unconditional)
            prediction = torch.cat([torch.cat([guided, guided]), variance], dim=1)
            tokens = scheduler.step(prediction, timestep, tokens, variance_noise=noise[i + 1], return_dict=False)[0]
        latents = latents.scatter(1, index, tokens.chunk(2)[0].unflatten(0, (len(labels), -1)))
        num_unknown = remaining
    return latents
