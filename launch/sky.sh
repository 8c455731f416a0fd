#!/usr/bin/env bash
# A TPU slice or GPU machines through SkyPilot: launched, used for one seal-jax command, taken down. TPUs v4, v5e, v5p, v6e.
#
#   launch/sky.sh --name NAME --tpu v6e:2x4 [FLAG...] -- train CONFIG [KEY=VALUE...]
#   launch/sky.sh --name NAME --gpus H100:8 --nodes 2 [FLAG...] -- train CONFIG [KEY=VALUE...]
#
# --name NAME      of the cluster, and of the run: its folder is runs/NAME here, copied there first if it exists, and back
# --bucket URL     gs://BUCKET or s3://BUCKET, with a path or without: the run folder is URL/NAME instead, and nothing is copied
# --tpu GEN:SHAPE  a slice, as for `seal-jax plan --topology`; or --gpus TYPE:N, and --nodes N machines of them (1)
# --infra WHERE    where to look, say gcp/us-east5; without it SkyPilot takes the cheapest (for TPUs: gcp)
# --spot           spot capacity; the same command goes on after a preemption
# --env-file FILE  lines KEY=VALUE, put into the environment there (HF_TOKEN, OPENAI_API_KEY)
# --sync MINUTES   how often results are copied back while it runs (10)
# --keep           leave the cluster at the end; --reuse: go on with one that was left
# --dry-run        print every command and the task file, run none

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
# shellcheck source=launch/slices.sh
source launch/slices.sh

tpu='' gpus='' nodes=1 infra='' spot=no
while [ $# -gt 0 ]; do
  case $1 in
    --tpu) tpu=$(value "$@"); shift 2 ;;
    --gpus) gpus=$(value "$@"); shift 2 ;;
    --nodes) nodes=$(value "$@"); shift 2 ;;
    --infra) infra=$(value "$@"); shift 2 ;;
    --spot) spot=yes; shift ;;
    --) shift; break ;;
    *) common_flag "$@"; shift "$used" ;;
  esac
done
check "$@"
number "--nodes" "$nodes"
before=''
if earlier; then before=runs/$name; fi
if [ -n "$tpu" ] && [ -z "$gpus" ]; then
  slice "$tpu"
  [ "$generation" != tpu7x ] || fail "--tpu $tpu: SkyPilot makes TPU VMs by Google's TPU API, which does not serve tpu7x; use launch/gke.sh"
  writers=$hosts
  task=$(render sky_tpu.yaml "ACCELERATOR=tpu-$accelerator" "RUNTIME=$runtime" "INFRA=${infra:-gcp}" "SPOT=$spot" "BEFORE=$before" \
    "INSTALL=$(install_line tpu)")
elif [ -n "$gpus" ] && [ -z "$tpu" ]; then
  writers=1
  task=$(render sky_gpu.yaml "ACCELERATOR=$gpus" "NODES=$nodes" "INFRA=$infra" "SPOT=$spot" "BEFORE=$before" "INSTALL=$(install_line cuda)")
else
  fail "either --tpu or --gpus is needed; see --help"
fi
files=build/launch/$name

fetch() { # from whichever host writes it: the archives of the others are empty
  run mkdir -p runs || return
  local number
  for number in $(seq 0 $((writers - 1))); do
    [ "$number" -gt 0 ] && number=-worker$number || number=''
    pipeline "ssh $name$number $(quoted "cd sky_workdir && $(pack -)") >$files.run.tgz" && unpack "$files.run.tgz" || return
  done
}

delete() {
  run sky down --yes "$name"
}

if [ "$reuse" = no ]; then absent "the cluster $name" sky status --ip "$name"; fi
run mkdir -p build/launch
write "$files.sky.yaml" "$task"
made=yes
begin_sync
follow sky launch --yes --cluster "$name" ${env_file:+--env-file "$env_file"} "$files.sky.yaml"
