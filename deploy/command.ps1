# Dot-sourced by the scripts beside it, in noodle's folder. Invoke-Noodle runs the command line from .venv, or from a
# small environment with its three packages, which it makes on first use.
function Invoke-Noodle([string[]]$Options) {
    $python = '.venv\Scripts\python.exe'
    if (-not (Test-Path $python)) {
        $python = '.venv-command\Scripts\python.exe'
        if (-not (Test-Path $python)) {
            python -c 'import sys; sys.exit(sys.version_info < (3, 11))'
            if ($LASTEXITCODE -ne 0) { throw 'noodle needs Python 3.11 or newer: winget install -e --id Python.Python.3.11' }
            python -m venv .venv-command
        }
        $packages = 'msgspec', 'psutil', 'rich'
        & $python -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))' @packages
        if ($LASTEXITCODE -ne 0) {
            & $python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock @packages
            if ($LASTEXITCODE -ne 0) { throw 'The packages of the command could not be installed; see above.' }
        }
    }
    $Env:PYTHONPATH = "$PWD;$PWD\shared"
    & $python -m services.cli @Options
}

function noodle { Invoke-Noodle $args }
