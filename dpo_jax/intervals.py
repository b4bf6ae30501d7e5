"""How well a mean over seeds is known."""

from typing import Any

import numpy as np
from scipy import special


def half_width(stderr: Any, num: Any) -> np.ndarray | np.float64:
    """Half the width of the 95 % confidence interval of a mean: Student's t with `num - 1` degrees of freedom.

    All intervals in tables, figures and claims are of this kind, with few seeds and with many.

    Args:
      stderr: the standard error of the mean, in any unit: the deviation of the values (`ddof=1`) over `sqrt(num)`.
      num: how many independent values the mean is of.

    Returns:
      In the unit of `stderr`; NaN where there are fewer than two values.

    Examples:
      >>> half_width(0.1, [2, 4, 1000]).round(3)
      array([1.271, 0.318, 0.196])
    """
    num = np.asarray(num, dtype=float)
    return special.stdtrit(np.where(num > 1, num - 1, np.nan), 0.975) * np.asarray(stderr, dtype=float)
