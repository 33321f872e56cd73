"""Runs a page of docs/ as somebody who tries it out does: each block, in order, in one folder.

python   executed; `await` may stand at the top level, and names live on from block to block
sh       by `sh -e`, with `sidecar` on the PATH and $SIDECAR_CONFIG set
yaml     a list of policies, or a part of sidecar.yaml
json     read
text     what somebody sees; the only kind that is not run

A block of another kind, or of none, is an error: nothing in a page is left untried by accident.
"""

import ast
import asyncio
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from sidecar import PolicySpec
from sidecar.settings import parse

DOCS = Path(__file__).parents[2] / "docs"
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(text: str) -> list[tuple[str, str]]:
    """Kind and content, in order."""
    return [(found[1], found[2]) for found in _BLOCK.finditer(text)]


async def run(text: str, config: Path, names: dict[str, Any]) -> list[str]:
    """-> what the blocks of sh wrote. `names` are there for the blocks of Python, and have what these made afterwards."""
    said = []
    for kind, block in blocks(text):
        match kind:
            case "python":
                await _python(block, names)
            case "sh":
                said.append(await asyncio.to_thread(_sh, block, config))
            case "yaml":
                _yaml(block, config.parent)
            case "json":
                json.loads(block)
            case "text":
                pass
            case _:
                raise ValueError(f"a block of kind {kind!r}: {block[:60]}")
    return said


async def _python(block: str, names: dict[str, Any]) -> None:
    code = compile(block, "a page", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if code.co_flags & inspect.CO_COROUTINE:
        await eval(code, names)
    else:
        await asyncio.to_thread(exec, code, names)  # it may run a loop of its own


def _sh(block: str, config: Path) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = dict(os.environ) | {"PATH": path, "SIDECAR_CONFIG": str(config)}
    done = subprocess.run(["sh", "-e", "-c", block], cwd=config.parent, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"exit {done.returncode}\n{block}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _yaml(block: str, base: Path) -> None:
    document = yaml.safe_load(block)
    if isinstance(document, list):
        for policy in document:
            PolicySpec.model_validate(policy)
    else:
        parse(document, where="a page", base=base)
