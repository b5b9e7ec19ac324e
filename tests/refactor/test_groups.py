"""Experts that are not one a domain: which text makes which."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from readme_jax.config import Slice
from readme_jax.errors import ConfigError
from readme_jax.refactor.groups import ByExpert, expert_count, group_text, histograms

EMPTY = {d: np.zeros((0, 4), np.int32) for d in "abcdefg"}


def two_topics(rng: np.random.Generator, count: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Sequences of low or of high token ids, shuffled, and which they are."""
    topic = rng.permutation(np.arange(count) % 2)
    return rng.integers(0, 40, (count, 64)).astype(np.int32) + 1000 * topic[:, None].astype(np.int32), topic


@pytest.mark.parametrize("experts, names", [
    (0, list("abcdefg")),
    (7, list("abcdefg")),
    (4, ["a+b", "c+d", "e+f", "g"]),
    (2, ["a+b+c+d", "e+f+g"]),
])  # fmt: skip
def test_neighbouring_domains_share_experts(experts, names):
    grouping = group_text(EMPTY, Slice(num_experts=experts))
    assert grouping.names == names
    label = grouping.experts(np.zeros((7, 4), np.int32), np.arange(7))
    assert [names[e] for e in label] == [next(n for n in names if d in n) for d in "abcdefg"]
    assert [d for group in grouping.groups for d in group] == list("abcdefg")


def test_dense_slice_is_one_expert_of_all():
    grouping = group_text(EMPTY, Slice(experts="one"))
    assert grouping.names == ["a+b+c+d+e+f+g"]
    assert not grouping.experts(np.zeros((7, 4), np.int32), np.arange(7)).any()


@given(st.integers(2, 40), st.integers(1, 9))
def test_experts_are_at_most_the_domains_or_a_multiple(experts, domains):
    if experts <= domains or experts % domains == 0:
        assert expert_count(Slice(num_experts=experts), domains) == experts
    else:
        with pytest.raises(ConfigError, match=f"Slice.num_experts = {experts}: with {domains} domains"):
            expert_count(Slice(num_experts=experts), domains)


def test_two_topics_of_a_domain_become_two_experts():
    rng = np.random.default_rng(0)
    (a, topic_a), (b, topic_b) = two_topics(rng), two_topics(rng)
    grouping = group_text({"a": a, "b": b}, Slice(num_experts=4))
    assert grouping.names == ["a.1", "a.2", "b.1", "b.2"]
    parts = grouping.parts({"a": a, "b": b})
    assert [len(part) for part in parts.values()] == [10] * 4
    fresh, topic = two_topics(rng, 50)  # text that was not calibrated on
    for domain, old, known in ((0, a, topic_a), (1, b, topic_b)):
        label = grouping.experts(old, np.full(len(old), domain))
        assert set(label) == {2 * domain, 2 * domain + 1}
        assert len(set(zip(label, known, strict=True))) == 2, "a part is a topic"
        new = grouping.experts(fresh, np.full(len(fresh), domain))
        assert set(zip(new, topic, strict=True)) == set(zip(label, known, strict=True))


def test_labels_are_a_function_of_each_sequence_alone():
    rng = np.random.default_rng(1)
    a, _ = two_topics(rng)
    grouping = group_text({"a": a, "b": a[::-1].copy()}, Slice(num_experts=6))
    tokens = rng.integers(0, 2000, (12, 64)).astype(np.int32)
    domain = np.arange(12) % 2
    whole = grouping.experts(tokens, domain)
    alone = [int(grouping.experts(tokens[i : i + 1], domain[i : i + 1])[0]) for i in range(12)]
    assert whole.tolist() == alone and whole.dtype == np.int32
    batch = {"tokens": tokens, "domain": domain.astype(np.int32)}
    labelled = ByExpert([batch], grouping)[0]
    assert labelled["tokens"] is tokens and labelled["domain"].tolist() == alone
    assert batch["domain"].tolist() == domain.tolist(), "the source's batch is left as it was"


def test_histograms_are_unit_vectors_whatever_the_order():
    tokens = np.random.default_rng(2).integers(0, 50000, (3, 100))
    rows = histograms(tokens)
    np.testing.assert_allclose((rows**2).sum(1), 1)
    np.testing.assert_array_equal(rows, histograms(tokens[:, ::-1]))


def test_text_that_is_all_alike_leaves_a_part_empty_and_says_so():
    same = np.ones((4, 8), np.int32)
    with pytest.raises(ConfigError, match=r"a\.1 has no calibration text; raise Slice\.calibration_tokens"):
        group_text({"a": same, "b": same}, Slice(num_experts=4))
