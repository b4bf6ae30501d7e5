import inspect
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

from dpo_jax import losses, toy, train
from dpo_jax.types import Labels, Pair, Preferences

POLICY = toy.ToyLM(num_responses=10)


def moved(params):
    """Not the reference: no two losses are equal."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: leaf + np.float32(0.2 * rng.normal(size=leaf.shape)), params)


def test_sft_objective_is_the_mean_negative_log_likelihood(start):
    world, log_prob, params, demos, _ = start
    table = np.float64(jax.jit(toy.table_fn(POLICY, world.embeddings))(params))
    loss, metrics = jax.jit(train.sft_objective(log_prob))(params, demos)
    np.testing.assert_allclose(loss, -table[demos.prompts, demos.responses].mean(), rtol=1e-5)
    assert metrics == {}


def test_preference_objective_has_the_notebooks_metrics(start, key):
    world, log_prob, params, _, preferences = start
    other, tables = moved(params), jax.jit(toy.table_fn(POLICY, world.embeddings))
    table, reference = (np.float64(tables(p)) for p in (other, params))
    prompts, (chosen, rejected) = preferences.prompts, preferences.responses
    ratios = table - reference
    chosen_reward, rejected_reward = 0.3 * ratios[prompts, chosen], 0.3 * ratios[prompts, rejected]
    loss, metrics = jax.jit(train.preference_objective(log_prob, losses.dpo_loss, beta=0.3))(other, preferences)
    expected = {
        "chosen_reward": chosen_reward.mean(),
        "rejected_reward": rejected_reward.mean(),
        "reward_margin": (chosen_reward - rejected_reward).mean(),
        "accuracy": (chosen_reward > rejected_reward).mean(),
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(loss, np.logaddexp(0, rejected_reward - chosen_reward).mean(), rtol=1e-5)


def test_hyperparameters_reach_the_loss(start):
    _, log_prob, _, _, preferences = start

    def loss(policy, reference, *, beta, slope):
        return slope * beta * jnp.ones_like(policy[0] - reference[0])

    value, _ = train.preference_objective(log_prob, loss, beta=0.5, slope=4.0)(start[2], preferences)
    assert value == 2.0


def test_whole_weights_equal_repeated_rows(start, key):
    _, log_prob, params, demos, preferences = start
    params = moved(params)
    rows = np.array([0, 1, 1, 1])
    for objective, data in (
        (train.sft_objective(log_prob), demos),
        (train.preference_objective(log_prob, losses.dpo_loss, beta=0.1), preferences),
    ):
        data = jax.tree.map(np.asarray, data)
        repeated = jax.jit(objective)(params, jax.tree.map(lambda leaf: leaf[rows], data))
        two_rows = jax.tree.map(lambda leaf: leaf[:2], data)._replace(weights=np.array([0.5, 1.5], np.float32))
        loss, metrics = jax.jit(objective)(params, two_rows)
        weighted = loss, {name: np.asarray(metric) for name, metric in metrics.items()}
        chex.assert_trees_all_close(weighted, repeated, rtol=1e-5)


def test_no_gradient_flows_into_the_reference(start):
    _, log_prob, params, _, preferences = start
    gradient = jax.jit(
        jax.grad(lambda params: train.with_reference(log_prob, params, preferences).reference_logps.chosen.sum())
    )(params)
    chex.assert_trees_all_equal(gradient, jax.tree.map(np.zeros_like, gradient))


def test_a_log_prob_that_does_not_keep_the_pair_is_refused(start):
    def stacked(params, prompts, responses):
        return params[prompts, jnp.stack(responses)]

    with pytest.raises(TypeError, match="must return 2 arrays, one for each of the responses, got 1"):
        train.with_reference(stacked, jnp.zeros((5, 10)), start[4])


def test_losses_that_take_the_mean_themselves_are_refused(start):
    _, log_prob, params, _, preferences = start

    def mean_of_dpo(policy, reference, *, beta):
        return losses.dpo_loss(policy, reference, beta=beta).mean()

    with pytest.raises(
        ValueError, match=r"mean_of_dpo must have one number for each of the \d+ rows .* got shape \(\)"
    ):
        train.preference_objective(log_prob, mean_of_dpo, beta=0.1)(params, preferences)


def test_numbers_of_tokens_are_refused(start):
    """A comparison is one row; the loss of its tokens is another loss."""
    _, log_prob, params, demos, preferences = start

    def of_tokens(params, prompts, responses):
        return jax.tree.map(lambda logps: jnp.stack([logps, logps], axis=1), log_prob(params, prompts, responses))

    message = r"one number for each of the \d+ rows of the batch, got shape \(\d+, 2\): take sums or means over tokens"
    for call in (
        lambda: train.with_reference(of_tokens, params, preferences),
        lambda: train.sft_objective(of_tokens)(params, demos),
        lambda: train.preference_objective(of_tokens, losses.dpo_loss, beta=0.1)(params, preferences),
        lambda: train.reference_free_objective(of_tokens, losses.simpo_loss, beta=2.0, gamma=0.5)(params, preferences),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_preferences_without_reference_are_refused(start):
    _, log_prob, params, _, preferences = start
    objective = train.preference_objective(log_prob, losses.dpo_loss, beta=0.1)
    with pytest.raises(ValueError, match="no reference log-probabilities"):
        objective(params, preferences._replace(reference_logps=None))


def test_bad_beta_is_refused_when_the_objective_is_made(start):
    with pytest.raises(ValueError, match="beta must be in .0, inf., got -0.1"):
        train.preference_objective(start[1], losses.dpo_loss, beta=-0.1)


# Of the policy alone


def test_reference_free_objective_has_its_own_metrics(start):
    _, log_prob, params, _, preferences = start
    objective = train.reference_free_objective(log_prob, losses.simpo_loss, beta=2.0, gamma=0.5)
    loss, metrics = jax.jit(objective)(params, preferences._replace(reference_logps=None))
    logps = jax.jit(log_prob)(params, preferences.prompts, preferences.responses)
    chosen, rejected = (np.float64(side) for side in logps)
    np.testing.assert_allclose(loss, np.logaddexp(0, 0.5 - 2 * (chosen - rejected)).mean(), rtol=1e-5)
    expected = {"chosen_logp": chosen, "rejected_logp": rejected, "logp_margin": chosen - rejected}
    expected["accuracy"] = chosen > rejected
    assert metrics.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(metrics[name], values.mean(), rtol=1e-5)


# Of single responses


@pytest.mark.parametrize("weights", [None, np.linspace(0.5, 1.5, 40, dtype=np.float32)])
def test_unpaired_objective_tells_good_from_bad(start, labels, weights):
    _, log_prob, params, _, _ = start
    objective = train.unpaired_objective(log_prob, losses.apo_zero_unpaired_loss, beta=0.5)
    loss, metrics = jax.jit(objective)(params, labels._replace(weights=weights))
    logps = jax.jit(log_prob)(params, labels.prompts, labels.responses)
    rewards = 0.5 * (np.float64(logps) - np.float64(labels.reference_logps))
    good, weights = np.asarray(labels.desirable), np.ones(40) if weights is None else weights
    values = np.where(good, 1 / (1 + np.exp(rewards)), 1 / (1 + np.exp(-rewards)))
    np.testing.assert_allclose(loss, (weights * values).mean(), rtol=1e-5)
    desirable, undesirable = (np.average(rewards[side], weights=weights[side]) for side in (good, ~good))
    np.testing.assert_allclose(metrics["desirable_reward"], desirable, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["undesirable_reward"], undesirable, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["reward_margin"], desirable - undesirable, rtol=1e-4, atol=1e-6)


def test_a_batch_without_bad_responses_adds_nothing_to_their_mean(start, labels):
    _, log_prob, params, _, _ = start
    good = labels._replace(desirable=jnp.ones(40, bool))
    _, metrics = jax.jit(train.unpaired_objective(log_prob, losses.apo_zero_unpaired_loss, beta=0.5))(params, good)
    assert (metrics["undesirable_reward"].numerator, metrics["undesirable_reward"].denominator) == (0, 0)
    assert np.isnan(metrics["undesirable_reward"])
    chex.assert_tree_all_finite(metrics)


def test_labels_without_reference_are_refused(start, labels):
    objective = train.unpaired_objective(start[1], losses.apo_zero_unpaired_loss, beta=0.5)
    with pytest.raises(ValueError, match="no reference log-probabilities: add them by train.with_reference"):
        objective(start[2], labels._replace(reference_logps=None))
    with pytest.raises(ValueError, match="beta must be in .0, inf., got 0"):
        train.unpaired_objective(start[1], losses.apo_zero_unpaired_loss, beta=0)


# Hyperparameters that depend on the batch


def test_functions_of_the_batch_are_hyperparameters_without_gradient(start):
    """An offset that is a column of the data, and one that moves with the parameters."""
    _, log_prob, params, _, preferences = start
    offsets = jnp.linspace(-1, 1, 70)
    data = preferences._replace(columns={"offset": offsets})
    named = train.preference_objective(
        log_prob, losses.offset_dpo_loss, beta=0.3, offset=lambda params, batch, logps: batch.columns["offset"]
    )
    fixed = train.preference_objective(log_prob, losses.offset_dpo_loss, beta=0.3, offset=offsets)
    chex.assert_trees_all_close(jax.jit(named)(params, data), jax.jit(fixed)(params, preferences))
    moving = train.preference_objective(
        log_prob, losses.offset_dpo_loss, beta=0.3, offset=lambda params, batch, logps: logps.chosen
    )
    held = jax.jit(log_prob)(params, preferences.prompts, preferences.responses).chosen
    still = train.preference_objective(log_prob, losses.offset_dpo_loss, beta=0.3, offset=held)
    gradients = (jax.jit(jax.grad(lambda p, f=f: f(p, preferences)[0]))(params) for f in (moving, still))
    chex.assert_trees_all_close(*gradients, rtol=1e-5)


def test_no_gradient_flows_through_a_function_of_the_parameters(start, labels):
    """KTO's exact KL, say."""
    world, log_prob, params, _, _ = start
    table = toy.table_fn(POLICY, world.embeddings)

    def exact_kl(params, *_):
        return jnp.mean(toy.kl_to_reference(table(params), jnp.full((5, 10), -np.log(10.0))))

    moving = train.unpaired_objective(log_prob, losses.kto_loss, beta=0.5, reference_point=exact_kl)
    still = train.unpaired_objective(log_prob, losses.kto_loss, beta=0.5, reference_point=jax.jit(exact_kl)(params))
    gradients = (jax.jit(jax.grad(lambda p, f=f: f(p, labels)[0]))(params) for f in (moving, still))
    chex.assert_trees_all_close(*gradients, rtol=1e-5)


