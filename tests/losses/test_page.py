"""What the page of the losses says is true: every loss is on it, its table is the reported one, its code runs."""

import json
import re

import jax.numpy as jnp
import pytest

from dpo_jax import losses, toy
from experiments.lab import page
from tests.golden import deviations
from tests.losses.menu import OF_RLHF

TEXT = deviations.PAGE.read_text(encoding="utf-8")
FAMILY = TEXT.split("## The family")[1].split("## Dialects")[0]
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
SUMMARY = json.loads((deviations.OUT / "summary.json").read_text())
COMMAND = "run python -m tests.golden.deviations"
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}


def test_every_public_loss_is_in_the_tables_once():
    rows = re.findall(r"^\| `([\w.]+)", FAMILY, flags=re.MULTILINE)
    assert len(rows) == len(set(rows))
    public = {name for name in dir(losses) if name.endswith("_loss")} - OF_RLHF
    additions = {"with_divergence", "with_sft", "weighted_sum", "wpo_weights", "with_weights"}
    additions |= {"length_desensitized_logps", "down_sampling_mask", "train.moving_reference"}
    links = {"reverse_kl", "forward_kl", "jensen_shannon", "alpha_divergence", "chi_square_kl"}
    expected = public | additions | links
    missing, unknown = expected - set(rows), set(rows) - expected
    assert not missing, f"add to a table of dpo_jax/losses/README.md, under The family, a row of {missing}"
    assert not unknown


def test_rows_have_as_many_cells_as_their_headings():
    for block in re.findall(r"(?:^\|.*\n)+", TEXT, flags=re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1, block


def test_its_table_is_that_of_the_reported_results():
    assert page.between(TEXT, "deviations") == deviations.table(SUMMARY), COMMAND


def test_the_script_writes_its_table(tmp_path, monkeypatch):
    copy, out = tmp_path / "README.md", tmp_path / "reported" / "losses"
    copy.write_text(page.replaced(TEXT, "deviations", "old"), encoding="utf-8")
    monkeypatch.setattr(page, "REPORTED", out.parent)
    monkeypatch.setattr(deviations, "OUT", out)
    monkeypatch.setattr(deviations, "PAGE", copy)
    monkeypatch.setattr(deviations, "summarise", lambda: {"losses": SUMMARY["losses"]})
    deviations.main()
    assert copy.read_text(encoding="utf-8") == TEXT
    assert json.loads((out / "summary.json").read_text())["losses"] == SUMMARY["losses"]


def test_the_reported_results_are_of_all_losses_and_small():
    names = {row["loss"] for row in SUMMARY["losses"]}
    assert names == {case.name for case in deviations.CASES} | deviations.WITHOUT_CASE.keys(), COMMAND
    asked = {deviations.row_of(entry) for entry in deviations.ENTRIES if entry["loss"] not in deviations.STATISTICS}
    assert asked == {row["loss"] for row in SUMMARY["losses"] if row["oracles"]}, COMMAND
    for row in SUMMARY["losses"]:
        for source in ("oracle", "equation"):
            for dtype, tolerance in TOLERANCE.items():
                assert (row[source][dtype] or 0) < tolerance, row


@pytest.mark.parametrize("name", ["dpo_loss", "orpo_loss", pytest.param("wpo_weights", marks=pytest.mark.slow)])
def test_the_reported_results_can_be_had_again(name):
    """Up to the last digits, which depend on the machine."""
    (row,) = deviations.summarise([name])["losses"]
    (reported,) = (entry for entry in SUMMARY["losses"] if entry["loss"] == name)
    for source in ("oracle", "equation"):
        for dtype, floor in {"float64": 1e-14, "float32": 1e-6}.items():
            assert (row[source][dtype] is None) == (reported[source][dtype] is None)
            assert (row[source][dtype] or 0) <= max(10 * (reported[source][dtype] or 0), floor)
        row.pop(source)
    assert row == {key: reported[key] for key in row}, COMMAND


@pytest.mark.parametrize(
    ("number", "text"), [(None, "–"), (0.0, "0"), (4.2e-15, "5e-15"), (9.5e-8, "1e-7"), (2e-7, "2e-7")]
)
def test_deviations_are_rounded_up(number, text):
    assert deviations.rounded_up(number) == text


@pytest.mark.slow
def test_all_code_runs_and_every_training_earns_reward():
    scope = {}
    exec(BLOCKS[0], scope)

    def reward(params):
        return toy.expected_reward(scope["table"](params), scope["world"].rewards).mean()

    before, num = reward(scope["reference_params"]), 0
    training = scope["trained"]

    def watched(objective, data):
        nonlocal num
        tuned, num = training(objective, data), num + 1
        assert jnp.isfinite(reward(tuned))
        assert reward(tuned) > before, num
        return tuned

    scope["trained"] = watched
    for block in BLOCKS[1:]:
        exec(block, scope)
    assert num == len(re.findall(r"= trained\(", TEXT))
