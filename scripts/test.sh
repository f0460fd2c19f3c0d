#!/usr/bin/env bash
# Runs the tests: sets up what is needed, then pytest. Usage: scripts/test.sh [PYTEST ARGUMENT ...]
set -u
. "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
setup_environment dev
cd "$root" && exec python -m pytest "$@"
