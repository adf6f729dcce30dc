"""Files in S3 and stores that speak its protocol, through Amazon's own library.

Credentials and regions come from where it looks for them (environment, configuration files), never from a config. It was
preferred to s3fs, which asks for one exact fsspec and a narrow range of botocore, and so quarrels with what torch installed.
"""

import fnmatch
import os
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from vitssl.data.stores.base import Passing, Stat, Unreachable, globbed, shown
from vitssl.errors import ConfigError, DataError


class S3Store:
    """``storage`` are arguments of boto3's S3 client, such as ``endpoint_url``; ``{"anon": True}`` asks without credentials."""

    def __init__(self, storage: dict[str, Any], *, tries: int = 6) -> None:
        self.storage, self.tries = storage, tries
        self._made: tuple[int, Any] | None = None

    def stat(self, url: str) -> Stat:
        """From the object's head."""
        found = self._ask(url, "head_object")
        if "ContentLength" not in found:
            raise DataError(f"{shown(url)}: the server does not say how long it is; use another server or a local copy")
        return Stat(found["ContentLength"], found.get("ETag", ""), ranges=True)

    def read(self, url: str, offset: int, length: int, *, size: int | None = None) -> bytes:
        """Bytes ``offset`` to ``offset + length``, in one request."""
        if not length:
            return b""
        found = self._ask(url, "get_object", Range=f"bytes={offset}-{offset + length - 1}")
        total = found.get("ContentRange", "").rpartition("/")[2]
        if not (total.isascii() and total.isdigit()):
            raise DataError(f"{shown(url)}: the server answers with a range of {total!r}; use another server or a local copy")
        if size is not None and int(total) != size:
            raise Passing(f"{shown(url)}: has {int(total):,} bytes and had {size:,} when it was indexed; index it again")
        if len(found["Body"]) != length:
            raise Passing(f"{shown(url)}: ends before byte {offset + length:,}; it changed since it was indexed")
        return found["Body"]

    def fetch(self, url: str, file: BinaryIO, *, size: int | None = None) -> None:
        """The whole object, in pieces of 16 MiB."""
        size, piece = self.stat(url).size if size is None else size, 16 << 20
        for offset in range(0, size, piece):
            file.write(self.read(url, offset, min(piece, size - offset), size=size))

    def find(self, pattern: str) -> list[str]:
        """The objects of a folder or of a glob."""
        bucket, key = _parted(pattern)
        folder, name = key.rpartition("/")[::2] if globbed(key) else (key.rstrip("/"), "*")
        if globbed(folder) or globbed(bucket):
            raise ConfigError(f"{shown(pattern)}: only the last part of an address may be a pattern; name the folder")
        prefix, found, token = f"{folder}/" if folder else "", [], {}
        while token is not None:
            page = self._ask(pattern, "list_objects_v2", key=False, Prefix=prefix, Delimiter="/", **token)
            found += [each["Key"] for each in page.get("Contents", [])]
            token = {"ContinuationToken": page["NextContinuationToken"]} if page.get("IsTruncated") else None
        return [f"s3://{bucket}/{each}" for each in sorted(found) if fnmatch.fnmatchcase(each.removeprefix(prefix), name)]

    def _ask(self, url: str, what: str, *, key: bool = True, **arguments: Any) -> dict[str, Any]:
        """One request, tried again by the library where that may help; a body is read whole."""
        import botocore.exceptions as failures

        bucket, name = _parted(url)
        arguments |= {"Bucket": bucket} | ({"Key": name} if key else {})
        for left in reversed(range(self.tries)):
            try:
                found = getattr(self._client(), what)(**arguments)
                return found | ({"Body": found["Body"].read()} if "Body" in found else {})
            except failures.ClientError as error:
                raise _refused(url, error) from None
            except (failures.NoCredentialsError, failures.PartialCredentialsError):
                raise Passing(
                    f"{shown(url)}: no credentials were found; give some in the environment, or data.storage.anon=true"
                ) from None
            except (failures.ResponseStreamingError, failures.IncompleteReadError, failures.ReadTimeoutError) as error:
                reason = error  # a body that broke off: the library has seen only its beginning
            except failures.BotoCoreError as error:
                reason, left = error, 0
            if not left:
                said = " ".join(str(reason).split())
                raise Unreachable(f"{shown(url)}: cannot be reached ({said}); look at the network and the server") from None
        raise AssertionError("unreachable")

    def _client(self) -> Any:
        """This process's client: a forked child must not talk on its parent's connections."""
        if self._made is None or self._made[0] != os.getpid():
            try:
                import boto3
                from botocore import UNSIGNED
                from botocore.config import Config
            except ImportError:
                raise ConfigError("s3:// needs a library that is not installed: pip install 'vitssl[s3]'") from None
            options = dict(self.storage)
            unsigned = {"signature_version": UNSIGNED} if options.pop("anon", False) else {}
            retries = {"max_attempts": self.tries, "mode": "standard"}
            config = Config(retries=retries, max_pool_connections=32, **unsigned)
            try:
                self._made = os.getpid(), boto3.session.Session().client("s3", config=config, **options)
            except (TypeError, ValueError) as error:
                named = ", ".join(self.storage)  # their values may be secrets
                raise ConfigError(f"data.storage ({named}): s3:// takes no such options ({error})") from None
        return self._made[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_made": None}


def _parted(url: str) -> tuple[str, str]:
    """(bucket, key)."""
    parts = urlsplit(url, allow_fragments=False)
    return parts.netloc, parts.path.lstrip("/") + (f"?{parts.query}" if parts.query else "")


def _refused(url: str, error: Any) -> Passing:
    """What an answer that is an error means."""
    status, code = error.response["ResponseMetadata"].get("HTTPStatusCode", 0), error.response["Error"].get("Code", "")
    if status >= 500 or code in ("SlowDown", "RequestTimeout", "Throttling"):
        return Unreachable(f"{shown(url)}: cannot be reached ({code}, status {status}); look at the network and the server")
    words = {404: "is not there", 403: "is forbidden", 401: "wants credentials", 416: "ends before what was asked of it"}
    what = words.get(status, "was refused")
    return Passing(f"{shown(url)}: {what} ({code}, status {status}); correct the address or look at your credentials")
