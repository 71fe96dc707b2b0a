"""MosaicML Streaming without the packages that only its own data sets and its own loader need.

``import streaming`` also imports transformers and torchvision, for data sets of texts and pictures and for two types
that its loader compares batches with: six seconds of each process that reads a shard. Here placeholders stand for them
during the import and are gone after it, so that a real import of either still works. Import Streaming from here.
"""

import sys
from types import ModuleType

_PLACEHOLDERS: dict[str, tuple[str, ...]] = {
    "streaming.text": (),
    "streaming.vision": (),
    "streaming.multimodal": (),
    "transformers": (),
    "transformers.feature_extraction_utils": ("BatchFeature",),
    "transformers.tokenization_utils_base": ("BatchEncoding",),
}
_real = {"streaming", "transformers"} & sys.modules.keys()
_placed = {} if _real else {name: ModuleType(name) for name in _PLACEHOLDERS}
for _name, _module in _placed.items():
    for _type in _PLACEHOLDERS[_name]:
        setattr(_module, _type, type(_type, (), {}))
sys.modules.update(_placed)
try:
    from streaming import MDSWriter, Stream, StreamingDataset
    from streaming.base.compression import decompress
    from streaming.base.format import FileInfo, Reader
    from streaming.base.format.mds.reader import MDSReader
    from streaming.base.hashing import get_hash
    from streaming.base.shared import SharedMemory
    from streaming.base.shared import array as shared_array
    from streaming.base.shared import prefix as shared_prefix
finally:
    for _name in _placed:
        del sys.modules[_name]

__all__ = [
    "FileInfo",
    "MDSReader",
    "MDSWriter",
    "Reader",
    "SharedMemory",
    "Stream",
    "StreamingDataset",
    "decompress",
    "get_hash",
    "shared_array",
    "shared_prefix",
]
