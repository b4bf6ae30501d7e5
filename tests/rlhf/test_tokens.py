"""PPO and GRPO by token, in a small world of strings: where exact expectations lead, and the exact moments of samples.

A policy on a table of next tokens can become any policy, so a learner stops where no token at no prefix gains.
"""

from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import optimize

from dpo_jax import losses, rlhf, strings, toy, train
from dpo_jax.types import Responses, TokenLogps
from tests.rlhf.conftest import policy_of
from tests.strings import naive

BETA, LARGE_BETA = 0.5, 3.0
SIZE, SMALL = (2, 3), (2, 2)
EMBEDDINGS = np.eye(2)
as_they_are = lambda advantages, _: advantages  # noqa: E731
per_length = partial(losses.mean_per_length, max_length=3)


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


class Town:
    """A world of strings with two prompts, a reference, a policy away from it, and what learners ask for."""

    def __init__(self, *size):
        rng = np.random.default_rng(1)
        self.size, self.space = size, strings.Strings(*size)
        self.policy = strings.PrefixTable(self.space)
        self.critic = strings.PrefixTable(self.space, num_outputs=1)
        shape = (2, self.space.num_prefixes, self.space.num_choices)
        self.reference, self.moved = ({"params": {"logits": jnp.asarray(rng.normal(size=shape))}} for _ in range(2))
        self.values = {"params": {"logits": jnp.asarray(rng.normal(size=(*shape[:2], 1)))}}
        self.rewards = rng.normal(size=(2, self.space.num_responses))
        self.world = toy.World(jnp.asarray(EMBEDDINGS), jnp.asarray(self.rewards))
        self.prefixes = naive.listed(size[0], size[1] - 1)
        self.listed = naive.listed(*size)

    def table(self, params):
        """The log-probabilities of all strings."""
        return toy.table_fn(self.policy, self.world.embeddings)(params)

    def next_probs(self, params):
        """The probabilities of next tokens, `[prompts, prefixes, choices]`, by NumPy."""
        logits = np.asarray(params["params"]["logits"])
        return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)

    def steps(self, string):
        """The row of each prefix of a string in tables of next tokens, and the token after it."""
        tokens = naive.tokens_of(string, *self.size[:2])
        return [(self.prefixes.index(string[:place]), token) for place, token in enumerate(tokens)]

    def learner(self, make, **options):
        """A learner of exact expectations, unless told otherwise; of tokens, or of whole responses."""
        token_log_prob = strings.token_log_prob_fn(self.policy, self.world.embeddings)
        shared = {
            "ask": toy.ask_everything(self.world),
            "respond": toy.enumerate_fn(self.policy, self.world.embeddings),
            "reward": toy.reward_fn(self.world.rewards),
            "reference_params": self.reference,
            "beta": BETA,
        }
        if make in (rlhf.token_ppo, rlhf.token_grpo):
            shared["token_log_prob"] = token_log_prob
        else:
            shared["log_prob"] = strings.log_prob_fn(self.policy, self.world.embeddings)
        if make is rlhf.token_ppo:
            shared["token_value"] = strings.token_value_fn(self.critic, self.world.embeddings)
        return make(**{**shared, **options})

    def start(self, make, policy):
        return rlhf.ActorCritic(policy, self.values) if make is rlhf.token_ppo else policy


@cache
def town(*size):
    return Town(*size)


def direction(learner, params):
    """Where a learner moves the logits of the next tokens."""
    found = rlhf.learner_gradient(jax.random.key(0), params, learner)
    return policy_of(found)["params"]["logits"]


# Where exact expectations lead. The moments below say that each gradient is its equation, so that most are slow


def settled(make, *, num_steps=150, rate=1.0, **options):
    """The policy's table after natural gradient steps: each logit moves by what its token gains, not by how often."""
    here = town(*SIZE)
    learner = here.learner(make, **options)

    def step(policy, _):
        next_tokens = strings.next_token_log_probs(here.table(policy), here.space)
        reached = jnp.exp(strings.prefix_log_probs(here.table(policy), here.space))[..., None] * jnp.exp(next_tokens)
        move = direction(learner, here.start(make, policy)) / reached
        return {"params": {"logits": policy["params"]["logits"] + rate * move}}, None

    return jax.jit(lambda start: here.table(jax.lax.scan(step, start, length=num_steps)[0]))(here.moved)


