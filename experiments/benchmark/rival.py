"""The rival: the same DPO runs in PyTorch, as the tutorial's loop, and many of them stacked by hand.

All do the same work: batches of 64 and a short last one, a new random order for each run and epoch, Adam, and the mean
loss, accuracy and margin of each epoch. Each run has its own world, data, SFT policy and orders. The loop is the
tutorial's own. The others stack runs, run the network once per distinct prompt, keep the reference as a table, and take
the metrics of an epoch together:

- `stacked`: the loss as one writes it, on batched matrix products; its gradient by autograd; PyTorch's fused Adam;
- `by hand`: no autograd either, but the gradients of this network and this loss, written out, and everything large
  written into buffers that are there already;
- `by hand, compiled`: the same with the axis of runs last, so that sums of products are vectorised over it, and
  `torch.compile` sees the whole step.

Nothing else in the project needs PyTorch.
"""

import copy
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch  # type: ignore[import-not-found, unused-ignore]
from torch import nn  # type: ignore[import-not-found, unused-ignore]
from torch.nn import functional  # type: ignore[import-not-found, unused-ignore]

from experiments.benchmark.measuring import seconds_in_turn
from experiments.benchmark.workloads import DPO, Experiment
from experiments.lab.pipeline import BETA, TUTORIAL

NUM_EPOCHS, BATCH_SIZE, LEARNING_RATE = TUTORIAL.num_epochs, TUTORIAL.batch_size, TUTORIAL.learning_rate
DECAY, SQUARES_DECAY, EPSILON = 0.9, 0.999, 1e-8

Tensor = Any
JaxRuns = Mapping[int, Callable[[], Any]]
"""For each number of runs, what makes that many in JAX."""


class Stack(NamedTuple):
    """Runs that train together.

    Attributes:
      start: the parameters of their SFT policies.
      params: the parameters that are trained.
      moments: Adam's, first and second, zero before the first step.
      cells: the data, `[runs, 2, rows]`: where in the flattened table of their run the two responses are.
      last: whether the axis of runs comes last everywhere else, not first.
      step: `(batch, margins, number)`: trains on cells, chosen ones before rejected ones, and writes down their
        margins; counted from 1.
      log_probs: the tables of the policies, runs first.
    """

    start: list[Tensor]
    params: list[Tensor]
    moments: tuple[list[Tensor], list[Tensor]]
    cells: Tensor
    last: bool
    step: Callable[[Tensor, Tensor, int], None]
    log_probs: Callable[[], Tensor]


def compare(starts: Experiment, jax_runs: JaxRuns, *, repeats: int, compile_seconds: float) -> dict[str, Any]:
    """Times DPO runs in JAX and in PyTorch, in turn; starts are stacked NumPy arrays. See `times_in_turn`."""

    def rivals(num: int) -> dict[str, Callable[[], Any]]:
        stacks = {"stacked": runs_by_autograd(starts, num), "by hand": runs_first(starts, num)}
        loop = {"tutorial's loop": partial(tutorial_run, starts, 0)} if num == 1 else {}
        return {**loop, **{name: partial(train, stack) for name, stack in stacks.items()}}

    to_compile = partial(runs_last, starts, compiled=True)
    return times_in_turn(
        jax_runs, rivals, to_compile, train, steps=DPO.steps, repeats=repeats, compile_seconds=compile_seconds
    )


