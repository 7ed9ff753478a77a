"""The command `softvq-hf`: convert official checkpoints, and list the published ones.

    softvq-hf convert SoftVQVAE/sit-xl_softvq-bl-64 --tokenizer SoftVQVAE/softvq-bl-64 --output_dir sit-xl_softvq-bl-64
    softvq-hf info

`softvq-hf convert --help` lists the options, which are the arguments of [`convert_pretrained`].
"""

import argparse
import logging
import sys

from safetensors import SafetensorError

from softvq_hf.conversion.published_models import published_models_table
from softvq_hf.data import UnreadableImagesError
from softvq_hf.training.convert import BETA_SCHEDULES, GENERATORS, TOKENIZERS, convert_pretrained
from softvq_hf.training.path_detection import PATH_TYPES


def build_parser() -> argparse.ArgumentParser:
    """The parser; the options of `convert` bear the names of the arguments of [`convert_pretrained`]."""
    parser = argparse.ArgumentParser(
        prog="softvq-hf", description="Image tokenizers and the generators on top of them."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("info", help="list the published models", description="List the published models.")

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


def main(argv: list[str] | None = None) -> None:
    """
    Run the command. What a user can put right ends it with one line, `error: ...`, and exit code 2.

    Args:
        argv (`list[str]`, *optional*): The arguments; by default those of the process.
    """
    options = vars(build_parser().parse_args(argv))
    if options.pop("command") == "info":
        print(published_models_table())
        return

    logging.basicConfig(format="%(message)s")
    logging.getLogger("softvq_hf").setLevel(logging.INFO)
    try:
        converted = convert_pretrained(**options)
    except (OSError, SafetensorError, UnreadableImagesError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    print(f"{type(converted).__name__} written to {options['output_dir']}")


if __name__ == "__main__":
    main()
