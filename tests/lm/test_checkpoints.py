import numpy as np

from dpo_jax.lm.checkpoints import fingerprint


def test_fingerprints_tell_names_shapes_dtypes_and_bits_apart():
    zeros = np.zeros((2, 3), np.float32)
    trees = [{"a": zeros}, {"b": zeros}, {"a": zeros.T}, {"a": zeros.view(np.int32)}, {"a": -zeros}, {"a": "0"}]
    assert len({fingerprint(tree) for tree in trees}) == len(trees)
    assert fingerprint({"a": zeros}) == fingerprint({"a": zeros.copy()})
