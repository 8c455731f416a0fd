#!/usr/bin/env bash
# GPU nodes of a Slurm cluster: submits one seal-jax command, from a login node. Slurm gives the nodes back at the job's end, and the file
# system is shared, so that nothing is copied; `make run`'s .venv there must have the extra `cuda`.
#
#   launch/slurm.sh --name NAME --nodes 2 --gpus 8 [FLAG...] -- train CONFIG [KEY=VALUE...]
#
# --name NAME      of the job and of the run: its folder is runs/NAME
# --bucket URL     gs://BUCKET or s3://BUCKET, with a path or without: the run folder is URL/NAME instead, and nothing is copied
# --nodes N        nodes (1); --gpus N: GPUs of each (8), one task a GPU
# --time LIMIT     Slurm's time limit, say 24:00:00
# --partition P    and --account A: if your cluster wants them; --qos Q: say one that may be preempted
# --dry-run        print every command, run none

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

nodes=1 gpus=8 options=()
while [ $# -gt 0 ]; do
  case $1 in
    --nodes) nodes=$(value "$@"); shift 2 ;;
    --gpus) gpus=$(value "$@"); shift 2 ;;
    --time | --partition | --account | --qos) options+=("$1=$(value "$@")"); shift 2 ;;
    --keep | --reuse | --sync | --env-file) fail "$1: not with Slurm, which gives nodes back itself and passes the environment on" ;;
    --) shift; break ;;
    *) common_flag "$@"; shift "$used" ;;
  esac
done
check "$@"
number "--nodes" "$nodes"
number "--gpus" "$gpus"

run mkdir -p runs
run sbatch "--job-name=$name" "--nodes=$nodes" "--ntasks-per-node=$gpus" "--gpus-per-node=$gpus" ${options[@]+"${options[@]}"} \
  "--output=runs/$name.slurm.log" launch/train.sbatch "${command[@]:1}"
note "its output: runs/$name.slurm.log; to stop it: scancel --name=$name; the same command goes on"