def distance(table, other):
    return 0.5 * np.abs(np.exp(np.asarray(table)) - np.exp(np.asarray(other))).sum(-1).max()


def optimum(beta=BETA):
    here = town(*SIZE)
    return toy.optimal_policy(here.table(here.reference), here.world.rewards, beta=beta)


OF_RLHF = {
    "token_ppo": (rlhf.token_ppo, {"decay": 1.0, "advantages": as_they_are}),
    "token_ppo, whitened": (rlhf.token_ppo, {"decay": 1.0}),
    "rloo": (rlhf.rloo, {}),
    "reinforce": (rlhf.reinforce, {}),
}


def slow_but(names, *fast):
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=[] if name in fast else pytest.mark.slow) for name in names]
    )


@slow_but(OF_RLHF, "token_ppo, whitened")
def test_with_the_kl_in_the_reward_they_find_the_optimum(name):
    make, options = OF_RLHF[name]
    assert distance(settled(make, **options), optimum()) < 1e-4


@pytest.mark.slow
def test_online_dpo_finds_it_too():
    here = town(*SIZE)
    online = lambda reward, **options: rlhf.online_dpo(prefer=toy.preference_fn(here.world.rewards), **options)  # noqa: E731
    assert distance(settled(online, rate=4.0 / BETA, num_steps=600), optimum()) < 1e-4


@pytest.mark.slow
def test_ppo_by_means_of_responses_does_not():
    options = {"decay": 1.0, "advantages": as_they_are, "aggregate": losses.mean_of_responses}
    assert distance(settled(rlhf.token_ppo, **options), optimum()) > 0.1


# Where GRPO stops: worked out from the ends of the strings to their beginning


def tilted_by_k2(reference, gain, share, beta):
    """The next token's probabilities where k2 stops: gain - beta * share * log-ratio is the same for all tokens."""

    def probs(level):
        return reference * np.exp((gain - level) / (beta * share))

    return probs(optimize.brentq(lambda level: probs(level).sum() - 1, -50, 50, xtol=1e-15))


def tilted_by_k3(reference, gain, share, beta):
    """The same where k3 stops: gain - beta * share * (1 - reference / policy) is the same for all tokens."""

    def probs(level):
        return reference / (1 - (gain - level) / (beta * share))

    lowest = np.max(gain - beta * share)  # where a probability would be infinite
    return probs(optimize.brentq(lambda level: probs(level).sum() - 1, lowest + 1e-9, lowest + 50, xtol=1e-15))


def stops(tilted, beta, *, share=np.ones_like, standardised=False):
    """The table where GRPO stops.

    Args:
      tilted: how the next token is chosen.
      beta: the price of KL.
      share: how much each token of a string counts, from the strings' numbers of tokens.
      standardised: whether rewards are measured in standard deviations.
    """
    here = town(*SIZE)
    reference, shares = here.next_probs(here.reference), share(here.space.num_tokens.astype(float))

    def policy(prompt, mean, scale):
        advantages = (here.rewards[prompt] - mean) / scale

        def after(prefix):
            """Expected share times advantage, expected share, and probabilities of the strings that begin so."""
            row, choices = here.prefixes.index(prefix), []
            for token in range(here.space.num_choices):
                string = (*prefix, token) if token < here.size[0] else prefix
                if string in here.prefixes and token < here.size[0]:
                    choices.append(after(string))
                else:
                    end = here.listed.index(string)
                    choices.append((shares[end] * advantages[end], shares[end], {end: 1.0}))
            gain, weight = (np.array([choice[i] for choice in choices]) for i in (0, 1))
            probs = tilted(reference[prompt, row], gain, weight, beta)
            spread = {end: p * q for p, choice in zip(probs, choices, strict=True) for end, q in choice[2].items()}
            return probs @ gain, probs @ weight, spread

        spread = after(())[2]
        return np.array([spread[row] for row in range(len(here.listed))])

    def moments(prompt, mean, scale):
        probs = policy(prompt, mean, scale)
        mean = probs @ here.rewards[prompt]
        return mean, np.sqrt(probs @ (here.rewards[prompt] - mean) ** 2) + 1e-4 if standardised else 1.0

    rows = []
    for prompt in range(2):
        found = (0.0, 1.0)
        for _ in range(60):
            found = moments(prompt, *found)
        rows.append(policy(prompt, *found))
    return jnp.log(jnp.asarray(rows))


