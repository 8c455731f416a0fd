# shellcheck shell=bash disable=SC2034 # the launchers read the variables
# What the launchers share. Sourced, not run. Every command that acts goes through `run`, `pipeline` and the like, which print it, quoted so
# that it can be pasted into a shell; with --dry-run they do no more than that.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1 # the root of the checkout
dry_run=no keep=no reuse=no name='' bucket='' sync=10 env_file=''
made=no started=no child='' others=''

fail() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 2
}

help() { # the comment at the head of the script
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
  exit 0
}

value() { # value --flag VALUE...: VALUE
  [ $# -ge 2 ] || fail "$1 wants a value; see --help"
  printf '%s\n' "$2"
}

common_flag() { # handles a flag that all launchers have; sets `used`, how many words it was
  used=2
  case $1 in
    --name) name=$(value "$@") ;;
    --bucket) bucket=$(value "$@") ;;
    --sync) sync=$(value "$@") ;;
    --env-file) env_file=$(value "$@") ;;
    --dry-run) dry_run=yes used=1 ;;
    --keep) keep=yes used=1 ;;
    --reuse) reuse=yes used=1 ;;
    --help | -h) help ;;
    -*) fail "unknown flag $1; see --help" ;;
    *) fail "$1: the seal-jax command comes after --; see --help" ;;
  esac
}

quoted() { # the words as one line of shell
  local word line='' q="'" escaped="'\\''"
  for word in "$@"; do
    # shellcheck disable=SC2016 # $worker and $head are what `capture` leaves in a dry run
    case $word in
      '$worker'* | '$head'*) word="\"$word\"" ;;
      '' | *[!A-Za-z0-9_./:=@%+,-]*) word="'${word//$q/$escaped}'" ;;
    esac
    line="$line${line:+ }$word"
  done
  printf '%s\n' "$line"
}

show() { # show LINE: what is done; on standard output if it is all there will be
  if [ "$dry_run" = yes ]; then printf '%s\n' "$1"; else printf '%s\n' "$1" >&2; fi
}

note() { show "# $*"; }

counted() { # counted NUMBER THING: 1 host, 2 hosts
  local many=s
  [ "$1" != 1 ] || many=''
  printf '%s %s%s\n' "$1" "$2" "$many"
}

run() { # run COMMAND...
  show "$(quoted "$@")"
  [ "$dry_run" = yes ] || "$@"
}

pipeline() { # pipeline TEXT: a line of shell, for what has a pipe or writes to a file
  show "$1"
  [ "$dry_run" = yes ] || bash -c "set -euo pipefail; $1"
}

run_with_input() { # run_with_input TEXT COMMAND...
  local text=$1
  shift
  show "$(quoted "$@") <<'END'
$text
END"
  [ "$dry_run" = yes ] || "$@" <<<"$text"
}

write() { # write FILE TEXT
  show "cat >$(quoted "$1") <<'END'
$2
END"
  [ "$dry_run" = yes ] || printf '%s\n' "$2" >"$1"
}

follow() { # like run, but a signal to this script is not held back until the command ends
  show "$(quoted "$@")"
  [ "$dry_run" = yes ] && return
  "$@" &
  child=$!
  wait "$child"
}

background() { # background COMMAND...: shows what it prints until this script ends
  show "$(quoted "$@") &"
  [ "$dry_run" = yes ] && return
  "$@" &
  others="$others $!"
}

capture() { # capture VARIABLE COMMAND...: what it prints; in a dry run the variable's name, as a shell would write it
  local target=$1 found="\$$1"
  shift
  show "$target=\$($(quoted "$@"))"
  [ "$dry_run" = yes ] || found=$("$@")
  [ -n "$found" ] || fail "nothing found by: $(quoted "$@")"
  printf -v "$target" '%s' "$found"
}

poll() { # poll SECONDS GOOD BAD COMMAND...: until it prints GOOD, kept in `said`; fails on BAD, or if it fails itself ten times in a row
  local seconds=$1 good=$2 bad=$3 failures=0
  said=0
  shift 3
  note "until it says $good, every $seconds s; ${bad:-ten failures} ends it:"
  show "$(quoted "$@")"
  [ "$dry_run" = yes ] && return
  while :; do
    if said=$("$@"); then
      failures=0
      [[ $said =~ ^($good)$ ]] && return
      if [ -n "$bad" ] && [[ $said =~ ^($bad)$ ]]; then
        note "it says $said"
        return 1
      fi
    else
      failures=$((failures + 1))
      [ "$failures" -lt 10 ] || return 1
    fi
    sleep "$seconds" >/dev/null 2>&1 &
    child=$!
    wait "$child" # so that a signal is heard at once
  done
}