# Rankings


def test_rankings_train_by_the_same_objective(start, key):
    world, log_prob, params, _, _ = start
    rankings = jax.jit(
        lambda key: train.with_reference(log_prob, params, toy.sample_rankings(key, world, num=50, num_ranked=4))
    )(key)
    assert len(rankings.reference_logps) == 4
    other = moved(params)
    objective = train.preference_objective(log_prob, losses.plackett_luce_loss, beta=0.5)
    _, metrics = jax.jit(objective)(other, rankings)
    logps = jax.jit(log_prob)(other, rankings.prompts, rankings.responses)
    rewards = 0.5 * np.mean(np.subtract(logps, rankings.reference_logps), axis=-1)
    np.testing.assert_allclose(metrics["chosen_reward"], rewards[0], rtol=1e-5)
    np.testing.assert_allclose(metrics["rejected_reward"], rewards[3], rtol=1e-5)
    state = train.init_state(params, objective=objective, optimizer=optax.sgd(0.1))
    step = jax.jit(partial(train.update, objective=objective, optimizer=optax.sgd(0.1)))
    state, before = step(state, rankings)
    _, after = step(state, rankings)
    assert after["loss"] < before["loss"]


@pytest.mark.slow
def test_rankings_train(start, key):
    world, log_prob, params, _, _ = start
    rankings = train.with_reference(log_prob, params, toy.sample_rankings(key, world, num=50, num_ranked=4))
    objective = train.preference_objective(log_prob, losses.plackett_luce_loss, beta=0.5)
    _, history = train.fit(
        key, params, rankings, objective=objective, optimizer=optax.adam(1e-2), num_epochs=5, batch_size=25
    )
    assert history["loss"][-1] < history["loss"][0]


