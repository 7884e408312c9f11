#!/bin/sh
# Sets up a working copy: Debian packages (as root only), the virtual environment, the MicroPython targets.
# Says what it does, does nothing twice, and needs no network once all is there.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

say() { printf 'setup: %s\n' "$*"; }

# --- Debian packages: brokers and tools that the tests drive -----------------------------------------------------
want=""
need() { command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ] || want="$want $2"; }
need mosquitto mosquitto
need mosquitto_sub mosquitto-clients
need nft nftables
need ip iproute2
need qemu-arm-static qemu-user-static
if [ -n "$want" ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        say "installing the Debian packages$want"
        export DEBIAN_FRONTEND=noninteractive
        { apt-get update -q && apt-get install -q -y --no-install-recommends $want; } >.setup.log 2>&1 ||
            say "apt-get could not install them (see .setup.log); the tests that need them will be skipped"
    else
        say "not root: the tests that need$want will be skipped (apt-get install$want makes them run)"
    fi
fi

# --- the virtual environment ----------------------------------------------------------------------------------------
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
    say "$PYTHON is missing or older than 3.11; name another: make PYTHON=python3.11 ..."
    exit 1
}
stamp=$(cat pyproject.toml tools/setup.sh | sha256sum | cut -d' ' -f1)
if [ ! -x .venv/bin/python ] || [ "$(cat .venv/stamp 2>/dev/null)" != "$stamp" ]; then
    say "making .venv and installing what pyproject.toml names (once; some minutes)"
    [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
    .venv/bin/python -m pip install -q --disable-pip-version-check -e '.[dev]'
    printf %s "$stamp" >.venv/stamp
fi

# --- an independent COSE library, in a room of its own because it needs an older cbor2 ---------------------------------
if [ ! -f .venv-cose/stamp ]; then
    say "making .venv-cose with cwt, which checks our COSE messages"
    { "$PYTHON" -m venv .venv-cose && .venv-cose/bin/python -m pip install -qq --disable-pip-version-check 'cwt>=3,<4' &&
        touch .venv-cose/stamp; } || say "cwt could not be installed; the test that needs it will be skipped"
fi

# --- MicroPython targets and stubs: said by name when one can't be had ------------------------------------------------
.venv/bin/python firmware_tests/targets.py install
