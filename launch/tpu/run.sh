#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs a plan on GKE (or, with BACKEND=tpu-vm, on TPU VMs):
#   launch/tpu/run.sh experiments/plans/8x7b.py:org=example [options]
set -euo pipefail
cd "$(dirname "$0")/../.."
exec "${FLEXOLMO:-.venv/bin/flexolmo}" launch --backend "${BACKEND:-gke}" \
  --cluster launch/tpu/cluster.yaml --plan "$@"
