"""Who may command what: signatures are checked against allow-listed issuers, each with the operations and tenants that it may speak for.

A key vouches for its issuer only. Two keys of one issuer (an old and a new one) are one voice where several must approve.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from fnmatch import fnmatchcase

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from sidecar.core.dsse import Signed, key_id
from sidecar.core.errors import CommandRejected


@dataclass(frozen=True, slots=True, kw_only=True)
class Issuer:
    """A key and what it may command; `ops` may be `*`, `tenants` are globs."""

    name: str
    key: Ed25519PublicKey
    ops: frozenset[str]
    tenants: tuple[str, ...]

    @property
    def key_id(self) -> str:
        return key_id(self.key)

    def may(self, op: str, tenant: str) -> bool:
        return bool(self.ops & {op, "*"}) and any(fnmatchcase(tenant, glob) for glob in self.tenants)


@dataclass(frozen=True, slots=True, kw_only=True)
class Authority:
    """What a deployment asks of a command before it carries it out. `approvals`: op → how many issuers must have signed."""

    audience: str
    issuers: Sequence[Issuer] = ()
    approvals: Mapping[str, int]
    max_validity: timedelta
    allow_unsigned: bool = False

    def signers(self, signed: Signed | None) -> list[Issuer]:
        """The issuers whose signatures hold; a signature that does not is as good as none. Raises CommandRejected if none holds.

        None: the command is not signed. Then nobody vouches for it, and it goes on only where unsigned commands are allowed.
        """
        if signed is None:
            if not self.allow_unsigned:
                raise CommandRejected("unsigned", "unsigned commands are not allowed here (control.allow_unsigned)")
            return []
        known = {issuer.key_id: issuer for issuer in self.issuers}
        valid = signed.valid_key_ids({name: issuer.key for name, issuer in known.items()})
        if not valid and any(name in known for name, _ in signed.signatures):
            raise CommandRejected("bad_signature", "no signature of the command holds: it was altered, or signed with another key")
        if not valid:
            raise CommandRejected("unknown_issuer", "the command is signed by nobody who is listed in control.issuers")
        return [known[name] for name in sorted(valid)]

    def permit(self, signers: Sequence[Issuer], op: str, tenant: str) -> tuple[str, ...]:
        """The names of those signers that may command it, each once. Raises CommandRejected where they may not, or are too few."""
        names = tuple(sorted({issuer.name for issuer in signers if issuer.may(op, tenant)}))
        if signers and not names:
            raise CommandRejected("not_permitted", f"{', '.join(sorted({s.name for s in signers}))} may not {op} for this tenant")
        needed = self.approvals.get(op, 0)
        if len(names) < needed:
            raise CommandRejected("approvals_missing", f"{op} needs the signatures of {needed} issuers that may command it; there are {len(names)}")
        return names
