"""The generated blocks of docs/FORMAT.md.    python -m tests.unit.format_page    writes them anew."""

import json
import re
from pathlib import Path
from typing import Any

from sidecar.core.keys import TRANSITIONS, KeyState
from tests.unit import independent_decoder as second

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "FORMAT.md"
EXAMPLE = "AES-256-GCM stream framed"


def lifecycle(transitions: dict[KeyState, frozenset[KeyState]] = TRANSITIONS) -> str:
    arrows = ["    [*] --> active"]
    for before, afters in transitions.items():
        arrows += [f"    {before} --> {after}" for after in KeyState if after in afters]
        arrows += [] if afters else [f"    {before} --> [*]"]
    return "\n".join(["```mermaid", "stateDiagram-v2", *arrows, "```"])


def _lines(hexadecimal: str) -> str:
    return "\n".join(f"    {' '.join(re.findall('..', hexadecimal[at : at + 64]))}" for at in range(0, len(hexadecimal), 64))


def example() -> str:
    vectors: list[dict[str, Any]] = json.loads((ROOT / "tests" / "vectors" / "envelopes-v1.json").read_text())
    vector = next(v for v in vectors if v["name"] == EXAMPLE)
    envelope, dek = bytes.fromhex(vector["envelope"]), bytes.fromhex(vector["dek"])
    raw = vector["envelope"]
    parts = [("magic", 0, 2), ("version", 2, 3), ("suite", 3, 4), ("flags", 4, 5), ("key id", 5, 21), ("key version", 21, 25), ("nonce", 25, 37)]
    header = "\n".join(f"    {name:<12} {raw[2 * start : 2 * end]}" for name, start, end in parts)
    row = {name: vector[name] for name in ("tenant", "stream", "position", "message_id", "type", "schema_version", "field_path")}
    aad = second.event_aad(vector, envelope)
    plaintext = second.open_envelope(envelope, dek, aad)
    return "\n".join(
        [
            f"The row: `{json.dumps(row)}`. The DEK:\n",
            _lines(vector["dek"]),
            "\nThe envelope's header:\n",
            header,
            "\nand behind it ciphertext and tag:\n",
            _lines(raw[74:]),
            '\nThe suite key, `expand(DEK, "enc", 01)`:\n',
            _lines(second.hkdf_expand(dek, "enc", b"\x01").hex()),
            "\nThe associated data:\n",
            _lines(aad.hex()),
            "\nWhat opens with them:\n",
            _lines(plaintext.hex()),
            f"\nThat is a length of {int.from_bytes(plaintext[:4], 'big')}, the attributes `{vector['attributes']}`",
            f"and the value `{bytes.fromhex(vector['value']).decode()}`. As text: `{vector['text'][:44]}…`",
        ]
    )


BLOCKS = {"lifecycle": lifecycle, "example": example}


def filled(page: str) -> str:
    """The page with its generated blocks as they must be."""
    for name, make in BLOCKS.items():
        before, start, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        if not (start and end):
            raise ValueError(f"the page has no block {name}")
        page = f"{before}{start}{make()}\n{end}{after}"
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
