# SPDX-License-Identifier: Apache-2.0
"""The NumPy reference against numbers worked out by hand, then the package against it."""

import types

import numpy as np
import pytest
from reference import numpy_olmo2 as ref

LN = np.log


def weights_of(x, *, router=None, raw=None, allowed=None, segments=None, **switches):
    """Combine weights of a 3-slot router whose rows are the unit vectors: logits are `x` itself."""
    settings = {"k": 3, "context": "token", "renormalize": False} | switches
    x = np.atleast_2d(np.asarray(x, float))
    return ref.combine_weights(
        x,
        np.eye(3) if router is None else np.asarray(router, float),
        np.full(3, -1e4) if raw is None else np.asarray(raw, float),
        [True] * 3 if allowed is None else allowed,
        np.ones(len(x), int) if segments is None else np.asarray(segments),
        **settings,
    )


# Each expectation is worked out on paper: logits are logarithms, so softmax gives plain fractions.
TOKEN = [LN(1), LN(2), LN(5)]  # exp: 1, 2, 5, of 8
HAND = {
    "all three": (TOKEN, {}, [1 / 8, 2 / 8, 5 / 8]),
    "two of three keep the softmax over all": (TOKEN, {"k": 2}, [0, 2 / 8, 5 / 8]),
    "two of three renormalised": (TOKEN, {"k": 2, "renormalize": True}, [0, 2 / 7, 5 / 7]),
    "one of three": (TOKEN, {"k": 1}, [0, 0, 5 / 8]),
    "one renormalised": (TOKEN, {"k": 1, "renormalize": True}, [0, 0, 1]),
    "denied slot leaves the softmax": (TOKEN, {"allowed": [1, 1, 0]}, [1 / 3, 2 / 3, 0]),
    "denied slot, one active": (TOKEN, {"allowed": [1, 1, 0], "k": 1}, [0, 2 / 3, 0]),
    "k clamps to what is allowed": (TOKEN, {"allowed": [0, 1, 0], "k": 3}, [0, 1, 0]),
    # softplus(ln 4) = ln(1 + 4): the bias of slot 2 is -ln 5, its exp falls from 5 to 1: 1, 2, 1.
    "bias": (TOKEN, {"raw": [-1e4, -1e4, LN(4)]}, [1 / 4, 2 / 4, 1 / 4]),
    # softplus(0) = ln 2 halves slots 1 and 2; a raw value in slot 0 must not count: 1, 1, 2.5.
    "slot 0 has no bias": (TOKEN, {"raw": [7.0, 0.0, 0.0]}, [2 / 9, 2 / 9, 5 / 9]),
    "a very negative raw bias is none": (TOKEN, {"raw": [-1e4] * 3}, [1 / 8, 2 / 8, 5 / 8]),
    "ties go to the lower slot": ([0.0, 0.0, 0.0], {"k": 2}, [1 / 3, 1 / 3, 0]),
    "ties among the allowed": ([0.0, 0.0, 0.0], {"k": 1, "allowed": [0, 1, 1]}, [0, 1 / 2, 0]),
}


@pytest.mark.parametrize("case", HAND)
def test_router_by_hand(case):
    x, switches, expected = HAND[case]
    np.testing.assert_allclose(weights_of(x, **switches)[0], expected, atol=1e-12)


def test_router_row_is_a_dot_product():
    # logits: slot 0 [1,0,0].x = ln 2; slot 1 [1,1,0].x = ln 2 + ln 3 = ln 6; slot 2 [0,0,-1].x = 0.
    rows = [[1, 0, 0], [1, 1, 0], [0, 0, -1]]
    got = weights_of([LN(2), LN(3), 0.0], router=rows)[0]
    np.testing.assert_allclose(got, [2 / 9, 6 / 9, 1 / 9], atol=1e-12)


