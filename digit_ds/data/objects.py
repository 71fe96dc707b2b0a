"""Whole files of a shard directory, on disk or in an object store, as bytes."""

import sys
import tempfile
import time
from pathlib import Path

from digit_ds.data import s3
from digit_ds.errors import UserError

_WAITS = 0.5, 10.0
"""Seconds before the second request, and the most before a later one; each is twice the one before."""


def is_address(place: str) -> bool:
    """Whether a place is one in an object store, and not a path."""
    return "://" in place


def file_of(directory: Path | str, name: str) -> str:
    """The place of a file in a directory on disk or in an object store."""
    if not is_address(str(directory)):
        return str(Path(directory) / name)
    scheme, _, path = str(directory).partition("://")
    return f"{scheme}://{path.rstrip('/')}/{name}"


def read_object(place: str, content: str, patience: float = 0.0) -> bytes:
    """The bytes of a file.

    Args:
        place: path or address.
        content: what should be there, for messages.
        patience: seconds for which a store that does not answer is asked again; a line says so.

    Raises:
        UserError: it cannot be read; one line.
    """
    end, (wait, longest), warned = time.monotonic() + patience, _WAITS, False
    while True:
        try:
            return _read(place, content)
        except s3.Unavailable as error:
            if time.monotonic() + wait > end:
                raise UserError(f"{error}; asked for {patience:.0f} seconds" if warned else str(error)) from error
            if not warned:
                print(f"warning: {error}; it is asked again for {patience:.0f} seconds", file=sys.stderr, flush=True)
                warned = True
        time.sleep(wait)
        wait = min(2 * wait, longest)


def _read(place: str, content: str) -> bytes:
    if place.startswith(s3.SCHEME):
        return s3.read(place, content)
    if is_address(place):
        return _read_other(place, content)
    try:
        return Path(place).read_bytes()
    except OSError as error:
        raise UserError(f"{place}: cannot be read ({error.strerror or error}), expected {content}") from error


def _read_other(address: str, content: str) -> bytes:
    """From any other store that StreamingDataset supports."""
    from streaming.base.storage import CloudDownloader

    with tempfile.TemporaryDirectory(prefix="digit_ds-download-") as folder:
        path = Path(folder) / "object"
        try:
            CloudDownloader.direct_download(address, str(path))
            return path.read_bytes()
        except Exception as error:  # each store's client has exceptions of its own
            lasting = isinstance(error, (ValueError, ImportError, FileNotFoundError))
            reason = f"{address}: cannot be read ({' '.join(str(error).split())[:300]}), expected {content}"
            raise (UserError if lasting else s3.Unavailable)(reason) from error
