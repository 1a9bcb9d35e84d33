# Sourced by the scripts beside it, in noodle's folder: defines `noodle`, which runs the command line from .venv, or
# from a small environment with its three packages, which it makes on first use.
noodle() {
    local python=.venv/bin/python
    if [ ! -x "$python" ]; then
        python=.venv-command/bin/python
        local packages=(msgspec psutil rich)
        if ! "$python" -c 'import msgspec, psutil, rich' 2>/dev/null; then
            "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
                echo "noodle needs Python 3.11 or newer: name it with PYTHON=/path/to/python3.11" >&2
                return 1
            }
            "${PYTHON:-python3}" -m venv .venv-command
            "$python" -m pip install --quiet --disable-pip-version-check --constraint requirements.lock "${packages[@]}"
        fi
    fi
    PYTHONPATH="$PWD:$PWD/shared" "$python" -m services.cli "$@"
}
