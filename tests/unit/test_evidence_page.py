"""docs/evidence.md: its commands are run, and its table names the fields that there are."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from sidecar.core.certificate import FIELDS
from tests.unit.test_certificate import RAW, SALT, SIGNER

TEXT = (Path(__file__).parents[2] / "docs" / "evidence.md").read_text()
SIGNATURE, SCOPE = re.findall(r"```sh\n(.*?)```", TEXT.partition("<!-- by-hand -->")[2].partition("<!-- /by-hand -->")[0], re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "certificate.json").write_bytes(RAW)
    (tmp_path / "control.pub").write_bytes(SIGNER.public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return tmp_path


def run(folder: Path, script: str, salt: bytes = SALT) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ) | {"SALT": salt.hex()}
    return subprocess.run(["sh", "-e", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_certificate_verifies_by_hand_as_the_page_says(folder: Path) -> None:
    found = run(folder, SIGNATURE)
    assert (found.returncode, found.stdout.strip()) == (0, "Signature Verified Successfully"), found.stderr
    assert run(folder, SCOPE).stdout.strip() == "True"


def test_control_changed_certificate_and_wrong_salt_do_not(folder: Path) -> None:
    at = RAW.index(b'"payload":"') + 60
    (folder / "certificate.json").write_bytes(RAW[:at] + bytes([RAW[at] ^ 1]) + RAW[at + 1 :])
    found = run(folder, SIGNATURE)
    assert found.returncode != 0 and "Verified Successfully" not in found.stdout
    (folder / "certificate.json").write_bytes(RAW)
    assert run(folder, SIGNATURE).returncode == 0
    assert run(folder, SCOPE, bytes(32)).stdout.strip() == "False"


def test_table_names_the_fields_of_a_certificate() -> None:
    first_column = "".join(line.split("|")[1] for line in TEXT.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`(\w+)`", first_column)) == FIELDS
