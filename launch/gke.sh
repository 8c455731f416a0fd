#!/usr/bin/env bash
# A TPU slice of a GKE cluster that exists: one seal-jax command on all of its hosts, as a JobSet or through XPK. v4, v5e, v5p, v6e, tpu7x.
#
#   launch/gke.sh --name NAME --tpu tpu7x:2x2x2 --cluster CLUSTER --location WHERE --image IMAGE [FLAG...] -- train CONFIG [KEY=VALUE...]
#
# --name NAME      of the JobSet, and of the run: its folder is runs/NAME here, copied there first if it exists, and back
# --bucket URL     gs://BUCKET or s3://BUCKET, with a path or without: the run folder is URL/NAME instead, and nothing is copied
# --tpu GEN:SHAPE  the slice, as for `seal-jax plan --topology`: v4:2x2x1, v5e:2x4, v5p:2x2x4, v6e:4x4, tpu7x:2x2x2 ...
# --cluster C      and --location WHERE, its region or zone; --project PROJECT: if not gcloud's own
# --image IMAGE    an image with seal-jax, as launch/image.sh makes it
# --create-pool    make the node pool too, and delete it at the end (--node-zone ZONE: where; not for Autopilot, which makes nodes itself)
# --spot           spot nodes; the same command goes on after a preemption
# --through xpk    submit through XPK, into a cluster that `xpk cluster create` made (--node-zone ZONE: of its TPUs)
# --env-file FILE  lines KEY=VALUE, put into the environment there (HF_TOKEN, OPENAI_API_KEY)
# --sync MINUTES   how often results are copied back while it runs (10)
# --keep           leave the node pool at the end; --reuse: go on with one that was left
# --dry-run        print every command and the manifest, run none

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
# shellcheck source=launch/slices.sh
source launch/slices.sh

tpu='' cluster='' location='' zone='' project='' image='' spot='' pool=no through=jobset
while [ $# -gt 0 ]; do
  case $1 in
    --tpu) tpu=$(value "$@"); shift 2 ;;
    --cluster) cluster=$(value "$@"); shift 2 ;;
    --location) location=$(value "$@"); shift 2 ;;
    --node-zone) zone=$(value "$@"); shift 2 ;;
    --project) project=$(value "$@"); shift 2 ;;
    --image) image=$(value "$@"); shift 2 ;;
    --through) through=$(value "$@"); shift 2 ;;
    --spot) spot=true; shift ;;
    --create-pool) pool=yes; shift ;;
    --) shift; break ;;
    *) common_flag "$@"; shift "$used" ;;
  esac
done
check "$@"
[ -n "$tpu" ] && [ -n "$cluster" ] && [ -n "$location" ] && [ -n "$image" ] ||
  fail "--tpu, --cluster, --location and --image are needed; see --help"
slice "$tpu"
case $through in
  jobset) ;;
  xpk)
    [ "$pool$spot" = no ] || fail "--through xpk: node pools, spot ones too, are made by xpk cluster create"
    [ -n "$zone" ] || fail "--through xpk wants --node-zone"
    ;;
  *) fail "--through $through: jobset or xpk" ;;
esac
if [ "$keep$reuse" != nono ] && [ "$pool" = no ]; then fail "--keep and --reuse are for the pool of --create-pool"; fi

where=("--location=$location")
own=()
[ -z "$project" ] || own=("--project=$project")
where+=(${own[@]+"${own[@]}"})
pods=jobset.sigs.k8s.io/jobset-name=$name
files=build/launch/$name
worker='' secret=no policy=no pooled=no job=no

# All pods wait for the run folder of an earlier run, and keep the results until they were fetched: then they are deleted.
in_pod="mkdir -p runs; until [ -e /tmp/go ]; do sleep 1; done; status=0; $(quoted "${command[@]}") || status=\$?; \
echo \$status >/tmp/ended; sleep 1800; exit \$status"

fetch() {
  run mkdir -p build/launch runs &&
    pipeline "kubectl exec $worker -- bash -c $(quoted "$(pack -)") >$files.run.tgz" && unpack "$files.run.tgz"
}