per_token = np.reciprocal
of_rlhf = {"advantages": losses.rloo_advantages, "kl": losses.k2_estimate, "beta": BETA}
GRPO = {
    "k2, mean_of_tokens": ({**of_rlhf, "aggregate": losses.mean_of_tokens}, (tilted_by_k2, BETA), {}),
    "k2, mean_per_length": ({**of_rlhf, "aggregate": per_length}, (tilted_by_k2, BETA), {}),
    "k2, mean_of_responses": (of_rlhf, (tilted_by_k2, BETA), {"share": per_token}),
    "GRPO": ({"beta": LARGE_BETA}, (tilted_by_k3, LARGE_BETA), {"share": per_token, "standardised": True}),
    "Dr. GRPO": (
        {"advantages": losses.centred_advantages, "aggregate": per_length, "beta": LARGE_BETA},
        (tilted_by_k3, LARGE_BETA),
        {},
    ),
}


@slow_but(GRPO, "k2, mean_of_tokens", "GRPO")
def test_grpo_stops_where_theory_says(name):
    """Not at the optimum: the gradient of a KL by token misses that earlier tokens decide which prefixes come."""
    options, (tilted, beta), what = GRPO[name]
    table = settled(rlhf.token_grpo, rate=1.0 if beta == BETA else 0.5, **options)
    assert distance(table, stops(tilted, beta, **what)) < 1e-4
    assert distance(table, optimum(beta)) > 0.01


def test_what_it_misses_is_what_comes_later():
    """Its k2 stops at ref exp(Q / beta), and the optimum has the soft value of a prefix in the place of Q."""
    here = town(*SIZE)

    @jax.jit
    def tokens(table, reference, rewards):
        plain = strings.advantages(table, rewards, here.space) / BETA
        soft = strings.soft_advantages(reference, rewards, here.space, beta=BETA) / BETA
        return strings.token_log_ratios(table, reference, here.space), plain, soft

    ratios, plain, soft = tokens(stops(tilted_by_k2, BETA), here.table(here.reference), here.world.rewards)
    constant = ratios - plain  # one for each prefix
    np.testing.assert_allclose(constant - constant[..., :1], 0, atol=1e-9)
    last = here.space.offsets[-2]  # nothing comes later there
    np.testing.assert_allclose(ratios[:, last:], soft[:, last:], atol=1e-9)
    assert np.abs(ratios - soft)[:, 0].max() > 0.1


# Which way it moves lengths


def change_of_lengths(make, **options):
    """How the expected lengths of right and of wrong strings change with an exact step; right ones begin with a 0."""
    here = town(*SIZE)
    first = here.space.tokens[:, 0]
    rewards = jnp.broadcast_to(jnp.asarray(first == 0, float), here.rewards.shape)
    options = {"beta": 0.0, "reward": toy.reward_fn(rewards), **options}

    def lengths(params):
        table = here.table(params)
        sides = [jnp.where(first == letter, table, -jnp.inf) for letter in (0, 1)]
        return jnp.stack([strings.expected_length(jax.nn.log_softmax(side), here.space) for side in sides])

    def change(params):
        move = {"params": {"logits": direction(here.learner(make, **options), params)}}
        return jax.jvp(lengths, (params,), (move,))[1]

    return np.asarray(jax.jit(change)(here.moved))


def test_means_of_responses_shorten_right_answers_and_lengthen_wrong_ones():
    """Liu et al. 2025, 2503.20783, Sec. 3.1: a long response counts for less. All right answers are equally good."""
    right, wrong = change_of_lengths(rlhf.token_grpo)
    assert np.all(right < -1e-5) and np.all(wrong > 1e-5)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        pytest.param(rlhf.token_grpo, {"aggregate": losses.mean_of_tokens, "clip_high": 0.28}, marks=pytest.mark.slow),
        (rlhf.token_grpo, {"aggregate": per_length, "advantages": losses.centred_advantages}),
        pytest.param(rlhf.rloo, {}, marks=pytest.mark.slow),
    ],
    ids=["DAPO", "Dr. GRPO", "rloo"],
)
def test_others_leave_the_lengths_of_equally_good_answers(make, options):
    np.testing.assert_allclose(change_of_lengths(make, **options), 0, atol=1e-12)


# What a round collects, by hand


