# Shared by the scripts beside it: `. "$(dirname "$0")/lib.sh"`.  Never run by itself.
# shellcheck shell=bash

set -Eeuo pipefail
trap 'printf "error: %s, line %s: %s\n" "$0" "$LINENO" "$BASH_COMMAND" >&2' ERR

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

if [ -t 1 ] && [ -z "${NO_COLOR:-}" ]; then
    bold=$'\e[1m' dim=$'\e[2m' green=$'\e[32m' red=$'\e[31m' plain=$'\e[0m'
else
    # Sourcing scripts use these.
    # shellcheck disable=SC2034
    bold='' dim='' green='' red='' plain=''
fi

say() { printf '%s==>%s %s\n' "$bold" "$plain" "$*"; }
die() {
    printf '%serror:%s %s\n' "$red" "$plain" "$*" >&2
    exit 1
}

# usage TEXT "$@": print the comment at the head of the calling script where --help is asked for.
help_if_asked() {
    case " $* " in *' --help '* | *' -h '*)
        sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
        exit 0
        ;;
    esac
}

# --- the system's packages ---------------------------------------------------------------------

# apt_install PACKAGE...: install through apt, having said so; as root, or through sudo.
apt_install() {
    command -v apt-get >/dev/null ||
        die "missing here, and no apt-get to install it with (Debian's names): $*"
    local sudo=()
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null || die "not root and no sudo; as root: apt-get install $*"
        sudo=(sudo)
    fi
    say "Installing with apt: $*"
    local run=("${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=300)
    local log
    log=$(mktemp)
    # A fresh machine has no package lists, an old one has lists that name vanished files; and what
    # upgrades it by itself may hold the lock.
    if ! { "${run[@]}" update && "${run[@]}" install -y --no-install-recommends "$@"; } \
        </dev/null >"$log" 2>&1; then
        cat "$log" >&2
        rm -f "$log"
        die "apt-get could not install: $*"
    fi
    rm -f "$log"
}

# ensure_command COMMAND PACKAGE: queue PACKAGE where COMMAND is missing.
missing=()
ensure_command() { command -v "$1" >/dev/null || missing+=("$2"); }
install_missing() {
    if [ "${#missing[@]}" -gt 0 ]; then apt_install "${missing[@]}"; fi
    missing=()
}

has_libmilter() {
    [ -n "${LIBMILTER_INCLUDE:-}" ] ||
        echo '#include <libmilter/mfapi.h>' | cc -E -x c -o /dev/null - 2>/dev/null
}

# install_unstarted SERVICE...: install what is missing.  These services, if they are among it, are
# not to serve on this machine because of that: their packages may not start nor enable them.
install_unstarted() {
    [ "${#missing[@]}" -gt 0 ] || return 0
    local packages=" ${missing[*]} " policy=/usr/sbin/policy-rc.d made='' sudo=() service
    if [ "$(id -u)" -ne 0 ]; then sudo=(sudo); fi
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' | "${sudo[@]}" tee "$policy" >/dev/null
        "${sudo[@]}" chmod 755 "$policy"
        made=1
    fi
    install_missing
    if [ -n "$made" ]; then "${sudo[@]}" rm -f "$policy"; fi
    for service in "$@"; do
        if [[ $packages == *" $service "* ]] && command -v systemctl >/dev/null; then
            "${sudo[@]}" systemctl --quiet disable "$service" 2>/dev/null || true
        fi
    done
}

# ensure_servers: PostgreSQL and Redis, of which the tests run instances of their own.
ensure_servers() {
    compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null || missing+=(postgresql)
    ensure_command redis-server redis-server
    install_unstarted postgresql redis-server
}

# ensure_mtas: Postfix installed, and sendmail unpacked into .venvs/sendmail with what makes
# passwords for AUTH: installed, each of the two MTAs would remove the other.
ensure_mtas() {
    local tree=$root/.venvs/sendmail package
    local binary=$tree/usr/libexec/sendmail/sendmail
    [ -x /usr/lib/postfix/sbin/master ] || missing+=(postfix)
    ensure_command openssl openssl
    ensure_command m4 m4
    install_unstarted postfix
    if [ ! -x "$binary" ] || [ ! -x "$tree/usr/sbin/saslpasswd2" ]; then unpack_sendmail "$tree"; fi
    if ldd "$binary" | grep -q 'not found'; then
        for package in $(apt-cache depends sendmail-bin | sed -n 's/^ *Depends: \(lib[^ ]*\)$/\1/p'); do
            missing+=("$package")
        done
        install_missing
    fi
}

# unpack_sendmail DIRECTORY: the packages that ensure_mtas needs, unpacked there.
unpack_sendmail() {
    say "Unpacking sendmail into ${1#"$root"/}"
    local work packages=(sendmail-bin sendmail-cf sasl2-bin)
    local sudo=()
    if [ "$(id -u)" -ne 0 ]; then sudo=(sudo); fi
    work=$(mktemp -d)
    (
        cd "$work"
        apt-get -qq download "${packages[@]}" 2>apt.log || {
            # There are no package lists yet, or they are old.
            "${sudo[@]}" apt-get -qq update && apt-get -qq download "${packages[@]}" 2>apt.log
        } || { cat apt.log >&2; exit 1; }
        for package in *.deb; do dpkg-deb -x "$package" tree; done
    ) || die "apt-get could not download: ${packages[*]}"
    chmod 755 "$work/tree"
    mkdir -p "${1%/*}"
    rm -rf "$1"
    mv "$work/tree" "$1"
    rm -rf "$work"
}

# --- the interpreter and its virtual environment -----------------------------------------------

# find_python NAME: the interpreter's own path, or nothing where NAME does not run.
find_python() { "$1" -c 'import sys; print(sys.executable)' 2>/dev/null || true; }

# python_tag PATH: python3.11, python3.11d for a debug build, python3.13t for a free-threaded one,
# python3.13t-tsan for one under ThreadSanitizer.
python_tag() {
    "$1" - <<'END'
import sys, sysconfig
tsan = "-tsan" if "thread-sanitizer" in (sysconfig.get_config_var("CONFIG_ARGS") or "") else ""
print("python%d.%d%s%s" % (*sys.version_info[:2], sys.abiflags, tsan))
END
}

# free_threaded: whether $python was built without a global lock.
free_threaded() {
    "$python" -c 'import sys, sysconfig; sys.exit(not sysconfig.get_config_var("Py_GIL_DISABLED"))'
}

# choose_python: set `python` (from PYTHON, else python3) and `venv`, installing what apt has.
choose_python() {
    local name=${PYTHON:-python3}
    python=$(find_python "$name")
    if [ -z "$python" ]; then
        [[ $name =~ ^python3(\.[0-9]+(-dbg)?)?$ ]] || die "PYTHON=$name: no such interpreter"
        apt_install "$name"
        python=$(find_python "$name")
        [ -n "$python" ] || die "PYTHON=$name does not run"
    fi
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 9))' ||
        die "$python is $("$python" -V); pymilter needs Python 3.9 or later (PYTHON=... names one)"
    if [ -n "${PYTHON:-}" ]; then venv=$root/.venvs/$(python_tag "$python"); else venv=$root/.venv; fi
}

