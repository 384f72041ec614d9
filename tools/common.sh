# What the scripts of this folder share; sourced, after ME was set to the name that their messages begin with.

say() { printf '%s: %s\n' "$ME" "$*" >&2; }
fail() { say "$*"; exit 2; }
have() { command -v "$1" >/dev/null 2>&1; }

# Runs a command with the rights to install packages.
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif have sudo && sudo -n true 2>/dev/null; then
        sudo -n "$@"
    elif have sudo && [ -t 2 ] && [ -r /dev/tty ]; then
        say "sudo is needed to install packages"
        sudo "$@" </dev/tty
    else
        fail "packages are missing and there is no right to install them; run as root: $*"
    fi
}

# Installs packages: `install_named APT-NAMES DNF-NAMES`, each one word list. One root shell: one password at most.
install_named() {
    if have apt-get; then
        say "installing with apt-get: $1"
        as_root env DEBIAN_FRONTEND=noninteractive sh -c \
            "apt-get -qq update && apt-get -qq install -y --no-install-recommends $1"
    elif have dnf; then
        say "installing with dnf: $2"
        as_root sh -c "dnf -q -y install $2"
    else
        fail "missing, and neither apt-get nor dnf is here to install them: $1"
    fi
}

# Names of packages in one column of a list, as words: `names_of COLUMN LIST`.
names_of() { cut -d' ' -f"$1" <<<"$2" | sort -u | tr '\n' ' '; }
