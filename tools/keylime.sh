#!/usr/bin/env bash
# Makes .keylime: stock Keylime, pinned by tools/keylime.txt, in a virtual environment of its own. Nothing of it is
# needed to run or test the harness; `harness bench appraise` measures its appraisal beside ours.
#
#   tools/keylime.sh
#
# Invariants:
#   1. A run with nothing to do takes well under a second and asks for no network.
#   2. Nothing is asked: no standard input is read, and where rights are missing the command to run is printed.
#   3. The environment counts as ready only if Keylime's appraisal could be imported in it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null

ME=keylime
VENV=.keylime
READY=$VENV/.ready
# The distribution's: Keylime imports its `gpg` module, which PyPI has as source only and for which headers are needed.
PYTHON=/usr/bin/python3
. tools/common.sh

wanted() { { pwd; cat tools/keylime.txt; } | sha256sum | cut -d' ' -f1; }

is_ready() {
    [ -r "$READY" ] && [ "$(cat "$READY")" = "$(wanted)" ] && "$VENV/bin/python" -c '' 2>/dev/null
}

# Prints what is missing, as `apt-name dnf-name`, one package a line.
missing_packages() {
    "$PYTHON" -c '' 2>/dev/null || echo 'python3 python3'
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || echo 'python3-venv python3'
    "$PYTHON" -c 'import gpg' 2>/dev/null || echo 'python3-gpg python3-gpg'
}

install_packages() {
    local missing
    missing=$(missing_packages)
    [ -n "$missing" ] || return 0
    install_named "$(names_of 1 "$missing")" "$(names_of 2 "$missing")"
    missing=$(missing_packages)
    [ -z "$missing" ] || fail "still missing after the installation: $(names_of 1 "$missing")"
}

make_venv() {
    local site gpg
    say "creating $VENV with $PYTHON, and installing $(grep '^keylime==' tools/keylime.txt) into it"
    "$PYTHON" -m venv --clear "$VENV"
    "$VENV/bin/python" -m pip install -qq --disable-pip-version-check -r tools/keylime.txt >&2 ||
        fail "pip could not install Keylime; its message is above"
    site=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
    gpg=$("$PYTHON" -c 'import gpg, os; print(os.path.dirname(gpg.__file__))')
    ln -sfn "$gpg" "$site/gpg"
    "$VENV/bin/python" -c 'from keylime.tpm.tpm_main import Tpm; Tpm.check_quote' 2>/dev/null ||
        fail "Keylime was installed and cannot be used: $VENV/bin/python -c 'import keylime.tpm.tpm_main' says why"
    wanted >"$READY"
    say "ready: $("$VENV/bin/python" -V), $VENV"
}

[ $# = 0 ] || fail "takes no option"
is_ready && exit 0
install_packages
make_venv
