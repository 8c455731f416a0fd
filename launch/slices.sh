# shellcheck shell=bash disable=SC2034 # the variables are read by the launchers
# TPU slices as Google's tools name them. Sourced, not run. Sources: cloud.google.com/tpu/docs (pages of v4, v5e, v5p, v6e, tpu7x; runtimes)
# and cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus (labels, machine types, chips a host); XPK's table says the same.

slice() { # slice GENERATION:TOPOLOGY, as `seal-jax plan --topology` takes it, say v6e:4x4 or v5p:2x2x4
  generation=${1%%:*} topology=${1#*:}
  local sides
  [[ $1 =~ ^[a-z0-9]+:[0-9]+x[0-9]+(x[0-9]+)?$ ]] || fail "--tpu $1: expected GENERATION:TOPOLOGY, say v6e:4x4 or v5p:2x2x4"
  IFS=x read -ra sides <<<"$topology"
  chips=1
  for side in "${sides[@]}"; do chips=$((chips * side)); done
  case $generation in
    v5e | v6e)
      case $topology in
        1x1 | 2x2 | 2x4 | 4x4 | 4x8 | 8x8 | 8x16 | 16x16) ;;
        *) fail "--tpu $1: $generation comes as 1x1, 2x2, 2x4 ... 16x16" ;;
      esac
      host_chips=4
      [ "$chips" -gt 8 ] || host_chips=$chips # up to eight chips are one host
      cores=$chips
      ;;
    v4 | v5p | tpu7x)
      host_chips=4
      [ "$1" != tpu7x:1x1x1 ] || host_chips=1 # a machine with a single chip
      [ "${#sides[@]}" -eq 3 ] && [ $((chips % host_chips)) -eq 0 ] || fail "--tpu $1: $generation comes as AxBxC, in fours, say 2x2x1"
      cores=$((2 * chips))
      ;;
    *) fail "--tpu $1: generations are v4, v5e, v5p, v6e and tpu7x" ;;
  esac
  hosts=$((chips / host_chips))
  # accelerator: the type's name where it is one (gcloud, SkyPilot, Ray); runtime: of TPU VMs; the rest: of GKE
  case $generation in
    v4) accelerator=v4-$cores runtime=tpu-ubuntu2204-base label=tpu-v4-podslice machine=ct4p-hightpu-4t ;;
    v5e) accelerator=v5litepod-$cores runtime=v2-alpha-tpuv5-lite label=tpu-v5-lite-podslice machine=ct5lp-hightpu-${host_chips}t ;;
    v5p) accelerator=v5p-$cores runtime=v2-alpha-tpuv5 label=tpu-v5p-slice machine=ct5p-hightpu-4t ;;
    v6e) accelerator=v6e-$cores runtime=v2-alpha-tpuv6e label=tpu-v6e-slice machine=ct6e-standard-${host_chips}t ;;
    tpu7x) accelerator=tpu7x-$cores runtime='' label=tpu7x machine=tpu7x-standard-${host_chips}t ;;
  esac
}
