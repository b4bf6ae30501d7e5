import io

import numpy as np

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
