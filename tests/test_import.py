"""What `import softvq_hf` does, in fresh processes."""

import subprocess
import sys


def run_python(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_names_are_there_before_diffusers_is_imported():
    run_python("""
import sys
import softvq_hf

assert "torch" not in sys.modules and "diffusers" not in sys.modules
for name in softvq_hf.__all__:
    assert name in dir(softvq_hf)
    assert "torch" not in sys.modules
assert softvq_hf.AutoencoderSoftVQ.__module__ == "softvq_hf.models.autoencoder_softvq"
assert type(sys.modules["softvq_hf.models.autoencoder_softvq"]) is type(sys)
from softvq_hf import *
from softvq_hf.models.transformer_dit_1d import DiTTransformer1DModel as from_its_module
assert from_its_module is DiTTransformer1DModel
""")


def test_modules_wait_in_sys_modules_while_diffusers_is_imported():
    """There diffusers looks for a component's class; and `inspect` for files, while other modules are imported."""
    run_python("""
import inspect
import sys
import softvq_hf

module = sys.modules["softvq_hf.models.transformer_dit_1d"]
assert module.__file__.endswith("transformer_dit_1d.py")
inspect.getmodule(sys._getframe())
assert "torch" not in sys.modules
from diffusers import DiffusionPipeline  # imports torchvision, which asks `inspect`
assert "DiTTransformer1DModel" not in vars(module)
assert module.DiTTransformer1DModel is softvq_hf.DiTTransformer1DModel
""")


def test_importing_takes_no_time_of_its_own():
    """Beyond torch and what diffusers loads for these classes: 0.3 s, of which it takes a tenth."""
    seconds = []
    for _ in range(3):  # other programs may disturb one
        code = """
import time
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn

started = time.perf_counter()
import softvq_hf
softvq_hf.AutoencoderSoftVQ, softvq_hf.DiTTransformer1DModel, softvq_hf.SoftVQPipeline
print(time.perf_counter() - started)
"""
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds.append(float(result.stdout))
    assert min(seconds) < 0.3


def test_names_that_are_not_there():
    run_python("""
import softvq_hf
import softvq_hf.models.autoencoder_softvq as module

for holder in (softvq_hf, module):
    try:
        holder.Nothing
    except AttributeError as error:
        assert "Nothing" in str(error)
    else:
        raise SystemExit("no error")
""")


def test_several_threads_run_a_module_once():
    run_python("""
import sys
import threading
import softvq_hf

found = []
threads = [threading.Thread(target=lambda: found.append(softvq_hf.AutoencoderSoftVQ)) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert len(found) == 8 and len(set(found)) == 1
""")
