"""`make bench`: what the product costs, as ratios of rounds that were interleaved in one run. Prints a table and JSON.

    python -m tests.benchmarks.run [--events 60000] [--rounds 3] [--only throughput,streams,commands,…] [--json FILE]

Broker, database and this process share the machine: seconds mean little, ratios of one run something. Nothing here fails for being slow.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import uvloop

from sidecar.testing import local_stack
from tests.benchmarks import audit, beside, commands, epochs, library, reencryption, throughput

BOUNDS = {
    "encrypted / plain": ">= 0.90",
    "encrypted / bare loader": ">= 0.70",
    "view / bare loader": ">= 0.40",
    "plain / no policy and keys": ">= 0.95",
    "new streams per second": ">= 4000",
    "rotate in the database p99 ms": "< 50",
    "rotate p99 ms": "< 1000",
    "shred of 10 streams p99 ms": "< 1000",
    "shred of 100,000 streams ms": "< 1000",
    "shred of 1,000,000 streams ms": "< 1000",
    "shred of a stream among 1,000,000 p99 ms": "< 1000",
    "dry run of 1,000,000 streams ms": "< 2000",
    "shred, one instance stopped ms": "< 5000",
    "shred, one instance killed ms": "< 5000",
    "beside a control plane / alone": ">= 0.98",
    "memory after a million streams MB": "< 250",
    "append loss, 1 event per commit, 1 writer %": "< 5",
    "append loss, 1 event per commit, 8 writers %": "< 5",
    "append loss, 100 events per commit %": "< 10",
    "append loss, plain class %": "< 2",
    "read of 1,000 events, added µs per event": "<= 10",
    "SQL statements more per append of 100": "<= 1",
    "verify of 1,000,000 audit rows s": "< 30",
    "re-encryption, one worker, events/s": ">= 10000",
    "epoch roll of 10,000 tenants on SoftHSM s": "< 10",
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=40_000, help="new streams, one event each")
    parser.add_argument("--memory-streams", type=int, default=1_000_000)
    parser.add_argument("--shreds", type=int, default=200, help="small tenants to shred, and streams to rotate, under load")
    parser.add_argument("--large", default="100000,1000000", help="streams of the large tenants")
    parser.add_argument("--audit-rows", type=int, default=1_000_000)
    parser.add_argument("--tenants", type=int, default=10_000, help="whose keys a new seal epoch takes over")
    parser.add_argument("--resealed", type=int, default=40_000, help="events that workers seal anew")
    parser.add_argument("--only", default="throughput,streams,commands,beside,library,memory,audit,epochs,reencryption")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


async def measure(options: argparse.Namespace, stack: local_stack.LocalStack) -> dict[str, Any]:
    only = set(options.only.split(","))
    figures: dict[str, Any] = {}
    bench = throughput.Bench(stack.bootstrap_servers, stack.dsn, Path(stack.dir))
    if "throughput" in only:
        figures |= await throughput.ratios(bench, options.events, options.rounds)
    if "streams" in only:
        figures |= await throughput.new_streams(bench, options.streams, options.rounds)
    if "commands" in only:
        figures |= await commands.latencies(bench, options.shreds, [int(size) for size in options.large.split(",")], options.rounds)
    if "beside" in only:
        figures |= await beside.ratio(bench, options.events, options.rounds)
    if "library" in only:
        figures |= await library.figures(bench, options.rounds)
    if "audit" in only:
        figures |= await audit.verify_seconds(bench, options.audit_rows)
    if "epochs" in only:
        figures |= await epochs.roll_seconds(bench, options.tenants)
    if "reencryption" in only:
        figures |= await reencryption.rates(bench, options.resealed, options.rounds)
    if "memory" in only:
        figures |= await throughput.memory(bench, options.memory_streams)
    return figures


def show(figures: dict[str, Any]) -> None:
    for name, figure in figures.items():
        values = figure if isinstance(figure, list) else [figure]
        middle = statistics.median(values)
        spread = f"{min(values):.2f} .. {max(values):.2f}" if len(values) > 1 else ""
        print(f"{name:42s} {middle:10.2f}   {spread:22s} {BOUNDS.get(name, '')}")


def main() -> None:
    options = arguments()
    conditions = {"python": platform.python_version(), "cores": os.cpu_count(), "machine": platform.machine(), "event_bytes": 1024, "partitions": 4}
    print("conditions", json.dumps(conditions))
    with tempfile.TemporaryDirectory(prefix="sidecar-bench-") as folder:
        stack = local_stack.up(Path(folder) / "stack", progress=lambda text: print(text, file=sys.stderr), owner_pid=os.getpid())
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                figures = runner.run(measure(options, stack))
        finally:
            local_stack.down(Path(folder) / "stack", wipe=True)
    show(figures)
    if options.json:
        options.json.write_text(json.dumps({"conditions": conditions, "figures": figures, "bounds": BOUNDS}, indent=2))


if __name__ == "__main__":
    main()
