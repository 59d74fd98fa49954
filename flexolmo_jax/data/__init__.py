# SPDX-License-Identifier: Apache-2.0
"""Text, tokens, shards and batches."""
