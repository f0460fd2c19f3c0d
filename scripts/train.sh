#!/usr/bin/env bash
# Trains Tamiyo: sets up what is needed, then runs the trainer. Usage: scripts/train.sh [KEY=VALUE ...] (or --help)
set -u
. "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
setup_environment
exec python -m trainers.train "$@"
