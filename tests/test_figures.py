import io
import re
from html import unescape

import matplotlib as mpl
import numpy as np
import pytest
import xarray

from dpo_jax import figures
from experiments.lab import claim_figure

BETAS = (0.1, 1.0)


def drawn(figure):
    """Draws the figure, and returns its axes."""
    figure.savefig(io.BytesIO(), format="png")
    return figure.axes


def test_training_shows_what_it_is_given():
    history = {name: np.linspace(1, 2, 5) for name in ("loss", "accuracy", "reward_margin")}
    panels = drawn(figures.training(history))
    assert [axes.get_xlabel() for axes in panels] == ["Epoch"] * 3
    assert [axes.get_ylabel() for axes in panels] == ["Training loss (nats)", "Training accuracy", "Reward margin"]
    assert all(axes.lines[0].get_ydata().tolist() == history["loss"].tolist() for axes in panels)
    held_out = drawn(figures.training({**history, "held_out_loss": np.full(5, 7.0)}))[0]
    assert held_out.lines[1].get_ydata().tolist() == [7.0] * 5
    bayes = drawn(figures.training(history, bayes={"loss": 0.5, "accuracy": 0.6}))
    assert [axes.lines[-1].get_ydata()[0] for axes in bayes[:2]] == [0.5, 0.6]
    assert "held out" in [text.get_text() for text in held_out.get_legend().get_texts()]


def test_ablation_shows_curves_and_bars():
    left, right = drawn(
        figures.beta_ablation(
            BETAS,
            np.array([[0.7, 0.6], [0.7, 0.5]]),
            np.array([0.4, 0.5]),
            optimal_rewards=np.array([0.6, 0.55]),
            sft_reward=0.3,
            stderr=np.array([0.01, 0.02]),
        )
    )
    assert [line.get_label() for line in left.lines] == ["β = 0.1", "β = 1"]
    assert [bar.get_height() for bar in right.patches] == [0.4, 0.5]
    assert right.get_ylim()[1] > 0.6


def test_frontier_joins_what_was_learnt_to_its_optimum():
    curve = {"kl_to_reference": np.array([0.0, 1.0]), "expected_reward": np.array([0.3, 0.6])}
    learned = {"kl_to_reference": np.array([0.8, 0.2]), "expected_reward": np.array([0.4, 0.35])}
    (axes,) = drawn(figures.frontier(curve, learned, BETAS, curve, sft_reward=0.3))
    joining = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert [line.get_xdata().tolist() for line in joining] == [[0.0, 0.8], [1.0, 0.2]]
    assert len(axes.get_legend().get_texts()) == 6


def test_gains_have_a_row_for_each_loss_and_a_mark_for_each_setting():
    families = {"margin": ["dpo", "ipo"], "reference-free": ["simpo"]}
    gains = {"clean": {"dpo": (0.1, 0.01), "ipo": (0.2, 0.02), "simpo": (0.0, 0.01)}, "noisy": {"dpo": (0.05, 0.01)}}
    figure = figures.loss_gains(families, {"gain": gains, "other gain": gains})
    axes, other = drawn(figure)
    assert [axes.get_xlabel(), other.get_xlabel()] == ["gain", "other gain"]
    rows = {label.get_text(): place for label, place in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True)}
    assert list(rows) == ["margin", "dpo", "ipo", "reference-free", "simpo"]
    clean, noisy = (container.lines[0] for container in axes.containers)
    np.testing.assert_allclose(clean.get_xdata(), [0.1, 0.2, 0.0])
    np.testing.assert_allclose(clean.get_ydata(), [rows[name] for name in ("dpo", "ipo", "simpo")], atol=0.4)
    assert noisy.get_xdata().tolist() == [0.05]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dpo", "clean", "noisy"]