def test_pairs_are_rankings_of_two(start):
    _, log_prob, params, _, preferences = start
    other = moved(params)
    ranked, paired = (
        jax.jit(train.preference_objective(log_prob, loss, beta=0.5))(other, preferences)
        for loss in (losses.plackett_luce_loss, losses.dpo_loss)
    )
    chex.assert_trees_all_close(ranked, paired, rtol=1e-5)


# Bad hyperparameters, refused when the objective is made


@pytest.mark.parametrize(
    ("make", "loss", "hyperparameters", "error", "message"),
    [
        (
            "preference",
            losses.robust_dpo_loss,
            {"beta": 0.1, "label_smoothing": 0.5},
            ValueError,
            "in .0, 0.5., got 0.5",
        ),
        ("preference", losses.exo_loss, {"beta": 0.1, "label_smoothing": 0.0}, ValueError, "in .0, 0.5."),
        (
            "preference",
            losses.dpo_loss,
            {"beta": float("nan")},
            ValueError,
            "beta must be in .0, inf., got nan",
        ),
        ("preference", losses.dpo_loss, {"beta": 0.1, "gamma": 1.0}, TypeError, "gamma"),
        ("preference", losses.robust_dpo_loss, {"beta": 0.1}, TypeError, "label_smoothing"),
        (
            "reference_free",
            losses.simpo_loss,
            {"beta": 2.0, "gamma": -1.0},
            ValueError,
            "gamma must be in .0, inf.",
        ),
        (
            "unpaired",
            losses.kto_loss,
            {"beta": 0.1, "reference_point": -1.0},
            ValueError,
            "reference_point must be in .0, inf.",
        ),
    ],
)
def test_bad_hyperparameters_are_refused_before_training(start, make, loss, hyperparameters, error, message):
    with pytest.raises(error, match=message):
        getattr(train, f"{make}_objective")(start[1], loss, **hyperparameters)


