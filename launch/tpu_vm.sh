#!/usr/bin/env bash
# A TPU VM, or all hosts of a pod slice, through gcloud: created or queued for, used for one seal-jax command, deleted. v4, v5e, v5p, v6e.
#
#   launch/tpu_vm.sh --name NAME --tpu v6e:4x4 --zone ZONE [FLAG...] -- train CONFIG [KEY=VALUE...]
#
# --name NAME      of the machine, and of the run: its folder is runs/NAME here, copied there first if it exists, and back
# --bucket URL     gs://BUCKET or s3://BUCKET, with a path or without: the run folder is URL/NAME instead, and nothing is copied
# --tpu GEN:SHAPE  the slice, as for `seal-jax plan --topology`: v4:2x2x1, v5e:2x4, v5p:2x2x4, v6e:4x4 ...
# --zone ZONE      a zone that has it; --project PROJECT: if not gcloud's own
# --spot           spot capacity: cheaper, and taken away at any moment; the same command goes on
# --direct         create at once or fail (tpu-vm create), instead of waiting in the queue (queued-resources create)
# --env-file FILE  lines KEY=VALUE, put into the environment there (HF_TOKEN, OPENAI_API_KEY)
# --sync MINUTES   how often results are copied back while it runs (10)
# --keep           leave the machine at the end; --reuse: go on with one that was left
# --dry-run        print every command, run none

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
# shellcheck source=launch/slices.sh
source launch/slices.sh

tpu='' zone='' project='' spot=no direct=no
while [ $# -gt 0 ]; do
  case $1 in
    --tpu) tpu=$(value "$@"); shift 2 ;;
    --zone) zone=$(value "$@"); shift 2 ;;
    --project) project=$(value "$@"); shift 2 ;;
    --spot) spot=yes; shift ;;
    --direct) direct=yes; shift ;;
    --) shift; break ;;
    *) common_flag "$@"; shift "$used" ;;
  esac
done
check "$@"
[ -n "$tpu" ] && [ -n "$zone" ] || fail "--tpu and --zone are needed; see --help"
slice "$tpu"
[ "$generation" != tpu7x ] || fail "--tpu $tpu: Google's TPU API does not serve tpu7x; use launch/gke.sh"

where=("--zone=$zone" --quiet) # no question is asked, by ssh of a new key either
[ -z "$project" ] || where+=("--project=$project")
vm=(gcloud compute tpus tpu-vm)
queue=(gcloud compute tpus queued-resources)
kind=("--accelerator-type=$accelerator")
[ "$spot" = no ] || kind+=(--spot)
files=build/launch/$name

there() { # there WORKER TEXT: a line of shell on a worker, or on all
  run "${vm[@]}" ssh "$name" "${where[@]}" "--worker=$1" "--command=$2"
}

copy() { # copy WORKER FROM TO
  run "${vm[@]}" scp "$2" "$3" "${where[@]}" "--worker=$1"
}

fetch() {
  there 0 "cd seal_jax && $(pack ../../run.tgz)" && run mkdir -p runs && copy 0 "$name:run.tgz" "$files.run.tgz" && unpack "$files.run.tgz"
}

delete() {
  if [ "$direct" = yes ]; then
    run "${vm[@]}" delete "$name" "${where[@]}"
  else
    run "${queue[@]}" delete "$name" "${where[@]}" --force # with its machine
  fi
}

note "$(counted "$hosts" host) of $(counted "$host_chips" chip), $accelerator: asked for by its size; of shapes with three sides Google chooses one"
signed_in "$project"
if [ "$reuse" = yes ]; then
  made=yes
elif [ "$direct" = yes ]; then
  absent "the TPU VM $name" "${vm[@]}" describe "$name" "${where[@]}"
  claim made yes run "${vm[@]}" create "$name" "${where[@]}" "${kind[@]}" "--version=$runtime"
else
  absent "the queued resource $name" "${queue[@]}" describe "$name" "${where[@]}"
  claim made yes run "${queue[@]}" create "$name" "--node-id=$name" "${where[@]}" "${kind[@]}" "--runtime-version=$runtime"
  poll 30 ACTIVE 'FAILED|SUSPENDING|SUSPENDED|DELETING' "${queue[@]}" describe "$name" "${where[@]}" '--format=value(state.state)'
fi

archive "$files.source.tgz"
copy all "$files.source.tgz" "$name:source.tgz"
there all "mkdir -p seal_jax && tar -xzf source.tgz -C seal_jax && cd seal_jax && $(install_line tpu)"
if earlier; then
  run tar -czf "$files.before.tgz" -C runs "$name"
  copy 0 "$files.before.tgz" "$name:before.tgz"
  # Not over one that is there already, on a machine that was left, and is newer.
  there 0 "mkdir -p seal_jax/runs && { [ -d seal_jax/runs/$name ] || tar -xzf before.tgz -C seal_jax/runs; }"
fi
environment=''
if [ -n "$env_file" ]; then
  copy all "$env_file" "$name:seal.env"
  environment="$(exports ../seal.env) && "
fi

begin_sync
follow "${vm[@]}" ssh "$name" "${where[@]}" --worker=all "--command=cd seal_jax && $environment.venv/bin/$(quoted "${command[@]}")"
