"""Classification and decision: record → class → policy → Encrypt, Plain or Refuse. Dictionary look-ups only."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate
from typing import Literal

from sidecar.core.aead import Suite
from sidecar.core.fields import Fields
from sidecar.core.model import UNCLASSIFIED, ScopeKind

Unmatched = Literal["encrypt", "plain", "refuse"]
SUBJECT_HEADER = "header:ce_subjectid"
"""Where a record names its person, unless the policy says otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What happens to a tenant's events of one class; tenant `*` stands for every tenant without a policy of its own.

    `rotation_days` is about rotation, never retention. `subject` is the extractor of a record's person, for key scope subject.
    With `fields`, JSON pointers, only these are sealed and the rest of the document stays clear; without, the whole event is.
    """

    policy_id: str
    stream_class: str
    tenant: str = "*"
    encrypt: bool
    suite: Suite = Suite.AES_256_GCM
    key_scope: ScopeKind = ScopeKind.STREAM
    subject: str | None = None
    rotation_days: int | None = None
    fields: tuple[str, ...] = ()
    blind_index: tuple[str, ...] = ()
    version: int = 1


@dataclass(frozen=True, slots=True)
class Encrypt:
    """`subject`: with key scope subject, the extractor that names each record's person; else None. `fields`: None for the whole event."""

    suite: Suite
    key_scope: ScopeKind
    subject: str | None = None
    fields: Fields | None = None


@dataclass(frozen=True, slots=True)
class Plain:
    """Stored and shown as it is."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """Not stored: no policy is about it, and what no policy is about is refused."""


Decision = Encrypt | Plain | Refuse
PLAIN, REFUSE = Plain(), Refuse()
_UNMATCHED: dict[str, Decision] = {"encrypt": Encrypt(Suite.AES_256_GCM, ScopeKind.STREAM), "plain": PLAIN, "refuse": REFUSE}


def _of(policy: Policy) -> Decision:
    if not policy.encrypt:
        return PLAIN
    by_subject = policy.key_scope is ScopeKind.SUBJECT
    fields = Fields(policy.fields, policy.blind_index) if policy.fields else None
    return Encrypt(policy.suite, policy.key_scope, (policy.subject or SUBJECT_HEADER) if by_subject else None, fields)


class PolicySet:
    """All policies at one policy version. Immutable: a change makes a new one."""

    __slots__ = ("_by_key", "_decisions", "_default", "unmatched", "version")

    def __init__(self, policies: Sequence[Policy], unmatched: Unmatched, version: int) -> None:
        self._by_key = {(p.tenant, p.stream_class): p for p in policies}
        self._decisions: dict[tuple[str, str], Decision] = {}
        self._default = _UNMATCHED[unmatched]
        self.unmatched, self.version = unmatched, version

    def find(self, tenant: str, stream_class: str) -> Policy | None:
        """The tenant's own policy before the one of `*`."""
        return self._by_key.get((tenant, stream_class)) or self._by_key.get(("*", stream_class))

    def overridden(self, decision: Encrypt) -> "PolicySet":
        """The same version, with one answer for all: of a single call that asks for more than policy does."""
        out = PolicySet((), self.unmatched, self.version)
        out._default = decision
        return out

    def decide(self, tenant: str, stream_class: str) -> Decision:
        key = (tenant, stream_class)
        decision = self._decisions.get(key)
        if decision is None:
            policy = self.find(tenant, stream_class)
            decision = self._default if policy is None else _of(policy)
            self._decisions[key] = decision
        return decision


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassRule:
    """Globs over what a rule may see; all that are given must match. `headers` maps a header's name to a glob; one that is missing matches none."""

    stream_class: str
    topic: str | None = None
    type: str | None = None
    stream: str | None = None
    headers: tuple[tuple[str, str], ...] = ()


class Classifier:
    """The first rule that matches names a stream's class, at the stream's first event, for good."""

    __slots__ = ("_rules",)

    def __init__(self, rules: Sequence[ClassRule]) -> None:
        self._rules = [
            (
                rule,
                [(attr, re.compile(translate(glob))) for attr in ("topic", "type", "stream") if (glob := getattr(rule, attr)) is not None],
                [(name, re.compile(translate(glob))) for name, glob in rule.headers],
            )
            for rule in rules
        ]

    def match(self, *, topic: str, type: str, stream: str, headers: Mapping[str, bytes | None]) -> ClassRule | None:
        seen = {"topic": topic, "type": type, "stream": stream}
        for rule, fields, header_globs in self._rules:
            if all(glob.match(seen[attr]) for attr, glob in fields) and all(
                name in headers and glob.match((headers[name] or b"").decode("utf-8", "replace")) for name, glob in header_globs
            ):
                return rule
        return None

    def classify(self, *, topic: str, type: str, stream: str, headers: Mapping[str, bytes | None]) -> str:
        rule = self.match(topic=topic, type=type, stream=stream, headers=headers)
        return rule.stream_class if rule else UNCLASSIFIED