def times_in_turn(
    jax_runs: JaxRuns,
    rivals: Callable[[int], dict[str, Callable[[], Any]]],
    to_compile: Callable[[int], Stack],
    train_stack: Callable[[Stack], Any],
    *,
    steps: int,
    repeats: int,
    compile_seconds: float,
) -> dict[str, Any]:
    """Times runs in JAX and in PyTorch, in turn.

    Args:
      jax_runs: for each number of runs, what makes that many in JAX.
      rivals: from a number of runs to what makes that many in PyTorch, by name.
      to_compile: from a number of runs to a stack whose step `torch.compile` compiles when it is first trained.
      train_stack: trains a stack.
      steps: optimizer steps of a run.
      repeats: how often each is timed.
      compile_seconds: how long `torch.compile` may take for each number of runs; 0 leaves it out.
    """
    entries = []
    for num, run_in_jax in jax_runs.items():
        contenders = {"jax": run_in_jax, **rivals(num)}
        with fresh_compiler():
            stack = to_compile(num)
            compiling, problem = seconds_to_compile(stack, compile_seconds)
            if problem is None:
                contenders["by hand, compiled"] = partial(train_stack, stack)
            times = {name: statistics.median(t) for name, t in seconds_in_turn(contenders, repeats).items()}
        entries.append(
            {
                "num": num,
                "microseconds_per_step_and_run": {name: 1e6 * t / (num * steps) for name, t in times.items()},
                "times_jax": {name: t / times["jax"] for name, t in times.items() if name != "jax"},
                "compile_seconds": compiling,
                "not_compiled": problem,
            }
        )
    return {"version": torch.__version__, "threads": torch.get_num_threads(), "runs": entries}


def train(stack: Stack, num_epochs: int = NUM_EPOCHS) -> tuple[Tensor, dict[str, Tensor]]:
    """DPO from its start, for all runs of a stack.

    Returns:
      The tables of the policies, and for each metric an array `[epochs, runs]` of means over batches.
    """
    history = epochs(stack, num_epochs)
    return stack.log_probs(), history


def epochs(stack: Stack, num_epochs: int) -> dict[str, Tensor]:
    """What `train` does before it makes tables: the history."""
    with torch.no_grad():
        for value, start in zip(stack.params, stack.start, strict=True):
            value.copy_(start)
    for moment in (*stack.moments[0], *stack.moments[1]):
        moment.zero_()
    num, _, num_rows = stack.cells.shape
    sizes = [min(BATCH_SIZE, num_rows - first) for first in range(0, num_rows, BATCH_SIZE)]
    shares = torch.cat([torch.full((size,), 1 / (size * len(sizes))) for size in sizes])
    order, shuffled = torch.empty(num, 1, num_rows, dtype=torch.int64), torch.empty_like(stack.cells)
    all_margins = torch.empty((num_rows, num) if stack.last else (num, num_rows))
    history: dict[str, list[Tensor]] = {"loss": [], "accuracy": [], "reward_margin": []}
    generators = [torch.Generator().manual_seed(i) for i in range(torch.get_num_threads())]
    with torch.no_grad(), ThreadPoolExecutor(len(generators)) as pool:
        for epoch in range(num_epochs):
            list(pool.map(draw_orders, order.tensor_split(len(generators)), generators))
            torch.gather(stack.cells, 2, order.expand(-1, 2, -1), out=shuffled)
            rows = shuffled.movedim(0, -1).contiguous() if stack.last else shuffled
            for i, size in enumerate(sizes):
                batch = rows.narrow(1 if stack.last else 2, i * BATCH_SIZE, size).long()
                margins = all_margins.narrow(0 if stack.last else 1, i * BATCH_SIZE, size)
                stack.step(batch, margins, epoch * len(sizes) + i + 1)
            by_run = all_margins.t() if stack.last else all_margins
            history["loss"].append(-functional.logsigmoid(by_run) @ shares)
            history["accuracy"].append((by_run > 0).float() @ shares)
            history["reward_margin"].append(by_run @ shares)
    return {name: torch.stack(values) for name, values in history.items()}


def draw_orders(orders: Tensor, generator: Any) -> None:
    """Random permutations, one for each row; faster than anything that sorts, and so all threads can draw some."""
    for order in orders.unbind():
        torch.randperm(orders.shape[-1], generator=generator, out=order[0])


