#!/usr/bin/env bash
# torchrun, but with the exit code 75 where SIGTERM has stopped it. torchrun hands the signal on to its processes, which
# save, and itself ends with 1, whatever their exit codes.
set -u
stopped=
trap stopped=yes TERM
torchrun "$@" &
launcher=$!
[ -n "$stopped" ] || wait "$launcher"
code=$?
if [ -n "$stopped" ]; then
  kill -TERM "$launcher"
  # A second signal ends a wait, and is not handed on: the processes would stop without saving.
  while kill -0 "$launcher" 2>/dev/null; do wait "$launcher"; done
  code=75
fi
exit "$code"
