#!/bin/sh
# Sets up a working copy, as much of it as is asked for:
#
#   tools/setup.sh demo      the virtual environment with what `make demo` needs
#   tools/setup.sh test      and all that the tests need, the MicroPython targets too (the default)
#   tools/setup.sh system    and what `make test-system` boots
#
# Debian packages are installed as root only. Says what it does and how much it downloads, does nothing twice, begins
# anew what an interruption left half made, and needs no network once all is there.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
LEVEL=${1:-test}
LOG=.setup.log
apt="apt-get -o Acquire::Retries=3"  # a mirror may be out of reach for a moment

say() { printf 'setup: %s\n' "$*"; }
die() { say "$*" >&2; exit 1; }
case $LEVEL in demo | test | system) ;; *) die "want demo, test or system, not $LEVEL" ;; esac

if command -v flock >/dev/null 2>&1; then  # two at once would spoil one another's .venv
    exec 9>.setup.lock
    flock -n 9 || { say "another set-up is at work here: waiting for it"; flock 9; }
fi

# --- Debian packages: brokers and tools that the tests drive -----------------------------------------------------
want=""
need() { command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ] || want="$want $2"; }
need mosquitto mosquitto
need ip iproute2
if [ "$LEVEL" != demo ]; then
    need mosquitto_sub mosquitto-clients
    need nft nftables
    need qemu-arm-static qemu-user-static
    need faketime faketime
    need haproxy haproxy
    need chromium chromium
    need promtool prometheus
    [ -d /usr/lib/postgresql ] || need postgres postgresql
fi
if [ "$LEVEL" = system ]; then
    need debootstrap debootstrap
    need systemd-nspawn systemd-container
fi
if [ -n "$want" ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        say "installing the Debian packages$want"
        export DEBIAN_FRONTEND=noninteractive
        { $apt update -q && $apt install -q -y --no-install-recommends $want; } >$LOG 2>&1 ||
            say "apt-get could not install them (see $LOG); what needs them is left out"
    else
        say "not root: what needs$want is left out (as root: apt-get install$want)"
    fi
fi

# --- the virtual environment ----------------------------------------------------------------------------------------
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    die "$PYTHON is missing or older than 3.11; name another: make PYTHON=python3.11 ..."

# pip for a venv whose Python has no ensurepip (Debian without python3-venv): from a wheel or a pip that is on the
# machine, else from Debian's package of pip's wheel, which apt-get fetches for every user.
pip_from_elsewhere() {
    for wheel in /usr/share/python-wheels/pip-*.whl; do
        [ ! -f "$wheel" ] || { .venv/bin/python "$wheel/pip" install -q pip && return 0; }
    done
    if "$PYTHON" -m pip --version >/dev/null 2>&1; then
        "$PYTHON" -m pip --python .venv/bin/python install -q pip && return 0
    fi
    mkdir -p .venv/pip-wheel
    (cd .venv/pip-wheel && $apt download -q python3-pip-whl && dpkg-deb -x python3-pip-whl_*.deb .) || return 1
    for wheel in .venv/pip-wheel/usr/share/python-wheels/pip-*.whl; do
        .venv/bin/python "$wheel/pip" install -q pip || return 1
    done
    rm -rf .venv/pip-wheel
}

make_venv() {
    rm -rf .venv
    mkdir .venv && touch .venv/unfinished
    if "$PYTHON" -c 'import ensurepip' 2>/dev/null; then
        "$PYTHON" -m venv .venv >$LOG 2>&1 || { rm -rf .venv; die "$PYTHON -m venv failed: $(tail -n 1 $LOG)"; }
    else
        say "$PYTHON has no ensurepip: fetching pip another way"
        "$PYTHON" -m venv --without-pip .venv
        pip_from_elsewhere >$LOG 2>&1 || {
            rm -rf .venv
            die "no pip could be fetched (see $LOG): apt-get install python3-venv as root, or make PYTHON=..."
        }
    fi
    # pip 25.1 is the first that knows --group
    .venv/bin/python -m pip install -q --disable-pip-version-check --upgrade 'pip>=25.1' >$LOG 2>&1 ||
        { rm -rf .venv; die "pip could not be brought up to 25.1: $(tail -n 1 $LOG)"; }
}

# What pip downloads is named line by line with its size; the rest of what it says goes to the log.
pip_install() {
    touch .venv/unfinished
    { .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt "$@" 2>&1 &&
        rm .venv/unfinished; } | tee $LOG | sed -n "s/^ *\(Downloading [^ ]* ([0-9.]* [MG]B)\).*/setup:   \1/p"
    [ ! -e .venv/unfinished ] || die "pip failed: $(grep -i error $LOG | tail -n 1) (see $LOG)"
}

# `test` covers `demo`: one stamp a level, of the files that say what is installed.
stamp=$(cat pyproject.toml constraints.txt tools/setup.sh | sha256sum | cut -d' ' -f1)
stamped() { [ "$(cat ".venv/stamp-$1" 2>/dev/null)" = "$stamp" ]; }
set_stamp() { printf %s "$stamp" >".venv/stamp-$1.new" && mv ".venv/stamp-$1.new" ".venv/stamp-$1"; }

if [ -e .venv/unfinished ]; then
    say "the last set-up was interrupted: making .venv anew (downloads are in pip's cache)"
    make_venv
elif ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    say "making .venv"
    make_venv
elif ! .venv/bin/python -m pip install --help | grep -q -e '--group'; then
    make_venv
fi
rm -f .venv/unfinished
if [ "$LEVEL" = demo ]; then
    if ! stamped test && ! stamped demo; then
        say "installing what the demo needs: 6 MB to download, once"
        broker=""
        command -v mosquitto >/dev/null 2>&1 || [ -x /usr/sbin/mosquitto ] || broker="--group broker"
        pip_install -e '.[linux]' --group demo $broker
        set_stamp demo
    fi
    exit 0
fi
if ! stamped test; then
    say "installing what the tests need: 140 MB to download, 950 MB on disk, once (minutes)"
    pip_install -e '.[tools,tflite,parquet,release]' --group dev
    set_stamp test
fi

# --- an independent COSE library, in an environment of its own because it needs an older cbor2 -------------------------
if [ ! -f .venv-cose/stamp ]; then
    say "making .venv-cose with cwt, which checks our COSE messages: 6 MB to download"
    rm -rf .venv-cose
    { .venv/bin/python -m venv --without-pip .venv-cose &&
        .venv/bin/python -m pip --python .venv-cose/bin/python install -qq --disable-pip-version-check 'cwt>=3,<4' &&
        touch .venv-cose/stamp; } || say "cwt could not be installed; the test that needs it will be skipped"
fi

# --- axe-core, which looks at the dashboard's pages for what a screen reader or a keyboard can't use ------------------
AXE=4.14.1
if [ ! -f ".targets/axe-$AXE.js" ]; then
    mkdir -p .targets
    { command -v npm >/dev/null 2>&1 && (cd .targets && npm pack --silent "axe-core@$AXE" && tar xzf "axe-core-$AXE.tgz" \
        package/axe.min.js && mv package/axe.min.js "axe-$AXE.js" && rm -r package "axe-core-$AXE.tgz"); } >$LOG 2>&1 ||
        say "axe-core could not be had (it needs npm); the test that needs it will be skipped"
fi

# --- MicroPython targets and stubs: said by name when one can't be had ------------------------------------------------
if [ "$LEVEL" = system ]; then
    .venv/bin/python firmware_tests/targets.py install system
else
    .venv/bin/python firmware_tests/targets.py install
fi
