"""The last part of `make quickstart`: load what was trained, look at it, and write the numbers down.

    python training/quickstart_report.py

Reads the quickstart configs and the folders they name; writes `reconstructions.png`, `samples.png`, `training.png` and
`report.md` beside those folders.
"""

import argparse
import json
import math
import os
import platform
import resource
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.models.autoencoders.vae import DecoderOutput
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from softvq_hf.data import collate_images, load_image_dataset
from softvq_hf.training.logging import METRICS_FILE
from softvq_hf.training.validation import evaluate_reconstruction, image_grid, reconstruction_grid
