"""The commands that tune language models, on a model of a few thousand parameters."""

import json
from pathlib import Path

import numpy as np
import pytest

from dpo_jax import lm
from dpo_jax.types import Labels
from experiments import lm_beta_ablation, tune_lm
from experiments.lab import language
from experiments.lab.methods import method_of

MODEL = Path(__file__).parent.parent / "golden" / "language_models" / "chat_model"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Twenty-four pairs, the chosen ones about Paris."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {"prompt": [{"role": "user", "content": f"Question {i}?"}], "chosen": f"Paris {i}.", "rejected": f"no {i}"}
        for i in range(24)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tune(pairs, out, **options):
    usual = {
        "num_epochs": 2,
        "batch_size": 5,
        "learning_rate": 1e-2,
        "held_out": 0.2,
        "num_samples": 2,
        "max_tokens": 4,
    }
    tune_lm.main(tune_lm.Options(MODEL, pairs, out=out, **{**usual, **options}))
    return json.loads((out / "summary.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"steps_per_evaluation": 3}, {"lora_rank": 2}, {"loss": "simpo", "beta": 2.0}], ids=str
)
def test_a_folder_and_a_file_become_a_folder(pairs, tmp_path, capsys, options):
    summary = tune(pairs, tmp_path / "out", **options)
    assert summary["after"]["loss"]["mean"] < summary["before"]["loss"]["mean"]
    assert summary["after"]["accuracy"]["mean"] == 1
    assert "24 of 24 rows are used" in capsys.readouterr().out
    tuned = lm.load(tmp_path / "out" / "model")
    assert tuned.text.stops == lm.Text.load(MODEL).stops
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"checkpoints", "training.png", "model"}
    assert ("lora_rank" in options) == (tmp_path / "out" / "adapter").exists()
    by_step = summary["held_out_by_step"]
    assert [*by_step] == (["0", "3", "6", "8"] if "steps_per_evaluation" in options else ["0", "8"])
    assert by_step["0"] == summary["before"] and by_step["8"] == summary["after"]
    again = tune(pairs, tmp_path / "out", **options)
    assert again["after"] == summary["after"] and again["held_out_by_step"] == by_step


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["kto", "bco", "bco on pairs", "plackett-luce of 4"])
def test_losses_of_all_kinds_of_data_tune(pairs, tmp_path, loss):
    if loss == "plackett-luce of 4":
        rows = [json.loads(line) for line in pairs.read_text().splitlines()]
        ranked = [{"prompt": row["prompt"], "responses": [row["chosen"], "hm", row["rejected"]]} for row in rows]
        pairs = tmp_path / "rankings.jsonl"
        pairs.write_text("".join(json.dumps(row) + "\n" for row in ranked))
    summary = tune(pairs, tmp_path / "out", loss=loss)
    metric = "accuracy" if "reward_margin" not in summary["after"] else "reward_margin"
    before, after = (summary[when] for when in ("before", "after"))
    better = "desirable_reward" if loss in ("kto", "bco") else metric
    assert after[better]["mean"] > before[better]["mean"]


@pytest.mark.slow
def test_adapters_of_several_betas_are_measured_each(pairs, tmp_path):
    options = lm_beta_ablation.Options(
        MODEL,
        pairs,
        loss=("dpo", "ipo"),
        beta=(0.1, 1.0),
        learning_rate=(1e-2,),
        num_epochs=3,
        top_layers=1,
        lora_rank=2,
        num_samples=4,
        max_tokens=4,
        out=tmp_path,
    )
    lm_beta_ablation.main(options)
    entries = json.loads((tmp_path / "summary.json").read_text())["adapters"]
    assert [(e["loss_name"], round(e["beta"], 3)) for e in entries] == [
        ("dpo", 0.1),
        ("dpo", 1),
        ("ipo", 0.1),
        ("ipo", 1),
    ]
    assert all(np.isfinite(entry["kl"]["mean"]) for entry in entries)
    assert entries[0]["reward_margin"]["mean"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "dpoo"}, "there is no 'dpoo'; did you mean 'dpo'"),
        ({"held_out": 0.0}, r"--held-out must be in \(0, 1\)"),
        ({"held_out": 0.02}, "leaves too few"),
        ({"max_rows": 0}, "--max-rows must be at least 1"),
        ({"max_tokens": 0}, "--max-tokens must be at least 1"),
        ({"fixed": {"gama": 0.5}}, "gama"),
        ({"max_length": 1}, "max_length must be at least 2"),
    ],
    ids=str,
)
def test_bad_options_end_the_command_with_a_line(pairs, tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        tune(pairs, tmp_path / "out", **options)


def test_rows_of_a_prompt_are_held_out_together_and_no_more_than_asked(key):
    prompts = np.random.default_rng(0).integers(0, 60, 500)[:, None]
    train, out = language.split(key, Labels(prompts, prompts, np.ones(500, bool)), held_out=0.1, at_most=400)
    assert len(train.prompts) + len(out.prompts) == 400 and 40 <= len(out.prompts) < 50
    assert not {*train.prompts.ravel()} & {*out.prompts.ravel()}


def test_what_a_run_without_a_checkpoint_left_is_forgotten(tmp_path):
    (tmp_path / "held_out.json").write_text('{"2": {"loss": 1}, "5": {"loss": 2}}')
    held_out = tune_lm.HeldOut(tmp_path / "held_out.json", lambda params: {"loss": params}, every=2)
    for done in (3, 4):
        held_out.report(lm.Step(done, 9, {}, 0.0, 0.0, 0, done))
    assert held_out.found == {2: {"loss": 1}, 4: {"loss": 4}}


def test_a_loss_of_ones_own_with_a_known_name_is_ones_own():
    own = method_of("kto", lambda logps, reference, *, beta: 0.0)
    assert not language.is_kto(own) and language.kind_of_data(language.OF_LANGUAGE["kto"]) != language.kind_of_data(own)
    simpo = method_of("simpo", lambda logps, *, beta: 0.0)
    assert [language.takes_means(simpo, mean) for mean in (None, True)] == [False, True]


def test_hyperparameters_go_to_the_losses_that_have_them():
    dpo, simpo = (language.OF_LANGUAGE[name] for name in ("dpo", "simpo"))
    found = [language.hyperparameters_of(m, {"gamma": 0.7, "label_smoothing": 0.1}, (dpo, simpo)) for m in (dpo, simpo)]
    assert ["gamma" in h for h in found] == [False, True] and all(h["label_smoothing"] == 0.1 for h in found)


def test_a_folder_without_a_tokenizer_is_refused(pairs, tmp_path):
    with pytest.raises(SystemExit, match="has no tokenizer.json"):
        tune_lm.main(tune_lm.Options(MODEL.parent / "qwen2", pairs, out=tmp_path / "out"))
