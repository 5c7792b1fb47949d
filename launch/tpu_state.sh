#!/usr/bin/env bash
# What there is of the TPU of tpu.sh, which sources this: its state, the wait for it, its end.
set -euo pipefail

tpus() { run gcloud compute tpus "$1" "$2" "${@:3}" --project="$PROJECT" --zone="$ZONE"; }
node() { tpus tpu-vm describe "$NAME" '--format=value(state)'; }
request() { tpus queued-resources describe "$NAME" '--format=value(state.state)'; }

# Prints the state of a `node` or a `request`, and nothing where there is none of that name. If
# gcloud cannot tell, its own error is the end: what may be there is not to be deleted.
state() {
  local error
  { error=$("$1" 2>&1 >&3 3>&-); } 3>&1 && return
  [[ $error == *NOT_FOUND* ]] || die "$error" 1
}

# Sets `asked` and `found`, the states of the request and of the node.
look() {
  asked=$(state request) || exit
  found=$(state node) || exit
}

# Whether it will not come back by itself; in any other state it is there or may be on its way.
gone() {
  [[ $found != READY ]] &&
    [[ $asked == @(FAILED|SUSPEND*) || $found == @(PREEMPTED|STOPPED|TERMINATED) ]]
}

await() {
  local nothing="there is no TPU $NAME in $ZONE of $PROJECT, and no request for one"
  until look && [[ $found == READY ]]; do
    [[ $asked$found ]] || die "$nothing: create or queue it" 1
    ! gone || die "$NAME is gone (${asked:-no request}, ${found:-no node}): resume" 1
    [[ $found || $asked != ACTIVE ]] || die "$NAME has lost its node: delete, then resume" 1
    echo "waiting for $NAME (${found:-$asked})"
    sleep 60
  done
}

delete() {
  [[ $dry ]] || look
  if [[ $dry || $asked ]]; then tpus queued-resources delete "$NAME" --force --quiet
  else tpus tpu-vm delete "$NAME" --quiet; fi
}

# Makes anew what is gone; leaves what is there or on its way.
renew() {
  [[ $dry ]] || look
  [[ $dry || ! $asked$found ]] || gone || return 0
  if [[ $dry || $asked$found ]]; then delete; fi
  queue
}
