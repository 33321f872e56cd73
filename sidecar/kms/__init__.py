"""KMS providers by URI, behind `ports.Kms`. A provider's client library is imported when its URI is used."""

from sidecar.core.errors import ConfigurationError
from sidecar.ports import Kms


def open_kms(uri: str) -> Kms:
    """The provider of a URI. Raises ConfigurationError for one that this release does not have."""
    provider, _, rest = uri.partition(":")
    if provider == "file" and rest:
        from sidecar.kms.file import FileKms

        return FileKms(rest)
    raise ConfigurationError(f"no KMS provider for {provider!r}", where="kms.uri", mend="this release has file:PATH, for development")