def test_hyperparameters_may_have_a_value_for_each_comparison(start):
    _, log_prob, params, _, preferences = start
    betas = jnp.linspace(0.1, 1.0, 70)
    objective = train.preference_objective(log_prob, losses.dpo_loss, beta=betas)
    other = moved(params)
    policy = jax.jit(log_prob)(other, preferences.prompts, preferences.responses)
    values = np.asarray(losses.dpo_loss(policy, preferences.reference_logps, beta=betas))
    np.testing.assert_allclose(jax.jit(objective)(other, preferences)[0], values.mean(), rtol=1e-5)


# Data that do not fit


@pytest.mark.parametrize(
    ("make", "loss", "given", "message"),
    [
        ("unpaired", losses.bco_loss, "preferences", "is for Labels, got Preferences: use train.preference"),
        ("preference", losses.dpo_loss, "labels", "is for Preferences, got Labels: use train.unpaired"),
        ("reference_free", losses.simpo_loss, "labels", "is for Preferences, got Labels"),
        ("preference", losses.dpo_loss, "demos", "got Demonstrations: use train.sft_objective"),
        ("sft", None, "preferences", "is for Demonstrations, got Preferences"),
    ],
)
def test_the_wrong_noun_is_told_where_it_belongs(start, labels, make, loss, given, message):
    _, log_prob, params, demos, preferences = start
    data = {"preferences": preferences, "labels": labels, "demos": demos}[given]
    hyperparameters = {"unpaired": {"beta": 0.1, "shift": 0.0}, "preference": {"beta": 0.1}, "sft": {}}
    arguments = hyperparameters.get(make, {"beta": 0.1, "gamma": 0.0})
    objective = getattr(train, f"{make}_objective")(log_prob, *([loss] if loss else []), **arguments)
    with pytest.raises(TypeError, match=message):
        inspect.unwrap(objective)(params, data)


