#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs a plan on this machine:
#   launch/local/run.sh experiments/plans/demo.py:workdir=runs/demo [options]
set -euo pipefail
cd "$(dirname "$0")/../.."
exec "${FLEXOLMO:-.venv/bin/flexolmo}" launch --backend local --plan "$@"
