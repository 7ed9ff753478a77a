"""Efficient image tokenizers and the generators on top of them, native to diffusers.

diffusers takes the class of a component from a module in `sys.modules`. Those of the public names are there as soon as
this package is imported; their code, which imports most of diffusers, runs when it is first needed.
"""

import sys
from importlib.util import find_spec, module_from_spec
from threading import RLock
from types import ModuleType
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from softvq_hf.models.autoencoder_softvq import AutoencoderSoftVQ
    from softvq_hf.models.transformer_dit_1d import DiTTransformer1DModel
    from softvq_hf.models.transformer_mar_1d import MARTransformer1DModel
    from softvq_hf.pipelines.pipeline_mar import MARPipeline
    from softvq_hf.pipelines.pipeline_softvq import SoftVQPipeline
    from softvq_hf.schedulers.scheduling_ddpm_temperature import TemperatureDDPMScheduler
    from softvq_hf.schedulers.scheduling_stochastic_interpolant import StochasticInterpolantScheduler


__version__ = "0.1.0.dev0"

__all__ = [
    "AutoencoderSoftVQ",
    "DiTTransformer1DModel",
    "MARPipeline",
    "MARTransformer1DModel",
    "SoftVQPipeline",
    "StochasticInterpolantScheduler",
    "TemperatureDDPMScheduler",
]

_MODULES = {
    "AutoencoderSoftVQ": "softvq_hf.models.autoencoder_softvq",
    "DiTTransformer1DModel": "softvq_hf.models.transformer_dit_1d",
    "MARPipeline": "softvq_hf.pipelines.pipeline_mar",
    "MARTransformer1DModel": "softvq_hf.models.transformer_mar_1d",
    "SoftVQPipeline": "softvq_hf.pipelines.pipeline_softvq",
    "StochasticInterpolantScheduler": "softvq_hf.schedulers.scheduling_stochastic_interpolant",
    "TemperatureDDPMScheduler": "softvq_hf.schedulers.scheduling_ddpm_temperature",
}


class _LazyModule(ModuleType):
    """
    A module whose code runs when the first of its names is looked up.

    `importlib.util.LazyLoader` would run it for any attribute. But `inspect` asks each module in `sys.modules` for its
    `__file__`, also while diffusers is being imported, which is no moment to import diffusers.
    """

    _lock = RLock()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        with self._lock:  # another thread waits until the code has run
            if type(self) is _LazyModule and self.__spec__.loader_state is None:
                self.__spec__.loader_state = "running"
                try:
                    self.__spec__.loader.exec_module(self)
                    self.__class__ = ModuleType
                finally:
                    self.__spec__.loader_state = None
        return ModuleType.__getattribute__(self, name)


def _register(name: str) -> None:
    """Put a module into `sys.modules` and its package."""
    module = module_from_spec(find_spec(name))
    module.__class__ = _LazyModule
    sys.modules[name] = module
    package, _, child = name.rpartition(".")
    setattr(sys.modules[package], child, module)


for _name in _MODULES.values():
    _register(_name)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(sys.modules[_MODULES[name]], name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
