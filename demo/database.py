"""A plain look into Postgres, without the product between: rows by SQL, and the bytes of its files."""

import asyncio
import mmap
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg

SUITES = {1: "AES-256-GCM", 2: "ChaCha20-Poly1305"}


class Database:
    """One connection, used from ordinary code."""

    def __init__(self, dsn: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._connection = self._loop.run_until_complete(asyncpg.connect(dsn))

    def rows(self, sql: str, *arguments: Any) -> list[Any]:
        return list(self._loop.run_until_complete(self._connection.fetch(sql, *arguments)))

    def value(self, sql: str, *arguments: Any) -> Any:
        return self._loop.run_until_complete(self._connection.fetchval(sql, *arguments))

    def run(self, sql: str) -> None:
        self._loop.run_until_complete(self._connection.execute(sql))

    def close(self) -> None:
        self._connection.terminate()
        self._loop.close()


def dissect(envelope: bytes) -> list[tuple[str, str]]:
    """The header of an envelope, field by field, as docs/FORMAT.md gives it: -> hex, meaning."""
    magic, version, suite, flags, key_id, key_version, nonce = struct.unpack_from(">2sBBB16sI12s", envelope)
    body = envelope[37:]
    return [
        (magic.hex(), f"magic {magic.decode()!r}"),
        (f"{version:02x}", f"format {version}"),
        (f"{suite:02x}", f"suite: {SUITES.get(suite, '?')}"),
        (f"{flags:02x}", "flags: stream key, headers sealed too"),
        (key_id.hex(), f"key {str(UUID(bytes=key_id))[:8]}…"),
        (f"{key_version:08x}", f"key version {key_version}"),
        (nonce.hex(), "nonce"),
        (body[:12].hex() + "…", f"{len(body) - 16} bytes of ciphertext, 16 of tag"),
    ]


def scan(folder: Path, needles: Sequence[bytes]) -> tuple[list[int], int, int]:
    """How often each needle stands in the files below the folder (tables, indexes, WAL, logs, all of it); files; bytes."""
    hits, files, size = [0] * len(needles), 0, 0
    for path in sorted(folder.rglob("*")):
        try:
            if not path.is_file() or not path.stat().st_size:
                continue
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                files, size = files + 1, size + len(content)
                for number, needle in enumerate(needles):
                    hits[number] += _count(content, needle)
        except FileNotFoundError:  # the server recycles WAL and temporary files while we look
            continue
    return hits, files, size


def _count(content: mmap.mmap, needle: bytes) -> int:
    found, at = 0, content.find(needle)
    while at >= 0:
        found, at = found + 1, content.find(needle, at + 1)
    return found