def runs_first(starts: Experiment, num: int) -> Stack:
    """Stacked runs whose every operation is a kernel of PyTorch, the axis of runs first."""
    weights, cells, reference, embeddings = inputs(starts, num)
    start = [torch.cat(weights[:2], dim=1).contiguous(), torch.cat(weights[2:], dim=1).contiguous()]  # biases below
    params, grads, first, second = ([torch.zeros_like(value) for value in start] for _ in range(4))
    embeddings = torch.cat([embeddings, torch.ones(*embeddings.shape[:2], 1)], dim=-1)
    transposed = embeddings.mT.contiguous()
    num_prompts, num_responses = reference.shape[1:]
    before_relu = torch.empty(num, num_prompts, start[0].shape[-1])
    hidden = torch.ones(num, num_prompts, start[1].shape[1])
    slopes = torch.empty(num, num_prompts * num_responses)
    numbers = torch.arange(1.0 + NUM_EPOCHS * -(-cells.shape[-1] // BATCH_SIZE)).unbind()

    def log_probs() -> Tensor:
        torch.bmm(embeddings, params[0], out=before_relu)
        torch.clamp_min(before_relu, 0, out=hidden[:, :, :-1])
        logits = torch.bmm(hidden, params[1])
        return logits.sub_(logits.logsumexp(-1, keepdim=True))

    def step(batch: Tensor, margins: Tensor, number: int) -> None:
        size, batch = margins.shape[1], batch.flatten(1)
        rewards = log_probs().sub_(reference).view(num, -1).gather(1, batch).mul_(BETA)
        torch.sub(rewards[:, :size], rewards[:, size:], out=margins)
        pull = torch.sigmoid(-margins).mul_(-BETA / size)
        slopes.zero_().scatter_add_(1, batch, torch.cat([pull, -pull], dim=1))
        of_logits = slopes.view_as(reference)  # a pair's slopes cancel in their row: the normaliser has none
        of_hidden = torch.bmm(of_logits, params[1][:, :-1].mT)
        torch.bmm(hidden.mT, of_logits, out=grads[1])
        torch.bmm(transposed, torch.ops.aten.threshold_backward(of_hidden, before_relu, 0), out=grads[0])
        fused_adam(params, grads, (first, second), numbers[number])

    return Stack(start, params, (first, second), cells, False, step, log_probs)


def runs_by_autograd(starts: Experiment, num: int) -> Stack:
    """Stacked runs as one would write them: a batched network, its gradient by autograd, the axis of runs first."""
    start, cells, reference, embeddings = inputs(starts, num)
    params, first, second = ([torch.zeros_like(value) for value in start] for _ in range(3))
    for value in params:
        value.requires_grad_()
    numbers = torch.arange(1.0 + NUM_EPOCHS * -(-cells.shape[-1] // BATCH_SIZE)).unbind()

    def log_probs() -> Tensor:
        hidden = torch.baddbmm(params[1], embeddings, params[0]).relu()
        return torch.baddbmm(params[3], hidden, params[2]).log_softmax(-1)

    def step(batch: Tensor, margins: Tensor, number: int) -> None:
        size = margins.shape[1]
        with torch.enable_grad():
            rewards = BETA * (log_probs() - reference).flatten(1).gather(1, batch.flatten(1))
            difference = rewards[:, :size] - rewards[:, size:]
            loss = -functional.logsigmoid(difference).mean(1).sum()
        margins.copy_(difference.detach())
        fused_adam(params, list(torch.autograd.grad(loss, params)), (first, second), numbers[number])

    return Stack(start, params, (first, second), cells, False, step, log_probs)


def fused_adam(
    params: list[Tensor], grads: list[Tensor], moments: tuple[list[Tensor], list[Tensor]], number: Tensor
) -> None:
    """PyTorch's own kernel of Adam, without what the optimizer does around it."""
    torch._fused_adam_(
        params,
        grads,
        *moments,
        [],
        [number] * len(params),
        lr=LEARNING_RATE,
        beta1=DECAY,
        beta2=SQUARES_DECAY,
        weight_decay=0.0,
        eps=EPSILON,
        amsgrad=False,
        maximize=False,
    )


def runs_last(starts: Experiment, num: int, *, compiled: bool) -> Stack:
    """Stacked runs whose step is one function, to be compiled, the axis of runs last."""
    weights, cells, *tables = inputs(starts, num)
    start = [value.movedim(0, -1).contiguous() for value in weights]
    reference, embeddings = (table.movedim(0, -1).contiguous() for table in tables)
    params, first, second = ([torch.zeros_like(value) for value in start] for _ in range(3))
    numbers = torch.arange(1.0 + NUM_EPOCHS * -(-cells.shape[-1] // BATCH_SIZE), dtype=torch.float64)
    rates = (LEARNING_RATE / (1 - DECAY**numbers)).float().unbind()
    root_rates = (1 - SQUARES_DECAY**numbers).rsqrt().float().unbind()

    def layers() -> tuple[Tensor, Tensor]:
        before_relu = (embeddings[:, :, None] * params[0]).sum(1) + params[1]
        logits = (before_relu.relu()[:, :, None] * params[2]).sum(1) + params[3]
        return before_relu, logits - logits.logsumexp(1, keepdim=True)

    def step(batch: Tensor, margins: Tensor, rate: Tensor, root_rate: Tensor) -> None:
        before_relu, log_probs = layers()
        size, ratios = margins.shape[0], (log_probs - reference).flatten(0, 1)
        rewards = ratios.gather(0, batch) * BETA
        difference = rewards[:size] - rewards[size:]
        margins.copy_(difference)
        pull = torch.sigmoid(-difference) * (-BETA / size)
        slopes = torch.zeros_like(ratios).scatter_add(0, batch, torch.cat([pull, -pull]))
        of_logits = slopes.view_as(reference)
        of_hidden = (of_logits[:, None] * params[2]).sum(2) * (before_relu > 0)
        of_kernel = (embeddings[:, :, None] * of_hidden[:, None]).sum(0)
        of_second_kernel = (before_relu.relu()[:, :, None] * of_logits[:, None]).sum(0)
        gradients = of_kernel, of_hidden.sum(0, keepdim=True), of_second_kernel, of_logits.sum(0, keepdim=True)
        for value, gradient, mean, square in zip(params, gradients, first, second, strict=True):
            mean.lerp_(gradient, 1 - DECAY)
            square.mul_(SQUARES_DECAY).addcmul_(gradient, gradient, value=1 - SQUARES_DECAY)
            value.sub_(rate * mean / (square.sqrt() * root_rate + EPSILON))

    inner = torch.compile(step, dynamic=False, fullgraph=True) if compiled else step

    def outer(batch: Tensor, margins: Tensor, number: int) -> None:
        inner(batch.flatten(0, 1), margins, rates[number], root_rates[number])

    return Stack(start, params, (first, second), cells, True, outer, lambda: layers()[1].movedim(-1, 0))


def inputs(starts: Experiment, num: int) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """The first runs as tensors, runs first: the SFT policies' weights and biases, cells, their tables, embeddings."""
    first, last = (starts.start.params["params"][name] for name in ("Dense_0", "Dense_1"))
    parameters = first["kernel"], first["bias"][:, None], last["weight"].swapaxes(1, 2), last["bias"][:, None]
    weights = [np.array(value[:num], order="C") for value in parameters]
    responses = np.stack([side[:num] for side in starts.preferences.responses], axis=1)
    cells = starts.preferences.prompts[:num, None] * starts.start.world.rewards.shape[-1] + responses
    arrays = (
        cells.astype(np.uint8),
        starts.start.log_probs[:num],
        starts.start.world.embeddings[:num],
    )  # fewer than 256 cells
    return [torch.from_numpy(value) for value in weights], *(torch.from_numpy(np.array(array)) for array in arrays)


def seconds_to_compile(stack: Stack, limit: float) -> tuple[float | None, str | None]:
    """How long the first epoch takes, in which a step is compiled for both sizes of batches; or why there was none."""
    if not limit:
        return None, "not asked for"
    start = time.perf_counter()
    try:
        with time_limit(limit):
            train(stack, num_epochs=1)
    except Exception as problem:  # of many kinds: no C++ compiler, an operation it does not know, no time left
        return None, f"{type(problem).__name__}: {str(problem).splitlines()[0]}"
    return time.perf_counter() - start, None


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises a `TimeoutError` if what is inside takes longer."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def fresh_compiler() -> Iterator[None]:
    """A compiler that remembers nothing, so that the time it takes is the whole time."""
    torch.compiler.reset()
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder):
        yield


def tutorial_run(starts: Experiment, run: int, num_epochs: int = NUM_EPOCHS) -> tuple[Tensor, dict[str, list[float]]]:
    """One DPO run as the tutorial writes it; returns the policy's table, and for each metric a number per epoch."""
    embeddings = torch.from_numpy(np.array(starts.start.world.embeddings[run]))
    preferences, rng = starts.preferences, np.random.default_rng(run)
    columns = (preferences.prompts, *preferences.responses)
    data = list(zip(*(column[run].tolist() for column in columns), strict=True))
    policy = tutorial_network(starts, run)
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.Adam(policy.parameters(), lr=LEARNING_RATE)
    history: dict[str, list[float]] = {"loss": [], "accuracy": [], "reward_margin": []}
    for _ in range(num_epochs):
        indices, batches = rng.permutation(len(data)), []
        for first in range(0, len(indices), BATCH_SIZE):
            batch = [data[i] for i in indices[first : first + BATCH_SIZE]]
            prompts, chosen, rejected = (torch.LongTensor([row[i] for row in batch]) for i in range(3))
            loss, metrics = tutorial_loss(policy, reference, embeddings[prompts], chosen, rejected)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            batches.append({"loss": loss.item(), **metrics})
        for name, values in history.items():
            values.append(float(np.mean([metrics[name] for metrics in batches])))
    with torch.no_grad():
        return functional.log_softmax(policy(embeddings), dim=-1), history


def tutorial_network(starts: Experiment, run: int) -> Any:
    """The network of a run's SFT policy."""
    first, last = (starts.start.params["params"][name] for name in ("Dense_0", "Dense_1"))
    weights = first["kernel"][run].T, last["weight"][run]
    network = nn.Sequential(nn.Linear(*weights[0].shape[::-1]), nn.ReLU(), nn.Linear(*weights[1].shape[::-1]))
    with torch.no_grad():
        for layer, weight, bias in ((network[0], weights[0], first["bias"]), (network[2], weights[1], last["bias"])):
            layer.weight.copy_(torch.from_numpy(np.array(weight)))
            layer.bias.copy_(torch.from_numpy(np.array(bias[run])))
    return network


def tutorial_loss(
    policy: Any, reference: Any, contexts: Tensor, chosen: Tensor, rejected: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """The tutorial's DPO loss, with its metrics: the networks run once for each response of each pair."""

    def log_probs(network: Any, responses: Tensor) -> Tensor:
        return functional.log_softmax(network(contexts), dim=-1).gather(1, responses.unsqueeze(1)).squeeze(1)

    policy_chosen, policy_rejected = log_probs(policy, chosen), log_probs(policy, rejected)
    with torch.no_grad():
        reference_chosen, reference_rejected = log_probs(reference, chosen), log_probs(reference, rejected)
    chosen_ratios, rejected_ratios = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    logits = BETA * (chosen_ratios - rejected_ratios)
    return -functional.logsigmoid(logits).mean(), {
        "chosen_reward": (BETA * chosen_ratios).mean().item(),
        "rejected_reward": (BETA * rejected_ratios).mean().item(),
        "reward_margin": (BETA * (chosen_ratios - rejected_ratios)).mean().item(),
        "accuracy": (logits > 0).float().mean().item(),
    }
