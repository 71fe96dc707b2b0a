"""Archives in an S3-compatible object store, read in place by ranges; nothing is copied to this machine."""

import io
import os
import re
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from digit_ds.data.s3 import SCHEME, client, errors, split

AHEAD = 8 << 20
"""Bytes of a request where a file is read from one end to the other."""
_ATTEMPTS = 8


class _Stat(NamedTuple):
    st_size: int
    st_mtime_ns: int


class RemoteFile:
    """An object as much like a ``Path`` as archives need."""

    def __init__(self, bucket: str, key: str, size: int, modified_ns: int) -> None:
        self._bucket, self._key, self._stat = bucket, key, _Stat(size, modified_ns)
        path = PurePosixPath(key)
        self.name, self.stem, self.suffix = path.name, path.stem, path.suffix

    def __str__(self) -> str:
        return f"{SCHEME}{self._bucket}/{self._key}"

    def stat(self) -> _Stat:
        """Size and time of the last change when it was listed."""
        return self._stat

    def open(self, _mode: str = "rb") -> BinaryIO:
        """The bytes, read ahead in large pieces."""
        return io.BufferedReader(_Raw(self), AHEAD)

    def read_at(self, length: int, offset: int) -> bytes:
        """``length`` bytes from ``offset`` on, fewer at the end.

        Raises:
            UserError: the store does not give them, also after some repetitions.
        """
        length = min(length, self._stat.st_size - offset)
        if length <= 0:
            return b""
        with errors(str(self), "the archive that was listed"):
            span = f"bytes={offset}-{offset + length - 1}"
            return client(_ATTEMPTS).get_object(Bucket=self._bucket, Key=self._key, Range=span)["Body"].read()


class _Raw(io.RawIOBase):
    """A ``RemoteFile`` as a file that ``io`` can buffer."""

    def __init__(self, file: RemoteFile) -> None:
        self._file, self._position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.stat().st_size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._file.read_at(len(buffer), self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def is_remote(path: object) -> bool:
    """Whether a path is the address of something that is not in a file system."""
    return "://" in str(path)


def list_files(address: str) -> list[RemoteFile]:
    """The objects that ``s3://BUCKET/KEY`` names: one, those of a folder, or those that a pattern matches; sorted.

    Raises:
        UserError: it is no such address, or the store cannot be asked.
    """
    bucket, key = split(address, "images")
    fixed = re.split(r"[*?\[]", key)[0]
    found = []
    with errors(address, "images"):
        for page in client(_ATTEMPTS).get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=fixed):
            for entry in page.get("Contents", []):
                name = entry["Key"]
                if name == key or name.startswith(f"{key.rstrip('/')}/") or (fixed != key and fnmatchcase(name, key)):
                    modified = int(entry["LastModified"].timestamp()) * 10**9
                    found.append(RemoteFile(bucket, name, entry["Size"], modified))
    return sorted(found, key=str)
