"""The rival on strings: the DPO runs of `string_runs.py` in PyTorch, stacked by hand.

As in `rival.py`, all do the same work as the library: the same batches, losses, metrics and Adam, on data of their own.

- `stacked`: the loss as one writes it: rows of the hidden layer looked up along each string, gradients by autograd;
- `by hand`: gradients written out, and the network runs once for each prefix at the first places, where a batch has
  more strings than there are prefixes;
- `by hand, in blocks`: the same, but as few runs at once as stay in the caches, each block on a core of its own;
- `by hand, compiled`: `by hand`, its gradients compiled by `torch.compile`.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch  # type: ignore[import-not-found, unused-ignore]
from torch.nn import functional  # type: ignore[import-not-found, unused-ignore]

from experiments.benchmark.rival import JaxRuns, Stack, Tensor, epochs, fused_adam, times_in_turn
from experiments.benchmark.string_runs import BATCH_SIZE, NUM_EPOCHS, NUM_PROMPTS, STRINGS, TRAINING, Start
from experiments.lab.pipeline import BETA

LETTERS, HORIZON, CHOICES = STRINGS.num_letters, STRINGS.horizon, STRINGS.num_choices
SHARED = 3
"""At how many places the network runs once for each prefix."""
LEVELS = [NUM_PROMPTS * LETTERS**place for place in range(SHARED)]
"""How many prefixes there are at each of these places."""
NODES = sum(LEVELS)
BLOCK = 64
"""The largest number of runs of a block: larger and smaller ones are slower."""


class Paths(NamedTuple):
    """Where a string is found, for each cell of the table of prompts and strings; anything behind its end.

    Attributes:
      nodes: its prefix at each shared place, among those of all shared places.
      letters: the row of each of its letters, `[cells, horizon - 1]`.
      tokens: at each place.
      mask: 1 where there is a token.
    """

    nodes: Tensor
    letters: Tensor
    tokens: Tensor
    mask: Tensor


def paths() -> Paths:
    """The paths of all strings after all prompts."""
    prompts = np.repeat(np.arange(NUM_PROMPTS), STRINGS.num_responses)
    tokens = np.tile(STRINGS.tokens, (NUM_PROMPTS, 1))
    letters = np.where(tokens < LETTERS, np.maximum(tokens, 0), 0)
    nodes, number = [], prompts
    for place in range(SHARED):
        nodes.append(sum(LEVELS[:place]) + number)
        number = number * LETTERS + letters[:, place]
    rows = letters[:, :-1] + LETTERS * np.arange(HORIZON - 1)
    arrays = np.stack(nodes, axis=1), rows, np.maximum(tokens, 0), (tokens >= 0).astype(np.float32)
    return Paths(*map(torch.from_numpy, arrays))


def by_hand(starts: Start, num: int, first: int = 0, *, compiled: bool = False) -> Stack:
    """Stacked runs, their gradients written out."""
    start, cells, reference, embeddings = inputs(starts, num, first)
    every, transposed = paths(), embeddings.mT.contiguous()
    runs = torch.arange(num)[:, None]

    def gradients(params: list[Tensor], cell: Tensor) -> tuple[Tensor, list[Tensor]]:
        kernel, letters, weight, bias = params
        nodes, rows, tokens, mask = (table[cell] for table in every)
        parents = (runs * NODES + nodes[:, :, -1]).flatten()
        added = [(runs * letters.shape[1] + row).flatten() for row in rows.unbind(2)[SHARED - 1 :]]
        tree = down_the_tree(torch.bmm(embeddings, kernel), letters)
        parts, sums = [tree], tree.flatten(0, 1).index_select(0, parents)
        for row in added:
            sums = sums + letters.flatten(0, 1).index_select(0, row)
            parts.append(sums.view(num, -1, sums.shape[1]))
        before_relu = torch.cat(parts, dim=1)
        hidden = before_relu.relu()
        log_probs = torch.baddbmm(bias, weight, hidden.mT).log_softmax(1)
        index = where(nodes, tokens)
        logps = (log_probs.flatten(1).gather(1, index).view_as(mask) * mask).sum(2)
        margins, slopes = loss_slopes(logps - reference.gather(1, cell))
        of_tokens = torch.zeros_like(log_probs).flatten(1)
        of_tokens = of_tokens.scatter_add(1, index, (slopes[:, :, None] * mask).flatten(1)).view_as(log_probs)
        of_logits = of_tokens - log_probs.exp() * of_tokens.sum(1, keepdim=True)
        of_sums = torch.ops.aten.threshold_backward(torch.bmm(of_logits.mT, weight), before_relu, 0)
        of_tree, *of_parts = of_sums.split([NODES] + [cell.shape[1]] * len(added), dim=1)
        of_letters, below = torch.zeros_like(letters).flatten(0, 1), torch.zeros_like(of_parts[0])
        for part, row in zip(of_parts[::-1], added[::-1], strict=True):
            below = below + part
            of_letters = of_letters.index_add(0, row, below.flatten(0, 1))
        of_tree = of_tree.flatten(0, 1).index_add(0, parents, below.flatten(0, 1)).view_as(tree)
        of_first, of_shared = up_the_tree(of_tree)
        of_letters = of_letters.view_as(letters) + functional.pad(
            of_shared, (0, 0, 0, letters.shape[1] - of_shared.shape[1])
        )
        of_bias = of_logits.sum(2, keepdim=True)
        return margins, [torch.bmm(transposed, of_first), of_letters, torch.bmm(of_logits, hidden), of_bias]

    return stack_of(start, cells, torch.compile(gradients, dynamic=False, fullgraph=True) if compiled else gradients)


def where(nodes: Tensor, tokens: Tensor) -> Tensor:
    """Where each token of each string is in a flattened table `[choices, shared prefixes and then further ones]`."""
    num, size, _ = nodes.shape
    own = NODES + torch.arange((HORIZON - SHARED) * size).view(-1, size).t()
    columns = torch.cat([nodes, own.expand(num, -1, -1)], dim=2)
    return (tokens * (NODES + own.numel()) + columns).flatten(1)


def down_the_tree(first: Tensor, letters: Tensor) -> Tensor:
    """Sums after every shared prefix, place after place: each adds the row of its last letter to its parent's."""
    levels = [first]
    for rows in letters.split(LETTERS, dim=1)[: SHARED - 1]:
        levels.append((levels[-1][:, :, None] + rows[:, None]).flatten(1, 2))
    return torch.cat(levels, dim=1)


