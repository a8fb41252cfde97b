#!/usr/bin/env bash
# Makes the virtual environment: setup_env.sh VENV [PYTHON]
# The packages are those of requirements.lock, by hash, on the platform that it is of; elsewhere, and
# with LOCKED=no, the newest that pyproject.toml allows.
set -u
venv=$1 python=${2:-}
needed_gb=9 # torch's CUDA build, its libraries, and the downloads

fail() {
  echo "setup: $1" >&2
  exit 1
}

recent() { # PYTHON -> success if it is 3.12 or newer
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null
}

locked() { # -> success if requirements.lock is of this platform and wanted
  [ "${LOCKED:-yes}" != no ] && [ "$(uname -sm)" = "Linux x86_64" ] &&
    "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))'
}

install_packages() {
  local pip=("$venv/bin/python" -m pip install --disable-pip-version-check -q)
  if locked; then
    "${pip[@]}" --require-hashes -r requirements.lock &&
      "${pip[@]}" --no-deps --no-build-isolation -e .
  else
    "${pip[@]}" -e '.[demo,test]'
  fi
}

find_python() { # 3.12 first: every dependency has wheels for it
  local candidates=() version
  for version in 3.12 3.13 3.14; do
    candidates+=("python$version" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version"*/bin/python)
    if command -v uv >/dev/null; then
      candidates+=("$(uv python find --no-python-downloads "$version" 2>/dev/null)")
    fi
  done
  candidates+=(python3 python)
  for python in "${candidates[@]}"; do
    if [ -n "$python" ] && recent "$python"; then
      echo "$python"
      return
    fi
  done
}

if [ -z "$python" ]; then
  python=$(find_python)
  [ -n "$python" ] || fail "no Python 3.12 or newer found (PATH, pyenv, uv): name one, \
make demo PYTHON=/path/to/python3.12"
elif ! command -v "$python" >/dev/null; then
  fail "PYTHON=$python: no such program."
elif ! recent "$python"; then
  fail "PYTHON=$python is $("$python" --version 2>&1), but 3.12 or newer is needed."
fi

if [ ! -x "$venv/bin/python" ] || ! recent "$venv/bin/python"; then
  free_gb=$(df -Pk . | awk 'NR==2 {print int($4 / 1048576)}')
  [ "$free_gb" -ge "$needed_gb" ] || fail "$free_gb GB of disk are free here, $needed_gb are needed."
  echo "setup: making $venv with $("$python" --version) ..."
  rm -rf "$venv"
  "$python" -m venv "$venv" || fail "could not make $venv (on Debian: apt install python3-venv)."
fi

echo "setup: installing megatron_dr, torch and megatron-core into $venv (about 5 GB, minutes) ..."
log=$venv/install.log
if ! install_packages >"$log" 2>&1; then
  tail -n 5 "$log" >&2
  if grep -qiE 'no space left' "$log"; then
    fail "the disk is full: free about $needed_gb GB and run it again."
  elif grep -qiE 'name resolution|connection|network|timed out|no matching distribution' "$log"; then
    fail "the package index could not be reached, or lacks a package: check the network and run it \
again (whole log: $log)."
  fi
  fail "pip failed (whole log: $log)."
fi
echo "setup: done."
