#!/usr/bin/env bash
# Runs a command so that a scheduler can tell a run that was stopped from one that is done.
#
# usage: launch/again.sh COMMAND [WORDS]
# SIGTERM is passed on. A run that it stops has saved and ends with code 0, as one that is done
# does; here it ends with code 75, "try again". Every other code stays as it is.
set -euo pipefail
if [[ ${1:---help} == --help ]]; then
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
  exit
fi

told=''
trap 'told=1; kill -TERM "${!-}" 2>/dev/null || exit 75' TERM
"$@" &
code=0
wait "$!" || code=$?
while kill -0 "$!" 2>/dev/null; do # the signal has interrupted the wait
  code=0
  wait "$!" || code=$?
done
if [[ $told && $code == 0 ]]; then code=75; fi
exit "$code"