def test_lengths_have_a_row_for_each_loss_and_a_mark_for_each_judge():
    judges = {"indifferent": {"longer": (0.5, 0.1), "gain": (0.2, 0.05)}}
    fond = {"fond": {"longer": (1.5, 0.2), "gain": (0.1, 0.05)}}
    figure = figures.lengths({"dpo": {**judges, **fond}, "r-dpo": fond})
    left, right = drawn(figure)
    assert [label.get_text() for label in left.get_yticklabels()] == ["dpo", "r-dpo"]
    assert left.yaxis_inverted()
    indifferent, fond_of_length = left.containers
    assert indifferent.lines[0].get_xdata().tolist() == [0.5]
    assert fond_of_length.lines[0].get_xdata().tolist() == [1.5, 1.5]
    np.testing.assert_allclose(np.float64(fond_of_length.lines[0].get_ydata()), [0, 1], atol=0.4)
    assert indifferent.lines[0].get_ydata()[0] < fond_of_length.lines[0].get_ydata()[0]
    bars = [segment[:, 0].tolist() for segment in fond_of_length.lines[2][0].get_segments()]
    np.testing.assert_allclose(bars, [[1.3, 1.7]] * 2)
    assert [container.lines[0].get_xdata()[0] for container in right.containers] == [0.2, 0.1]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["judge indifferent", "judge fond"]


def test_names_beside_points_do_not_overlap():
    curve = {"kl_to_reference": np.array([0.0, 1.0]), "expected_reward": np.array([0.3, 0.6])}
    points = {"dpo": (0.5, 0.5), "ipo": (0.5, 0.501), "simpo": (0.4, 0.499)}
    content = {"frontier": curve, "sharpened": curve, "sft_reward": 0.3, "points": points}
    panels = drawn(figures.loss_frontiers({"Clean": content}, {"margin": list(points)}, labelled=list(points)))
    heights = sorted(text.xyann[1] for text in panels[0].texts)
    assert min(np.diff(heights)) > 0.01
    assert [axes.get_visible() for axes in panels] == [True, False]
    assert panels[0].get_title() == "Clean"


POINTS = figures.Points(np.array([0.0, 0.5]), np.array([0.0, 0.1]), np.array([0.0, 0.3]))


def labels_of(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_rlhf_frontier_shows_bounds_in_every_panel_and_methods_in_their_own():
    judges = {"comparisons": {"DPO": POINTS}, "reward model": {"PPO": POINTS, "RLOO": POINTS}}
    left, right = drawn(figures.rlhf_frontier(judges, {"frontier": POINTS}, limits=(1.0, -0.1)))
    for axes, methods in ((left, ["DPO"]), (right, ["PPO", "RLOO"])):
        assert labels_of(axes) == methods
        assert [line.get_label() for line in axes.lines[: 1 + len(methods)]] == ["frontier", *methods]
        assert axes.lines[0].get_ydata().tolist() == [0.0, 0.1]


def test_overoptimisation_shows_truth_and_score():
    (axes,) = drawn(figures.overoptimisation({"PPO": POINTS}, largest_kl=1.0))
    assert [line.get_ydata().tolist() for line in axes.lines[:2]] == [[0.0, 0.1], [0.0, 0.3]]
    assert labels_of(axes) == ["PPO", "true reward", "by the reward model"]
    without_score = drawn(figures.overoptimisation({"PPO": POINTS._replace(learned_gain=None)}, largest_kl=1.0))[0]
    assert len(without_score.lines) == len(axes.lines) - 1


def test_learning_rates_are_drawn_for_every_method():
    curves = {f"method {i}": np.array([0.1, i]) for i in range(10)}
    left, right = drawn(figures.learning_rates([1e-3, 1e-2], curves, curves))
    assert labels_of(right) == list(curves)
    assert left.get_xscale() == "log"
    styles = {(line.get_color(), line.get_linestyle()) for line in left.lines[:10]}
    assert len(styles) == 10


def test_learned_rewards_are_relative_to_their_prompts():
    true = np.array([[0.0, 1.0], [5.0, 5.0]])
    (axes,) = drawn(figures.learned_rewards(true, true + np.array([[3.0], [4.0]])))
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[-0.5, -0.5], [0.5, 0.5]])
    np.testing.assert_allclose(axes.lines[1].get_xydata(), 0)


def test_reinforcement_shows_ratios_only_where_they_change():
    names = ("sampled_reward", "learned_reward", "expected_reward", "sampled_kl", "kl_to_reference", "ratio_change")
    history = {"step": np.array([1.0, 2.0]), **{name: np.array([0.1, 0.2]) for name in names}}
    assert len(drawn(figures.reinforcement(history))) == 3
    assert len(drawn(figures.reinforcement({**history, "ratio_change": np.zeros(2)}))) == 2


