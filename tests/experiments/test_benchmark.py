"""The benchmark: what it counts is what is done, and every workload runs."""

import json
import re
from importlib.util import find_spec
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax import sweep
from dpo_jax.types import Pair
from experiments.benchmark import __main__ as benchmark
from experiments.benchmark import losses, measuring, report, string_runs, workloads
from experiments.benchmark.least_work import DPO_PAIR, FLOAT, Network, StringNetwork, Training, Work, string_pair
from experiments.benchmark.measuring import Clock
from experiments.lab.pipeline import TUTORIAL
from tests.experiments.walks import ROOT

# Counts


def test_an_experiment_has_the_optimizer_steps_of_the_tutorial_notebook():
    assert workloads.SFT.steps == 1600
    assert workloads.DPO.steps == 1450
    assert workloads.EXPERIMENT_STEPS == 8850


@pytest.fixture(scope="module")
def network():
    embeddings = jnp.ones((Network().prompts, Network().features))
    return TUTORIAL.policy.init(jax.random.key(0), embeddings), embeddings


def test_the_network_that_is_counted_is_the_one_that_is_trained(network):
    params, _ = network
    assert Network().num_params == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_least_work_is_what_xla_counts_in_a_plain_network(network):
    params, embeddings = network

    def forward(params):
        first, second = params["params"]["Dense_0"], params["params"]["Dense_1"]
        hidden = jax.nn.relu(embeddings @ first["kernel"] + first["bias"][None])
        return jax.nn.log_softmax(hidden @ second["weight"].T + second["bias"][None])

    def count(function):
        counts = jax.jit(function).lower(params).compile().cost_analysis()
        return counts["flops"] + counts["transcendentals"]

    slopes = jax.random.normal(jax.random.key(0), (Network().prompts, Network().responses))
    both = count(jax.grad(lambda params: (slopes * forward(params)).sum()))
    assert Network().forward_flops == pytest.approx(count(forward), rel=0.1)
    assert Network().forward_flops + Network().backward_flops == pytest.approx(both, rel=0.15)


def test_least_work_adds_up():
    training = Training(num_epochs=2, num_rows=5, batch_size=4, row=DPO_PAIR)
    more_rows = training._replace(num_rows=6)
    assert training.steps == more_rows.steps == 4
    assert more_rows.work.flops - training.work.flops == 2 * DPO_PAIR.flops
    assert training.work.bytes - 10 * DPO_PAIR.bytes == 4 * FLOAT * (6 * 618 + 40)
    assert Work(6, 3).intensity == 2
    assert Work(1, 2) + Work(3, 4) * 2 == Work(7, 10)


def test_the_string_network_that_is_counted_is_the_one_that_is_trained():
    params = jax.eval_shape(string_runs.POLICY.init, jax.random.key(0), jnp.ones((5, StringNetwork().features)))
    counted = string_runs.TRAINING.network
    assert counted == StringNetwork()
    assert counted.num_params == sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.slow
def test_least_work_on_strings_is_what_xla_counts_in_a_plain_network():
    """With so many strings in a batch that all prefixes are among them."""
    network = StringNetwork(strings=10**6)
    embeddings = jnp.ones((network.prompts, network.features))
    params = string_runs.POLICY.init(jax.random.key(0), embeddings)
    assert network.prefixes == pytest.approx(network.prompts * string_runs.STRINGS.num_prefixes)

    def forward(params):
        outputs = string_runs.POLICY.apply(params, embeddings, method="outputs")
        return jax.nn.log_softmax(outputs)

    def count(function):
        counts = jax.jit(function).lower(params).cost_analysis()  # compiled, it does some things twice
        return counts["flops"] + counts["transcendentals"]

    slopes = jax.random.normal(jax.random.key(0), (network.prompts, string_runs.STRINGS.num_prefixes, 5))
    both = count(jax.grad(lambda params: (slopes * forward(params)).sum()))
    assert network.forward_flops == pytest.approx(count(forward), rel=0.05)
    assert network.forward_flops + network.backward_flops == pytest.approx(both, rel=0.1)


def test_batches_have_as_many_prefixes_and_tokens_as_are_counted():
    strings, network, rng = string_runs.STRINGS, StringNetwork(), np.random.default_rng(0)
    found = []
    for _ in range(50):
        rows = rng.integers(0, strings.num_responses, network.strings)
        prompts = np.broadcast_to(rng.integers(0, network.prompts, (network.strings, 1)), (len(rows), strings.horizon))
        inside = strings.mask[rows]
        reached = {*zip(prompts[inside].tolist(), strings.prefixes[rows][inside].tolist(), strict=True)}
        found.append(len(reached | {(prompt, 0) for prompt in range(network.prompts)}))
    assert network.prefixes == pytest.approx(np.mean(found), rel=0.01)
    assert string_pair(1.0) == DPO_PAIR + Work(2, 0)


