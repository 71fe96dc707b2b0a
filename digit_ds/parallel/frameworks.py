"""DeepSpeed and Megatron-core, imported without their warnings about packages that this project does not use.

Import them from here: the first import of either prints its warnings.
"""

import logging
import os
import warnings

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read once, when DeepSpeed is first imported
_extensions = logging.getLogger("torch.utils.cpp_extension")
_before = _extensions.level
_extensions.setLevel(logging.ERROR)  # of CUDA's compiler on machines without a GPU
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    import deepspeed
    from megatron.core import parallel_state
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
_extensions.setLevel(_before)

__all__ = [
    "ColumnParallelLinear",
    "ModelParallelConfig",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "deepspeed",
    "parallel_state",
]
