"""Every error that the product raises. An error's class is the fate of the record, that is all a caller must know.

    SidecarError
    ├ ConfigurationError                                         refuse to start, exit 2
    ├ RecordError                                                dead letter
    │   MalformedRecord, MalformedEnvelope, UnsupportedEnvelope, AuthenticationFailed (alert)
    ├ RecordRefused                                              audited refusal, the topic goes on
    ├ KeyUnavailable                                             never "plaintext instead"
    │   KeyShredded, StreamErased (erased), UnknownKey (wait and alert), KeyExhausted (rotate and go on)
    ├ AccessDenied                                               refuse, audit
    ├ CommandRejected                                            negative receipt
    ├ Conflict                                                   somebody else wrote first: reload and redo
    │   WrongVersion (the caller decides)
    └ Unavailable                                                back off and retry, the partition waits
        KmsUnavailable, StoreUnavailable, BrokerUnavailable, LedgerBehind

The docstring is the default message. No message ever holds a key, a payload, a token or a password.
"""

from typing import Any


class SidecarError(Exception):
    """The sidecar could not do what was asked."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (type(self).__doc__ or "").strip())


class ConfigurationError(SidecarError):
    """The configuration cannot be used.

    Carries what is wrong, where it stands, and how to mend it: three lines for a person.
    """

    def __init__(self, what: str, *, where: str = "configuration", mend: str = "see `sidecar config show`") -> None:
        super().__init__(f"{what}\n  where: {where}\n  mend:  {mend}")
        self.what, self.where, self.mend = what, where, mend


class RecordError(SidecarError):
    """The record cannot be stored as an event; `reason` is the dead letter's reason (contract: messages.md)."""

    reason = "malformed"

    def __init__(self, message: str | None = None, *, reason: str | None = None) -> None:
        super().__init__(message)
        if reason is not None:
            self.reason = reason


class MalformedRecord(RecordError):
    """The record does not have the form that its source is configured for."""


class MalformedEnvelope(RecordError):
    """The stored bytes are no envelope."""


class UnsupportedEnvelope(RecordError):
    """The envelope has a format version, suite or flag that this release does not know. It is never read as plaintext."""


class AuthenticationFailed(RecordError):
    """The bytes are not what was sealed for this place: moved, swapped, truncated, altered, or planted."""

    reason = "authentication_failed"


class RecordRefused(SidecarError):
    """The record is not accepted by decision; `reason`: tenant_shredded, scope_erased or policy_refuse."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"refused: {reason}")
        self.reason = reason


class KeyUnavailable(SidecarError):
    """The key cannot be had."""


class KeyShredded(KeyUnavailable):
    """The key was destroyed on command; what it protected reads as erased."""


class StreamErased(KeyUnavailable):
    """Events of the stream are erased: what is left of it gives no state, only a wrong one."""


class UnknownKey(KeyUnavailable):
    """No such key is recorded. That is not the same as shredded: wait and alert."""


class KeyExhausted(KeyUnavailable):
    """More is to be sealed at once than one key version may seal."""


class AccessDenied(SidecarError):
    """The caller may not do this."""


class CommandRejected(SidecarError):
    """The command is not carried out; `code` and the message go onto a negative receipt, `facts` too and into the audit trail."""

    def __init__(self, code: str, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.code, self.facts = code, facts


class Conflict(SidecarError):
    """Somebody else wrote first; reload and redo."""


class WrongVersion(Conflict):
    """The stream is not at the expected version: somebody else appended first."""


class Unavailable(SidecarError):
    """Something that is needed cannot be reached; nothing was decided, try again."""


class KmsUnavailable(Unavailable):
    """The KMS cannot be reached."""


class StoreUnavailable(Unavailable):
    """Postgres cannot be reached."""


class BrokerUnavailable(Unavailable):
    """The Kafka broker cannot be reached."""


class LedgerBehind(Unavailable):
    """This database may lack shreds that the ledger has: it is not served before `sidecar ledger replay`."""
