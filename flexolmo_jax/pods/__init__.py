# SPDX-License-Identifier: Apache-2.0
"""Planning for pods: compile ahead of time, then count memory, work, traffic and time."""
