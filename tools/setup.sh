#!/usr/bin/env bash
# Makes this clone ready: distribution packages, then .venv with the harness and its tools in it.
#
#   tools/setup.sh            everything that is missing
#   tools/setup.sh --packages the distribution packages only
#   tools/setup.sh --tests    also what only the tests need (a PostgreSQL server, openssl, ...); goes with --packages
#
# Invariants:
#   1. Nothing is installed that is there already, and a run with nothing to do takes well under a second.
#   2. Nothing is asked: no standard input is read, and where rights are missing the command to run is printed.
#   3. An interpreter or program counts as present only if it answered.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null

ME=setup
VENV=.venv
READY=$VENV/.ready
PACKAGES_ONLY= FOR_TESTS=

. tools/common.sh

# --- distribution packages ---------------------------------------------------------------------------------------

# Prints what is missing, as `apt-name dnf-name`, one package a line.
missing_packages() {
    have swtpm || echo 'swtpm swtpm'
    have swtpm_setup || echo 'swtpm-tools swtpm-tools'
    have tpm2_pcrread || echo 'tpm2-tools tpm2-tools'
    have gcc || echo 'gcc gcc'
    have make || echo 'make make'
    have pkg-config || echo 'pkg-config pkgconf-pkg-config'
    pkg-config --exists tss2-esys tss2-fapi 2>/dev/null || echo 'libtss2-dev tpm2-tss-devel'
    [ -e /usr/include/stdio.h ] || echo 'libc6-dev glibc-devel'
    [ -z "$FOR_TESTS" ] || missing_for_tests
    has_python || printf 'python3 python3\npython3-venv python3\npython3-dev python3-devel\n'
}

# The same, of what only the tests need; a small container may lack even essential packages.
missing_for_tests() {
    has_postgres || echo 'postgresql postgresql-server'
    have openssl || echo 'openssl openssl'
    have systemd-analyze || echo 'systemd systemd'
    have chattr || echo 'e2fsprogs e2fsprogs'
    { have mount && have umount; } || echo 'mount util-linux'
    { have unshare && have setpriv; } || echo 'util-linux util-linux'
}

# Whether a PostgreSQL server's programs are here: Debian keeps them beside the version, and this one in PATH.
has_postgres() { have pg_ctlcluster || have initdb; }

# Whether an interpreter exists from which .venv was made, or can be made, and tpm2-pytss compiled.
has_python() {
    venv_is_ready && return 0
    local python
    python=$(choose_python) && [ -n "$python" ] &&
        "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' 2>/dev/null
}

# Prints the interpreter for .venv; the probe itself runs on whatever Python answers.
choose_python() {
    local any
    for any in python3 /usr/bin/python3; do
        if "$any" -c '' >/dev/null 2>&1; then
            "$any" tools/pythons.py best
            return
        fi
    done
    return 1
}

install_packages() {
    local missing
    missing=$(missing_packages)
    [ -n "$missing" ] || return 0
    case $missing in *postgresql*)
        say "the tests run private PostgreSQL servers; a service that the package starts is not used and may be disabled" ;;
    esac
    install_named "$(names_of 1 "$missing")" "$(names_of 2 "$missing")"
    missing=$(missing_packages)
    [ -z "$missing" ] || fail "still missing after the installation: $(names_of 1 "$missing")"
}

# --- the virtual environment -------------------------------------------------------------------------------------

# What .venv was made from: another list of packages, or a clone that was moved, makes it anew.
wanted() { { pwd; cat pyproject.toml constraints.txt; } | sha256sum | cut -d' ' -f1; }

venv_is_ready() {
    [ -r "$READY" ] && [ "$(cat "$READY")" = "$(wanted)" ] && "$VENV/bin/python" -c '' 2>/dev/null
}

# Whether .venv works and was made here: its scripts name their interpreter by the folder's full path.
venv_is_ours() {
    "$VENV/bin/python" -c 'import pip' 2>/dev/null && head -n 1 "$VENV/bin/pip" | grep -qF "#!$PWD/$VENV/bin/python"
}

make_venv() {
    venv_is_ready && return 0
    local python
    python=$(choose_python) || fail "no usable Python 3.11 or newer was found; install one with its venv module"
    if ! venv_is_ours; then
        say "creating $VENV with $python"
        "$python" -m venv --clear "$VENV"
    fi
    say "installing the harness into $VENV (tpm2-pytss is compiled: a minute or two the first time)"
    "$VENV/bin/python" -m pip install -qq --disable-pip-version-check \
        -c constraints.txt -e '.[tpm,merklelib,dev]' >&2 ||
        fail "pip could not install the harness; its message is above"
    # An editable install leaves no byte code, and not every environment lets programs write it when they start.
    "$VENV/bin/python" -m compileall -q harness
    wanted >"$READY"
    say "ready: $("$VENV/bin/python" -V), $VENV/bin/harness"
}

for option in "$@"; do
    case $option in
    --packages) PACKAGES_ONLY=yes ;;
    --tests) FOR_TESTS=yes ;;
    *) fail "unknown option $option; there are --packages and --tests" ;;
    esac
done
install_packages
[ -n "$PACKAGES_ONLY" ] || make_venv
