"""StreamingDataset over shards that this package fetches: its errors are one line, and no process waits for a shard
that another one could not get.

StreamingDataset would leave half files of a killed process in its folder, some of which it takes for whole ones later,
and raises whatever the client of a store raises. Here a shard is in the cache decompressed and checked or not at all.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

from digit_ds.data.cache import FAILED
from digit_ds.data.mosaic import FileInfo, Reader, Stream, StreamingDataset, decompress
from digit_ds.data.objects import file_of, read_object
from digit_ds.data.shards import CONTENT, check_bytes
from digit_ds.errors import UserError
from digit_ds.files import write_atomically

PATIENCE = 300.0
"""Seconds for which a store that stopped to answer is asked for a shard again; ``training.timeout_seconds`` is twice
that."""
_FAILED = 255
"""State of a shard that a process of this node could not get; StreamingDataset's own are 0 to 3."""


class CachedShards(StreamingDataset):
    """One shard directory behind a cache in a local folder.

    Args:
        remote: path or address of the directory; its index is in the cache already.
        cache: local folder.
        cache_limit: bytes of it; None: all shards.
    """

    def __init__(self, remote: str, cache: str, cache_limit: int | None = None) -> None:
        super().__init__(
            streams=[_Fetched(remote=remote, local=cache)], shuffle=False, batch_size=1, cache_limit=cache_limit
        )

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Have a shard in the cache.

        Raises:
            UserError: this process, or another one of this node, cannot get it; the same line in all of them.
        """
        self._refuse_failed(shard_id)
        try:
            super().prepare_shard(shard_id, blocking)
        except UserError as error:
            with suppress(OSError):
                self._reason(shard_id).write_text(str(error), encoding="utf-8")
            self._shard_states[shard_id] = _FAILED  # others would wait forever
            raise
        except RuntimeError:  # another process set the state between the two reads of it
            self._refuse_failed(shard_id)
            raise
        self._refuse_failed(shard_id)  # by a process that this one waited for

    def _refuse_failed(self, shard_id: int) -> None:
        if self._shard_states[shard_id] == _FAILED:
            stream, shard = self.streams[0], self.shards[shard_id]
            line = f"{_place(stream, _stored(shard))}: could not be read by another process of this node"
            with suppress(OSError):
                line = self._reason(shard_id).read_text(encoding="utf-8")
            raise UserError(line)

    def _reason(self, shard_id: int) -> Path:
        """File with the line of the process that could not get a shard."""
        return Path(self.streams[0].local, f"{FAILED}{shard_id}")


class _Fetched(Stream):
    """Reads shards by :func:`read_object`, in memory, and writes them decompressed."""

    def prepare_shard(self, shard: Reader) -> int:
        """Have a shard in the cache; how many bytes more it holds."""
        ((raw, _),) = shard.file_pairs
        path, stored = Path(self.local, raw.basename), _stored(shard)
        if path.is_file():
            return 0
        place = _place(self, stored)
        data = read_object(place, f"{CONTENT}, whose index.json names it", PATIENCE)
        check_bytes(place, data, stored.bytes, stored.hashes)
        if stored is not raw:
            data = decompress(shard.compression, data)
            check_bytes(f"{place}, decompressed,", data, raw.bytes, raw.hashes)
        write_atomically(path, lambda temporary: temporary.write_bytes(data))
        return raw.bytes


def _stored(shard: Reader) -> FileInfo:
    """The file of a shard in its directory."""
    ((raw, compressed),) = shard.file_pairs
    return compressed or raw


def _place(stream: Any, stored: FileInfo) -> str:
    return file_of(stream.remote, stored.basename)
