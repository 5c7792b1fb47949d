#!/usr/bin/env bash
# What the scripts beside this one share. They source it, after their variables.
#
# A script's first comment is its --help. --dry-run and --help may stand anywhere on its command
# line; they are taken out of it here.
set -euo pipefail

# Ends with one line on stderr: 2, wrong usage, unless another code is given.
die() {
  printf '%s: %s\n' "${0##*/}" "$1" >&2
  exit "${2:-2}"
}

# Ends unless the named variables are set, and those of directories are absolute paths.
need() {
  local name
  for name; do
    [[ ${!name} ]] || die "$name is not set; see --help"
    [[ $name != *DIR || ${!name} == /* ]] ||
      die "$name=${!name} must be a path from /, on storage that all hosts mount"
  done
}

# Prints words so that a shell reads them as the same words.
quote() { printf '%q ' "$@"; }

# Runs a command, or prints it in a dry run.
run() {
  if [[ $dry ]]; then
    quote "$@"
    echo
  else
    "$@"
  fi
}

dry=''
for word; do
  shift
  case $word in
    --dry-run) dry=1 ;;
    --help | -h)
      sed -n '2,/^[^#]/{/^#SBATCH/d;s/^# \{0,1\}//p;}' "$0"
      exit
      ;;
    *) set -- "$@" "$word" ;;
  esac
done
