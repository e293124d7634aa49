#!/usr/bin/env bash
# Installs sam3-jax with its server and the storage of buckets from a clone into the Python on PATH, as deploy/Dockerfile does.
#
#   deploy/install.sh cpu|cuda|tpu
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in
  cpu) extras="serve,gcs,s3" ;;
  cuda | tpu) extras="serve,gcs,s3,$1" ;;
  *)
    echo "usage: deploy/install.sh cpu|cuda|tpu; got '${1:-}'" >&2
    exit 2
    ;;
esac
python -m pip install --no-cache-dir ".[$extras]"
