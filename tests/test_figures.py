import io
import re
from html import unescape

import matplotlib as mpl
import numpy as np
import pytest

from dpo_jax import figures

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
    line = figures.Measured([0.1, 1.0], [1.0, 2.0], [0.1, 0.2])
    marks = figures.Measured(["clean", "noisy"], [1.0, 2.0], [0.1, 0.2])
    over_numbers, over_names = drawn(figures.claim({"reward": {"a": line, "b": line}, "KL": {"a": marks}}, xlabel="x"))
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


def test_sweeps_show_means_with_intervals_and_mark_the_smallest_beta_largest():
    curve = {
        "expected_reward": np.array([0.4, 0.5]),
        "expected_reward_stderr": np.array([0.01, np.nan]),  # one seed has no interval
        "gain": np.array([0.1, 0.2]),
        "gain_stderr": np.array([0.001, 0.002]),
        "num_seeds": np.array([4, 4]),
        "kl_to_reference": np.array([0.8, 0.2]),
    }
    left, right = drawn(figures.reward_against_beta(np.array(BETAS), {"dpo": curve}, sft_reward=0.3, of="Rate 1"))
    assert [left.get_title(), right.get_title()] == ["Rate 1, 95 % intervals"] * 2
    assert [left.get_ylabel(), right.get_ylabel()] == ["Expected true reward", "Reward gained on SFT"]
    assert [list(line.get_ydata()) for line in left.lines] == [[0.4, 0.5], [0.3, 0.3]]
    assert [list(line.get_ydata()) for line in right.lines] == [[0.1, 0.2], [0.0, 0.0]]
    bands = [axes.collections[0].get_paths()[0].vertices[:, 1] for axes in (left, right)]
    np.testing.assert_allclose(
        [[band.min(), band.max()] for band in bands], [[0.368176, 0.5], [0.0968176, 0.2063648]], rtol=1e-5
    )
    (axes,) = drawn(figures.reward_against_kl(np.array(BETAS), {"dpo": curve}, sft_reward=0.3))
    points = axes.collections[0]
    assert points.get_offsets().tolist() == [[0.8, 0.4], [0.2, 0.5]]
    assert points.get_sizes()[0] > points.get_sizes()[1]


def test_heat_maps_write_values_where_their_axes_say():
    table = np.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    figure = figures.heat_maps({"dpo": table, "ipo": table}, {"β": BETAS, "Learning rate": (1, 2, 3)}, title="Reward")
    left, right, bar = drawn(figure)
    assert [left.get_title(), right.get_title(), bar.get_ylabel()] == ["dpo", "ipo", "Reward"]
    assert [label.get_text() for label in left.get_yticklabels()] == ["1", "2", "3"]
    written = {text.get_position(): text.get_text() for text in left.texts}
    assert written[1, 2] == "0.600"
    assert written[0, 0] == "0.100"


CURVE = {"kl_to_reference": np.array([0.0, 1.0]), "expected_reward": np.array([0.3, 0.6])}
SWEPT = {**CURVE, "expected_reward_stderr": np.ones(2), "gain": np.ones(2), "gain_stderr": np.ones(2)}
SWEPT |= {"num_seeds": np.array([4, 4])}
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
    by_name = figures.Measured([name.first, name.second], [1.0, 2.0], [0.1, 0.2])
    by_number = by_name._replace(x=[0.1, 1.0])
    panels = {name.panel: {name.line: by_number, name.line2: by_number}, name.panel2: {"": by_name}}
    return figures.claim(panels, xlabel=name.x, log=False)


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
        lambda name: figures.overoptimisation({name.method: POINTS}, largest_kl=1.0),
        lambda name: figures.learning_rates([1e-3, 1e-2], *[{name.method: np.ones(2)}] * 2),
        claim_of,
        lambda name: figures.reward_against_beta(np.array(BETAS), {name.loss: SWEPT}, sft_reward=0.3, of=name.of),
        lambda name: figures.reward_against_kl(np.array(BETAS), {name.loss: SWEPT}, sft_reward=0.3, of=name.of),
        lambda name: figures.heat_maps({name.loss: np.eye(2)}, {name.x: BETAS, name.y: BETAS}, title=name.title),
    ],
)
def test_names_are_drawn_as_they_are(draw):
    figure = draw(name := Strange())
    with mpl.rc_context({"svg.fonttype": "none"}):
        figure.savefig(page := io.StringIO(), format="svg")
    drawn_texts = [unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", page.getvalue())]
    assert [given for given in name.names if not any(given in text for text in drawn_texts)] == []
