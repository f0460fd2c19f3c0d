# Sourced by train.sh and test.sh: leaves a Python environment with the project in it on PATH.
# An active virtual or conda environment is used as it is; otherwise .venv is made. It installs again only when
# pyproject.toml has changed. Usage: . scripts/_env.sh [EXTRA]
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
extra=${1:-}

if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
  if [ ! -x "$root/.venv/bin/python" ]; then
    base=
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
  PATH=$root/.venv/bin:$PATH
  export VIRTUAL_ENV=$root/.venv PATH
fi

stamp=$(python -c 'import sys; print(sys.prefix)')/.esper-${extra:-base}
wanted="$root $(cksum <"$root/pyproject.toml")"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  echo "setting up $(dirname "$stamp") (once; about a minute, longer where torch has to be downloaded) ..."
  python -m pip install --quiet --editable "$root${extra:+[$extra]}" || {
    echo "error: the packages could not be installed; the lines above say why" >&2
    exit 2
  }
  echo "$wanted" >"$stamp"
fi