def test_rankings_in_losses_of_pairs_are_refused(start, key):
    world, log_prob, params, _, _ = start
    rankings = jax.jit(
        lambda key: train.with_reference(log_prob, params, toy.sample_rankings(key, world, num=5, num_ranked=3))
    )(key)
    dpo = train.preference_objective(log_prob, inspect.unwrap(losses.dpo_loss), beta=0.1)
    simpo = train.reference_free_objective(log_prob, losses.simpo_loss, beta=0.1, gamma=0.0)
    for objective in (dpo, simpo):
        with pytest.raises(TypeError, match="must be a pair, a tuple"):
            objective(params, rankings)


def score(params, prompts, responses):
    """Of a table of logits."""
    return toy.lookup(jax.nn.log_softmax(params), prompts, responses)


def own_loss(policy, reference, *, beta):
    margin = losses.dpo_loss(policy, reference, beta=beta)
    return margin / jax.lax.stop_gradient(jnp.mean(margin))


@pytest.mark.parametrize(
    "loss",
    [
        losses.aot_loss,
        partial(losses.aot_unpaired_loss, label_smoothing=0.1),
        losses.with_sft(losses.aot_loss, weight=0.1),
        losses.weighted_sum((1.0, losses.dpo_loss), (1.0, losses.aot_loss)),
        partial(losses.beta_dpo_loss, keep=0.5, alpha=0.1, moments=losses.MarginMoments(jax.random.key(0))),
        own_loss,
    ],
)
def test_losses_of_whole_batches_refuse_weights(loss):
    pairs = Preferences(jnp.zeros(4, int), Pair(jnp.array([2, 1, 1, 1]), jnp.array([0, 0, 2, 2])))
    data = train.with_reference(score, jnp.zeros((1, 3)), pairs)
    weighted = data._replace(weights=jnp.array([4.0, 0.0, 0.0, 0.0]))

    def value(beta, data):
        return train.preference_objective(score, loss, beta=beta)(jnp.zeros((1, 3)), data)[0]

    for call in (value, jax.jit(jax.vmap(value, in_axes=(0, None)))):
        beta = 0.1 if call is value else jnp.array([0.1, 0.2])
        with pytest.raises(ValueError, match="comparisons cannot have weights in .*, which compares whole batches"):
            call(beta, weighted)
    assert np.isfinite(jax.jit(value)(0.1, data))


def test_weights_of_nothing_give_no_nan(start):
    _, log_prob, params, _, preferences = start
    objective = train.preference_objective(log_prob, losses.dpo_loss, beta=0.1)
    chex.assert_tree_all_finite(jax.jit(objective)(params, preferences._replace(weights=jnp.zeros(70))))


def test_negative_weights_are_an_error_and_stop_training_where_nobody_can_look(start):
    _, log_prob, params, _, preferences = start
    objective = train.preference_objective(log_prob, losses.dpo_loss, beta=0.1)
    data = preferences._replace(weights=jnp.ones(70).at[3].set(-1.0))
    with pytest.raises(ValueError, match=r"weights must be in .0, inf., got -1.0 in row 3"):
        objective(params, data)
    assert jnp.isnan(jax.jit(objective)(params, data)[0])


# Metrics of an epoch


