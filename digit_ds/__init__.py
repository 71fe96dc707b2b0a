"""DiGIT image generation at cluster scale.

The public API is the loaders below; each is imported on first use so that ``import digit_ds`` stays light.
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_HOMES = {
    "load_encoder": "digit_ds.tokenizer.encoder",
    "load_codebook": "digit_ds.tokenizer.codebook",
    "load_vqgan": "digit_ds.tokenizer.vqgan",
    "load_model": "digit_ds.model.transformer",
    "load_pipeline": "digit_ds.generation.loaded",
}
__all__ = ["load_codebook", "load_encoder", "load_model", "load_pipeline", "load_vqgan"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'digit_ds' has no attribute {name!r}")
