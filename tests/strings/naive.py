"""What the package computes by sums over a tree, by loops over strings; and without any list of strings."""

from itertools import product

import numpy as np
from scipy import stats


def listed(num_letters, horizon, fixed_length=False):
    """All strings as tuples of letters, in the order of their ids."""
    lengths = [horizon] if fixed_length else range(horizon + 1)
    return [string for length in lengths for string in product(range(num_letters), repeat=length)]


def tokens_of(string, num_letters, horizon):
    """The letters, and the end where there is one."""
    return [*string] if len(string) == horizon else [*string, num_letters]


def prefix_probs(probs, num_letters, horizon, fixed_length=False):
    """For each prefix, the probability that a string begins with it, and that it then has each token."""
    every = listed(num_letters, horizon, fixed_length)
    choices = num_letters + (not fixed_length)
    found = {prefix: [0.0, np.zeros(choices)] for prefix in listed(num_letters, horizon - 1)}
    for string, prob in zip(every, probs, strict=True):
        for place, token in enumerate(tokens_of(string, num_letters, horizon)):
            found[string[:place]][0] += prob
            found[string[:place]][1][token] += prob
    return found


def next_tokens(probs, *sizes):
    """A row for each prefix: the probabilities of the next token."""
    return np.array([joint / total for total, joint in prefix_probs(probs, *sizes).values()])


def continued(probs, numbers, num_letters, horizon, fixed_length=False):
    """For each prefix and each token after it, the mean of a number of strings, given that they begin so."""
    weighed = prefix_probs(probs * numbers, num_letters, horizon, fixed_length)
    total = prefix_probs(probs, num_letters, horizon, fixed_length)
    before = np.array([weighed[prefix][0] / total[prefix][0] for prefix in total])
    after = np.array([weighed[prefix][1] / total[prefix][1] for prefix in total])
    return before, after


def walk(string, transitions):
    """The states of an automaton along a string, the last one behind it."""
    states = [0]
    for letter in string:
        states.append(int(transitions[states[-1]][letter]))
    return states


def automaton_optimum(transitions, weights, final, chain, *, beta, horizon, fixed_length=False):
    """The optimum where rewards are sums along an automaton and the reference is Markov, by dynamic programming.

    Args:
      transitions: the state after each state and letter.
      weights: of each letter in each state.
      final: of the state at the end.
      chain: the reference's probabilities of the next token: a row for the beginning and for each previous letter.
      beta: strength of the pull towards the reference.
      horizon: the largest number of letters.
      fixed_length: whether strings have that many.

    Returns:
      `log_partition`, and `expected_reward`, `kl_to_reference` and the distribution of `lengths` of the optimum; and a
      function that gives the log-probability of a string.
    """
    num_states, num_letters = weights.shape
    values = {horizon: np.tile(final[:, None], num_letters + 1)}  # [states, previous letter], in units of reward
    choices = {}
    for place in reversed(range(horizon)):
        here = np.full((num_states, num_letters + 1, chain.shape[1]), -np.inf)
        for state in range(num_states):
            for previous in range(num_letters + 1):
                for token in range(chain.shape[1]):
                    if token < num_letters:
                        worth = weights[state, token] + values[place + 1][transitions[state][token], 1 + token]
                    else:
                        worth = final[state]
                    here[state, previous, token] = np.log(chain[previous, token]) + worth / beta
        values[place] = beta * np.log(np.exp(here).sum(-1))
        choices[place] = np.exp(here - values[place][..., None] / beta)
    reached, lengths, reward, kl = np.zeros((num_states, num_letters + 1)), np.zeros(horizon + 1), 0.0, 0.0
    reached[0, 0] = 1.0
    for place in range(horizon):
        after = np.zeros_like(reached)
        for state, previous in product(range(num_states), range(num_letters + 1)):
            for token in range(chain.shape[1]):
                prob = reached[state, previous] * choices[place][state, previous, token]
                kl += prob * np.log(choices[place][state, previous, token] / chain[previous, token])
                if token < num_letters:
                    reward += prob * weights[state, token]
                    after[transitions[state][token], 1 + token] += prob
                else:
                    reward += prob * final[state]
                    lengths[place] += prob
        reached = after
    reward += np.sum(reached.sum(-1) * final)
    lengths[horizon] = reached.sum()

    def log_prob(string):
        total, state, previous = 0.0, 0, 0
        for place, token in enumerate(string if fixed_length else tokens_of(string, num_letters, horizon)):
            total += np.log(choices[place][state, previous, token])
            if token < num_letters:
                state, previous = transitions[state][token], 1 + token
        return total

    facts = {"log_partition": values[0][0, 0] / beta, "expected_reward": reward, "kl_to_reference": kl}
    return facts | {"lengths": lengths}, log_prob


def assert_distributed(sample, probs):
    """The sample, ids, has the stated probabilities; what is impossible does not occur, what is rare is pooled."""
    probs = np.ravel(np.float64(probs))
    counts = np.bincount(np.ravel(sample), minlength=probs.size)
    assert len(counts) == len(probs)
    assert not np.any(counts[probs == 0])
    expected = probs / probs.sum() * counts.sum()
    common = expected > 8
    pooled = [np.append(x[common], x[~common].sum()) for x in (counts, expected)]
    if pooled[1][-1] < 8:
        pooled = [x[:-1] for x in pooled]
    assert len(pooled[0]) > 1
    assert stats.chisquare(*pooled, sum_check=False).pvalue > 1e-4
