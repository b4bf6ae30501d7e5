"""The benchmark of language models: the work it counts, and what it makes of what the sides say."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dpo_jax import lm
from experiments.lm_benchmark import __main__ as script
from experiments.lm_benchmark import workload


def test_the_least_work_is_counted_by_hand():
    config = lm.Config(10, 4, 6, 1, 2, 1, 2)
    capacity = lm.Capacity(tokens=20, rows=(10, 10), scored=5)
    products = 4 * (4 + 2 + 2) + 4 * 4 + 3 * 4 * 6  # q, k, v; out; gate, up, down
    attention = 2 * 2 * 4 * 5  # scores and values, 4 features, 5 tokens before on average
    assert workload.least_work(config, capacity, num_rows=2) == 3 * (20 * (2 * products + attention) + 2 * 5 * 10 * 4)


def test_smollm2_has_its_number_of_parameters():
    shapes = jax.eval_shape(lambda: lm.init(jax.random.key(0), workload.SMOLLM2).params)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 134_515_008


def test_pairs_have_the_lengths_of_real_ones():
    data = workload.pairs(100, 26)
    for i in (0, 23, 24, 25):
        lengths = [int(np.sum(side[i] >= 0)) for side in (data.prompts, *data.responses)]
        assert tuple(lengths) == workload.LENGTHS[i % 24]


def test_medians_are_over_all_rounds():
    rounds = {
        "all parameters": [
            {"seconds": [1.0, 3.0], "least_flop": 4.0, "peak_flops": 4.0, "peak_bytes": 1},
            {"seconds": [2.0], "least_flop": 4.0, "peak_flops": 2.0, "peak_bytes": 2},
        ]
    }
    found = script.summarise(rounds)["all parameters"]
    assert found["per_step"] == 2.0 and found["share_of_peak"] == 0.5


def test_rivals_get_the_same_pairs(tmp_path):
    model = Path(__file__).parent.parent / "golden" / "language_models" / "chat_model"
    assert not any("TRL" in name for name in script.sides(script.Options(), tmp_path))
    found = script.sides(script.Options(model=model, rivals=Path("python")), tmp_path)
    few, many = (json.loads(Path(found[name][4]).read_text()) for name in ("TRL", f"TRL, {script.EPOCH}"))
    assert few == many[:4] and len(many) == len(workload.LENGTHS)
    data = workload.pairs(lm.load(model).decoder.config.vocab_size, 4)
    for row, tokens in zip(few, data.responses.chosen.tolist(), strict=True):
        assert row["chosen_ids"] == [token for token in tokens if token >= 0]


def test_epochs_are_compared_with_epochs():
    sides = {
        name: {"per_step": seconds, "peak_bytes": 1e9}
        for name, seconds in {"all parameters": 1.0, script.EPOCH: 2.0, f"TRL, {script.EPOCH}": 8.0, "TRL": 3.0}.items()
    }
    assert [row[2] for row in script.rows_of(sides)] == ["1.00", "1.00", "4.00", "3.00"]


@pytest.mark.slow
def test_a_side_says_what_it_took(tmp_path):
    lm.save(tmp_path / "model", lm.init(jax.random.key(0), lm.Config(64, 16, 24, 2, 2, 1, 8)))
    command = [
        sys.executable,
        "-m",
        "experiments.lm_benchmark.side",
        "--model",
        str(tmp_path / "model"),
        "--steps",
        "2",
    ]
    for options in ([], ["--rank", "2", "--adapters", "3", "--top-layers", "1"]):
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        assert len(found["seconds"]) == 2 and min(found["seconds"]) > 0 and found["tokens"] == 564


def test_our_sides_have_their_memory_in_huge_pages_except_for_one(tmp_path):
    model = Path(__file__).parent.parent / "golden" / "language_models" / "chat_model"
    names = script.sides(script.Options(model=model, rivals=Path("python")), tmp_path)
    small = {name for name in names if not script.pages_of(name)["GLIBC_TUNABLES"]}
    assert small == {script.SMALL_PAGES, *(name for name in names if name.startswith(("TRL", "PyTorch")))}
    say = "import json, os; print(json.dumps({'seen': os.environ['GLIBC_TUNABLES']}))"
    for name in (script.SMALL_PAGES, "all parameters"):
        environment = script.pages_of(name)
        assert script.timed([sys.executable, "-c", say], environment) == {"seen": environment["GLIBC_TUNABLES"]}