# Measuring


def test_contenders_take_turns_after_a_round_to_warm_up():
    calls = []
    times = measuring.seconds_in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 4
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3}


def test_a_compiled_program_does_what_its_function_does():
    rows = np.arange(6.0, dtype=np.float32).reshape(3, 2)
    program = measuring.compile_on(1, lambda rows: rows.sum(1), rows)
    np.testing.assert_array_equal(program(program.place(rows)), rows.sum(1))
    assert program.compile_seconds > 0


def test_rates_are_work_over_time_and_shares_are_of_what_the_machine_did_meanwhile():
    speeds = iter([{"float32": 150.0, "copy": 30.0}, {"float32": 50.0, "copy": 70.0}])  # before, after
    rates = Clock(lambda *_: next(speeds), repeats=1).timed(lambda: 2.0, Work(40, 20), runs=6)
    assert rates["runs_per_second"] == 3
    assert (rates["flops_per_second"], rates["share_of_peak_flops"]) == (20, 0.2)
    assert (rates["bytes_per_second"], rates["share_of_peak_copy"]) == (10, 0.2)
    assert rates["peaks"] == {"float32": [150, 50], "copy": [30, 70]}


def entry(flops=0.5, copy=0.5, speeds=(1e9, 1e9)):
    return {
        "num": 4,
        "share_of_peak_flops": flops,
        "share_of_peak_copy": copy,
        "peaks": {"float32": list(speeds), "copy": [1e9, 1e9]},
    }


def test_shares_above_everything_and_changing_machines_are_said_in_words():
    fine = {"experiments": [entry()], "dpo": [entry()], "losses": {"dpo": entry()}}
    assert report.doubts(fine) == []
    (over,) = report.doubts({**fine, "losses": {"dpo": entry(copy=17.92), "ipo": entry(copy=1.1)}})
    assert over.startswith("2 of 4 exceed the machine's B/s in a copy, dpo most (1792%)")
    (changed,) = report.doubts({**fine, "dpo": [entry(speeds=(1e9, 2e9))]})
    assert changed.startswith("The machine changed its speed meanwhile: 1 G to 2 GFLOP/s")
    peaks = report.highest({"float32": 1.0, "copy": 3e9}, [entry(speeds=(1e9, 2e9))])
    assert peaks == {"float32": 2e9, "copy": 3e9}


# Workloads


@pytest.fixture(scope="module")
def starts():
    return sweep.prepare(workloads.prepare, jax.random.key(3), num_seeds=3)


@pytest.mark.slow
def test_more_runs_than_starts_start_alike_and_differ_in_their_orders(starts):
    arguments = workloads.dpo_runs(starts, None).arguments
    assert sweep.plan(**arguments(2)).num_runs == 2
    assert sweep.plan(**arguments(6)).num_runs == 6
    assert arguments(6)["again"].tolist() == [0, 1]


@pytest.mark.slow
def test_a_step_of_a_run_is_a_step_of_the_tutorial(starts):
    start = jax.tree.map(lambda leaf: leaf[0], starts.values)
    result = jax.jit(workloads.dpo_step)(start.start.params, start)
    assert float(result["loss"]) == pytest.approx(np.log(2), abs=1e-6)
    change = optax.tree.sub(result["state"].params, start.start.params)
    assert 0 < max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(change)) < 1.1e-3


@pytest.mark.slow
def test_every_workload_runs_and_is_reported(tmp_path, capsys):
    benchmark.main(benchmark.Options(quick=True, repeats=1, torch=False, out=tmp_path))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {path.name for path in tmp_path.iterdir()} == {"summary.json", "roofline.png", "cost_per_step.png"}
    assert [entry["num"] for entry in summary["experiments"]] == [1]
    assert [entry["num"] for entry in summary["dpo"]] == [1, 2]
    assert [entry["num"] for entry in summary["strings"]] == [2]
    assert all(0 < entry["share_of_peak_flops"] < 1 for entry in summary["experiments"] + summary["dpo"])
    assert summary["torch"] is summary["string_torch"] is None
    assert summary["string_step"]["least_flops"] < summary["string_step"]["xla"]["flops"]
    tables = report.page_tables(summary)
    assert tables.keys() == {"benchmark experiments", "benchmark strings", "benchmark steps"}
    assert tables["benchmark strings"].splitlines()[2].startswith("| 2 | ")
    assert summary["machine"].keys() == {"processor", "cores", "usable_cores", "memory", "load"}
    assert all(len(e["peaks"]["copy"]) == 2 for e in [*summary["dpo"], *summary["losses"].values()])
    assert all(peak >= max(e["peaks"]["copy"]) for peak in [summary["peaks"]["copy"]] for e in summary["dpo"])
    said = capsys.readouterr().out
    assert all(title in said for title in ("Losses with their gradients", "DPO runs on strings at once", "least"))