release() { # what holds nothing to keep
  local failed=0
  case $job in
    xpk) run xpk workload delete "--cluster=$cluster" "--workload=$name" "--zone=$zone" ${own[@]+"${own[@]}"} --force || failed=1 ;;
    jobset) run kubectl delete jobset "$name" --ignore-not-found || failed=1 ;;
  esac
  [ "$secret" = no ] || run kubectl delete secret "$name" --ignore-not-found || failed=1
  return "$failed"
}

delete() {
  [ "$pooled" = no ] || run gcloud container node-pools delete "$name" "--cluster=$cluster" "${where[@]}" --quiet || return
  [ "$policy" = no ] || run gcloud compute resource-policies delete "$name" "--region=$region" ${own[@]+"${own[@]}"} --quiet
}

note "$(counted "$hosts" host) of $(counted "$host_chips" chip)"
signed_in "$project"
run gcloud container clusters get-credentials "$cluster" "${where[@]}"
absent "the JobSet $name" kubectl get jobset "$name"
region=$location
[[ ! $location =~ -[a-z]$ ]] || region=${location%-*}
if [ "$pool" = yes ]; then
  # Slices of several hosts of tpu7x have their shape from a policy, others from a flag of the pool.
  shape=("--tpu-topology=$topology") by_policy=no
  if [ "$generation" = tpu7x ] && [ "$hosts" -gt 1 ]; then shape=("--placement-policy=$name") by_policy=yes; fi
  if [ "$reuse" = yes ]; then
    pooled=yes policy=$by_policy
  else
    absent "the node pool $name" gcloud container node-pools describe "$name" "--cluster=$cluster" "${where[@]}"
    made=yes
    if [ "$by_policy" = yes ]; then
      claim policy yes run gcloud compute resource-policies create workload-policy "$name" --type=HIGH_THROUGHPUT "--accelerator-topology=$topology" \
        "--region=$region" ${own[@]+"${own[@]}"}
    fi
    claim pooled yes run gcloud container node-pools create "$name" "--cluster=$cluster" "${where[@]}" ${zone:+"--node-locations=$zone"} \
      "--machine-type=$machine" "${shape[@]}" "--num-nodes=$hosts" ${spot:+--spot}
  fi
fi
made=yes

if [ "$through" = xpk ]; then
  single=() # one process a host: of tpu7x some versions of XPK start two, in two containers
  [ "$generation" != tpu7x ] || single=(--no-use-parallel-containers)
  claim job xpk run xpk workload create "--cluster=$cluster" "--workload=$name" "--zone=$zone" ${own[@]+"${own[@]}"} \
    "--tpu-type=${accelerator%-*}-$topology" --num-slices=1 ${single[@]+"${single[@]}"} "--docker-image=$image" \
    ${env_file:+"--env-file=$env_file"} "--command=$in_pod"
else
  if [ -n "$env_file" ]; then
    absent "the secret $name" kubectl get secret "$name"
    claim secret yes run kubectl create secret generic "$name" "--from-env-file=$env_file"
  fi
  manifest=$(COMMAND=$in_pod render jobset.yaml "HOSTS=$hosts" "CHIPS=$host_chips" "LABEL=$label" "TOPOLOGY=$topology" "SPOT=$spot" \
    "IMAGE=$image" "SECRET=${env_file:+$name}")
  claim job jobset run_with_input "$manifest" kubectl create -f -
fi
poll 15 1/0 '.*/[1-9].*' kubectl get jobset "$name" -o \
  'jsonpath={.status.replicatedJobsStatus[0].ready}/{.status.replicatedJobsStatus[0].failed}'
capture worker kubectl get pods "--selector=$pods,batch.kubernetes.io/job-completion-index=0" -o 'jsonpath={.items[0].metadata.name}'
if earlier; then
  pipeline "tar -czf - -C runs $name | kubectl exec -i $worker -- bash -c 'mkdir -p runs && tar -xzf - -C runs'"
fi
pipeline "kubectl get pods --selector=$pods -o name | xargs -I{} kubectl exec {} -- touch /tmp/go"

begin_sync
background kubectl logs --follow "$worker"
poll 30 '[0-9]+' '' kubectl exec "$worker" -- sh -c 'cat /tmp/ended 2>/dev/null || echo running'
exit "$said"
