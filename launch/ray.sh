#!/usr/bin/env bash
# A Ray cluster with the hosts of a TPU slice, made for one seal-jax command and deleted: through KubeRay in a GKE cluster that exists
# (v4, v5e, v5p, v6e, tpu7x), or through Ray's own launcher on Google Cloud (v4, v5e, v5p, v6e).
#
#   launch/ray.sh --through kuberay --name NAME --tpu v6e:4x4 --cluster C --location WHERE --image IMAGE [FLAG...] -- train CONFIG [...]
#   launch/ray.sh --through launcher --name NAME --tpu v6e:4x4 --zone ZONE --project PROJECT [FLAG...] -- train CONFIG [KEY=VALUE...]
#
# With --slices N the run's groups are dealt out over N such slices (executor.name=ray): train and evaluate.
#
# --name NAME      of the Ray cluster, and of the run: its folder is runs/NAME here, copied there first if it exists, and back
# --bucket URL     gs://BUCKET or s3://BUCKET, with a path or without: the run folder is URL/NAME instead, and nothing is copied
# --tpu GEN:SHAPE  the slice, as for `seal-jax plan --topology`
# --slices N       how many of them (1)
# --cluster C      KubeRay: the GKE cluster, with Ray's add-on; --location WHERE: its region or zone; --project PROJECT: if not gcloud's own
# --image IMAGE    KubeRay: an image with seal-jax and Ray, as `launch/image.sh --ray` makes it
# --zone ZONE      launcher: a zone that has the slice, in --project PROJECT
# --spot           spot capacity; the same command goes on after a preemption
# --env-file FILE  lines KEY=VALUE, put into the environment there (HF_TOKEN, OPENAI_API_KEY)
# --sync MINUTES   how often results are copied back while it runs (10)
# --keep           leave the Ray cluster at the end
# --dry-run        print every command and the YAML, run none

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
# shellcheck source=launch/slices.sh
source launch/slices.sh

tpu='' cluster='' location='' zone='' project='' image='' spot=no through='' head='' slices=1
while [ $# -gt 0 ]; do
  case $1 in
    --tpu) tpu=$(value "$@"); shift 2 ;;
    --slices) slices=$(value "$@"); shift 2 ;;
    --cluster) cluster=$(value "$@"); shift 2 ;;
    --location) location=$(value "$@"); shift 2 ;;
    --zone) zone=$(value "$@"); shift 2 ;;
    --project) project=$(value "$@"); shift 2 ;;
    --image) image=$(value "$@"); shift 2 ;;
    --through) through=$(value "$@"); shift 2 ;;
    --spot) spot=yes; shift ;;
    --reuse) fail "--reuse: not with Ray; delete the cluster that was kept, or choose another --name" ;;
    --) shift; break ;;
    *) common_flag "$@"; shift "$used" ;;
  esac
done
check "$@"
[ -n "$tpu" ] || fail "--tpu is needed; see --help"
slice "$tpu"
number --slices "$slices"
if [ "$slices" -gt 1 ]; then
  case $1 in train | evaluate) ;; *) fail "--slices $slices: $1 runs on one slice; train and evaluate run on several" ;; esac
fi
files=build/launch/$name
file=$files.ray.yaml

# The two ways differ in how the head is reached. There, Ray keeps the job; so a lost connection does not end it.
case $through in
  kuberay)
    [ -n "$cluster" ] && [ -n "$location" ] && [ -n "$image" ] || fail "--cluster, --location and --image are needed; see --help"
    place=/seal_jax ray=ray python=python
    on_head() { run kubectl exec "$head" -- bash -c "$1"; }
    to_head() { run kubectl cp "$1" "$head:$2"; }
    from_head() { run kubectl cp "$head:$1" "$2"; }
    delete() { run kubectl delete raycluster "$name" --ignore-not-found; }
    ;;
  launcher)
    [ "$generation" != tpu7x ] || fail "--tpu $tpu: it makes TPU VMs by Google's TPU API, which does not serve tpu7x; use kuberay"
    [ -n "$zone" ] && [ -n "$project" ] || fail "--zone and --project are needed; see --help"
    place=/home/ubuntu/seal_jax ray=.venv/bin/ray python=.venv/bin/python
    on_head() { run ray exec "$file" "$1"; }
    to_head() { run ray rsync-up "$file" "$1" "$2"; }
    from_head() { run ray rsync-down "$file" "$1" "$2"; }
    delete() { run ray down --yes "$file"; }
    ;;
  *) fail "--through is needed: kuberay or launcher; see --help" ;;
