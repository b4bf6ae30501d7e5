"""The least work in a training run: the arithmetic and the bytes that no implementation can do without.

It is counted from the algorithm, not from a program. One FLOP is one addition, multiplication, division, comparison,
root, exponential or logarithm of floating-point numbers. The network runs once per distinct prompt, as everywhere in
this library, and one that reads strings once per distinct prefix of a batch. Left out is what happens once per epoch or
run: drawing data, orders of data, evaluation.

The bytes are those of a step that finds nothing in fast memory: it reads and writes the parameters and both of Adam's
moments once, and reads its batch once. Where the state of all runs stays in a cache, fewer pass through memory, so that
a program may well exceed the rate of a big copy.
"""

from dataclasses import dataclass
from typing import NamedTuple

ADAM_FLOPS = 14
"""For each parameter: 3 for the first moment, 4 for the second, 2 corrections of bias, root, epsilon, division,
learning rate, subtraction."""

FLOAT = 4
"""Bytes of a number, and of an id."""


@dataclass(frozen=True)
class Work:
    """Arithmetic, and memory traffic.

    Attributes:
      flops: floating-point operations.
      bytes: bytes read or written.
    """

    flops: float
    bytes: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> "Work":
        return Work(times * self.flops, times * self.bytes)

    @property
    def intensity(self) -> float:
        """FLOP for each byte."""
        return self.flops / self.bytes


DPO_VALUE = Work(flops=2 + 1 + 1 + 4, bytes=4 * FLOAT + FLOAT)
"""The DPO loss of a pair: two log-ratios, their difference, beta; log-sigmoid: exponential, log1p, maximum, sum. Four
log-probabilities are read and one loss is written."""

DPO_GRADIENT = Work(flops=2 + 1 + 1, bytes=2 * FLOAT)
"""Its gradient, where the exponential is at hand: sigmoid, beta, and the sign for the rejected response."""

DPO_PAIR = Work(DPO_VALUE.flops + DPO_GRADIENT.flops + 2 + 1 + 7, bytes=5 * FLOAT)
"""A pair in a batch: also two additions into the gradient of the table, one into the mean loss, and the metrics (two
rewards, their margin, accuracy). Read are three ids and two log-probabilities under the reference."""

DEMONSTRATION = Work(flops=1 + 1, bytes=2 * FLOAT)
"""A demonstration in a batch: an addition into the gradient of the table, and one into the mean. Read are two ids."""


class Network(NamedTuple):
    """The sizes of `toy.ToyLM` in `toy.make_world`: embedding -> hidden layer -> logits."""

    prompts: int = 5
    features: int = 8
    hidden: int = 32
    responses: int = 10

    @property
    def num_params(self) -> int:
        """Weights and biases."""
        return (self.features + 1) * self.hidden + (self.hidden + 1) * self.responses

    @property
    def forward_flops(self) -> int:
        """Two layers with their biases, ReLU, and log-softmax: largest logit, subtract, exponential, sum, subtract."""
        layers = 2 * self.hidden * (self.features + self.responses)
        return self.prompts * (layers + self.hidden + 5 * self.responses)

    @property
    def backward_flops(self) -> int:
        """Gradients of logits, of both layers' weights and biases, and of the hidden layer."""
        weights = (2 * self.prompts - 1) * self.hidden * (self.features + self.responses)
        biases = (self.prompts - 1) * (self.hidden + self.responses)
        hidden = self.prompts * self.hidden * (2 * self.responses - 1 + 1)
        return 3 * self.prompts * self.responses + weights + biases + hidden


class StringNetwork(NamedTuple):
    """The sizes of `strings.CausalMLP`, and of a batch: uniform strings of up to `horizon` letters.

    Attributes:
      prompts, features, hidden: as in `Network`.
      letters, horizon: sizes of the strings.
      strings: how many are in a batch.
    """

    prompts: int = 5
    features: int = 8
    hidden: int = 32
    letters: int = 4
    horizon: int = 5
    strings: int = 128

    @property
    def num_params(self) -> int:
        """Weights, biases, and a row for each letter at each place but the last."""
        choices, rows = self.letters + 1, self.letters * (self.horizon - 1)
        return (self.features + 1 + rows) * self.hidden + (self.hidden + 1) * choices

    @property
    def prefixes(self) -> float:
        """The expected number of distinct prefixes in a batch; the empty one of each prompt counts always."""
        sizes = [self.letters**length for length in range(self.horizon + 1)]
        reach = [sum(sizes[place:]) / sum(sizes) for place in range(1, self.horizon)]  # is a string so long
        cells = [self.prompts * size for size in sizes[1:-1]]
        return self.prompts + sum(
            num * (1 - (1 - share / num) ** self.strings) for num, share in zip(cells, reach, strict=True)
        )

    @property
    def forward_flops(self) -> float:
        """A layer for each prompt; for each prefix a letter's row, ReLU, the last layer, and log-softmax."""
        choices = self.letters + 1
        prompts = self.prompts * self.hidden * (2 * self.features - 1)
        return prompts + self.prefixes * (2 * self.hidden + 2 * self.hidden * choices + 5 * choices)

    @property
    def backward_flops(self) -> float:
        """Gradients of logits, of the last layer, and of the hidden sums, which go to letters and shorter prefixes."""
        choices = self.letters + 1
        prefix = 3 * choices + choices + 2 * self.hidden * choices + 2 * self.hidden * choices + 2 * self.hidden
        return self.prefixes * prefix + (2 * self.prompts - 1) * self.hidden * self.features


def string_pair(tokens: float) -> Work:
    """A pair of strings in a batch, of so many tokens each on average.

    The log-probability of each token is added to its string's, and its gradient to that of its prefix.
    """
    return Work(DPO_PAIR.flops - 2 + 2 * 2 * tokens, DPO_PAIR.bytes)


class Training(NamedTuple):
    """A training run with Adam.

    Attributes:
      num_epochs: passes over the data.
      num_rows: comparisons or demonstrations.
      batch_size: rows per step; the last batch of an epoch may be short.
      row: the work in a row of a batch.
      network: what is trained.
    """

    num_epochs: int
    num_rows: int
    batch_size: int
    row: Work
    network: Network | StringNetwork = Network()

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.num_epochs * -(-self.num_rows // self.batch_size)

    @property
    def work(self) -> Work:
        """The least work of the whole run."""
        network = self.network
        flops = network.forward_flops + network.backward_flops + ADAM_FLOPS * network.num_params
        state = 6 * network.num_params + network.prompts * network.features
        return Work(flops, FLOAT * state) * self.steps + self.row * (self.num_epochs * self.num_rows)