def test_claims_are_drawn_over_numbers_and_over_names():
    line = claim_figure.Measured([0.1, 1.0], [1.0, 2.0], [0.1, 0.2])
    marks = claim_figure.Measured(["clean", "noisy"], [1.0, 2.0], [0.1, 0.2])
    over_numbers, over_names = drawn(
        claim_figure.draw({"reward": {"a": line, "b": line}, "KL": {"a": marks}}, xlabel="x")
    )
    assert labels_of(over_numbers) == ["a", "b"]
    assert [tick.get_text() for tick in over_names.get_xticklabels()] == ["clean", "noisy"]
    assert over_numbers.get_ylabel() == "reward"
    assert over_numbers.get_xlabel() == "x"


def test_a_roofline_has_a_roof_for_each_peak_and_a_mark_for_each_workload():
    workloads = {"one run": (1.5, 2e9), "many runs": (1.5, 1.6e10), "loss": (0.4, 5e9)}
    (axes,) = drawn(figures.roofline({"float32": 3e11, "rounded": 6e11}, 1e10, workloads, title="a machine"))
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["float32: 300 GFLOP/s"].get_ydata().tolist() == [3e11, 3e11]
    slope = lines["copy: 10 GB/s"]
    np.testing.assert_allclose(slope.get_ydata() / slope.get_xdata(), 1e10)
    np.testing.assert_allclose(slope.get_ydata()[-1], 6e11)
    assert (lines["many runs: 16 G"].get_xdata()[0], lines["many runs: 16 G"].get_ydata()[0]) == (1.5, 1.6e10)
    names = {text.get_text(): text.xyann[1] for text in axes.texts}
    assert names.keys() == workloads.keys()
    assert names["many runs"] > names["loss"] > names["one run"]


def test_costs_are_curves_over_the_number_of_runs():
    curves = {"notebooks": ([1, 4, 1024], [5.0, 2.0, 1.0]), "rival": ([1], [500.0])}
    (axes,) = drawn(figures.cost_per_step(curves))
    assert [line.get_label() for line in axes.lines] == ["notebooks", "rival"]
    assert axes.lines[0].get_ydata().tolist() == [5.0, 2.0, 1.0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "4", "1,024"]


def summary_of(loss="dpo", noise="noise", x="beta"):
    """Of two losses, two betas and two shares of noise; NaN where there is no interval."""
    axes = {loss: ["dpo", "ipo"], x: [1.0, 0.1], noise: [0.0, 0.2], "statistic": ["mean", "stderr", "low", "high"]}
    gain = np.arange(8.0).reshape(2, 2, 2)
    statistics = np.stack([gain, np.ones_like(gain), gain - 2, gain + 2], axis=-1)
    values = {
        "gain": statistics,
        "kl_to_reference": statistics / 10,
        "optimal_kl": statistics,
        "optimal_gain": statistics,
    }
    return xarray.Dataset({name: (tuple(axes), value) for name, value in values.items()}, axes)


def test_lines_have_a_colour_for_each_loss_and_a_panel_for_each_condition():
    panels = drawn(figures.lines(summary_of("loss"), "gain", x="beta", colour="loss", label="Gain", title="Means"))
    assert [axes.get_title() for axes in panels] == ["noise 0", "noise 0.2"]
    assert [line.get_ydata().tolist() for line in panels[1].lines[:2]] == [[3, 1], [7, 5]]  # beta 0.1 first
    band = panels[1].collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (-1, 5)
    assert panels[0].lines[0].get_color() == panels[1].lines[0].get_color() != panels[0].lines[1].get_color()
    assert labels_of(panels[1]) == ["dpo", "ipo"]
    assert panels[0].get_ylabel() == "Gain"


def test_frontiers_show_the_optimum_and_its_betas_and_intervals_of_both():
    panels = drawn(figures.frontiers(summary_of("loss").isel(noise=[0]), along="beta", colour="loss"))
    (axes,) = panels
    assert labels_of(axes) == ["exact optimum", "dpo", "ipo"]
    assert [text.get_text() for text in axes.texts] == ["0.1", "1"]
    (dpo, _) = axes.containers
    np.testing.assert_allclose(dpo.lines[0].get_xydata(), [[0.2, 2.0], [0.0, 0.0]])
    horizontal, vertical = (np.array(bars.get_segments()[0]) for bars in dpo.lines[2])
    np.testing.assert_allclose(horizontal[:, 0], [0.0, 0.4])
    np.testing.assert_allclose(vertical[:, 1], [0.0, 4.0])