esac
address=--address=http://127.0.0.1:8265

fetch() {
  run mkdir -p runs && on_head "cd $place && $(pack /tmp/run.tgz)" && from_head /tmp/run.tgz "$files.run.tgz" && unpack "$files.run.tgz"
}

note "$(counted "$slices" slice) of $(counted "$hosts" host) of $(counted "$host_chips" chip)"
run mkdir -p build/launch
if [ "$through" = kuberay ]; then
  signed_in "$project"
  run gcloud container clusters get-credentials "$cluster" "--location=$location" ${project:+"--project=$project"}
  absent "the RayCluster $name" kubectl get raycluster "$name"
  [ "$spot" = no ] && spot='' || spot=true
  manifest=$(render raycluster.yaml "SLICES=$slices" "HOSTS=$hosts" "CHIPS=$host_chips" "LABEL=$label" "TOPOLOGY=$topology" "SPOT=$spot" "IMAGE=$image")
  claim made yes run_with_input "$manifest" kubectl create -f -
  poll 15 ready failed kubectl get raycluster "$name" -o 'jsonpath={.status.state}'
  capture head kubectl get pods "--selector=ray.io/cluster=$name,ray.io/node-type=head" -o 'jsonpath={.items[0].metadata.name}'
else
  write "$file" "$(render ray_launcher.yaml "SLICES=$slices" "ACCELERATOR=$accelerator" "CHIPS=$host_chips" "RUNTIME=$runtime" "SPOT=$spot" \
    "REGION=${zone%-*}" "ZONE=$zone" "PROJECT=$project" "INSTALL=$(install_line tpu)")"
  absent "the Ray cluster $name" ray get-head-ip "$file"
  made=yes
  run ray up --yes "$file"
fi
if earlier; then
  run tar -czf "$files.before.tgz" -C runs "$name"
  to_head "$files.before.tgz" /tmp/before.tgz
  on_head "mkdir -p $place/runs && tar -xzf /tmp/before.tgz -C $place/runs"
fi
[ -z "$env_file" ] || to_head "$env_file" /tmp/seal.env

if [ "$slices" -gt 1 ]; then
  job="cd $place && ${env_file:+$(exports /tmp/seal.env) && }\
$python -m seal_jax.cli $(quoted "${command[@]:1}" executor.name=ray "executor.workers=$slices" "executor.slice=$tpu")"
else
  job="cd $place && $python launch/ray_hosts.py --hosts $hosts --resource TPU=$host_chips ${env_file:+--env-file /tmp/seal.env }\
--folder $folder -- $(quoted "${command[@]:1}")"
fi
on_head "cd $place && $ray job submit $address --submission-id=$name --no-wait -- bash -c $(quoted "$job")"
begin_sync
# The command of `poll` has to be one that is run; so here the two ways differ once more.
status="cd $place && $ray job status $address $name"
if [ "$through" = kuberay ]; then
  background kubectl exec "$head" -- bash -c "cd $place && $ray job logs $address --follow $name"
  poll 30 ".*' succeeded.*" ".*' (failed|was stopped).*" kubectl exec "$head" -- bash -c "$status"
else
  background ray exec "$file" "cd $place && $ray job logs $address --follow $name"
  poll 30 ".*' succeeded.*" ".*' (failed|was stopped).*" ray exec "$file" "$status"
fi
