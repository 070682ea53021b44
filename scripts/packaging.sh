# Shared by the scripts that make packages: `. "$(dirname "$0")/packaging.sh"` after lib.sh.
# shellcheck shell=bash

# --- sources -----------------------------------------------------------------------------------

project_version() { sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml | head -n1; }

# export_sources DIRECTORY: what is committed, into DIRECTORY, without git's own files.  Of sources
# without a git repository (an unpacked sdist) it is everything that a build has not left there.
export_sources() {
    mkdir -p "$1"
    if [ -e .git ]; then
        git diff --quiet HEAD -- || say 'There are changes that are not committed: left out'
        git archive HEAD | tar -x -C "$1"
    else
        tar -c --exclude=./build --exclude=./dist --exclude=./.venv --exclude=./.venvs . |
            tar -x -C "$1"
    fi
}

# source_epoch: the time of the last commit, else of the changelog, for what has dates in it.
source_epoch() {
    if [ -e .git ]; then git log -1 --format=%ct; else stat -c %Y CHANGELOG.md; fi
}

# unserved LOG: the files that apt or debootstrap asked a mirror for in vain, without its host.
unserved() {
    sed -nE "s#^[EW]: (Failed to fetch|Couldn't download package [^ ]+ \(ver [^ ]+ at|\
Failed getting release file|Invalid Release file.*at) +[a-z]+://[^/ ]+(/[^ )]*).*#\2#p" "$1" | sort -u
}

# logged LOG COMMAND...: quiet unless it fails; then the end of what it wrote, and what it was not
# given.
logged() {
    local log=$1
    shift
    # On the side, as a command that stands in a condition goes on after what fails in it.
    ("$@") </dev/null >"$log" 2>&1 &
    if ! wait "$!"; then
        tail -n 60 "$log" >&2
        local lacking
        lacking=$(unserved "$log")
        [ -z "$lacking" ] || lacking=$'\nthe mirror did not serve:\n'$lacking
        die "failed: $* (the whole of it: $log)$lacking"
    fi
}

# --- trees of Debian ---------------------------------------------------------------------------

# Fresh systems to build and test in, made by debootstrap from the mirror of this system.  Each is
# entered with mounts of its own, which are gone when the command ends.

trees=${root:?lib.sh goes first}/.venvs/trees

# mirror: where this system gets Debian's packages from.
mirror() {
    # apt's variables, not the shell's.
    # shellcheck disable=SC2016
    apt-get indextargets --format '$(ORIGIN) $(LABEL) $(REPO_URI)' 'Created-By: Packages' |
        sed -n 's/^Debian Debian //p' | head -n1
}

# base_tree SUITE: the archive $trees/SUITE.tar of a minimal system, made where it is not there.
base_tree() {
    local suite=$1 archive=$trees/$1.tar work uri script=()
    [ ! -f "$archive" ] || return 0
    [ "$(id -u)" -eq 0 ] || die "only root can make a tree of $suite"
    ensure_command debootstrap debootstrap
    ensure_command unshare util-linux
    ensure_command ip iproute2
    install_missing
    uri=$(mirror)
    if [ -z "$uri" ]; then
        apt-get -qq update
        uri=$(mirror)
    fi
    [ -n "$uri" ] || die 'apt has no mirror of Debian'
    say "Making a tree of $suite"
    mkdir -p "$trees"
    work=$trees/$suite.new
    rm -rf "$work"
    # A suite that is younger than this system's debootstrap is made as sid is.
    [ -e "/usr/share/debootstrap/scripts/$suite" ] || script=(/usr/share/debootstrap/scripts/sid)
    # With mounts of its own, too: an interrupted one leaves /proc mounted, which rm would go into.
    logged "$trees/$suite.log" unshare --mount --propagation private \
        debootstrap --variant=minbase --include=ca-certificates \
        "$suite" "$work" "$uri" "${script[@]}"
    adopt_host "$work"
    tar -C "$work" -cf "$archive.new" .
    mv "$archive.new" "$archive"
    rm -rf "$work"
}