@pytest.mark.parametrize("batch_size", [pytest.param(64, marks=pytest.mark.slow), 4, 24])
def test_metrics_with_a_denominator_of_their_own_do_not_depend_on_the_batch_size(batch_size):
    """64 labels of which 4 are good, and 64 comparisons of which one counts, with a policy that stays as it is."""
    params, prompts = jnp.array([[1.0, 0.5, -1.0]]), np.zeros(64, np.int32)
    good, only_one = np.arange(64) % 16 == 3, np.where(np.arange(64) == 5, np.float32(64), np.float32(0))
    labels = Labels(prompts, np.where(good, np.arange(64, dtype=np.int32) // 16 % 3, 2), good)
    pairs = Preferences(prompts, Pair(prompts, prompts + 1), weights=only_one)
    labels, pairs = jax.jit(lambda *data: tuple(train.with_reference(score, jnp.zeros((1, 3)), d) for d in data))(
        *jax.tree.map(jnp.asarray, (labels, pairs))
    )
    kto = train.unpaired_objective(score, losses.kto_loss, beta=1.0, reference_point=0.0)
    dpo = train.preference_objective(score, losses.dpo_loss, beta=1.0)
    order = np.random.default_rng(0).permutation(64)

    def epoch(objective, data):
        options = {"objective": objective, "optimizer": optax.set_to_zero()}
        state = train.init_state(params, **options)
        return train.run_epoch(state, data, jnp.asarray(order), batch_size=batch_size, **options)[1]

    uniform = -np.log(3.0)
    rewards = (special.log_softmax(np.float64(params), axis=-1) - uniform)[0, labels.responses]
    metrics, weighted = jax.jit(lambda: (epoch(kto, labels), epoch(dpo, pairs)))()
    np.testing.assert_allclose(metrics["desirable_reward"], rewards[good].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["reward_margin"], rewards[good].mean() - rewards[~good].mean(), rtol=1e-5)
    assert weighted["accuracy"] == 1
    np.testing.assert_allclose(weighted["reward_margin"], 0.5, rtol=1e-5)
    assert all(isinstance(metric, jax.Array) for metric in (metrics | weighted).values())
    if batch_size != 24:  # the loss counts batches, a short one like the others
        np.testing.assert_allclose(weighted["loss"], np.log1p(np.exp(-0.5)), rtol=1e-5)


def test_the_metrics_of_one_pair_of_scores_are_named_after_what_the_loss_takes(start):
    _, log_prob, params, _, preferences = start
    logps = jax.jit(log_prob)(params, preferences.prompts, preferences.responses)
    chosen, rejected = map(np.asarray, logps)
    means = [np.mean(values, dtype="f") for values in (chosen, rejected, chosen - rejected, chosen > rejected)]
    for loss, noun in ((losses.sft_loss, "logp"), (partial(losses.bradley_terry_loss, margin=0.5), "reward")):
        value, metrics = jax.jit(train.reference_free_objective(log_prob, loss))(params, preferences)
        names = f"chosen_{noun}", f"rejected_{noun}", f"{noun}_margin", "accuracy"
        chex.assert_trees_all_close(metrics, dict(zip(names, means, strict=True)), rtol=1e-5)
        np.testing.assert_allclose(value, np.mean(loss(logps)), rtol=1e-6)


def test_a_tie_counts_as_wrong_as_in_the_notebook(start):
    _, log_prob, params, _, preferences = start
    _, metrics = jax.jit(train.preference_objective(log_prob, losses.dpo_loss, beta=0.1))(params, preferences)
    assert metrics["accuracy"] == 0


# Losses of another family


@pytest.mark.parametrize(
    ("make", "loss", "message"),
    [
        ("preference", losses.simpo_loss, "simpo_loss is called .* use train.reference_free_objective"),
        ("preference", partial(losses.kto_loss, reference_point=0.0), "kto_loss .* use train.unpaired_objective"),
        (
            "preference",
            losses.with_sft(losses.orpo_loss, weight=1.0),
            r"with_sft\(orpo_loss\).*reference_free",
        ),
        ("reference_free", losses.dpo_loss, "use train.preference_objective"),
        ("preference", losses.bradley_terry_loss, "use train.reference_free_objective"),
        ("unpaired", losses.ppo_loss, "use train.policy_gradient_objective"),
        ("policy_gradient", losses.value_loss, "loss of a value function"),
        ("policy_gradient", lambda mine, yours: mine, r"takes \(mine, yours\): use train.preference_objective"),
        ("preference", losses.xpo_loss, "xpo_loss needs alpha, reference_won"),
        (
            "unpaired",
            losses.apo_zero_unpaired_loss,
            "has no hyperparameter delta; it takes beta",
        ),
        ("preference", 0.1, "loss must be a function"),
    ],
)
def test_the_objective_that_fits_a_loss_is_named(as_users_have_it, make, loss, message):
    hyperparameters = {"beta": 0.1} if make in ("preference", "unpaired") else {}
    hyperparameters |= {"delta": 1.0} if loss is losses.apo_zero_unpaired_loss else {}
    with pytest.raises(TypeError, match=message):
        getattr(inspect.unwrap(train), f"{make}_objective")(score, loss, **hyperparameters)
