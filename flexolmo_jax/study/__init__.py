# SPDX-License-Identifier: Apache-2.0
"""Methods against each other: what is compared, how it is scored, and how it is shown."""
