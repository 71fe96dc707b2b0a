"""Model repositories of the Hugging Face Hub, by its own client.

``HF_ENDPOINT``, ``HF_HUB_OFFLINE``, ``HF_TOKEN`` and ``HF_HOME`` mean what they mean to that client, which reads them
when it is first imported: so here it is imported by the functions that need it.
"""

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from digit_ds.errors import UserError, file_error

SCHEME = "hf://"
_ADDRESS = re.compile(r"hf://(\w[\w.-]*/\w[\w.-]*?)(?:@([\w./-]+))?")


def parse(address: str) -> tuple[str, str | None]:
    """Repository ``OWNER/NAME`` and revision of ``hf://OWNER/NAME[@REVISION]``.

    Raises:
        UserError: the address does not have this form.
    """
    if (found := _ADDRESS.fullmatch(address)) is None:
        raise UserError(
            f"{address}: is not the address of a model repository, expected hf://OWNER/NAME or ...@REVISION"
        )
    return found[1], found[2]


def located(place: Path | str, names: tuple[str, ...]) -> Path:
    """The folder that ``place`` is, or that holds the files ``names`` of the repository ``hf://OWNER/NAME[@REVISION]``.

    Files of a repository lie in the client's cache and are downloaded where they are not there yet.

    Raises:
        UserError: the repository or a file in it is not there or cannot be reached.
    """
    if not str(place).startswith(SCHEME):
        return Path(place)
    repository, revision = parse(str(place))
    import huggingface_hub

    with errors(str(place)):
        paths = [Path(huggingface_hub.hf_hub_download(repository, name, revision=revision)) for name in names]
    return paths[0].parent


def is_offline() -> bool:
    """Whether the user has forbidden the network."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


@contextmanager
def errors(what: str, folder: Path | None = None) -> Iterator[None]:
    """Turn the ways in which the client fails into one line about ``what``; its own warnings are not shown.

    Args:
        what: repository or file, which the line names.
        folder: where the client writes.
    """
    import requests
    from huggingface_hub import constants
    from huggingface_hub import errors as known
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (known.OfflineModeIsEnabled, known.LocalEntryNotFoundError) as error:
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"no connection to {constants.ENDPOINT}"
        raise UserError(f"{what}: is not on this machine, and {reason}") from error
    except (known.RepositoryNotFoundError, known.GatedRepoError) as error:
        raise UserError(
            f"{what}: is not at {constants.ENDPOINT} or not for everyone, expected a repository that HF_TOKEN may use"
        ) from error
    except (known.EntryNotFoundError, known.RevisionNotFoundError) as error:
        raise UserError(f"{what}: {constants.ENDPOINT} has no such file or revision") from error
    except known.HfHubHTTPError as error:
        raise UserError(f"{what}: {constants.ENDPOINT} answers {_answer(error)}") from error
    except requests.RequestException as error:
        raise UserError(f"{what}: no connection to {constants.ENDPOINT} ({type(error).__name__})") from error
    except (known.HFValidationError, known.FileMetadataError) as error:
        raise UserError(f"{what}: {_line(error)}") from error
    except OSError as error:
        if error.errno is None:  # the client's check of a file's size
            raise UserError(f"{what}: {_line(error)}") from error
        place = error.filename or folder
        reason = os.strerror(error.errno)
        raise file_error(error, folder) or UserError(f"{place or what}: cannot be written ({reason})") from error
    except RuntimeError as error:  # what its downloader in Rust raises
        raise UserError(f"{what}: {_line(error)}") from error


def _answer(error: Exception) -> str:
    """Status and message of an answer, in one line."""
    response = getattr(error, "response", None)
    if response is None:
        return _line(error)
    said = response.headers.get("X-Error-Message") or response.reason or ""
    return f"{response.status_code} {_line(said)}".strip()


def _line(text: object) -> str:
    """A message's first 200 characters in one line."""
    return " ".join(str(text).split())[:200]
