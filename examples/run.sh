#!/usr/bin/env bash
# Install degflow into .venv (made here, or reused) and degrade the photographs of this folder on a local Ray.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
echo "installing into .venv (minutes the first time, seconds later)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable .
exec .venv/bin/degflow synthesize input=examples/photographs output=runs/example scale.per_image=5 "$@"
