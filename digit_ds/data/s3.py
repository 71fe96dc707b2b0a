"""S3-compatible object stores: one client for each process, and what its exceptions mean for a user.

Credentials and region are those of boto3 (environment, ``~/.aws``); ``S3_ENDPOINT_URL`` names another store than
Amazon's, as for MosaicML streaming.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from digit_ds.errors import UserError

SCHEME = "s3://"
ENDPOINT = "S3_ENDPOINT_URL"
_PAID = "MOSAICML_STREAMING_AWS_REQUESTER_PAYS"
"""Buckets whose transfers the reader pays for, separated by commas."""
_CONNECT_SECONDS, _ATTEMPTS = 10, 3
_CREDENTIALS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile in ~/.aws, that the store knows"
_CODES = {
    "NoSuchBucket": ("there is no bucket {bucket}", "the name of a bucket of {endpoint}"),
    "NoSuchKey": ("there is no such object in bucket {bucket}", "{content}"),
    "404": ("there is no such object in bucket {bucket}", "{content}"),
    **dict.fromkeys(
        ("AccessDenied", "AllAccessDisabled", "403"),
        ("access is denied to access key {key}", "rights to list bucket {bucket} and to get its objects"),
    ),
    **dict.fromkeys(
        ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken", "TokenRefreshRequired"),
        ("the store refuses access key {key}", _CREDENTIALS),
    ),
    **dict.fromkeys(
        ("AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException", "301"),
        ("the bucket is not in region {region}", "AWS_DEFAULT_REGION to name the bucket's region"),
    ),
}
"""Code of a refusal: what is wrong, and what was expected. None of them passes by itself."""
_BUSY = ("RequestTimeout", "SlowDown", "Throttling", "TooManyRequests", "429")
_clients: dict[tuple[int, int], tuple[Any, Any]] = {}
"""By process and attempts, since a client must not be used after a fork: session and client."""


class Unavailable(UserError):
    """The store gave no answer, or one that it may not give to the same request later."""


def client(attempts: int) -> Any:
    """This process's boto3 client, which makes each request up to ``attempts`` times.

    Raises:
        UserError: ``S3_ENDPOINT_URL`` is not an address.
    """
    return _opened(attempts)[1]


def _opened(attempts: int) -> tuple[Any, Any]:
    place = os.getpid(), attempts
    if place not in _clients:
        import boto3
        from botocore.config import Config

        for other in [other for other in _clients if other[0] != os.getpid()]:
            del _clients[other]
        retries: Any = {"max_attempts": attempts, "mode": "standard"}
        config = Config(retries=retries, connect_timeout=_CONNECT_SECONDS)
        session, endpoint = boto3.session.Session(), os.environ.get(ENDPOINT)
        try:
            _clients[place] = session, session.client("s3", config=config, endpoint_url=endpoint)
        except ValueError as error:
            raise UserError(
                f"environment variable {ENDPOINT} is {endpoint!r}, expected http://HOST:PORT or https://HOST"
            ) from error
    return _clients[place]


def split(address: str, content: str) -> tuple[str, str]:
    """Bucket and key of ``s3://BUCKET/KEY``; ``content`` is what should be there.

    Raises:
        UserError: the address does not have this form.
    """
    match = re.fullmatch(rf"{SCHEME}([^/]+)/(.+)", address)
    if match is None:
        raise UserError(f"{address}: is not an address of {content}, expected a path or {SCHEME}BUCKET/KEY")
    return match[1], match[2]


def read(address: str, content: str) -> bytes:
    """The bytes of an object.

    Args:
        address: ``s3://BUCKET/KEY``.
        content: what should be there, for messages.

    Raises:
        UserError: the store refuses; :class:`Unavailable`: it does not answer, or not to the end.
    """
    bucket, key = split(address, content)
    paid = {"RequestPayer": "requester"} if bucket in os.environ.get(_PAID, "").split(",") else {}
    with errors(address, content):
        return client(_ATTEMPTS).get_object(Bucket=bucket, Key=key, **paid)["Body"].read()


@contextmanager
def errors(address: str, content: str) -> Iterator[None]:
    """Turn the client's exceptions into one line about ``address``, where ``content`` should be.

    Raises:
        UserError: the store refuses; :class:`Unavailable`: it does not answer, or not to the end.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        kind, found, expected = _explained(error, address, content)
        raise kind(f"{address}: cannot be read ({found}), expected {expected}") from error


def _explained(error: Exception, address: str, content: str) -> tuple[type[UserError], str, str]:
    """The class of the error, what was found and what was expected."""
    from botocore import exceptions

    reason = " ".join(str(error).split())[:300].rstrip(".")
    if isinstance(error, exceptions.ClientError):
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code in _CODES:
            found, expected = (text.format(**_facts(address, content)) for text in _CODES[code])
            return UserError, f"{found}: {code}", expected
        kind = Unavailable if status >= 500 or code in _BUSY else UserError
        return kind, reason, "an object store that answers"
    if isinstance(error, (exceptions.NoCredentialsError, exceptions.PartialCredentialsError)):
        return UserError, reason, _CREDENTIALS
    if isinstance(error, exceptions.ProfileNotFound):
        return UserError, reason, "AWS_PROFILE to name a profile in ~/.aws"
    lost = exceptions.ConnectionError, exceptions.HTTPClientError, exceptions.IncompleteReadError
    if isinstance(error, lost):
        return Unavailable, reason, f"an object store that answers; {ENDPOINT} names another than Amazon's"
    return UserError, reason, "an object store that answers"


def _facts(address: str, content: str) -> dict[str, str]:
    """What a request was made with, for messages: no secret."""
    session, made = next(iter(_clients.values()))
    credentials = session.get_credentials()
    return {
        "content": content,
        "bucket": repr(address.removeprefix(SCHEME).partition("/")[0]),
        "endpoint": str(made.meta.endpoint_url),
        "region": str(made.meta.region_name),
        "key": str(credentials.access_key) if credentials else "(none)",
    }
