import numpy as np
from scipy import stats

from experiments.lab.statistics import mean_and_stderr


def test_errors_are_those_of_means():
    values = np.random.default_rng(0).normal(size=(7, 3))
    found = mean_and_stderr(values)
    np.testing.assert_allclose(found["mean"], values.mean(axis=0))
    np.testing.assert_allclose(found["stderr"], stats.sem(values))
    assert np.isnan(mean_and_stderr(values[:1])["stderr"]).all()