# ensure_build_packages: a compiler, libmilter's and Python's headers, the venv module.
ensure_build_packages() {
    ensure_command cc gcc
    echo '#include <stdlib.h>' | cc -E -x c -o /dev/null - 2>/dev/null || missing+=(libc6-dev)
    has_libmilter || missing+=(libmilter-dev)
    local version
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=("python$version-venv")
    "$python" - <<'END' || missing+=("python$version-dev")
import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))
END
    install_missing
}

# fingerprint PATH...: one hash over the files below these paths and the build's environment.
fingerprint() {
    {
        env | grep -E '^(C|CPP|LD)FLAGS=|^(CC|CPATH|C_INCLUDE_PATH|PKG_CONFIG)=|^LIBMILTER_|^PYMILTER_' |
            sort || true
        # Not every path stands in every checkout.
        { find "$@" -type f ! -name '*.py[co]' ! -name '*.so' -print0 2>/dev/null || true; } |
            sort -z | xargs -0 sha256sum
    } | sha256sum | cut -d' ' -f1
}

# up_to_date STAMP HASH: whether the stamp says that this very thing was done.
up_to_date() { [ "$(cat "$1" 2>/dev/null)" = "$2" ]; }

# make_venv: a virtual environment of $python in $venv, afresh where it is another interpreter's.
make_venv() {
    local owner
    owner="$python $("$python" -c 'import sys; print(sys.version)' | tr '\n' ' ')"
    up_to_date "$venv/.python" "$owner" && return
    say "Creating ${venv#"$root"/} with $("$python" -V 2>&1) ($python)"
    rm -rf "$venv"
    "$python" -m venv "$venv"
    echo "$owner" >"$venv/.python"
}

# pip_install ARGUMENT...: quiet unless it fails.
pip_install() {
    "$venv/bin/python" -m pip --disable-pip-version-check --quiet install "$@" 2>"$venv/pip.log" || {
        cat "$venv/pip.log" >&2
        die "pip could not install: $*"
    }
}

# install_tools GROUP...: the pinned tools of scripts/requirements/GROUP.txt, or of
# GROUP-free-threaded.txt where there is one and $python is such.
install_tools() {
    local group file want
    for group in "$@"; do
        # What pip builds of the tools, the extra `policy`, needs Berkeley DB.
        if [ "$group" = test ] && ! [ -e /usr/include/db.h ]; then apt_install libdb-dev; fi
        file=scripts/requirements/$group-free-threaded.txt
        if [ ! -e "$file" ] || ! free_threaded; then file=scripts/requirements/$group.txt; fi
        # The one may include the other.
        want=$(fingerprint "scripts/requirements/$group.txt" "scripts/requirements/$group-free-threaded.txt")
        up_to_date "$venv/.tools-$group" "$want" && continue
        say "Installing the $group tools into ${venv#"$root"/}"
        pip_install -r "$file"
        echo "$want" >"$venv/.tools-$group"
    done
}

# install_project: a real install, not an editable one, so that tests see what users get.
install_project() {
    local want
    want=$(fingerprint setup.py pyproject.toml README.md ./*.c ./*.py src Milter milter-stubs mime-stubs)
    up_to_date "$venv/.project" "$want" && return
    say "Building pymilter into ${venv#"$root"/}"
    # Built outside the source tree: nothing stale is packaged, and interpreters keep apart.
    rm -rf "$venv/build"
    mkdir "$venv/build"
    printf '[build]\nbuild_base = %s\n[egg_info]\negg_base = %s\n' "$venv/build" "$venv/build" \
        >"$venv/build/distutils.cfg"
    rm -f "$venv/.project"
    DIST_EXTRA_CONFIG=$venv/build/distutils.cfg \
        pip_install --no-build-isolation --no-deps --force-reinstall "$root"
    echo "$want" >"$venv/.project"
}

# set_up build [GROUP...]: everything, in order; a step does nothing where it was done before.
set_up() {
    choose_python
    ensure_build_packages
    make_venv
    install_tools "$@"
    install_project
}
