"""Many images from a pipeline, for figures: each a function of seed and number alone, in files that an interrupted run
adds to.

    samples/
        plan.json                       everything that the images depend on
        images/00012-of-00196.npy       uint8 (images, height, width, 3)
        images/00012-of-00196.sha256    its checksum, for `sha256sum --check` as well
        samples.npz                     all of them as `arr_0` and their class labels as `arr_1`
"""

import hashlib
import inspect
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from softvq_hf.data.latents import tokenizer_fingerprint
from softvq_hf.evaluation.data import to_8_bit
from softvq_hf.evaluation.result import differences
from softvq_hf.metrics.batches import not_finite
from softvq_hf.metrics.images import check_rounding
from softvq_hf.pipelines.pipeline_mar import MARPipeline
from softvq_hf.pipelines.pipeline_softvq import SoftVQPipeline
from softvq_hf.training.arguments import check_output_dir
from softvq_hf.training.generator import get_image_size
from softvq_hf.training.logging import write_atomically


logger = get_logger(__name__)

LABELS = ("iid", "balanced")
# Arguments of a pipeline's call that images depend on.
SAMPLING_ARGUMENTS = {
    SoftVQPipeline: ("guidance_scale", "guidance_interval", "num_inference_steps"),
    MARPipeline: ("guidance_scale", "guidance_schedule", "num_inference_steps", "num_diffusion_steps", "temperature"),
}
PLAN_FILE = "plan.json"
NPZ_FILE = "samples.npz"


def sampling_arguments(pipeline: SoftVQPipeline | MARPipeline) -> tuple[str, ...]:
    """
    The names of the arguments of a pipeline's call that images depend on, beside labels and noise.

    Raises:
        TypeError: If it is another pipeline.
    """
    for kind, names in SAMPLING_ARGUMENTS.items():
        if isinstance(pipeline, kind):
            return names
    allowed = " and ".join(kind.__name__ for kind in SAMPLING_ARGUMENTS)
    raise TypeError(f"`pipeline` is a {type(pipeline).__name__}, allowed: {allowed}.")


def plan_samples(
    pipeline: SoftVQPipeline | MARPipeline,
    output_dir: str | Path,
    accelerator: Accelerator,
    *,
    num_images: int,
    labels: str = "iid",
    seed: int = 0,
    rounding: str = "round",
    shard_size: int = 256,
    **sampling: Any,
) -> "SampleFolder":
    """
    Say which images a folder is to have, and find what is wrong with that before any work is done.

    Mixed precision is that of `accelerator`. It is for the transformer: the state of the sampler is float32, and the
    decoder runs in the dtype of its weights.

    Args:
        pipeline ([`SoftVQPipeline`] or [`MARPipeline`]): The pipeline.
        output_dir (`str` or `Path`): The folder; it is made if needed.
        accelerator (`Accelerator`): Mixed precision.
        num_images (`int`): How many images, from 1 on.
        labels (`str`, *optional*, defaults to `"iid"`): "iid" or "balanced", see [`draw_labels`].
        seed (`int`, *optional*, defaults to 0): From 0 on.
        rounding (`str`, *optional*, defaults to `"round"`): To 8 bits, see [`~softvq_hf.metrics.images.to_uint8`].
        shard_size (`int`, *optional*, defaults to 256):
            Images in a file, all of which are held in memory while it is made: 50 MB at 256 pixels.
        sampling:
            As in the call of the pipeline, with the same defaults: `guidance_scale`, `num_inference_steps` and
            `guidance_interval`; of a [`MARPipeline`] instead of the last `guidance_schedule`, `num_diffusion_steps`
            and `temperature`.

    Returns:
        [`SampleFolder`]: with all, some or none of its images, for [`generate_samples`].

    Raises:
        ValueError: If an argument is not allowed, or the folder holds images that were made in another way (every
            difference is named) or cannot be written.
        TypeError: If an argument is one that the pipeline does not have.
    """
    names = sampling_arguments(pipeline)
    if not sampling.keys() <= set(names):
        raise TypeError(
            f"`{min(sampling.keys() - set(names))}` is no argument of a {type(pipeline).__name__}, allowed:"
            f" {', '.join(names)}."
        )
    for name, value, lowest in (("num_images", num_images, 1), ("seed", seed, 0), ("shard_size", shard_size, 1)):
        if value < lowest:
            raise ValueError(f"`{name}` is {value}, allowed: integers from {lowest} on.")
    check_rounding(rounding)
    parameters = inspect.signature(type(pipeline).__call__).parameters
    sampling = {name: sampling.get(name, parameters[name].default) for name in names}
    drawn = ("orders", "token_noise") if isinstance(pipeline, MARPipeline) else ("latents",)
    pipeline.check_inputs(
        batch_size=1,
        generator=None,
        output_type="pt",
        callback_on_step_end_tensor_inputs=[],
        **sampling,
        **dict.fromkeys(drawn),
    )
    height, width = get_image_size(pipeline.vae, pipeline.transformer)
    plan = {
        "num_images": num_images,
        "num_classes": pipeline.transformer.config.num_classes,
        "labels": labels,
        "seed": seed,
        **{name: list(value) if isinstance(value, tuple) else value for name, value in sampling.items()},  # as JSON
        "mixed_precision": accelerator.mixed_precision,
        "rounding": rounding,
        "height": height,
        "width": width,
        "shard_size": shard_size,
        "pipeline": pipeline_fingerprint(pipeline),
    }
    samples = SampleFolder(output_dir, plan)
    check_output_dir(str(output_dir))
    check_plan(output_dir, plan)
    return samples


