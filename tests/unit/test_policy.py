"""Class by rule, decision by policy; what no policy names is encrypted unless somebody chose otherwise."""

from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.aead import Suite
from sidecar.core.errors import MalformedRecord
from sidecar.core.extract import subject_of
from sidecar.core.model import UNCLASSIFIED, ScopeKind
from sidecar.core.policy import PLAIN, REFUSE, SUBJECT_HEADER, Classifier, ClassRule, Decision, Encrypt, Policy, PolicySet, Unmatched
from tests.unit.samples import scope_kinds, suites

DEFAULT = Encrypt(Suite.AES_256_GCM, ScopeKind.STREAM)
CHACHA = Encrypt(Suite.CHACHA20_POLY1305, ScopeKind.TENANT)
SOME = [
    Policy(policy_id="1", stream_class="A", encrypt=True),
    Policy(policy_id="2", stream_class="A", tenant="acme", encrypt=False),
    Policy(policy_id="3", stream_class="B", encrypt=False),
    Policy(policy_id="4", stream_class="B", tenant="acme", encrypt=True, suite=Suite.CHACHA20_POLY1305, key_scope=ScopeKind.TENANT),
]
CASES: list[tuple[str, str, Decision]] = [
    ("acme", "A", PLAIN),
    ("globex", "A", DEFAULT),
    ("acme", "B", CHACHA),
    ("globex", "B", PLAIN),
    ("acme", "C", DEFAULT),
    ("acme", "a", DEFAULT),
    ("acme", UNCLASSIFIED, DEFAULT),
]


@pytest.mark.parametrize(("tenant", "stream_class", "decision"), CASES)
def test_tenants_own_policy_comes_before_the_one_for_all(tenant: str, stream_class: str, decision: Decision) -> None:
    for order in permutations(SOME):
        policies = PolicySet(order, "encrypt", 1)
        assert policies.decide(tenant, stream_class) == decision
        assert policies.decide(tenant, stream_class) == decision, "from its memory"


@pytest.mark.parametrize(("unmatched", "decision"), [("encrypt", DEFAULT), ("plain", PLAIN), ("refuse", REFUSE)])
def test_what_no_policy_names_is_decided_by_unmatched(unmatched: Unmatched, decision: Decision) -> None:
    assert PolicySet([], unmatched, 1).decide("acme", "anything") == decision


@given(st.booleans(), suites, scope_kinds, st.sampled_from(["*", "acme"]))
def test_policy_that_encrypts_decides_its_suite_and_scope(encrypt: bool, suite: Suite, scope: ScopeKind, tenant: str) -> None:
    policy = Policy(policy_id="p", stream_class="A", tenant=tenant, encrypt=encrypt, suite=suite, key_scope=scope)
    assert PolicySet([policy], "refuse", 1).decide("acme", "A") == (
        Encrypt(suite, scope, SUBJECT_HEADER if scope is ScopeKind.SUBJECT else None) if encrypt else PLAIN
    )


def test_star_is_for_tenants_and_no_glob_for_classes() -> None:
    policies = PolicySet([replace(SOME[0], stream_class="*")], "refuse", 1)
    assert policies.decide("acme", "A") is REFUSE


def test_find_says_which_policy_it_was() -> None:
    policies = PolicySet(SOME, "encrypt", 7)
    assert [p.policy_id if (p := policies.find(tenant, "A")) else None for tenant in ("acme", "globex")] == ["2", "1"]
    assert policies.find("acme", "C") is None
    assert policies.version == 7


globs = st.text("ab*?[]-", max_size=5)
words = st.text("ab*[]-\n", max_size=5)
rules = st.lists(
    st.builds(ClassRule, stream_class=st.sampled_from("XYZ"), topic=st.none() | globs, type=st.none() | globs, stream=st.none() | globs),
    max_size=4,
)


@given(rules, words, words, words)
def test_first_rule_that_matches_whole_words_names_the_class(rules: list[ClassRule], topic: str, type_: str, stream: str) -> None:
    def matches(rule: ClassRule) -> bool:
        pairs = ((rule.topic, topic), (rule.type, type_), (rule.stream, stream))
        return all(glob is None or fnmatchcase(word, glob) for glob, word in pairs)

    expected = next((rule.stream_class for rule in rules if matches(rule)), UNCLASSIFIED)
    assert Classifier(rules).classify(topic=topic, type=type_, stream=stream, headers={}) == expected


HEADER_CASES: list[tuple[dict[str, bytes | None], bool]] = [
    ({"team": b"crm"}, True),
    ({"team": b"crm-2"}, True),
    ({"team": b"CRM"}, False),
    ({"team": None}, False),
    ({}, False),
    ({"Team": b"crm"}, False),
    ({"team": b"crm\xff"}, True),
    ({"team": b"xcrm"}, False),
]


@pytest.mark.parametrize(("headers", "matched"), HEADER_CASES)
def test_header_rule_matches_the_headers_value(headers: dict[str, bytes | None], matched: bool) -> None:
    classifier = Classifier([ClassRule(stream_class="X", headers=(("team", "crm*"),))])
    assert classifier.classify(topic="t", type="e", stream="s", headers=headers) == ("X" if matched else UNCLASSIFIED)


def test_rule_on_a_header_does_not_match_a_record_without_it() -> None:
    classifier = Classifier([ClassRule(stream_class="X", headers=(("team", "*"),))])
    assert classifier.classify(topic="t", type="e", stream="s", headers={}) == UNCLASSIFIED
    assert classifier.classify(topic="t", type="e", stream="s", headers={"team": b""}) == "X"


def test_producers_own_class_header_counts_only_through_a_rule() -> None:
    forged: dict[str, bytes | None] = {"ce_streamtype": b"CartData"}
    rules = [ClassRule(stream_class="UserPersonalData", topic="users")]
    assert Classifier(rules).classify(topic="users", type="e", stream="s", headers=forged) == "UserPersonalData"
    by_header = [ClassRule(stream_class="CartData", headers=(("ce_streamtype", "CartData"),)), *rules]
    assert Classifier(by_header).classify(topic="users", type="e", stream="s", headers=forged) == "CartData"


@pytest.mark.parametrize(
    ("extractor", "found"),
    [
        ("header:ce_subjectid", "jane"),
        ("json:/user/id", "jane@example.org"),
        ("json:/user/n", "7"),
        ("key", "k-1"),
        ("header:none", None),
        ("json:/user", None),
        ("header:empty", None),
        ("header:control", None),
    ],
)
def test_a_records_person_by_extractor(extractor: str, found: str | None) -> None:
    headers = {"ce_subjectid": b"jane", "empty": b"", "control": b"a\0b"}
    ask = partial(subject_of, extractor, "topic", b"k-1", b'{"user": {"id": "jane@example.org", "n": 7}}', headers)
    if found is None:
        with pytest.raises(MalformedRecord) as refused:
            ask()
        assert "jane" not in str(refused.value), "what a record holds stands in no error"
    else:
        assert ask() == found


def test_a_record_that_is_no_json_has_no_person_by_pointer() -> None:
    for value in (None, b"", b"{"):
        with pytest.raises(MalformedRecord):
            subject_of("json:/user/id", "topic", None, value, {})