def test_document_context_by_hand():
    # Document 1: logits (0, 0, ln 4), (0, ln 4, 0); running mean of the second: (0, ln 2, ln 2).
    # Document 2 starts afresh: its first token sees itself only.
    x = [[0, 0, LN(4)], [0, LN(4), 0], [0, LN(8), 0]]
    got = weights_of(x, context="document", segments=[1, 1, 2])
    np.testing.assert_allclose(got[0], [1 / 6, 1 / 6, 4 / 6], atol=1e-12)
    np.testing.assert_allclose(got[1], [1 / 5, 2 / 5, 2 / 5], atol=1e-12)
    np.testing.assert_allclose(got[2], [1 / 10, 8 / 10, 1 / 10], atol=1e-12)


def test_document_context_adds_the_bias_after_the_mean():
    # Second token: mean logits (0, ln 2, ln 2); slot 2 then loses ln 2 once: exp 1, 2, 1.
    x = [[0, 0, LN(4)], [0, LN(4), 0]]
    got = weights_of(x, context="document", raw=[-1e4, -1e4, 0.0])
    np.testing.assert_allclose(got[1], [1 / 4, 2 / 4, 1 / 4], atol=1e-12)


def test_norm_rope_positions_by_hand():
    # mean square of (3, 4) is 12.5; weight doubles the second entry.
    got = ref.rms_norm(np.array([3.0, 4.0]), np.array([1.0, 2.0]), 0.0)
    np.testing.assert_allclose(got, [3 / 12.5**0.5, 8 / 12.5**0.5])
    # H = 4, theta = 16: pair (0, 2) turns by p, pair (1, 3) by p / 4.
    got = ref.rotate(np.array([1.0, 0.0, 0.0, 1.0]), 2, 16.0)
    np.testing.assert_allclose(got, [np.cos(2), -np.sin(0.5), np.sin(2), np.cos(0.5)])
    positions, starts = ref.positions_of(np.array([1, 1, 2, 2, 2, 0]))
    assert positions.tolist() == [0, 1, 0, 1, 2, 0]
    assert starts.tolist() == [0, 0, 2, 2, 2, 5]


def test_attention_by_hand():
    # One head of size 2 and identity projections: queries, keys and values are the tokens.
    config = types.SimpleNamespace(
        n_heads=1, n_kv_heads=1, d_head=2, qk_norm="none", norm_eps=0.0, rope_theta=10.0
    )
    layer = {name: np.eye(2).reshape(2, 1, 2) for name in ("w_q", "w_k", "w_v")}
    layer["w_o"] = np.eye(2)[None]
    x = np.array([[1.0, 2.0], [3.0, 4.0]])
    # Each token alone in its document attends to itself only.
    np.testing.assert_allclose(ref.attention(config, layer, x, np.array([1, 2])), x)
    # Together: the query turns by 1 radian, (3 cos 1 - 4 sin 1, 3 sin 1 + 4 cos 1), against the
    # first key, unturned: 11 cos 1 + 2 sin 1. Its own key turned with it: 9 + 16 = 25.
    far, near = (11 * np.cos(1) + 2 * np.sin(1)) / 2**0.5, 25 / 2**0.5
    share = 1 / (1 + np.exp(near - far))
    joined = ref.attention(config, layer, x, np.array([1, 1]))
    np.testing.assert_allclose(joined, [x[0], share * x[0] + (1 - share) * x[1]], rtol=1e-12)


def test_loss_by_hand():
    # probabilities 1/4 and 3/4: -ln of each; logsumexp is ln 4 in both rows; third is masked out.
    logits = np.array([[[LN(1), LN(3)], [LN(1), LN(3)], [9.0, -9.0]]])
    got = ref.loss(logits, np.array([[0, 1, 0]]), np.array([[1, 1, 0]], bool), z_loss=0.5)
    assert np.isclose(got, (LN(4) + LN(4 / 3)) / 2 + 0.5 * LN(4) ** 2)