def up_the_tree(slopes: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `down_the_tree` by both of its arguments; of letters, those at shared places."""
    *levels, children = slopes.split(LEVELS, dim=1)
    of_rows: list[Tensor] = []
    for level in levels[::-1]:
        by_letter = children.unflatten(1, (-1, LETTERS))
        of_rows.insert(0, by_letter.sum(1))
        children = level + by_letter.sum(2)
    return children, torch.cat(of_rows, dim=1)


def by_autograd(starts: Start, num: int) -> Stack:
    """Stacked runs as one would write them: rows looked up along each string, gradients by autograd."""
    start, cells, reference, embeddings = inputs(starts, num)
    _, letters, tokens, mask = paths()
    runs = torch.arange(num)[:, None]

    def gradients(params: list[Tensor], cell: Tensor) -> tuple[Tensor, list[Tensor]]:
        for value in params:
            value.requires_grad_()
        with torch.enable_grad():
            rows = torch.cat([torch.bmm(embeddings, params[0]), params[1]], dim=1)
            prompts = cell // STRINGS.num_responses
            index = torch.cat([prompts[:, :, None], NUM_PROMPTS + letters[cell]], dim=2)
            sums = functional.embedding(runs[:, :, None] * rows.shape[1] + index, rows.flatten(0, 1)).cumsum(2)
            logits = torch.baddbmm(params[3], params[2], sums.relu().flatten(1, 2).mT)
            found = logits.log_softmax(1).gather(1, tokens[cell].flatten(1)[:, None])
            logps = (found.view_as(index) * mask[cell]).sum(2)
            ratios = logps - reference.gather(1, cell)
            chosen, rejected = ratios.chunk(2, dim=1)
            margins = BETA * (chosen - rejected)
            loss = -functional.logsigmoid(margins).mean(1).sum()
        return margins.detach(), list(torch.autograd.grad(loss, params))

    return stack_of(start, cells, gradients)


def loss_slopes(ratios: Tensor) -> tuple[Tensor, Tensor]:
    """Margins of pairs, and the slopes of the mean loss by the log-probabilities, chosen ones before rejected ones."""
    chosen, rejected = ratios.chunk(2, dim=1)
    margins = BETA * (chosen - rejected)
    pull = torch.sigmoid(-margins) * (-BETA / margins.shape[1])
    return margins, torch.cat([pull, -pull], dim=1)


def stack_of(
    start: list[Tensor], cells: Tensor, gradients: Callable[[list[Tensor], Tensor], tuple[Tensor, list[Tensor]]]
) -> Stack:
    """Runs that are trained by Adam along given gradients."""
    params, first, second = ([torch.zeros_like(value) for value in start] for _ in range(3))
    numbers = torch.arange(1.0 + NUM_EPOCHS * -(-cells.shape[-1] // BATCH_SIZE)).unbind()

    def step(batch: Tensor, margins: Tensor, number: int) -> None:
        found, grads = gradients(params, batch.flatten(1))
        margins.copy_(found)
        fused_adam(params, [grad.contiguous() for grad in grads], (first, second), numbers[number])

    return Stack(start, params, (first, second), cells, False, step, lambda: params)


def inputs(starts: Start, num: int, first: int = 0) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Some runs as tensors: parameters, cells, log-probabilities of the reference in a table, embeddings with a 1."""
    some = slice(first, first + num)
    tree = starts.params["params"]
    hidden = np.concatenate([tree["Dense_0"]["kernel"][some], tree["Dense_0"]["bias"][some, None]], axis=1)
    letters = tree["letters"][some].reshape(num, -1, hidden.shape[2])
    last = tree["Dense_1"]
    weights = [hidden, letters, last["weight"][some], last["bias"][some, :, None]]
    pairs = starts.preferences
    cells = np.stack([pairs.prompts[some] * STRINGS.num_responses + side[some] for side in pairs.responses], axis=1)
    reference = np.zeros((num, NUM_PROMPTS * STRINGS.num_responses), np.float32)
    for side, logps in zip(cells.swapaxes(0, 1), pairs.reference_logps, strict=True):
        np.put_along_axis(reference, side, logps[some], axis=1)
    embeddings = np.pad(starts.embeddings[some], ((0, 0), (0, 0), (0, 1)), constant_values=1)
    tensors = (torch.from_numpy(np.array(array)) for array in (cells.astype(np.int16), reference, embeddings))
    return [torch.from_numpy(np.array(value, order="C")) for value in weights], *tensors


def in_blocks(starts: Start, num: int) -> Callable[[], None]:
    """What trains so many runs by hand, block after block, each block on one thread and as many at once as threads."""
    threads = torch.get_num_threads()
    size = min(BLOCK, -(-num // threads))
    blocks = [by_hand(starts, min(size, num - first), first) for first in range(0, num, size)]

    def train() -> None:
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                list(pool.map(partial(epochs, num_epochs=NUM_EPOCHS), blocks))
        finally:
            torch.set_num_threads(threads)

    return train


def compare(starts: Start, jax_runs: JaxRuns, *, repeats: int, compile_seconds: float) -> dict[str, Any]:
    """Times DPO runs on strings in JAX and in PyTorch, in turn; starts are stacked NumPy arrays."""
    train = partial(epochs, num_epochs=NUM_EPOCHS)

    def rivals(num: int) -> dict[str, Callable[[], Any]]:
        stacks = {"stacked": by_autograd(starts, num), "by hand": by_hand(starts, num)}
        blocks = {"by hand, in blocks": in_blocks(starts, num)}
        return {**{name: partial(train, stack) for name, stack in stacks.items()}, **blocks}

    to_compile = partial(by_hand, starts, compiled=True)
    return times_in_turn(
        jax_runs, rivals, to_compile, train, steps=TRAINING.steps, repeats=repeats, compile_seconds=compile_seconds
    )
