"""SoftHSM2 tokens in a folder of our own, for tests of the PKCS#11 provider. Needs Debian's `softhsm2` (or another build of it)."""

import os
import secrets
import shutil
import subprocess
from pathlib import Path
from typing import Final

LIBRARIES: Final = ("/usr/lib", "/usr/local/lib", "/opt/homebrew/lib", "/usr/lib64", "/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu")
"""Where packages put `softhsm/libsofthsm2.so`; $SOFTHSM2_MODULE names another."""


class SoftHsm:
    """Sets $SOFTHSM2_CONF, which the library reads when it is loaded: one of these per process and its children."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokens.mkdir(parents=True)
        config = folder / "softhsm2.conf"
        config.write_text(f"directories.tokendir = {self.tokens}\nobjectstore.backend = file\nlog.level = ERROR\n")
        os.environ["SOFTHSM2_CONF"] = str(config)

    @property
    def tokens(self) -> Path:
        return self.folder / "tokens"

    @property
    def away(self) -> bool:
        return not self.tokens.exists()

    @away.setter
    def away(self, away: bool) -> None:
        """The folder of the tokens is moved away, or back."""
        aside = self.folder / "away"
        if away != self.away:
            (self.tokens if away else aside).rename(aside if away else self.tokens)

    def make_token(self) -> str:
        """-> the URI of a key of a new token; the key is not made yet."""
        label, pin = f"token-{secrets.token_hex(4)}", secrets.token_hex(4)
        file = self.folder / f"{label}.pin"
        file.touch(mode=0o600)
        file.write_text(pin)
        command = ["softhsm2-util", "--init-token", "--free", "--label", label, "--pin", pin, "--so-pin", secrets.token_hex(4)]
        subprocess.run(command, check=True, capture_output=True)
        return f"pkcs11:token={label};object=kek?module-path={library()}&pin-source={file}"


def library() -> str:
    """Raises FileNotFoundError: what to install."""
    found = [path for folder in LIBRARIES if (path := Path(folder, "softhsm", "libsofthsm2.so")).exists()]
    if given := os.environ.get("SOFTHSM2_MODULE"):
        return given
    if not found or shutil.which("softhsm2-util") is None:
        raise FileNotFoundError("SoftHSM2 is not installed: `make softhsm`, or sudo apt-get install softhsm2")
    return str(found[0])