@pytest.mark.parametrize("name", losses.LOSSES)
def test_losses_are_finite_with_their_gradients(name):
    logps = [Pair(-jnp.arange(1.0, 5), -jnp.arange(4.0, 0, -1)) for _ in range(2)]
    values, gradients = losses.values_and_gradients(losses.LOSSES[name], *logps)
    assert values.shape == (4,)
    assert all(bool(jnp.isfinite(array).all()) for array in (values, *gradients))


REPORTED = ROOT / "experiments" / "reported" / "benchmark"


def test_two_summaries_are_set_side_by_side(tmp_path, capsys):
    second = json.loads((REPORTED / "summary.json").read_text())
    second["experiments"][0]["microseconds_per_step_and_run"] *= 3
    second["losses"] = {"dpo": second["losses"]["dpo"]}
    first = json.loads((REPORTED / "summary.json").read_text())
    second |= {"device": "another", "machine": {"processor": "another", "load": [0, 1]}}
    second["peaks"]["copy"] *= 2
    (file := tmp_path / "second.json").write_text(json.dumps(second))
    benchmark.main(benchmark.Options(compare=(REPORTED, file), out=tmp_path / "out"))
    said = capsys.readouterr().out
    ratios = dict(re.findall(r"│ (\S.*?) +│.* ([\d.]+) │", said))
    assert ratios["1 experiments, per step and run"] == "3.00"
    assert set(ratios.values()) == {"3.00", "1.00"}
    assert [name for name in ratios if name.startswith("loss")] == ["loss: dpo"]
    assert "they differ in device: 2 x cpu (cpu) and another." in said
    assert f"they differ in machine processor: {first['machine']['processor']} and another." in said
    assert "they differ in peak of copy:" in said
    assert not (tmp_path / "out").exists()


NOTHING = {"experiments": [], "dpo": [], "strings": [], "losses": {}, "torch": None, "string_torch": None}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("no JSON", "is no summary of a benchmark"),
        ("[]", "is no summary of a benchmark: it has no 'steps'"),
        (json.dumps({"losses": [], "seed": 0}), "is no summary of a benchmark: it has no 'steps'"),
        (json.dumps({"pairs": 7}), "they did different work: pairs is 1048576 and 7"),
        (json.dumps(NOTHING), "nothing in common"),
        (None, "No such file"),
    ],
)
def test_what_cannot_be_compared_is_refused(text, problem, tmp_path):
    if text is not None:
        if text.startswith(('{"pairs"', '{"experiments"')):
            text = json.dumps(json.loads((REPORTED / "summary.json").read_text()) | json.loads(text))
        (tmp_path / "summary.json").write_text(text)
    with pytest.raises(SystemExit, match=problem):
        benchmark.main(benchmark.Options(compare=(REPORTED, tmp_path)))