def credit(here, prompt, policy, values, decay):
    """For each string, what stands at its tokens by GAE and a KL penalty: a dictionary of lists."""
    own, other = here.next_probs(policy)[prompt], here.next_probs(here.reference)[prompt]
    rows = []
    for string, reward in zip(here.listed, here.rewards[prompt], strict=True):
        steps = here.steps(string)
        logps, reference_logps = ([np.log(table[step]) for step in steps] for table in (own, other))
        before = [values[prefix] for prefix, _ in steps]
        rewards = [-BETA * (p - q) for p, q in zip(logps, reference_logps, strict=True)]
        rewards[-1] += reward
        surprises = np.array(rewards) + np.array([*before[1:], 0.0]) - np.array(before)
        gains = [sum(decay**k * later for k, later in enumerate(surprises[t:])) for t in range(len(steps))]
        returns = [gain + value for gain, value in zip(gains, before, strict=True)]
        rows.append([logps, reference_logps, before, gains, returns])
    names = ("logps", "reference_logps", "values", "advantages", "returns")
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


def padded(rows, width):
    return np.array([[*row, *[0.0] * (width - len(row))] for row in rows])


def test_token_ppo_collects_values_advantages_and_returns():
    here, decay = town(*SIZE), 0.7
    learner = here.learner(rlhf.token_ppo, decay=decay, advantages=as_they_are, value_weight=0.3, value_clip=jnp.inf)
    params = here.start(rlhf.token_ppo, here.moved)
    key = jax.random.key(0)

    @jax.jit
    def run(params):
        rollouts, _ = learner.collect(key, params, None)
        others = params._replace(value=jax.tree.map(lambda leaf: leaf + 0.5, params.value))
        return rollouts, learner.objective(params, rollouts), learner.objective(others, rollouts)

    rollouts, (loss, metrics), (other_loss, other_metrics) = run(params)
    probs = np.exp(np.asarray(here.table(here.moved)))
    np.testing.assert_allclose(rollouts.weights, len(here.listed) * probs.ravel(), rtol=1e-12)
    np.testing.assert_array_equal(rollouts.mask, np.tile(here.space.mask, (2, 1)))
    expected = [
        credit(here, i, here.moved, np.asarray(here.values["params"]["logits"])[i, :, 0], decay) for i in (0, 1)
    ]
    for name in expected[0]:
        rows = padded([row for of_prompt in expected for row in of_prompt[name]], here.size[1])
        np.testing.assert_allclose(getattr(rollouts, name), rows, atol=1e-12, err_msg=name)
    weights = rollouts.weights[:, None] * rollouts.mask
    for shift, found in ((0.0, metrics), (0.5, other_metrics)):
        errors = 0.5 * np.square(rollouts.values + shift - rollouts.returns)
        np.testing.assert_allclose(found["value_loss"], np.average(errors, weights=weights), rtol=1e-12)
    surrogate = -np.average(rollouts.advantages, weights=weights)
    np.testing.assert_allclose(loss, surrogate + 0.3 * metrics["value_loss"], rtol=1e-12)
    np.testing.assert_allclose(other_loss - loss, 0.3 * (other_metrics["value_loss"] - metrics["value_loss"]))
    np.testing.assert_allclose(metrics["sampled_reward"], np.sum(probs * here.rewards) / 2, rtol=1e-12)


# The exact moments of samples

GROUP, PROMPT = 3, 1


def true_values(here):
    """The expected sum of rewards to come after each prefix, KL penalties among them, of the policy that moved."""
    own, other = here.next_probs(here.moved)[PROMPT], here.next_probs(here.reference)[PROMPT]
    values = np.zeros(len(here.prefixes))
    for row, prefix in reversed(list(enumerate(here.prefixes))):
        for token, p in enumerate(own[row]):
            string = (*prefix, token) if token < here.size[0] else prefix
            goes_on = token < here.size[0] and string in here.prefixes
            after = values[here.prefixes.index(string)] if goes_on else here.rewards[PROMPT, here.listed.index(string)]
            values[row] += p * (after - BETA * np.log(p / other[row, token]))
    return values


