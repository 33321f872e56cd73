"""How long a roll of the seal epoch takes: every tenant's KEK under the next version of the KMS key, none made anew."""

import asyncio
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sidecar.keys import KeyManagement
from sidecar.kms import open_kms
from sidecar.kms.file import create_key_file
from sidecar.postgres import seal_epochs
from sidecar.postgres.connection import connected, open_pool
from sidecar.sealing import Sealing
from sidecar.servers import KmsSettings
from sidecar.steps import SystemClock
from sidecar.testing.softhsm import SoftHsm
from tests.benchmarks.throughput import Bench

AT_ONCE = 16


@contextmanager
def providers() -> Iterator[dict[str, str]]:
    """Name → URI. A copy of a SoftHSM2 token folder restores its keys, so it is on disk as well."""
    with tempfile.TemporaryDirectory(prefix="sidecar-bench-kms-") as folder:
        create_key_file(Path(folder) / "kek")
        yield {"SoftHSM": SoftHsm(Path(folder) / "softhsm").make_token(), "a key file": f"file:{folder}/kek"}


async def seed(dsn: str, keys: KeyManagement, tenants: int) -> None:
    names = [f"t{n:06d}" for n in range(tenants)]
    slots = asyncio.Semaphore(AT_ONCE)

    async def one(name: str) -> tuple[Any, ...]:
        async with slots:
            _, row = await keys.make_kek(name, 1)
            return seal_epochs.kek_record(row)

    records = await asyncio.gather(*(one(name) for name in names))
    async with connected(dsn) as connection:
        await connection.execute("INSERT INTO tenants (tenant_id) SELECT unnest($1::text[])", names)
        await connection.executemany(seal_epochs.INSERT_KEK, records)
        await connection.execute("ANALYZE tenants, tenant_keys")


async def roll_seconds(bench: Bench, tenants: int) -> dict[str, Any]:
    figures = {}
    with providers() as found:
        for name, uri in found.items():
            dsn = await bench.database()
            kms = open_kms(uri)
            if name == "SoftHSM":
                await kms.add_version()
            await seed(dsn, KeyManagement(kms), tenants)
            pool = await open_pool(dsn)
            try:
                started = time.perf_counter()
                await Sealing(pool, SystemClock(), kms, KmsSettings(uri=uri)).roll("bench")
                figures[f"epoch roll of {tenants:,} tenants on {name} s"] = time.perf_counter() - started
                async with connected(dsn) as connection:
                    left = await connection.fetchval("SELECT count(*) FROM tenant_keys WHERE kms_key_version <> $1", await kms.current())
            finally:
                await pool.close()
                await bench.drop(dsn)
            if left:
                raise RuntimeError(f"{left} tenants are still under the old version")
    return figures
