import numpy as np
import pytest
from scipy import stats

from dpo_jax import lm


def test_means_are_of_the_rows_that_have_a_number():
    values = np.array([1.0, np.nan, 4.0, 2.0])
    found = lm.mean_and_stderr(values)
    assert found["mean"] == pytest.approx(7 / 3) and found["stderr"] == pytest.approx(stats.sem([1.0, 4.0, 2.0]))
    assert np.isnan(lm.mean_and_stderr(values[:2])["stderr"]) and np.isnan(lm.mean_and_stderr(values[1:2])["mean"])