VALUES = {
    "true": true_values,
    "no": lambda here: np.zeros(len(here.prefixes)),
    "wrong": lambda here: np.cos(np.arange(len(here.prefixes))),
}
AGGREGATES = {
    "mean_of_responses": (losses.mean_of_responses, lambda lengths: 1 / (GROUP * lengths)),
    "mean_of_tokens": (losses.mean_of_tokens, lambda lengths: np.ones(GROUP) / np.sum(lengths)),
    "mean_per_length": (partial(losses.mean_per_length, max_length=2), lambda lengths: np.full(GROUP, 0.5 / GROUP)),
}
SAMPLED = {
    "rloo": (rlhf.rloo, {}),
    **{f"grpo, {name}": (rlhf.token_grpo, {"aggregate": f}) for name, (f, _) in AGGREGATES.items()},
    **{
        f"policy gradient, {name}": (
            rlhf.token_grpo,
            {"aggregate": f, "advantages": losses.rloo_advantages, "beta": 0.0},
        )
        for name, (f, _) in AGGREGATES.items()
    },
    **{
        f"ppo, {values} values, {decay}": (
            rlhf.token_ppo,
            {"decay": decay, "advantages": as_they_are, "aggregate": AGGREGATES["mean_per_length"][0]},
        )
        for values in VALUES
        for decay in (0.95, 1.0)
    },
    "ppo, wrong values, as in papers": (rlhf.token_ppo, {"decay": 0.95}),
}


@cache
def moments():
    """Mean and variance of each learner's estimate from a group of samples, as the library counts them."""
    here = town(*SMALL)

    def gradient(name, group, values, **traced):
        make, options = SAMPLED[name]
        params = here.moved
        if make is rlhf.token_ppo:
            everywhere = jnp.broadcast_to(values[None, :, None], (2, len(values), 1))
            params = rlhf.ActorCritic(params, {"params": {"logits": everywhere}})
        exchange = {"ask": lambda _: jnp.array([PROMPT]), "respond": lambda *_: Responses(group[None])}
        return direction(here.learner(make, **exchange, **{**options, **traced}), params)[PROMPT]

    grid = [name for name in SAMPLED if name.endswith((" 0.95", " 1.0"))]
    values = jnp.array([VALUES[name.split()[1]](here) for name in grid])
    decays = jnp.array([SAMPLED[name][1]["decay"] for name in grid])

    def estimate(group):
        of_grid = jax.vmap(lambda values, decay: gradient(grid[0], group, values, decay=decay))(values, decays)
        others = {name: gradient(name, group, values[-1]) for name in SAMPLED if name not in grid}
        return {**others, **dict(zip(grid, of_grid, strict=True))}

    options = {"group_size": GROUP, "groups_at_once": len(here.listed) ** GROUP}
    run = jax.jit(lambda log_probs: rlhf.group_moments(log_probs, estimate, **options))
    return jax.tree.map(np.asarray, run(here.table(here.moved)[PROMPT]))


def coefficients(name):
    """The function from a group to how much the score of each of its tokens counts, by the equations of the papers."""
    here = town(*SMALL)
    make, options = SAMPLED[name]
    values = VALUES[name.split()[1]](here) if make is rlhf.token_ppo else np.zeros(len(here.prefixes))
    found = credit(here, PROMPT, here.moved, values, options.get("decay", 1.0))
    every = {key: [np.array(row) for row in rows] for key, rows in found.items()}

    def of_group(group):
        logps, reference_logps, gains = (
            [every[key][row] for row in group] for key in ("logps", "reference_logps", "advantages")
        )
        lengths = np.array([len(row) for row in logps])
        rewards = here.rewards[PROMPT, list(group)]
        if make is rlhf.token_ppo and "advantages" in options:
            return [row / 2 / GROUP for row in gains]
        if make is rlhf.token_ppo:
            pooled = np.concatenate(gains)
            return [(row - pooled.mean()) / np.sqrt(pooled.var() + 1e-8) / lengths.sum() for row in gains]
        ratios = [p - q for p, q in zip(logps, reference_logps, strict=True)]
        if make is rlhf.rloo:
            net = rewards - BETA * np.array([row.sum() for row in ratios])
            return [(r - (net.sum() - r) / (GROUP - 1)) / GROUP * np.ones(n) for r, n in zip(net, lengths, strict=True)]
        shares = AGGREGATES[name.split(", ")[1]][1](lengths)
        centred = rewards - rewards.mean()
        if "beta" in options:
            return [s * a * GROUP / (GROUP - 1) * np.ones(n) for s, a, n in zip(shares, centred, lengths, strict=True)]
        standard = centred / (rewards.std(ddof=1) + 1e-4)
        return [s * (a - BETA * (1 - np.exp(-row))) for s, a, row in zip(shares, standard, ratios, strict=True)]

    return of_group


