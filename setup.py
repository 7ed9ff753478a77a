"""Packaging of softvq-hf: the only place where its metadata and dependencies are written."""

from pathlib import Path

from setuptools import find_packages, setup


# One line of reason each. The lower bounds are versions that were tried; constraints.txt holds the exact set.
install_requires = [
    "torch>=2.15",  # models, training
    "torchvision>=0.29",  # image transforms (v2), image grids, the VGG trunk of LPIPS; must match torch
    "diffusers>=0.42.1",  # ModelMixin, DiffusionPipeline, schedulers, EMAModel, get_scheduler
    "transformers>=5.23",  # frozen vision teachers (Dinov2Model), HfArgumentParser
    "accelerate>=1.15",  # launch, DDP, mixed precision, saving and resuming the training state
    "torchdata>=0.11",  # StatefulDataLoader: the position in a stream, prefetching workers included
    "datasets>=5.2",  # images from the Hub, image folders and parquet; the sharded latent cache
    "pyarrow>=26",  # shards of cached latents
    "peft>=0.21",  # LoRA adapters through diffusers' PeftAdapterMixin
    "evaluate>=0.4.6",  # the interface of the metrics, loading them by path
    "huggingface_hub>=2.4",  # downloads, push_to_hub, model cards
    "safetensors>=0.8",  # the only weight format that is written
    "numpy>=2.4",  # image arrays, sigma grids
    "pillow>=13",  # image decoding, ADM crops
    "lpips>=0.1.4",  # perceptual loss and metric
    "torchmetrics>=1.9",  # PSNR during validation
    "torch-fidelity>=0.4.0",  # the Inception network of the published protocol; KID, precision and recall
    "scikit-learn>=1.9",  # projections of latents to two dimensions
    "scikit-image>=0.26",  # SSIM; the photographs of the quickstart, inside its wheel
    "tensorboard>=2.21",  # the default tracker
    "psutil>=7.2",  # memory of a training process on the CPU
    "matplotlib>=3.11",  # the quickstart's curves and labelled grids, pictures of latents
    "tqdm>=4.70",  # progress bars
    "jinja2>=3.1",  # templates of model cards and reports
    "pyyaml>=6.0",  # --config file.yaml
]

extras_require = {
    "dev": [
        "pytest>=9.2",  # tests
        "pytest-xdist>=3.8",  # tests on several cores
        "ruff>=0.17.5",  # lint and format
        "import-linter>=2.16",  # who may import whom
        "scipy>=1.17",  # fits of benchmarks/scaling.py, references of tests
    ],
    "deepspeed": [
        "deepspeed>=0.19.8",  # training/accelerate/deepspeed_zero2.yaml
    ],
    "8bit": [
        "bitsandbytes>=0.50",  # --optimizer adam_8bit, adamw_8bit
    ],
    "quantization": [
        "torchao>=0.18",  # weights of 8 bits, docs/sampling.md
    ],
    "wandb": [
        "wandb>=0.31",  # --report_to wandb
    ],
    "docs": [
        "mkdocs>=1.6.1",  # the site
        "mkdocs-material>=9.8",  # its theme
        "mkdocstrings[python]>=1.0",  # API pages from docstrings
    ],
}

setup(
    name="softvq-hf",
    version="0.1.0.dev0",
    description="Efficient image tokenizers and the generators on top of them, native to diffusers.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=[
        "image tokenizer",
        "autoencoder",
        "diffusion",
        "flow matching",
        "diffusers",
        "SoftVQ-VAE",
        "SiT",
        "DiT",
        "MAR",
    ],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11",
    install_requires=install_requires,
    extras_require=extras_require,
    # pipelines/ stands at the top of the repository, where custom_pipeline= finds its files,
    # and is importable as softvq_hf.pipelines.
    package_dir={"": "src", "softvq_hf.pipelines": "pipelines"},
    packages=find_packages("src") + ["softvq_hf.pipelines"],
    package_data={
        "softvq_hf": ["py.typed"],
        "softvq_hf.conversion": ["*.yaml"],
        "softvq_hf.evaluation": ["templates/*.html"],
        "softvq_hf.training": ["templates/*.md"],
    },
    entry_points={"console_scripts": ["softvq-hf=softvq_hf.cli:main"]},
)