def test_heat_maps_write_values_where_their_axes_say():
    figure = figures.heat_maps(summary_of("loss"), "gain", x="beta", y="noise", title="Reward")
    left, right, bar = drawn(figure)
    assert [left.get_title(), right.get_title(), bar.get_ylabel()] == ["loss dpo", "loss ipo", "gain"]
    assert [label.get_text() for label in left.get_xticklabels()] == ["1", "0.1"]
    written = {text.get_position(): text.get_text() for text in right.texts}
    assert (written[1, 0], written[0, 1]) == ("6.000", "5.000")


def test_names_of_many_losses_stand_in_columns_beside_the_figure():
    many = xarray.concat(
        [summary_of("loss").isel(loss=[0]).assign_coords(loss=[f"loss {i}"]) for i in range(50)], "loss"
    )
    panels = drawn(figure := figures.lines(many, "gain", x="beta", colour="loss"))
    legend = panels[1].get_legend()
    box = legend.get_window_extent().transformed(figure.transFigure.inverted())
    assert len(legend.get_texts()) == 50
    assert box.x0 >= 0 and box.x1 <= 1 and box.y0 >= 0 and box.y1 <= 1


CURVE = {"kl_to_reference": np.array([0.0, 1.0]), "expected_reward": np.array([0.3, 0.6])}
STRANGE = r"_{} $b$ c^2 a\b x_y ß"


class Strange:
    """Makes names that Matplotlib would not draw as they are, a new one for each place, and keeps them."""

    def __init__(self):
        self.names = []

    def __getattr__(self, place):
        self.names.append(STRANGE.format(place))
        return self.names[-1]


def all_losses_of(name):
    return figures.LossFamily(
        name.title, name.x, np.arange(2.0), (name.y, (0, 1)), (name.y2, (0, 1)), {name.loss: (np.ones(2), np.ones(2))}
    )


def gains_of(name):
    gains = {name.gain: {name.setting: {(loss := name.loss): (0.1, 0.01)}}}
    return figures.loss_gains({name.family: [loss]}, gains, reference=name.reference)


def frontiers_of(name):
    content = {"frontier": CURVE, "sharpened": CURVE, "sft_reward": 0.3, "points": {(loss := name.loss): (0.1, 0.1)}}
    return figures.loss_frontiers({name.setting: content}, {name.family: [loss]}, labelled=[loss])


def claim_of(name):
    by_name = claim_figure.Measured([name.first, name.second], [1.0, 2.0], [0.1, 0.2])
    by_number = by_name._replace(x=[0.1, 1.0])
    panels = {name.panel: {name.line: by_number, name.line2: by_number}, name.panel2: {"": by_name}}
    return claim_figure.draw(panels, xlabel=name.x, log=False)


