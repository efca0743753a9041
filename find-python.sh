#!/usr/bin/env bash
# Print a Python of at least 3.12, or say how to get one.
for candidate in "${PYTHON:-}" python3.12 python3.13 python3 python3.14 python "$HOME"/.pyenv/versions/3.1[2-9]*/bin/python3; do
  [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 || continue
  if "$candidate" -c 'import sys, venv; sys.exit(not (3, 12) <= sys.version_info < (3, 15))' 2>/dev/null; then
    command -v "$candidate"
    exit 0
  fi
done
cat >&2 <<'TEXT'
Memory by Design needs Python 3.12 or newer, and none was found.
Get one with any of these, then run make again:
  apt install python3.12 python3.12-venv    (Debian, Ubuntu)
  brew install python@3.12                  (macOS)
  pyenv install 3.12 && pyenv local 3.12
  uv python install 3.12
or name one you have: make setup PYTHON=/path/to/python3.12
TEXT
exit 1