def test_bad_options_are_told(tmp_path):
    for options in ({"repeats": 0}, {"max_seconds": -1.0}, {"runs_at_once": 0}, {"max_experiments": 0}, {"seed": -1}):
        with pytest.raises(SystemExit, match="error: --"):
            benchmark.main(benchmark.Options(quick=True, out=tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


# PyTorch does the same work

needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="PyTorch is not installed")


@needs_torch
@pytest.mark.parametrize("version", ["runs_by_autograd", "runs_first", "runs_last"])
def test_a_stacked_step_in_pytorch_is_the_step_of_the_library(version, starts):
    import torch

    from experiments.benchmark import rival

    options = {"compiled": False} if version == "runs_last" else {}
    stack = getattr(rival, version)(benchmark.without_keys(starts.values), 3, **options)
    with torch.no_grad():
        for value, start in zip(stack.params, stack.start, strict=True):
            value.copy_(start)
        rows = stack.cells[..., :64].movedim(0, -1).contiguous() if stack.last else stack.cells[..., :64]
        margins = torch.empty((64, 3) if stack.last else (3, 64))
        stack.step(rows.long(), margins, 1)
        after = stack.log_probs().numpy()
    stepped = jax.vmap(workloads.dpo_step)(starts.values.start.params, starts.values)["state"].params
    tables = jax.vmap(lambda start, params: TUTORIAL.table(start.world)(params))(starts.values.start, stepped)
    np.testing.assert_allclose(after, tables, atol=1e-3)  # Adam's first step hangs on the sign of the tiniest gradient
    assert np.abs(after - starts.values.start.log_probs).max() > 0.01
    np.testing.assert_allclose(margins, 0, atol=1e-4)


@needs_torch
def test_all_versions_in_pytorch_learn_as_the_library_does():
    from experiments.benchmark import rival

    num = 16
    starts = sweep.prepare(workloads.prepare, jax.random.key(0), num_seeds=num)
    ours = workloads.dpo_runs(starts, None).run(num).isel(again=0)
    arrays = benchmark.without_keys(starts.values)
    for make in (rival.runs_by_autograd, rival.runs_first, lambda *args: rival.runs_last(*args, compiled=False)):
        _, history = rival.train(make(arrays, num))
        assert history["loss"].shape == (50, num)
        assert float(history["loss"][-1].mean()) == pytest.approx(float(ours.loss.mean()), abs=2e-3)
        assert float(history["accuracy"][-1].mean()) == pytest.approx(float(ours.accuracy.mean()), abs=0.01)
    _, history = rival.tutorial_run(arrays, 0)
    assert history["loss"][-1] == pytest.approx(float(ours.loss[0]), abs=5e-3)


@pytest.fixture(scope="module")
def string_starts():
    return sweep.prepare(string_runs.prepare, jax.random.key(3), num_seeds=3)


@needs_torch
@pytest.mark.parametrize("version", ["by_autograd", "by_hand"])
def test_a_stacked_step_on_strings_in_pytorch_is_the_step_of_the_library(version, string_starts):
    import torch

    from experiments.benchmark import string_rival

    starts = string_starts.values
    stack = getattr(string_rival, version)(benchmark.without_keys(starts), 3)
    margins = torch.empty(3, 64)
    with torch.no_grad():
        for value, start in zip(stack.params, stack.start, strict=True):
            value.copy_(start)
        stack.step(stack.cells[..., :64].long(), margins, 1)
    means = jax.vmap(string_runs.step)(starts.params, starts)["state"].opt_state[0].mu["params"]
    hidden, last = means["Dense_0"], means["Dense_1"]
    np.testing.assert_allclose(stack.moments[0][0][:, :-1], hidden["kernel"], atol=1e-8)
    np.testing.assert_allclose(stack.moments[0][0][:, -1], hidden["bias"], atol=1e-8)
    np.testing.assert_allclose(stack.moments[0][1], means["letters"].reshape(3, 16, 32), atol=1e-8)
    np.testing.assert_allclose(stack.moments[0][2], last["weight"], atol=1e-8)
    np.testing.assert_allclose(stack.moments[0][3][..., 0], last["bias"], atol=1e-8)
    assert max(float(abs(mean).max()) for mean in stack.moments[0]) > 1e-4
    np.testing.assert_allclose(margins, 0, atol=1e-5)


@needs_torch
def test_runs_on_strings_in_pytorch_learn_as_the_library_does(string_starts):
    from experiments.benchmark import rival, string_rival

    ours = string_runs.workload(string_starts, None).run(3).isel(again=0)
    arrays = benchmark.without_keys(string_starts.values)
    for make in (string_rival.by_autograd, string_rival.by_hand):
        history = rival.epochs(make(arrays, 3), string_runs.NUM_EPOCHS)
        assert float(history["loss"][-1].mean()) == pytest.approx(float(ours.loss.mean()), abs=2e-3)
        assert float(history["accuracy"][-1].mean()) == pytest.approx(float(ours.accuracy.mean()), abs=0.02)


@needs_torch
def test_each_number_of_runs_is_timed_in_both():
    from experiments.benchmark import rival

    made = []
    found = rival.times_in_turn(
        {2: lambda: made.append("jax"), 3: lambda: made.append("jax")},
        lambda num: {"stacked": lambda: made.append(num)},
        lambda num: SimpleNamespace(),
        lambda stack: made.append("compiled"),
        steps=10,
        repeats=2,
        compile_seconds=0.0,
    )["runs"]
    assert [entry["num"] for entry in found] == [2, 3]
    assert made.count("jax") == 2 * made.count(2) == 2 * made.count(3) and "compiled" not in made
    for entry in found:
        costs = entry["microseconds_per_step_and_run"]
        assert entry["times_jax"] == {"stacked": pytest.approx(costs["stacked"] / costs["jax"])}
        assert (entry["compile_seconds"], entry["not_compiled"]) == (None, "not asked for")


@needs_torch
def test_a_compiler_that_takes_too_long_is_left_out():
    from experiments.benchmark import rival

    assert rival.seconds_to_compile(SimpleNamespace(), 0.0) == (None, "not asked for")
    with pytest.raises(TimeoutError, match=r"more than 0\.01 seconds"), rival.time_limit(0.01):
        while True:
            pass
