"""The command `softvq-hf`: convert official checkpoints and list the published ones, evaluate models, look at latents.

    softvq-hf convert SoftVQVAE/sit-xl_softvq-bl-64 --tokenizer SoftVQVAE/softvq-bl-64 --output_dir sit-xl_softvq-bl-64
    softvq-hf info
    softvq-hf evaluate reconstruction --model softvq-bl-64 --dataset ILSVRC/imagenet-1k --output_file result.json
    softvq-hf evaluate generation --pipeline sit-xl_softvq-bl-64 --output_dir samples --reference imagenet.npz
    softvq-hf evaluate reference --dataset ILSVRC/imagenet-1k --split train --resolution 256 --output_file imagenet.npz
    softvq-hf inspect --model softvq-bl-64 --dataset ILSVRC/imagenet-1k --output_dir report

`--help` after a command lists its options. Those of `convert` are the arguments of [`convert_pretrained`]; those of
`evaluate` and `inspect` are the fields of a dataclass of arguments, and `--config file.yaml` takes them from a file.
With several processes: `accelerate launch -m softvq_hf.cli evaluate ...`.
"""

import argparse
import importlib
import json
import logging
import sys
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError

from softvq_hf.conversion.published_models import published_models_table
from softvq_hf.data import UnreadableImagesError
from softvq_hf.training.arguments import parse_args
from softvq_hf.training.convert import BETA_SCHEDULES, GENERATORS, TOKENIZERS, convert_pretrained
from softvq_hf.training.path_detection import PATH_TYPES


# Of each evaluation the module, its dataclass of arguments, and the function that takes them. A module is imported by
# its own command only.
EVALUATIONS = {
    "evaluate reconstruction": (
        "softvq_hf.evaluation.reconstruction",
        "ReconstructionArguments",
        "evaluate_reconstruction",
    ),
    "evaluate generation": ("softvq_hf.evaluation.generation", "GenerationArguments", "evaluate_generation"),
    "evaluate reference": ("softvq_hf.evaluation.reference", "ReferenceArguments", "make_reference"),
    "inspect": ("softvq_hf.evaluation.inspection", "InspectionArguments", "inspect_tokenizer"),
}


def build_parser() -> argparse.ArgumentParser:
    """
    The parser. The options of `convert` bear the names of the arguments of [`convert_pretrained`]; those of `evaluate`
    and `inspect` are left to [`parse_command`].
    """
    parser = argparse.ArgumentParser(
        prog="softvq-hf", description="Image tokenizers and the generators on top of them."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("info", help="list the published models", description="List the published models.")

    evaluate = commands.add_parser("evaluate", help="measure a model", description="Measure a model.")
    tasks = evaluate.add_subparsers(dest="task", required=True, metavar="TASK")
    tasks.add_parser("reconstruction", add_help=False, help="what a tokenizer keeps of images: PSNR, rFID and so on")
    tasks.add_parser("generation", add_help=False, help="images of a pipeline against real ones: gFID and so on")
    tasks.add_parser("reference", add_help=False, help="statistics of real images for 'generation', as .npz")
    commands.add_parser("inspect", add_help=False, help="pictures of a tokenizer's latent space, as PNG and HTML")

    convert = commands.add_parser(
        "convert",
        help="convert an official checkpoint to a folder that diffusers loads",
        description="Convert an official tokenizer or generator, or with --tokenizer both into a pipeline, to a folder"
        " that diffusers loads. The folder appears when it is complete, or not at all.",
    )
    convert.add_argument(
        "source",
        metavar="SOURCE",
        help="Hub id or local folder with config.json and model.safetensors, or a training file (.pt, .pth)",
    )
    convert.add_argument("--output_dir", required=True, help="folder to make; it must not exist, or be empty")
    convert.add_argument("--system", choices=(*TOKENIZERS, *GENERATORS), help="by default detected from the weights")
    convert.add_argument("--config", help="official config as a JSON file, where SOURCE has none or another")
    convert.add_argument(
        "--tokenizer", help="tokenizer of a generator, official (as SOURCE) or converted: makes a complete pipeline"
    )
    convert.add_argument("--id2label", help="class names of a pipeline: 'imagenet', or a JSON file from ids to names")
    convert.add_argument("--beta_schedule", choices=BETA_SCHEDULES, help="of a DiT")
    path = convert.add_mutually_exclusive_group()
    path.add_argument("--path_type", choices=PATH_TYPES, help="path that a SiT was trained on, which its SDE needs")
    path.add_argument("--detect_path", action="store_true", help="find the path, with --tokenizer and --images")
    convert.add_argument("--images", help="folder of images to detect the path on, or 'photographs'")
    convert.add_argument("--num_images", type=int, default=256, help="use at most so many of them (256)")
    convert.add_argument("--device", help="where to detect the path, by default CUDA where there is one")
    convert.add_argument("--revision", help="revision of SOURCE on the Hub")
    convert.add_argument("--token", help="access token of the Hub")
    convert.add_argument("--cache_dir", help="cache of downloads")
    convert.add_argument("--local_files_only", action="store_true", help="download nothing, read the cache")
    return parser


def parse_command(argv: list[str] | None = None) -> tuple[str, Any]:
    """
    What a command line asks for. Of the modules that evaluate, only that of the command is imported.

    Args:
        argv (`list[str]`, *optional*): The arguments; by default those of the process.

    Returns:
        `tuple`: the command, such as "evaluate reconstruction", and its arguments: a dataclass for "evaluate ..." and
        "inspect", otherwise a namespace.

    Raises:
        ValueError: As [`~softvq_hf.training.arguments.parse_args`].
        SystemExit: As argparse does.
    """
    parser = build_parser()
    options, words = parser.parse_known_args(argv)
    command = f"evaluate {options.task}" if options.command == "evaluate" else options.command
    if command not in EVALUATIONS:
        if words:
            parser.error(f"unrecognized arguments: {' '.join(words)}")
        return command, options
    module, arguments, _ = EVALUATIONS[command]
    arguments_type = getattr(importlib.import_module(module), arguments)
    return command, parse_args(arguments_type, words, prog=f"{parser.prog} {command}")


def run(command: str, args: Any) -> None:
    """Run a command and print what came of it; `command` and `args` are those of [`parse_command`]."""
    if command == "info":
        print(published_models_table())
        return
    if command == "convert":
        converted = convert_pretrained(**{name: value for name, value in vars(args).items() if name != "command"})
        print(f"{type(converted).__name__} written to {args.output_dir}")
        return
    module, _, function = EVALUATIONS[command]
    result = getattr(importlib.import_module(module), function)(args)
    if not PartialState().is_main_process:
        return
    if command == "evaluate reference":
        print(f"Reference of {result.num_images} images written to {args.output_file}")
    elif command == "inspect":
        print(f"Report written to {result}")
    else:  # a record
        summary = {"protocol": result["protocol"]["name"], "metrics": result["metrics"], "notes": result["notes"]}
        print(json.dumps(summary, indent=2, ensure_ascii=False))


def main(argv: list[str] | None = None) -> None:
    """
    Run the command. What a user can put right ends it with one line, `error: ...`, and exit code 2.

    Args:
        argv (`list[str]`, *optional*): The arguments; by default those of the process.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("softvq_hf").setLevel(logging.INFO)
    try:
        run(*parse_command(argv))
    except (OSError, SafetensorError, UnreadableImagesError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
