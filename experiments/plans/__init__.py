# SPDX-License-Identifier: Apache-2.0
"""Experiment files: each returns a configuration or a plan."""
