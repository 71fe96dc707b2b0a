"""How many devices a test may use: the GPUs of this machine.

``DIGIT_DS_CPU_RANKS=8 pytest tests/gpu/test_training_many_gpus.py`` runs tests of several GPUs over gloo and as many
processes where there is no GPU: slow, but the same code.
"""

import os

import pytest
import torch

CPU_RANKS = 0 if torch.cuda.is_available() else int(os.environ.get("DIGIT_DS_CPU_RANKS", "0"))
DEVICES = torch.cuda.device_count() or CPU_RANKS


def needs(count: int) -> pytest.MarkDecorator:
    """Skip where there are fewer devices."""
    return pytest.mark.skipif(count > DEVICES, reason=f"needs {count} CUDA devices")
