# SPDX-License-Identifier: Apache-2.0
"""FlexOlmo in JAX: experts trained alone on closed data, stitched into one model, with opt-out."""

__version__ = "0.1.0"
