#!/usr/bin/env bash
# Usage: launch/setup_environment.sh PYTHON FOLDER
# Makes a virtual environment and installs this project with the pinned dependencies of constraints.txt. Needs no root.
set -euo pipefail
python=$1 folder=$2
cd "$(dirname "$0")/.."

stop() { echo "setup: $*" >&2; exit 1; }
command -v "$python" >/dev/null || stop "no '$python' found: install Python 3.11 or newer, or name one with make PYTHON=/path/to/python3"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || stop "$("$python" --version) is too old: Python 3.11 or newer is needed"
"$python" -c 'import venv, ensurepip' 2>/dev/null || stop "'$python' has no venv module (on Debian or Ubuntu: apt install python3-venv)"

"$python" -m venv "$folder"
# torch alone first, pinned: with it in place nothing else pulls in another build
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch \
    || stop "pip could not install torch: is there a network or a package mirror?"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,quickstart,triton,deepspeed]' \
    || stop "pip could not install the dependencies named above"
