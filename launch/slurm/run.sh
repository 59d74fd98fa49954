#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs a plan on a Slurm cluster, from a login node:
#   launch/slurm/run.sh experiments/plans/two.py:root=DIR,on=h100 [options]
set -euo pipefail
cd "$(dirname "$0")/../.."
exec "${FLEXOLMO:-.venv/bin/flexolmo}" launch --backend slurm \
  --cluster launch/slurm/cluster.yaml --plan "$@"