@pytest.mark.parametrize("name", SAMPLED)
def test_moments_are_those_of_all_groups(name):
    here, of_group = town(*SMALL), coefficients(name)
    probs = np.exp(np.asarray(here.table(here.moved))[PROMPT])
    next_probs = here.next_probs(here.moved)[PROMPT]
    scores = [
        [np.eye(len(next_probs))[prefix, :, None] * (np.eye(3)[token] - next_probs) for prefix, token in here.steps(y)]
        for y in here.listed
    ]
    mean = square = 0.0
    for group in np.ndindex(*[len(here.listed)] * GROUP):
        pairs = zip(group, of_group(group), strict=True)
        estimate = sum(np.tensordot(of_string, scores[row], 1) for row, of_string in pairs)
        mean += np.prod(probs[list(group)]) * estimate
        square += np.prod(probs[list(group)]) * estimate**2
    np.testing.assert_allclose(moments()[0][name], mean, atol=1e-12)
    np.testing.assert_allclose(moments()[1][name], square - mean**2, atol=1e-12)


def test_groups_may_be_evaluated_in_parts():
    log_probs, numbers = jnp.log(jnp.array([0.5, 0.3, 0.2])), jnp.array([1.0, -2.0, 5.0])

    def found(groups_at_once):
        estimate = lambda group: {"sum": jnp.sum(numbers[group]), "each": numbers[group]}  # noqa: E731
        return rlhf.group_moments(log_probs, estimate, group_size=2, groups_at_once=groups_at_once)

    mean, variance = 0.9, 0.5 + 0.3 * 4 + 0.2 * 25 - 0.9**2
    for groups_at_once in (4, 1024):
        of_mean, of_variance = jax.jit(found, static_argnums=0)(groups_at_once)
        np.testing.assert_allclose([of_mean["sum"], of_variance["sum"]], [2 * mean, 2 * variance])
        np.testing.assert_allclose([of_mean["each"], of_variance["each"]], [[mean] * 2, [variance] * 2])


@cache
def exact_gradients():
    """Of the expected reward, and of the objective of RLHF."""
    here = town(*SMALL)

    def objective(params, beta):
        table, reference = here.table(params)[PROMPT], here.table(here.reference)[PROMPT]
        return toy.expected_reward(table, here.world.rewards[PROMPT]) - beta * toy.kl_to_reference(table, reference)

    found = jax.jit(jax.vmap(jax.grad(objective), in_axes=(None, 0)))(here.moved, jnp.array([0.0, BETA]))
    return np.asarray(found["params"]["logits"][:, PROMPT])


def bias_and_variance(name):
    """How far the mean of an estimate is from a multiple of the exact gradient, and its variance; both are relative."""
    mean, variance = (found[name] for found in moments())
    gradient = exact_gradients()[0 if "policy gradient" in name else 1]
    share = np.sum(mean * gradient) / np.sum(gradient**2)
    assert share > 0.01
    return np.linalg.norm(mean / share - gradient) / np.linalg.norm(gradient), variance.sum() / share**2


@pytest.mark.parametrize(
    "name",
    [
        "rloo",
        "policy gradient, mean_per_length",
        "ppo, true values, 0.95",
        *(f"ppo, {values} values, 1.0" for values in VALUES),
    ],
)
def test_these_estimates_are_unbiased_up_to_a_factor(name):
    assert bias_and_variance(name)[0] < 1e-12


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("policy gradient, mean_of_responses", 0.1),
        ("policy gradient, mean_of_tokens", 0.03),  # the number of tokens depends on the samples
        ("ppo, wrong values, 0.95", 0.01),
        ("ppo, no values, 0.95", 0.003),
        ("ppo, wrong values, as in papers", 0.1),
        ("grpo, mean_of_responses", 0.3),
        ("grpo, mean_of_tokens", 0.3),
        ("grpo, mean_per_length", 0.3),
    ],
)
def test_these_estimates_are_biased(name, least):
    assert bias_and_variance(name)[0] > least


