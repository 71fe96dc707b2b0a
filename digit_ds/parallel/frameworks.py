"""DeepSpeed and Megatron-core, imported without their warnings about packages that this project does not use.

Import them from here: the first import of either prints its warnings.
"""

import logging
import os
import warnings
from typing import Any

import torch


def _uncompiled(function: Any = None, **_: Any) -> Any:
    """In place of ``torch.compile`` during the import: Megatron decorates functions with it that this project does not
    call, and the first decoration imports the compiler, two seconds of every process.
    """
    return function or _uncompiled


if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read once, when DeepSpeed is first imported
_extensions = logging.getLogger("torch.utils.cpp_extension")
_before = _extensions.level
_extensions.setLevel(logging.ERROR)  # of CUDA's compiler on machines without a GPU
_compile = torch.compile
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    import deepspeed

    vars(torch)["compile"] = _uncompiled
    try:
        from megatron.core import parallel_state
        from megatron.core.model_parallel_config import ModelParallelConfig
        from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
    finally:
        vars(torch)["compile"] = _compile
_extensions.setLevel(_before)

__all__ = [
    "ColumnParallelLinear",
    "ModelParallelConfig",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "deepspeed",
    "parallel_state",
]
