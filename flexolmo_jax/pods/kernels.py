# SPDX-License-Identifier: Apache-2.0
"""Work of Mosaic (Pallas) kernels, which the compiler sees as one opaque call.

Grouped products carry an estimate of their author in the program's text. Splash attention carries
none: its products follow from the shapes, half of them skipped by the causal mask up to whole
blocks on the diagonal.
"""

import math
import re
from collections.abc import Sequence

from flexolmo_jax.pods.hlo import Instruction

TARGET = 'custom_call_target="tpu_custom_call"'
# Products [T, S, H] of one head: scores and values; with a backward pass those that it makes again.
_SPLASH = {"splash_mha_fwd": 2, "splash_mqa_fwd": 2, "dkv": 4, "dq": 3, "fused": 5}


def name_of(i: Instruction) -> str:
    """Name of the kernel that an instruction calls, or ""."""
    if i.opcode != "custom-call" or TARGET not in i.text:
        return ""
    path = [part for part in i.op_name.split("/") if part != "pallas_call"]
    return path[-1] if path else re.sub(r"[.\d]+$", "", i.name)


def flops(i: Instruction, operands: Sequence[Instruction]) -> float:
    """FLOPs of one call; 0 where neither an estimate nor a formula is known."""
    stated = _stated(i, "flops")
    if stated:
        return stated
    name = name_of(i)
    return _splash(i, name, operands) if "splash" in name else 0.0


def hbm_bytes(i: Instruction) -> float | None:
    """HBM bytes of one call as its author states them, or None."""
    return _stated(i, "bytes_accessed") or None


def load(name: str, operands: Sequence[Instruction], even_rows: float) -> float:
    """Share of a grouped product's row buffer that is used when all experts are used alike."""
    if not even_rows or not re.search(r"ragged-dot|gmm|grouped", name):
        return 1.0
    rows = [a.shape[0] for o in operands for a in o.arrays if len(a.shape) == 2]
    rows = [n for n in rows if n > 1]
    return min(1.0, even_rows / rows[0]) if rows else 1.0


def harmless(name: str) -> bool:
    """Whether a kernel only prepares indices, so that no FLOPs are missing."""
    return "metadata" in name


def _stated(i: Instruction, key: str) -> float:
    found = re.search(rf'"cost_estimate":\{{[^}}]*"{key}":"(\d+)"', i.text)
    return float(found[1]) if found else 0.0


def _splash(i: Instruction, name: str, operands: Sequence[Instruction]) -> float:
    """2·T·S·H per product, head and row, over the blocks that a causal mask leaves."""
    arrays = [a for o in operands for a in o.arrays if a.dtype in ("bf16", "f32")]
    # Queries and keys come first.
    heads = [a.shape for a in arrays if len(a.shape) >= 3]
    if len(heads) < 2:
        return 0.0
    *rows, length, width = heads[0]
    keys = heads[1][-2]
    products = next((n for key, n in _SPLASH.items() if key in name), 0)
    # The kernel that makes all gradients leaves one part of the queries' per block of keys.
    if "dkv" in name and any(len(a.shape) == len(heads[0]) + 1 for a in i.arrays):
        products = _SPLASH["fused"]
    block = re.search(r'block_q(?:_dkv|_dq)?\\?": (\d+)', i.text)
    blocks = max(1, length // int(block[1])) if block else length
    return products * 2.0 * math.prod(rows) * length * keys * width * (1 + 1 / blocks) / 2