# adopt_host TREE: how this system reaches its mirrors and package indexes: apt's settings for
# that, authorities, pip's configuration.
adopt_host() {
    local file
    apt-config dump | grep '^Acquire::' >"$1/etc/apt/apt.conf.d/90host" || true
    for file in /etc/apt/auth.conf.d /etc/ssl/certs/ca-certificates.crt /etc/pip.conf \
        /etc/resolv.conf /etc/hosts; do
        if [ -e "$file" ]; then cp -rL "$file" "$1${file%/*}/"; fi
    done
    # A tree does not outlive a script: dpkg need not wait for the disk.
    echo force-unsafe-io >"$1/etc/dpkg/dpkg.cfg.d/unsafe-io"
    # No daemon starts because it was installed.
    printf '#!/bin/sh\nexit 101\n' >"$1/usr/sbin/policy-rc.d"
    chmod 755 "$1/usr/sbin/policy-rc.d"
}

# fresh_tree SUITE DIRECTORY: a minimal system there, nothing installed in it before.
fresh_tree() {
    base_tree "$1"
    rm -rf "$2"
    mkdir -p "$2"
    tar -C "$2" -xf "$trees/$1.tar"
}

# in_tree [--offline] TREE DIRECTORY COMMAND...: run it there, DIRECTORY of this system being /mnt.
# --offline gives it a loopback interface of its own and no other network.
in_tree() {
    local network=()
    if [ "$1" = --offline ]; then
        network=(--net)
        shift
    fi
    local tree=$1 directory=$2
    shift 2
    # shellcheck disable=SC2016  # expanded within
    unshare --mount --pid --fork --kill-child "${network[@]}" --propagation private bash -ec '
        tree=$1 directory=$2 offline=$3
        shift 3
        [ -z "$offline" ] || ip link set lo up
        mount --bind "$tree" "$tree"
        mount -t proc proc "$tree/proc"
        mount --rbind /dev "$tree/dev"
        mount -t tmpfs -o mode=1777 tmp "$tree/tmp"
        mount --bind "$directory" "$tree/mnt"
        exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 \
            DEBIAN_FRONTEND=noninteractive ${PIP_CERT:+PIP_CERT="$PIP_CERT"} \
            chroot "$tree" "$@"
    ' in_tree "$tree" "$directory" "${network[*]}" "$@"
}

# tree_install TREE DIRECTORY PACKAGE...: install through the tree's apt; ./NAME.deb and the like
# are looked for in /mnt, which is DIRECTORY.
tree_install() {
    local tree=$1 directory=$2
    shift 2
    # shellcheck disable=SC2016  # expanded within
    in_tree "$tree" "$directory" bash -ec '
        cd /mnt
        apt-get -qq update
        apt-get -qq -y -o Dpkg::Use-Pty=0 --no-install-recommends install "$@"
    ' tree_install "$@"
}

# boot_tree TREE DIRECTORY SECONDS COMMAND...: boot the tree, in which systemd-sysv is installed, as
# a container with a loopback interface only, and run the command there as root; both end then.
boot_tree() {
    local tree=$1 directory=$2 seconds=$3 status=0
    shift 3
    ensure_command systemd-nspawn systemd-container
    install_missing
    printf 'export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8\n%s\n' \
        "$(printf '%q ' "$@")" >"$tree/root/booted.sh"
    cat >"$tree/etc/systemd/system/booted.service" <<END
[Unit]
SuccessAction=exit-force
FailureAction=exit-force

[Service]
Type=oneshot
ExecStart=/bin/bash /root/booted.sh
StandardOutput=truncate:/root/booted.log
StandardError=inherit
TimeoutStartSec=$seconds
END
    # A version of systemd that is newer than this system's may refuse the first version of control
    # groups, which this one may have.
    SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 timeout --kill-after=10 $((seconds + 60)) \
        systemd-nspawn --quiet --boot --register=no --keep-unit --private-network --settings=no \
        --link-journal=no --console=pipe --bind="$directory:/mnt" --directory="$tree" \
        -- --unit=booted.service </dev/null >"$tree.console" 2>&1 || status=$?
    cat "$tree/root/booted.log" || cat "$tree.console"
    rm -f "$tree.console"
    return "$status"
}
