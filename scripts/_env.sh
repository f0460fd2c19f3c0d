# Sourced by train.sh, test.sh and .ci/run. `setup_environment [EXTRA]` leaves a Python environment with the project in it
# on PATH: an active virtual or conda environment as it is, otherwise .venv, which it makes. It installs again only when
# pyproject.toml or this file has changed.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

setup_environment() {
  local extra=${1:-} base= candidate prefix wanted stamp
  if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    if [ ! -x "$root/.venv/bin/python" ]; then
      for candidate in python3 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
          base=$candidate
          break
        fi
      done
      if [ -z "$base" ]; then
        echo "error: no Python of version 3.11 or newer with venv was found; install one, or activate an environment" >&2
        exit 2
      fi
      "$base" -m venv "$root/.venv" || exit 2
    fi
    export VIRTUAL_ENV=$root/.venv PATH=$root/.venv/bin:$PATH
  fi
  prefix=$(python -c 'import sys; print(sys.prefix)') || exit 2
  wanted="$root $(cat "$root/pyproject.toml" "$root/scripts/_env.sh" | cksum)"
  # What an installation with an extra has put there is enough for one without.
  for stamp in "$prefix/.esper-${extra:-base}" "$prefix/.esper-${extra:-dev}"; do
    [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return
  done
  echo "setting up $prefix (once; about a minute, longer where torch has to be downloaded) ..."
  python -m pip install --quiet --editable "$root${extra:+[$extra]}" || {
    echo "error: the packages could not be installed; the lines above say why" >&2
    exit 2
  }
  # The tests compare with its networks. It asks for torchvision, which those do not need, and which would bring another
  # PyTorch along.
  if [ "$extra" = dev ]; then
    python -m pip install --quiet --no-deps 'spandrel==0.4.2' || {
      echo "error: spandrel could not be installed; the lines above say why" >&2
      exit 2
    }
  fi
  if [ "$prefix" = "$root/.venv" ]; then
    echo "done; to have it in a shell of yours: . $root/.venv/bin/activate"
  fi
  echo "$wanted" >"$prefix/.esper-${extra:-base}"
}