def generate_samples(
    pipeline: SoftVQPipeline | MARPipeline, samples: "SampleFolder", accelerator: Accelerator, *, batch_size: int = 32
) -> None:
    """
    Fill a folder with the images of its plan. Collective: every process calls it.

    The noise of image i and its class label depend on the seed and i alone ("balanced" labels on the number of images
    as well). Images are divided into shards of fixed size, whatever the number of processes; processes take turns at
    the shards that are missing, and no batch crosses the border of a shard. A shard appears when it is finished, so an
    interrupted run goes on by the same calls, with as many processes as you like, and loses at most one unfinished
    shard for each process, whose file is deleted then. Shards that are there are read once: one that does not agree
    with its checksum is made again, with a warning. The images are bit-equal then, and for every number of processes.
    Another `batch_size`, another device or another version of torch may round a number differently inside of the
    networks, and then a few pixel values by one grey level.

    Args:
        pipeline ([`SoftVQPipeline`] or [`MARPipeline`]): That of the plan; it is moved to the device of `accelerator`.
        samples ([`SampleFolder`]): From [`plan_samples`]; complete afterwards.
        accelerator (`Accelerator`): Device, processes and mixed precision.
        batch_size (`int`, *optional*, defaults to 32): Images at a time on each process.

    Raises:
        ValueError: If `batch_size` is not allowed, or the pipeline makes an image that is not finite (which is named).
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}, allowed: integers from 1 on.")
    plan = samples.plan
    checked = range(samples.num_shards)[accelerator.process_index :: accelerator.num_processes]
    # everyone has seen the same state of the folder
    missing = sorted(gather_object([shard for shard in checked if not samples.is_whole(shard)]))
    if accelerator.is_main_process:
        samples.remove_unfinished()
        write_atomically(samples.output_dir / PLAN_FILE, json.dumps(plan, indent=2) + "\n")
    accelerator.wait_for_everyone()  # no shard is begun before
    logger.info(
        f"{samples.num_images} images in {samples.num_shards} shards, {samples.num_shards - len(missing)} of them are"
        " there already"
    )

    own_shards = missing[accelerator.process_index :: accelerator.num_processes]
    pipeline.to(accelerator.device)
    pipeline.set_progress_bar_config(disable=True)
    with tqdm(
        total=sum(len(samples.indices(shard)) for shard in own_shards),
        desc=f"samples (process 1 of {accelerator.num_processes})",
        unit="image",
        disable=not accelerator.is_main_process,
    ) as progress:
        for shard in own_shards:
            indices = samples.indices(shard)
            shard_images = np.empty((len(indices), plan["height"], plan["width"], 3), np.uint8)
            for first in range(0, len(indices), batch_size):
                batch = indices[first : first + batch_size]
                with accelerator.autocast():
                    latents = pipeline(
                        samples.class_labels[batch],
                        **{name: plan[name] for name in sampling_arguments(pipeline)},
                        generator=[image_generator(plan["seed"], index) for index in batch],
                        output_type="latent",
                    ).images
                check_finite(latents, batch, samples)
                with torch.no_grad():
                    pixel_values = pipeline.decode_latents(latents)
                check_finite(pixel_values, batch, samples)
                images = to_8_bit(pixel_values, plan["rounding"])
                shard_images[first : first + len(batch)] = images.permute(0, 2, 3, 1).cpu().numpy()
                progress.update(len(batch))
            samples.write(shard, shard_images)
    accelerator.wait_for_everyone()


def draw_labels(labels: str, num_images: int, num_classes: int, seed: int) -> np.ndarray:
    """
    The class labels of images to generate.

    Args:
        labels (`str`):
            "iid": each label is drawn uniformly from all classes, independently of the others. It depends on `seed`
            and the number of the image only, not on `num_images`. Or "balanced": every class `num_images /
            num_classes` times, rounded down, or up for the first classes where the division leaves a rest, in an order
            that `seed` and `num_images` decide: with another number of images all labels are others.
        num_images (`int`), num_classes (`int`): How many.
        seed (`int`): From 0 on.

    Returns:
        `np.ndarray` of shape `(num_images,)`: int64.

    Raises:
        ValueError: If `labels` is unknown.
    """
    if labels not in LABELS:
        raise ValueError(f"`labels` is {labels!r}, allowed: {', '.join(map(repr, LABELS))}.")
    random = np.random.default_rng(seed)
    if labels == "iid":
        return random.integers(num_classes, size=num_images)
    return random.permutation(np.arange(num_images) % num_classes)


def image_generator(seed: int, index: int) -> torch.Generator:
    """
    The source of all noise of one image.

    torch's generators on the CPU have 2^32 streams, of which two out of 50,000 drawn at random would be the same with
    a probability of 25 %. So the images of one seed take neighbouring streams, from one that the seed picks.

    Args:
        seed (`int`): From 0 on.
        index (`int`): Number of the image, from 0 on.

    Returns:
        `torch.Generator`: on the CPU, whatever the device of the pipeline.
    """
    first = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return torch.Generator().manual_seed((first + index) % 2**32)


def check_finite(values: torch.Tensor, indices: Sequence[int], samples: "SampleFolder") -> None:
    """
    Stop at latents or images of a pipeline that has diverged, or whose numbers do not fit into its dtype.

    Raises:
        ValueError: If a number is NaN or infinite; it names the images.
    """
    broken = [indices[i] for i in not_finite(values)]
    if broken:
        raise ValueError(
            "The pipeline makes images that are not finite (NaN or infinite): with `seed`"
            f" {samples.plan['seed']} the images {', '.join(map(str, broken))}, of the classes"
            f" {', '.join(map(str, samples.class_labels[broken].tolist()))}."
        )


def pipeline_fingerprint(pipeline: SoftVQPipeline | MARPipeline) -> dict[str, Any]:
    """SHA-256 of the models with their configuration, and the configuration of the scheduler, as JSON has them."""
    scheduler = json.loads(pipeline.scheduler.to_json_string())
    return {
        "transformer": tokenizer_fingerprint(pipeline.transformer),
        "vae": tokenizer_fingerprint(pipeline.vae),
        "scaling_factor": pipeline.vae.config.scaling_factor,
        "shift_factor": pipeline.vae.config.shift_factor,
        "scheduler": {
            name: value for name, value in scheduler.items() if name == "_class_name" or not name.startswith("_")
        },
    }


def check_plan(output_dir: str | Path, plan: dict[str, Any]) -> None:
    """
    Refuse to mix: what `output_dir` holds already must have been made by the same plan.

    Raises:
        ValueError: If it has another plan (every difference is named), images without one, or a damaged one.
    """
    path = Path(output_dir, PLAN_FILE)
    if not path.is_file():
        if any(Path(output_dir, "images").glob("*.npy")):
            raise ValueError(
                f"`output_dir` is {str(output_dir)!r}, which has images but no {PLAN_FILE} that says how they were"
                " made. Use another folder."
            )
        return
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{path} is damaged: {error}. {_NEW_FOLDER}") from error
    if not isinstance(earlier, dict):
        raise ValueError(f"{path} is damaged: it holds {earlier!r} in place of a JSON object. {_NEW_FOLDER}")
    found = differences(earlier, plan)
    if found:
        raise ValueError(
            f"`output_dir` is {str(output_dir)!r}, which holds images of another plan: {'; '.join(found)}. Use the"
            " same arguments, or another folder."
        )


# What to do about a damaged plan: nothing else says how the images beside it were made.
_NEW_FOLDER = "Use another folder, or delete this one to make its images anew."


class SampleFolder:
    """
    Generated images in shards of fixed size, on disk.

    Args:
        output_dir (`str` or `Path`): The folder.
        plan (`dict`): What they depend on, as in `plan.json`.

    Attributes:
        plan (`dict`): As above.
        num_images (`int`): Images in all.
        num_shards (`int`): Files that they are in.
        class_labels (`np.ndarray` of shape `(num_images,)`): Their labels, int64.
    """

    def __init__(self, output_dir: str | Path, plan: dict[str, Any]):
        self.output_dir = Path(output_dir)
        self.plan = plan
        self.num_images = plan["num_images"]
        self.num_shards = -(-self.num_images // plan["shard_size"])
        self.class_labels = draw_labels(plan["labels"], self.num_images, plan["num_classes"], plan["seed"])

    def path(self, shard: int) -> Path:
        """Where shard number `shard` lies."""
        return self.output_dir / "images" / f"{shard:05d}-of-{self.num_shards:05d}.npy"

    def indices(self, shard: int) -> range:
        """The numbers of its images."""
        shard_size = self.plan["shard_size"]
        return range(self.num_images)[shard * shard_size : (shard + 1) * shard_size]

    def write(self, shard: int, images: np.ndarray) -> None:
        """
        Write a shard, uint8 of shape `(images, height, width, 3)`, at once or not at all, and before it its checksum:
        the shard is there when it has its name.
        """
        path = self.path(shard)
        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
        with unfinished.open("wb") as file:
            np.save(file, images)
        path.with_suffix(".sha256").write_bytes(_checksum_line(unfinished, path.name))
        os.replace(unfinished, path)

    def remove_unfinished(self) -> None:
        """Delete what killed runs have begun to write. No process may be writing."""
        for folder in (self.output_dir, self.output_dir / "images"):
            for path in folder.glob("*.unfinished"):
                path.unlink()

    def is_whole(self, shard: int) -> bool:
        """
        Whether a shard is there and agrees with its checksum. It is read as a whole; a damaged one gives a warning.
        """
        path = self.path(shard)
        if not path.exists():
            return False
        try:
            if path.with_suffix(".sha256").read_bytes() == _checksum_line(path, path.name):
                return True
            reason = "it does not agree with its checksum"
        except OSError as error:
            reason = str(error)
        logger.warning(f"{path} is damaged: {reason}. It is made again.", main_process_only=False)
        return False

    def read(self, shard: int) -> np.ndarray:
        """
        A shard, mapped into memory.

        Raises:
            ValueError: If the file is damaged.
        """
        path = self.path(shard)
        shape = (len(self.indices(shard)), self.plan["height"], self.plan["width"], 3)
        try:
            images = np.lib.format.open_memmap(path, mode="r")
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}. Delete it; the same command makes it anew.") from error
        if images.dtype != np.uint8 or images.shape != shape:
            raise ValueError(
                f"{path} holds {images.dtype} of shape {images.shape} in place of uint8 of shape {shape}. Delete it;"
                " the same command makes it anew."
            )
        return images

    def batches(self, shards: Sequence[int], batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """
        The images of some shards.

        Args:
            shards (`Sequence[int]`): Numbers of the shards.
            batch_size (`int`): Images at a time; no batch crosses the border of a shard.

        Yields:
            `tuple` of `torch.Tensor`: the numbers of the images `(B,)`, int64, and the images `(B, 3, height, width)`,
            uint8.
        """
        for shard in shards:
            indices, images = torch.tensor(self.indices(shard)), self.read(shard)
            for first in range(0, len(images), batch_size):
                batch = torch.from_numpy(np.array(images[first : first + batch_size]))  # a copy: the file is read-only
                yield indices[first : first + batch_size], batch.permute(0, 3, 1, 2)

    def write_npz(self) -> Path:
        """
        All images in one file, as the evaluation scripts of ADM (arXiv 2105.05233) take them, at once or not at all.
        One shard is in memory at a time. The file is as large as all shards together: 9.8 GB for 50,000 images of 256
        pixels. One that is there and is no older than any shard stays as it is.

        Returns:
            `Path`: of the file. `np.load` reads `arr_0`, uint8 of shape `(num_images, height, width, 3)`, and `arr_1`,
            the labels.
        """
        path = self.output_dir / NPZ_FILE
        shards = [self.path(shard) for shard in range(self.num_shards)]
        if path.is_file() and all(shard.stat().st_mtime_ns <= path.stat().st_mtime_ns for shard in shards):
            return path
        unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
        shape = (self.num_images, self.plan["height"], self.plan["width"], 3)
        with zipfile.ZipFile(unfinished, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                for shard in tqdm(range(self.num_shards), desc=NPZ_FILE, unit="shard"):
                    member.write(self.read(shard))
            with archive.open("arr_1.npy", "w") as member:
                np.lib.format.write_array(member, self.class_labels)
        os.replace(unfinished, path)
        return path


def _checksum_line(path: Path, name: str) -> bytes:
    """What `sha256sum` writes of a file that is to be called `name`."""
    with path.open("rb") as file:
        return f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n".encode()
