"""Runs to sweep, what a plain loop makes of them, and sweeps for processes of their own."""

import errno
import functools
import itertools
import os
import resource
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpo_jax import losses, sweep, toy, train
from dpo_jax.sweep import processes, store

POLICY = toy.ToyLM(num_responses=4)


def base_key():
    return jax.random.key(5)


def noisy(key, *, scale, shift=0.0, draws=3):
    """Cheap, with everything that can go wrong with places: each number depends on seed, both axes and its column."""
    noise = jax.random.normal(key, (draws,))
    return {"total": scale * noise.sum() + shift, "part": {"column": scale * noise[:2] + shift * jnp.arange(2.0)}}


@functools.cache
def world():
    with jax.ensure_compile_time_eval():
        made = toy.make_world(jax.random.key(7), num_prompts=3, num_responses=4)
        return made, POLICY.init(jax.random.key(8), made.embeddings)


def training(key, *, beta, learning_rate):
    """Comparisons of each seed's own, and three epochs on them."""
    made, params = world()
    data_key, fit_key = jax.random.split(key)
    log_prob = toy.log_prob_fn(POLICY, made.embeddings)
    data = train.with_reference(log_prob, params, toy.sample_preferences(data_key, made, num=20))
    objective = train.preference_objective(log_prob, losses.dpo_loss, beta=beta)
    options = {"optimizer": optax.sgd(learning_rate), "num_epochs": 3, "batch_size": 10}
    _, history = train.fit(fit_key, params, data, objective=objective, **options)
    return {name: history[name] for name in ("loss", "reward_margin", "step")}


SWEEPS = {
    "noisy": functools.partial(
        sweep.grid,
        noisy,
        num_seeds=7,
        runs_at_once=4,
        draws=sweep.static([3, 2]),
        scale=[1.0, 2.0, 3.0],
        shift=[0.0, 0.5],
    ),
    "uneven": functools.partial(sweep.grid, noisy, num_seeds=5, scale=[1.0, 2.0]),
    "training": functools.partial(
        sweep.grid,
        training,
        num_seeds=5,
        runs_at_once=4,
        dims={name: ["epoch"] for name in ("loss", "reward_margin", "step")},
        beta=[0.05, 0.1, 0.5, 1.0],
        learning_rate=[0.1, 1.0],
    ),
    "many blocks": functools.partial(
        sweep.grid, noisy, num_seeds=9, runs_at_once=2, draws=sweep.static([2, 3]), scale=[1.0, 2.0, 3.0, 4.0]
    ),
}


def loop(run, key, *, num_seeds, **axes):
    """The same as `sweep.grid`, one run after another: arrays by name, with an axis for each axis and the seeds."""
    static = [name for name, values in axes.items() if isinstance(values, type(sweep.static([])))]
    axes = {name: values.values if name in static else values for name, values in axes.items()}
    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    run = jax.jit(run, static_argnames=static)
    runs = [run(jax.random.fold_in(key, seed), **point) for point in points for seed in range(num_seeds)]
    sizes = [len(values) for values in axes.values()]
    return jax.tree.map(lambda *leaves: np.stack(leaves).reshape(*sizes, num_seeds, *leaves[0].shape), *runs)


def contents(folder):
    """Every file but locks, byte for byte."""
    paths = (path for path in Path(folder).rglob("*") if path.is_file() and "lock" not in path.name)
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def assert_same(first, second, compare=np.testing.assert_array_equal):
    assert set(first.data_vars) == set(second.data_vars)
    for name, array in first.items():
        assert array.dims == second[name].dims
        compare(array.values, second[name].values)


# Many blocks, in a process of its own (`tests/forked.py`) or not


NUM_RUNS = 72
NUM_BLOCKS = 36


def make(out, name="many blocks", **options):
    return SWEEPS[name](base_key(), out=out, **options)


class StoppedError(Exception):
    pass


def stop():
    raise StoppedError


def stop_at_half(progress):
    if progress.done >= NUM_RUNS // 2:
        raise StoppedError


def make_on_devices(out, name, num_devices):
    jax.config.update("jax_num_cpu_devices", num_devices)
    assert len(jax.devices()) == num_devices
    make(out, name)


def make_together(out, name, returned, environment, ends):
    """Exits with 99 if another process fails, 98 if the folder holds another sweep, and with the system's error.

    Args:
      out: the folder.
      name: of the sweep.
      returned: where to write what is returned, or what went wrong.
      environment: says which process this is.
      ends: how a process ends after its first block: "fails" or "dies". The other one takes its time then.
    """
    os.environ.update(environment)
    processes.SECONDS_OF_SILENCE = 4.0
    sweep.join_processes()
    assert jax.process_count() == 2

    def report(_):
        if ends == {"fails": jax.process_index()}:
            raise OSError(errno.ENOSPC, "No space left on device")
        if ends == {"dies": jax.process_index()}:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.5 if ends else 0)

    try:
        np.savez(f"{returned}.npz", **make(out, name, report=report))
    except OSError as problem:
        sys.exit(problem.errno)
    except sweep.OtherProcessError as problem:
        Path(f"{returned}.txt").write_text(str(problem))
        sys.exit(99)
    except ValueError:
        sys.exit(98)


def make_until_killed(out, line):
    """Dies in the given line of the store that is run, all lines counted."""
    lines = itertools.count(1)

    def count(frame, event, _):
        if frame.f_code.co_filename != store.__file__:
            return None
        if event == "line" and next(lines) == line:
            os.kill(os.getpid(), signal.SIGKILL)
        return count

    sys.settrace(count)
    make(out)
    sys.settrace(None)
    (Path(out).parent / "lines").write_text(str(next(lines)))


def make_until_terminated(out, num_runs):
    make(out, report=lambda progress: progress.done < num_runs or os.kill(os.getpid(), signal.SIGTERM))


def make_with_little_space(out, num_bytes):
    """Exits with the number of the system's error."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    make_and_tell(out)


def make_and_tell(out):
    try:
        make(out)
    except OSError as problem:
        sys.exit(problem.errno or 111)