def test_true_values_take_variance_away():
    true, none, wrong = (bias_and_variance(f"ppo, {values} values, 1.0")[1] for values in ("true", "no", "wrong"))
    assert true < 0.9 * none < 0.9 * wrong
    assert bias_and_variance("ppo, true values, 0.95")[1] < true < bias_and_variance("rloo")[1]


# Of one token each


@pytest.mark.slow
def test_with_one_token_each_they_are_ppo_and_grpo():
    """Losses, metrics and gradients: GRPO of samples, PPO of all responses."""
    space = strings.Strings(4, 1, fixed_length=True)
    policy, critic = strings.PrefixTable(space), strings.PrefixTable(space, num_outputs=1)
    rng = np.random.default_rng(2)
    reference, moved = ({"params": {"logits": jnp.asarray(rng.normal(size=(2, 1, 4)))}} for _ in range(2))
    valued = rlhf.ActorCritic(moved, {"params": {"logits": jnp.asarray(rng.normal(size=(2, 1, 1)))}})
    world = toy.World(jnp.eye(2), jnp.asarray(rng.normal(size=(2, 4))))
    tokens = {"token_log_prob": strings.token_log_prob_fn(policy, world.embeddings)}
    wholes = {"log_prob": toy.log_prob_fn(policy, world.embeddings)}
    exact = {"respond": toy.enumerate_fn(policy, world.embeddings)}
    samples = {"respond": toy.respond_fn(policy, world.embeddings, group_size=5)}
    clips = {"clip": 0.05, "clip_high": 0.2}

    def found(make, params, **options):
        learner = make(
            ask=toy.ask_everything(world),
            reward=toy.reward_fn(world.rewards),
            reference_params=reference,
            beta=BETA,
            **options,
        )
        data, _ = learner.collect(jax.random.key(1), params, None)
        later = jax.tree.map(lambda leaf: 1.3 * leaf, params)  # some ratios are clipped
        return jax.value_and_grad(learner.objective, has_aux=True)(later, data)

    def value(params, prompts):
        return params["params"]["logits"][prompts, 0, 0]

    @jax.jit
    def pairs():
        token_value = strings.token_value_fn(critic, world.embeddings)
        return {
            "grpo": (
                found(rlhf.token_grpo, moved, **tokens, **samples, **clips),
                found(rlhf.grpo, moved, **wholes, **samples, **clips),
            ),
            "ppo": (
                found(rlhf.token_ppo, valued, **tokens, **exact, token_value=token_value),
                found(rlhf.ppo, valued, **wholes, **exact, value=value),
            ),
        }

    for by_token, by_response in pairs().values():
        chex.assert_trees_all_close(by_token, by_response, rtol=1e-10, atol=1e-12)


# What stands behind the end, and traced hyperparameters


def test_what_stands_behind_the_end_is_harmless():
    """Even NaN: gradients with respect to it are zero."""
    here = town(*SIZE)
    token_log_prob = strings.token_log_prob_fn(here.policy, here.world.embeddings)
    token_value = strings.token_value_fn(here.critic, here.world.embeddings)

    @jax.jit
    def found(behind):
        added = jnp.where(here.space.mask, 0, behind)

        def log_prob(params, prompts, responses):
            values, mask = token_log_prob(params, prompts, responses)
            return TokenLogps(values + added[responses], mask)

        def value(params, prompts, responses):
            return token_value(params, prompts, responses) + added[responses]

        results = []
        for make, options in ((rlhf.token_ppo, {"token_value": value}), (rlhf.token_grpo, {})):
            params, learner = here.start(make, here.moved), here.learner(make, token_log_prob=log_prob, **options)
            data, _ = learner.collect(jax.random.key(0), params, None)
            results.append((data, jax.value_and_grad(learner.objective, has_aux=True)(params, data)))
        return results

    clean, dirty = found(0.0), found(jnp.nan)
    chex.assert_trees_all_close(dirty, clean, rtol=1e-12, atol=1e-14)
    chex.assert_tree_all_finite(clean)


def gradients_by(beta, decay):
    here = town(*SIZE)
    ppo = here.learner(rlhf.token_ppo, beta=beta, decay=decay, clip=decay, value_clip=beta, value_weight=beta)
    grpo = here.learner(rlhf.token_grpo, beta=beta, clip=decay, clip_high=beta)
    starts = here.start(rlhf.token_ppo, here.moved), here.moved
    return [rlhf.learner_gradient(jax.random.key(0), *pair) for pair in zip(starts, (ppo, grpo), strict=True)]


