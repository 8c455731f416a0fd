#!/usr/bin/env bash
# Builds a container image with seal-jax from this checkout, and pushes it, for GKE and KubeRay.
#
#   launch/image.sh --image REGION-docker.pkg.dev/PROJECT/REPOSITORY/seal-jax:TAG [--ray] [--dry-run]
#
# --image IMAGE    its name, in a registry that docker may push to and the cluster may pull from
# --ray            with Ray in it, for launch/ray.sh
# --dry-run        print every command, run none

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

image='' more=''
while [ $# -gt 0 ]; do
  case $1 in
    --image) image=$(value "$@"); shift 2 ;;
    --ray) more='ray[default]'; shift ;;
    --dry-run | --help | -h) common_flag "$@"; shift "$used" ;;
    *) fail "unknown argument $1; see --help" ;;
  esac
done
[ -n "$image" ] || fail "--image is needed; see --help"

run docker build --platform=linux/amd64 --file=launch/Dockerfile "--build-arg=MORE=$more" "--tag=$image" .
run docker push "$image"
