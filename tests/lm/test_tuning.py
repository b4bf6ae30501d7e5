"""Training: in parts, by adapters, stopped and resumed, it is the same training."""

import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import lm, losses, train
from dpo_jax.lm import checkpoints
from tests.lm import tiny

MODEL = tiny.model()
DATA = lm.with_reference(MODEL, tiny.pairs(12))
DPO = partial(train.preference_objective, loss=losses.dpo_loss)
LORA = lm.LoRA(rank=2, top_layers=1)


def tune(data=DATA, **options):
    usual = {
        "objective": partial(DPO, beta=0.1),
        "optimizer": lambda: optax.adam(1e-2),
        "num_epochs": 2,
        "batch_size": 4,
    }
    return lm.tune(jax.random.key(1), MODEL, data, **{**usual, **options})


@pytest.fixture(scope="module")
def usual():
    return tune()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that has ended."""
    folder = tmp_path_factory.mktemp("finished")
    tune(folder=folder)
    return folder


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_steps_are_those_of_update(usual):
    """The same batches, by `train.update` alone, in one shape that fits all."""
    from dpo_jax.lm.batches import shuffled, sizes_of

    order_key, _ = jax.random.split(jax.random.key(1))
    batches = shuffled(order_key, sizes_of(DATA.prompts, DATA.responses), num_epochs=2, batch_size=4)
    objective, optimizer = DPO(lm.log_prob_fn(MODEL.decoder), beta=0.1), optax.adam(1e-2)
    state = train.init_state(MODEL.params, objective=objective, optimizer=optimizer)
    step = jax.jit(partial(train.update, objective=objective, optimizer=optimizer))
    found = []
    for batch in batches:
        state, metrics = step(state, jax.tree.map(lambda leaf: jnp.asarray(leaf[batch.rows]), DATA))  # noqa: B023
        found.append(float(metrics["loss"]))
    np.testing.assert_allclose(usual.history["loss"], found, atol=1e-5)
    assert usual.history["loss"][-1] < usual.history["loss"][0] == pytest.approx(np.log(2))


def test_parts_of_a_batch_add_up_to_the_batch(usual):
    parts = tune(rows_at_once=2)
    np.testing.assert_allclose(parts.history["loss"], usual.history["loss"], atol=1e-5)


@pytest.mark.slow
def test_a_last_batch_may_be_smaller_than_a_part():
    some = {"data": jax.tree.map(lambda leaf: leaf[:7], DATA), "num_epochs": 1, "batch_size": 5}
    np.testing.assert_allclose(tune(rows_at_once=3, **some).history["loss"], tune(**some).history["loss"], atol=1e-5)


@pytest.mark.parametrize("stop_after", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_run_that_was_stopped_goes_on_with_the_same_bits(tmp_path, usual, stop_after):
    class StoppedError(Exception):
        pass

    def stop(step):
        if step.done == stop_after:
            raise StoppedError

    with pytest.raises(StoppedError):
        tune(folder=tmp_path, steps_per_checkpoint=2, report=stop)
    steps = []
    resumed = tune(folder=tmp_path, steps_per_checkpoint=2, report=steps.append)
    assert len(steps) == 6 - stop_after // 2 * 2
    equal(resumed.params, usual.params)
    equal(resumed.history, usual.history)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    equal(tune(folder=tmp_path).params, usual.params)  # nothing is left to do


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_epochs": 3}, "steps was 6, now 9"),
        ({"batch_size": 5}, "batches was"),
        ({"about": {"loss": "ipo"}}, "loss was None, now 'ipo'"),
        ({"lora": LORA}, "lora was 'None'"),
    ],
    ids=str,
)
def test_a_folder_of_another_run_is_refused(finished, options, message):
    with pytest.raises(ValueError, match=f"belongs to another run: .*{message}"):
        tune(folder=finished, **options)


def test_a_damaged_checkpoint_is_named(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "step-00000006" / "state.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="step-00000006 is damaged: remove it to go on from an earlier one"):
        tune(folder=tmp_path)


def test_keys_in_the_memory_of_a_run_are_kept(tmp_path):
    state = {"key": jax.random.key(3), "mean": jnp.arange(2.0)}
    checkpoints.save_checkpoint(tmp_path, 1, state, {})
    _, found = checkpoints.load_checkpoint(tmp_path, {"key": jax.random.key(0), "mean": jnp.zeros(2)}, {})
    assert found["key"] == state["key"] and np.array_equal(found["mean"], state["mean"])


def test_what_a_file_cannot_hold_is_refused_before_training(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        tune(folder=tmp_path, about={"beta": np.float32(1)}, report=lambda step: pytest.fail("a step was made"))


@pytest.mark.slow
def test_adapters_trained_together_are_those_trained_alone():
    rates, betas, seeds = [1e-2, 1e-2, 3e-3], [0.1, 0.5, 0.1], [0, 0, 1]
    options = {"objective": DPO, "optimizer": lambda learning_rate: optax.sgd(learning_rate), "lora": LORA}
    points = {"beta": betas, "learning_rate": rates, "seed": seeds}
    together = tune(points=points, **options)
    assert together.history["loss"].shape == (3, 6)
    last = tune(points={name: values[2:] for name, values in points.items()}, **options)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[2], b[0], atol=1e-5), together.params, last.params)
    single = tune(objective=partial(DPO, beta=0.5), optimizer=lambda: optax.sgd(1e-2), lora=LORA)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, atol=1e-5), together.params, single.params)


def test_only_the_adapter_is_trained_and_the_start_is_the_reference():
    steps = []
    tuned = tune(lora=LORA, report=steps.append)
    assert {*tuned.params} == {"layers_1"}
    assert steps[0].metrics["reward_margin"] == pytest.approx(0, abs=1e-5)


def test_steps_are_reported():
    steps = []
    tune(report=steps.append)
    assert [step.done for step in steps] == [1, 2, 3, 4, 5, 6] and {step.planned for step in steps} == {6}
    assert steps[0].compiling > 0 and steps[0].tokens > 0


def test_a_reference_of_another_model_is_noticed():
    other = DATA._replace(
        reference_logps=jax.tree.map(lambda x: x + np.arange(12.0, dtype=np.float32), DATA.reference_logps)
    )
    chosen = other._replace(reference_logps=other.reference_logps._replace(rejected=DATA.reference_logps.rejected))
    with pytest.raises(lm.UntrainedError, match="the first loss is .* are of another model"):
        lm.tune(jax.random.key(1), MODEL, chosen, objective=partial(DPO, beta=0.1), optimizer=lambda: optax.adam(1e-2))


def test_training_that_does_nothing_is_noticed():
    with pytest.raises(lm.UntrainedError, match=r"did not change, such as .*learning rate is 0"):
        tune(optimizer=lambda: optax.adam(0.0), batch_size=12, num_epochs=3)

    def blind(log_prob):
        return lambda params, batch: (
            jnp.sum(log_prob(jax.lax.stop_gradient(params), batch.prompts, batch.responses).chosen),
            {},
        )

    with pytest.raises(lm.UntrainedError, match="14 of 14 trained arrays had no gradient"):
        tune(objective=blind, lora=LORA, batch_size=12, num_epochs=3)


def test_a_run_that_diverges_does_not_stop_others():
    points = {"learning_rate": [1e-2, np.inf]}
    found = tune(optimizer=optax.sgd, points=points, lora=LORA, num_epochs=1)
    finite = np.isfinite(found.history["loss"])
    assert finite[0].all() and not finite[1].all()


def test_a_run_of_one_step_is_fine():
    assert tune(lora=LORA, batch_size=12, num_epochs=1).history["loss"] == pytest.approx([np.log(2)])


def test_numbers_that_are_not_finite_stop_a_run():
    with pytest.raises(train.NonFiniteError):
        tune(optimizer=lambda: optax.sgd(jnp.inf))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": {"beta": [0.1]}}, "several runs in one program share the model: give lora, too"),
        ({"points": {"beta": [0.1], "learning_rate": [1.0, 2.0]}, "lora": LORA}, "must be arrays .* of one length"),
        ({"points": {}, "lora": LORA}, "must be arrays"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"steps_per_checkpoint": 0}, "steps_per_checkpoint must be"),
        ({"rows_at_once": 0}, "rows_at_once must be"),
        ({"data": jax.tree.map(lambda leaf: leaf[:0], DATA)}, "has no rows"),
        ({"data": DATA._replace(prompts=DATA.prompts[:3])}, "ragged"),
        ({"data": DATA._replace(prompts=np.zeros((12, 2050), np.int32))}, "has 2056 tokens, the model's context 2048"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        tune(**options)


def test_the_reference_is_kept_on_disk(tmp_path, monkeypatch):
    first = lm.with_reference(MODEL, tiny.pairs(12), cache=tmp_path)
    equal(first.reference_logps, DATA.reference_logps)
    monkeypatch.setattr("dpo_jax.lm.reference.logps", None)
    equal(lm.with_reference(MODEL, tiny.pairs(12), cache=tmp_path).reference_logps, DATA.reference_logps)
    for changed in ({"data": tiny.pairs(12, seed=1)}, {"mean": True}, {"model": tiny.model(dtype=jnp.bfloat16)}):
        with pytest.raises(TypeError):  # computed anew, by what is not there any more
            lm.with_reference(**{"model": MODEL, "data": tiny.pairs(12), "cache": tmp_path, **changed})
    (file,) = tmp_path.glob("*/0.npy")
    file.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="0.npy is damaged: remove its folder"):
        lm.with_reference(MODEL, tiny.pairs(12), cache=tmp_path)
