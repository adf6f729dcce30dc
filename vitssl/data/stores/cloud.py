"""Files in Google's object store and on the Hugging Face hub, through fsspec: ``gs://``, ``hf://``.

Their libraries retry by themselves; what still fails is tried again a few times. Credentials come from where each library looks
for them (environment, configuration files), never from a config.
"""

import time
from collections.abc import Callable
from typing import Any, BinaryIO

from vitssl.data.stores.base import Passing, Stat, Unreachable, globbed, shown
from vitssl.errors import ConfigError, UserError

SCHEMES = {"gs": "pip install 'vitssl[gs]'", "hf": "pip install huggingface_hub"}


class CloudStore:
    """``storage`` are keyword arguments of the scheme's fsspec file system, such as ``{"anon": True}``."""

    def __init__(self, scheme: str, storage: dict[str, Any], *, tries: int = 4, wait: float = 0.5) -> None:
        if scheme not in SCHEMES:
            known = ", ".join(f"{name}://" for name in ("http", "https", "s3", *SCHEMES))
            raise ConfigError(f"{scheme}:// is none of the places that data can lie at: {known}, or a local path; correct it")
        self.scheme, self.storage, self.tries, self.wait = scheme, storage, tries, wait

    def stat(self, url: str) -> Stat:
        """Size and ETag (or whatever the file system says of the content's state)."""
        found = self._patiently(url, lambda: self._files().info(url))
        tag = next((str(found[name]) for name in ("ETag", "etag", "md5Hash", "blob_id", "LastModified") if found.get(name)), "")
        return Stat(int(found["size"]), tag, ranges=True)

    def read(self, url: str, offset: int, length: int, *, size: int | None = None) -> bytes:
        """Bytes ``offset`` to ``offset + length``; ``size`` is not checked here, a file that became shorter is."""
        content = (
            self._patiently(url, lambda: self._files().cat_file(url, start=offset, end=offset + length)) if length else b""
        )
        if len(content) != length:
            raise Passing(f"{shown(url)}: ends before byte {offset + length:,}; it changed since it was indexed")
        return content

    def fetch(self, url: str, file: BinaryIO, *, size: int | None = None) -> None:
        """The whole file, in pieces of 16 MiB."""
        size, piece = self.stat(url).size if size is None else size, 16 << 20
        for offset in range(0, size, piece):
            file.write(self.read(url, offset, min(piece, size - offset)))

    def find(self, pattern: str) -> list[str]:
        """What a folder holds, or what a glob meets."""
        files = self._files()
        glob = pattern if globbed(pattern) else pattern.rstrip("/") + "/*"
        names = self._patiently(pattern, lambda: files.glob(glob))
        return [f"{self.scheme}://{name.removeprefix(f'{self.scheme}://')}" for name in sorted(names)]

    def _files(self) -> Any:
        import fsspec

        try:
            return fsspec.filesystem(self.scheme, **self.storage)  # kept by fsspec, anew in a forked child
        except ImportError:
            raise ConfigError(f"{self.scheme}:// needs a library that is not installed: {SCHEMES[self.scheme]}") from None

    def _patiently(self, url: str, ask: Callable[[], Any]) -> Any:
        reason = ""
        for failures in range(self.tries):
            if failures:
                time.sleep(self.wait * 2**failures)
            try:
                return ask()
            except UserError:
                raise
            except FileNotFoundError:
                raise Passing(f"{shown(url)}: is not there; correct the address or put the file there") from None
            except PermissionError as error:
                raise Passing(f"{shown(url)}: is forbidden ({_in_words(error)}); look at your credentials") from None
            except TypeError as error:
                named = ", ".join(self.storage)  # their values may be secrets
                raise ConfigError(f"data.storage ({named}): {self.scheme}:// takes none such ({_in_words(error)})") from None
            except Exception as error:  # each library has failures of its own
                if type(error).__name__ in ("NoCredentialsError", "DefaultCredentialsError"):
                    raise Passing(
                        f"{shown(url)}: no credentials were found; give some in the environment, or data.storage.anon=true"
                    ) from None
                reason = _in_words(error)
        raise Unreachable(f"{shown(url)}: cannot be reached ({reason}, {self.tries} tries); look at the network and the server")


def _in_words(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