absent() { # absent WHAT COMMAND...: ends here if the command succeeds, so that nothing of somebody else's is used, or deleted at the end
  local what=$1
  shift
  note "goes on only if this fails, because there is no such thing yet:"
  show "$(quoted "$@")"
  [ "$dry_run" = yes ] && return
  local answer
  if answer=$("$@" 2>&1); then fail "$what exists already; choose another --name, or --reuse it"; fi
  # Another failure (no connection, no right to look) says nothing of whether it is there.
  grep -qiE 'not[ _]?found|does not exist|code=404' <<<"$answer" || fail "whether $what exists cannot be told: $(tail -n 1 <<<"$answer")"
}

claim() { # claim VARIABLE VALUE run COMMAND...: what it makes is this script's to delete, as the variable says, unless somebody has just made it
  local variable=$1 value=$2 before=${!1} log=build/launch/$name.said status=0
  shift 2
  printf -v "$variable" '%s' "$value" # before the command, which a signal may end in the middle
  if [ "$dry_run" = yes ]; then
    "$@"
    return
  fi
  mkdir -p build/launch
  { "$@" 2>&1 >&3 3>&- | tee "$log" >&2 3>&- || status=${PIPESTATUS[0]}; } 3>&1
  [ "$status" -ne 0 ] || return 0
  if grep -qiE 'already[ _]?exists' "$log"; then
    printf -v "$variable" '%s' "$before"
    fail "it exists already, since a moment; choose another --name"
  fi
  return "$status"
}

told() { # told COMMAND...: what it prints, into `said`; nothing if it fails
  show "$(quoted "$@")"
  said=''
  [ "$dry_run" = yes ] || said=$("$@" 2>/dev/null) || said=''
}

signed_in() { # signed_in PROJECT: ends here, before anything is made, if gcloud has no account, or no project of its own where PROJECT is ''
  if [ "$dry_run" = no ] && ! command -v gcloud >/dev/null; then fail "gcloud is not here; install Google's Cloud SDK"; fi
  if [ -z "${CLOUDSDK_AUTH_ACCESS_TOKEN_FILE:-}${CLOUDSDK_AUTH_CREDENTIAL_FILE_OVERRIDE:-}" ]; then # which stand in for an account
    note "goes on only if there is an account:"
    told gcloud auth list --filter=status:ACTIVE '--format=value(account)'
    [ "$dry_run$said" != no ] || fail "gcloud has no account; sign in with: gcloud auth login"
  fi
  [ -z "$1" ] || return 0
  note "goes on only if there is a project:"
  told gcloud config get-value project
  case $dry_run$said in no | 'no(unset)') fail "gcloud has no project; give --project, or run: gcloud config set project PROJECT" ;; esac
}

check() { # check COMMAND CONFIG [KEY=VALUE...]: the seal-jax command, into the array `command`
  case $name in
    '') fail "--name is missing; see --help" ;;
    [!a-z]* | *[!a-z0-9-]* | *-) fail "--name $name: expected small letters, digits and -, a letter first, as clouds want it" ;;
  esac
  [ ${#name} -le 40 ] || fail "--name $name: longer than 40 characters"
  case $bucket in
    '' | gs://?* | s3://?*) ;;
    *) fail "--bucket $bucket: expected gs://BUCKET or s3://BUCKET, with a path or without" ;;
  esac
  folder=${bucket%/}
  folder=${folder:-runs}/$name
  number --sync "$sync"
  [ -z "$env_file" ] || [ -f "$env_file" ] || fail "--env-file $env_file: no such file"
  case ${1:-} in
    train | evaluate | pretrain | continual) ;;
    *) fail "after --: train, evaluate, pretrain or continual, a config, and KEY=VALUE...; see --help" ;;
  esac
  [ -f "${2:-}" ] || fail "${2:-no config}: no such file in $PWD"
  case $2 in /*) fail "$2: give a config inside $PWD, which is what is copied" ;; esac
  local item
  for item in "${@:3}"; do
    case $item in
      name=* | run_dir=*) fail "$item: the run folder is runs/NAME, of --name, or in the bucket that --bucket names" ;;
      -* | [!a-z]*) fail "$item: expected KEY=VALUE" ;;
      *=*) ;;
      *) fail "$item: expected KEY=VALUE" ;;
    esac
  done
  command=(seal-jax "$@" "name=$name" "run_dir=$folder")
}

number() { # number --flag VALUE
  case $2 in '' | *[!0-9]* | 0*) fail "$1 $2: expected a number above 0" ;; esac
}

render() { # render TEMPLATE KEY=VALUE...: the template filled in, with NAME and COMMAND known
  local python=${PYTHON:-python3}
  [ -n "${PYTHON:-}" ] || [ ! -x .venv/bin/python ] || python=.venv/bin/python
  "$python" launch/render.py "launch/templates/$1" "NAME=$name" "COMMAND=${COMMAND:-$(quoted "${command[@]}")}" "${@:2}"
}

# The run folder travels as an archive: whole or not at all. Units (*.json) come before the checkpoints that they speak of, so that what is
# packed while a run goes on is a state that it could have been stopped in; files that are not finished stay behind.
# Links are made first, in no time, so that what is packed, which takes its time, are the files of one moment; the log alone may grow meanwhile,
# and tar then says 1.
pack() { # pack FILE: the shell line that packs runs/NAME, run in the root of the checkout; nothing, if there is no such run
  local copy=.$name.copy
  local listed="find $copy -type f ! -name '.*.tmp' ! -path '*/.*.new*'"
  printf '%s\n' "mkdir -p runs && cd runs && rm -rf $copy && mkdir $copy && { cp -al $name/. $copy/ 2>/dev/null || true; } && \
{ { $listed -name '*.json'; $listed ! -name '*.json'; } | tar -czf $1 --transform 's,^$copy,$name,' --ignore-failed-read --no-recursion -T - \
|| [ \$? -eq 1 ]; } && rm -rf $copy"
}

