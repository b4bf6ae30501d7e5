import numpy as np
import pytest

from dpo_jax import votes
from dpo_jax.types import Pair


def ballots(*pairs, ties=None):
    chosen, rejected = np.array(pairs).T
    return votes.Votes(Pair(chosen, rejected), None if ties is None else np.array(ties))


def warnings(cast, num, groups=("",), of_votes=None):
    return votes.warnings_of(votes.entrants(cast, of_votes), groups, [f"r{i}" for i in range(num)])


def test_entrants_are_responses_within_groups():
    cast = ballots((0, 2), (2, 0), (1, 2))
    contest = votes.entrants(cast, np.array([1, 0, 1]))
    assert contest.groups.tolist() == [0, 0, 1, 1, 1]
    assert contest.responses.tolist() == [0, 2, 0, 1, 2]
    assert contest.votes.responses.chosen.tolist() == [2, 1, 3]
    assert contest.votes.responses.rejected.tolist() == [4, 0, 4]
    assert votes.entrants(cast).groups.tolist() == [0, 0, 0]


def test_records_count_votes_whatever_their_weights():
    cast = ballots((0, 1), (0, 1), (1, 0), (1, 2), ties=[False, False, False, True])
    found = votes.record(cast._replace(weights=np.array([0.1, 5.0, 2.0, 1.0])), 4)
    assert [column.tolist() for column in found] == [[2, 1, 0, 0], [1, 2, 0, 0], [0, 1, 1, 0]]


def test_a_circle_is_one_level_and_a_chain_is_several():
    assert len(set(votes.levels(ballots((0, 1), (1, 2), (2, 0)), 3))) == 1
    assert len(set(votes.levels(ballots((0, 1), (1, 2)), 3))) == 3
    assert len(set(votes.levels(ballots((0, 1), (1, 2), ties=[True, True]), 3))) == 1
    assert len(set(votes.islands(ballots((0, 1), (2, 3)), 4))) == 2


def test_connected_votes_need_no_warning():
    assert warnings(ballots((0, 1), (1, 2), (2, 0)), 3) == []


def test_who_never_lost_or_won_is_named_with_the_number_of_votes():
    cast = ballots(*[(0, 1)] * 3, (0, 2), (1, 2), (2, 1), (1, 3), (2, 3))
    assert warnings(cast, 4) == [
        "r0 never lost in 4 votes: no vote bounds its strength from above.",
        "r3 never won in 2 votes: no vote bounds its strength from below.",
    ]


def test_a_set_that_never_lost_is_named():
    cast = ballots((0, 1), (1, 0), (0, 2), (2, 3), (3, 4), (4, 2))
    assert warnings(cast, 5) == ["r0, r1 never lost against the rest: no vote bounds their strengths from above."]


def test_sets_that_were_never_compared_are_named():
    (sentence,) = warnings(ballots((0, 1), (1, 0), (2, 3), (3, 2)), 4)
    assert sentence.startswith("2 sets of responses were never compared with each other: {r0, r1}; {r2, r3}.")


def test_groups_have_warnings_of_their_own_and_many_are_counted():
    cast = ballots((0, 1), (0, 1), (1, 0))
    assert warnings(cast, 2, ("tea", "coffee"), np.array([0, 1, 1]))[0] == (
        "r0 never lost in 1 vote (tea): no vote bounds its strength from above."
    )
    many = votes.Votes(Pair(np.zeros(50, int), np.ones(50, int)))
    sentences = warnings(many, 2, [f"p{i}" for i in range(50)], np.arange(50))
    assert len(sentences) == 2 * 21
    assert sentences[20] == "30 more warnings of this kind."


@pytest.mark.parametrize(
    ("judges", "prompts", "expected"),
    [
        ([0, 1, 2], None, [0.5, 0.5, 0.0]),  # votes: 0 > 1, 0 > 1, 1 > 0
        ([0, 1, 0], None, [0.5, 0.5]),
        ([0, 1, 2], [0, 1, 0], [0.0, np.nan, 0.0]),
    ],
)
def test_judges_agree_as_often_as_counted_by_hand(judges, prompts, expected):
    cast = ballots((0, 1), (0, 1), (1, 0))
    found = votes.agreement(cast, judges, prompts)
    np.testing.assert_allclose(found.agreement, expected)


def test_ties_agree_with_ties_only():
    cast = ballots((0, 1), (1, 0), (0, 1), ties=[True, True, False])
    found = votes.agreement(cast, [0, 1, 2])
    np.testing.assert_allclose(found.agreement, [0.5, 0.5, 0.0])
    assert found.pairs.tolist() == [2, 2, 2]
    assert found.overall == pytest.approx(1 / 3)
    assert np.isnan(votes.agreement(cast, [0, 0, 0]).overall)