@pytest.mark.parametrize(
    "draw",
    [
        lambda name: figures.roofline({name.peak: 1e9}, 1e9, {name.workload: (1.0, 1e8)}, title=name.title),
        lambda name: figures.cost_per_step({name.curve: ([1, 4], [2.0, 1.0])}, title=name.title),
        lambda name: figures.loss_family([all_losses_of(name)]),
        gains_of,
        frontiers_of,
        lambda name: figures.rlhf_frontier(
            {name.judge: {name.method: POINTS}}, {name.bound: POINTS}, limits=(1.0, -0.1)
        ),
        lambda name: figures.lengths({name.loss: {name.judge: {"longer": (0.1, 0.1), "gain": (0.1, 0.1)}}}),
        lambda name: figures.overoptimisation({name.method: POINTS}, largest_kl=1.0),
        lambda name: figures.learning_rates([1e-3, 1e-2], *[{name.method: np.ones(2)}] * 2),
        claim_of,
        lambda name: figures.lines(summary_of("loss", name.noise), "gain", x="beta", colour="loss", title=name.title),
        lambda name: figures.frontiers(summary_of("loss", name.noise), along="beta", colour="loss", title=name.title),
        lambda name: figures.heat_maps(summary_of(loss := name.loss), "gain", x=loss, y="noise", label=name.label),
    ],
)
def test_names_are_drawn_as_they_are(draw):
    figure = draw(name := Strange())
    with mpl.rc_context({"svg.fonttype": "none"}):
        figure.savefig(page := io.StringIO(), format="svg")
    drawn_texts = [unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", page.getvalue())]
    assert [given for given in name.names if not any(given in text for text in drawn_texts)] == []


def test_strengths_have_a_panel_for_each_ranking_best_on_top():
    ranking = [
        {"response": "a_$x$", "strength": 1.0, "low": 0.5, "high": 2.0},
        {"response": "b", "strength": -1.0, "low": -1.5, "high": -0.5},
    ]
    panels = [axes for axes in drawn(figures.strengths({"overall": ranking, "tea": ranking[:1]})) if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == ["overall", "tea"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["a_$x$", "b"]
    line, _, (bars,) = panels[0].containers[0]
    assert line.get_xdata().tolist() == [1.0, -1.0]
    assert bars.get_segments()[0][:, 0].tolist() == [0.5, 2.0]
    assert panels[0].yaxis_inverted()


def test_calibration_and_win_probabilities_show_their_numbers():
    bins = [{"predicted": 0.7, "observed": 0.6, "half_width": 0.1, "votes": 1234}]
    (axes,) = drawn(figures.calibration(bins))
    assert [text.get_text() for text in axes.texts] == ["1,234"]
    assert axes.containers[0].lines[0].get_ydata().tolist() == [0.6]
    table = np.array([[np.nan, 0.9], [0.1, np.nan]])
    fitted, observed, _ = drawn(figures.win_probabilities("overall", ["x", "y"], table, np.full((2, 2), np.nan)))
    assert [text.get_text() for text in fitted.texts] == ["90", "10"]
    assert list(observed.texts) == []


def test_tuning_shows_batches_and_held_out_pairs():
    history = {"loss": np.linspace(0.7, 0.5, 20), "accuracy": np.ones(20), "chosen_reward": np.zeros(20)}
    held_out = {20: {"loss": {"mean": 0.55, "stderr": 0.02}}, 0: {"loss": {"mean": 0.69, "stderr": 0.01}}}
    left, right = drawn(figures.tuning(history, held_out))
    assert left.lines[0].get_ydata().tolist() == history["loss"].tolist()
    assert left.lines[1].get_ydata()[0] == pytest.approx(np.mean(history["loss"][:2]))  # a mean of two
    (held,) = left.containers
    assert held.get_label() == "held out, ± 2 standard errors"
    np.testing.assert_allclose(held.lines[0].get_xydata(), [[0, 0.69], [20, 0.55]])
    assert [axes.get_title() for axes in (left, right)] == ["Loss ↓", "Accuracy ↑"]


def test_betas_of_language_models_have_a_line_for_each_loss():
    def entry(loss, beta):
        found = {name: {"mean": beta, "stderr": 0.1} for name in ("accuracy", "reward_margin", "kl")}
        return {"loss_name": loss, "beta": beta, "learning_rate": 1e-4, **found}

    panels = drawn(figures.language_betas([entry(loss, beta) for loss in ("dpo", "_own") for beta in BETAS]))
    assert [axes.get_title() for axes in panels] == [
        "Held-out accuracy ↑",
        "Held-out reward margin ↑",
        "KL of answers (nats)",
    ]
    assert [text.get_text() for text in panels[0].get_legend().get_texts()] == ["dpo", "_own"]


def test_frontiers_of_language_models_show_every_policy():
    estimate = {"mean": 1.0, "stderr": 0.1}
    (axes,) = drawn(
        figures.language_frontier(
            [(0.0, 0.0), (1.0, 2.0)], {"a": [(0.5, 0.5)], "b": [(0.0, 0.0), (1.0, 1.0)]}, sampled=(estimate, estimate)
        )
    )
    assert [line.get_xdata().tolist() for line in axes.lines[:3]] == [[0, 1], [0.5], [0, 1]]
    (axes,) = drawn(
        figures.estimated_frontier(
            {"DPO": [(estimate, estimate)] * 2}, {"DPO": ["β = 1", "β = 2"]}, xlabel="KL", ylabel="r"
        )
    )
    assert [text.get_text() for text in axes.texts] == ["β = 1", "β = 2"]