exports() { # exports FILE: the shell line that puts its lines KEY=VALUE into the environment as they are
  printf '%s\n' "while IFS= read -r line || [ -n \"\$line\" ]; do case \$line in ''|'#'*) ;; *=*) export \"\$line\" ;; esac; done <$1"
}

earlier() { # whether there is a run folder here to be copied there first
  [ -z "$bucket" ] && [ -d "runs/$name" ]
}

install_line() { # install_line EXTRA: into .venv, in the root of a checkout; with uv, since TPU VMs have a Python that is too old
  printf '%s\n' "python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --allow-existing --python 3.12 .venv \
&& python3 -m uv pip install --quiet --python .venv/bin/python '.[$1${bucket:+,remote}]'"
}

archive() { # archive FILE: what is to be copied of this checkout: all that git does not ignore, or without git all but what grows here
  local entry without=()
  run mkdir -p build/launch
  if [ -e .git ] && git rev-parse --git-dir >/dev/null 2>&1; then
    # What was deleted and is still listed is left out: tar would stop at it.
    pipeline "git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do if [ -e \"\$file\" ]; then \
printf '%s\0' \"\$file\"; fi; done | tar -czf $1 --null -T -"
    return
  fi
  for entry in .git .venv .make .jax_cache .pytest_cache .ruff_cache .hypothesis build dist runs sweeps exported adapter traces; do
    without+=("--exclude=./$entry")
  done
  run tar -czf "$1" "${without[@]}" .
}

unpack() { run tar -xzf "$1" -C runs; }

begin_sync() { # copies results back every so many minutes, since a preempted machine takes its disk with it
  if [ -n "$bucket" ]; then
    note "results are in $folder; nothing is copied"
    return
  fi
  started=yes
  note "while it runs, every $sync minutes: the copying back that stands below"
  [ "$dry_run" = yes ] && return
  (
    trap - EXIT
    trap 'kill $(jobs -p) 2>/dev/null; exit' TERM
    while :; do
      sleep $((60 * sync)) >/dev/null 2>&1 & # which, if it is left over, keeps nobody's output open
      wait $! 2>/dev/null # a signal between the two lines makes bash say that it has no such process
      fetch || note "this copy of the results failed; the next may not"
    done
  ) &
  others="$others $!"
}

# A launcher defines fetch (copy the results back) and delete (give the resources back) and, if it wants to, release (give back
# what --keep is not about), and creates by `claim made yes`, or after made=yes.
finish() {
  local status=$?
  trap - EXIT
  trap '' INT TERM HUP
  for process in $others $child; do
    if kill "$process" 2>/dev/null; then wait "$process" 2>/dev/null || true; fi # it ends as it was told to
  done
  if [ "$started" = yes ]; then
    fetch || {
      note "the results could not be copied back; what came earlier is in runs/$name"
      [ "$status" -ne 0 ] || status=1
    }
  fi
  if [ "$made" = yes ]; then
    if declare -F release >/dev/null && ! release; then status=1; fi
    if [ "$keep" = yes ]; then
      note "kept, and paid for until they are deleted; --reuse goes on with them. To delete:"
      dry_run=yes delete >&2
    else
      delete || {
        note "NOT DELETED: see above, and delete by hand what is paid for"
        status=1
      }
    fi
  fi
  if [ "$status" -ne 0 ] && [ "$made" = yes ]; then note "ended with $status; the same command goes on with $folder"; fi
  exit "$status"
}
trap finish EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