def test_hyperparameters_may_be_traced():
    """Their values are held against fixed ones where it is slow; discounts are mapped over in the moments above."""
    traced = jax.eval_shape(gradients_by, 0.1, 0.3)
    assert [policy_of(gradient)["params"]["logits"].shape for gradient in traced] == [(2, 7, 3)] * 2


@pytest.mark.slow
def test_traced_hyperparameters_are_fixed_ones():
    betas, decays = np.array([0.1, 2.0]), np.array([0.3, 1.0])
    traced = jax.jit(jax.vmap(gradients_by))(betas, decays)
    fixed = jax.jit(lambda: gradients_by(0.1, 0.3))()
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[0], traced), fixed, rtol=1e-10, atol=1e-14)
    differs = jax.tree.map(lambda leaf: np.max(np.abs(leaf[0] - leaf[1])) > 1e-6, traced)
    assert all(jax.tree.leaves(differs))


# Bad input


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (rlhf.token_ppo, {"beta": -0.1}, "beta must be in .0, inf."),
        (rlhf.token_ppo, {"decay": 1.1}, "decay must be in .0, 1."),
        (rlhf.token_ppo, {"decay": np.nan}, "decay must be in .0, 1."),
        (rlhf.token_ppo, {"clip": 0.0}, "clip must be in .0, inf."),
        (rlhf.token_ppo, {"value_clip": 0.0}, "value_clip must be in .0, inf."),
        (rlhf.token_ppo, {"value_weight": -1.0}, "value_weight must be in .0, inf."),
        (rlhf.token_grpo, {"beta": np.inf}, "beta must be in .0, inf."),
        (rlhf.token_grpo, {"clip": -1.0}, "clip must be in .0, inf."),
        (rlhf.token_grpo, {"clip_high": 0.0}, "clip_high must be in .0, inf."),
    ],
)
def test_bad_hyperparameters_are_refused_when_the_learner_is_made(as_users_have_it, make, changes, message):
    with pytest.raises(ValueError, match=message):
        town(*SIZE).learner(make, **changes)


@pytest.mark.parametrize("make", [rlhf.token_ppo, rlhf.token_grpo])
def test_an_actor_critic_is_no_reference(make):
    here = town(*SIZE)
    with pytest.raises(TypeError, match="reference_params must be those of a policy, got an ActorCritic"):
        here.learner(make, reference_params=here.start(rlhf.token_ppo, here.reference))


def test_token_ppo_wants_an_actor_critic(as_users_have_it):
    here = town(*SIZE)
    with pytest.raises(TypeError, match=r"token_ppo trains an ActorCritic\(policy, value\), got .* type dict"):
        rlhf.learner_gradient(jax.random.key(0), here.moved, here.learner(rlhf.token_ppo))


def test_groups_of_none_are_refused(as_users_have_it):
    with pytest.raises(ValueError, match="group_size must be at least 1"):
        rlhf.group_moments(jnp.zeros(4), lambda group: group, group_size=0)


# Samples


@pytest.mark.parametrize(
    ("make", "options", "write"),
    [
        pytest.param(rlhf.token_ppo, {"decay": 1.0, "value_weight": 1.0}, strings.respond_fn, marks=pytest.mark.slow),
        (rlhf.token_grpo, {"advantages": losses.rloo_advantages, "kl": losses.k2_estimate}, toy.respond_fn),
    ],
    ids=["token_ppo", "token_grpo"],
)
def test_samples_lead_most_of_the_way(make, options, write):
    here = town(*SIZE)
    respond = write(here.policy, here.world.embeddings, group_size=64)
    learner = here.learner(make, respond=respond, **options)

    @jax.jit
    def run(key):
        return train.fit_online(
            key,
            here.start(make, here.moved),
            learner,
            optimizer=optax.adam(optax.cosine_decay_schedule(0.1, 2 * 100)),
            num_epochs=2,
            rounds_per_epoch=50,
            passes_per_round=2,
        )

    params, history = run(jax.random.key(3))
    target = optimum() if make is rlhf.token_ppo else stops(tilted_by_k2, BETA, share=per_token)
    before, after = (distance(here.table(policy), target) for policy in (here.moved, policy_of(params)))
    assert after < before / 10
    assert history["loss"].shape == (2,)
