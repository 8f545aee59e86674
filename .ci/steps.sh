# shellcheck shell=bash
# What .ci/run and .ci/run-versions have in common. Sourced by both, at their beginning: a fresh clone of the last commit, in
# which the caller then stands, and the functions that run the steps. Needs git, and Python >= 3.11 with venv and pip.
# Redis, RabbitMQ and npm are installed where they are missing and apt-get may be used; what stands in for MongoDB and
# CouchDB, and newer versions of Redis and RabbitMQ, go into the directory in TESTS_SERVERS, else into the clone. The tests
# start all of them themselves.

repository=$(cd "$(dirname "$0")/.." && pwd)
workshop=$(mktemp -d)
trap 'rm -rf "$workshop"' EXIT
git clone --quiet "$repository" "$workshop/ekiden"
cd "$workshop/ekiden"
unset VIRTUAL_ENV
export CI=true # a skipped test fails: see tests/conftest.py

# install_servers PROGRAM PACKAGE ...: installs the packages whose programs are missing, patiently.
install_servers() {
    local packages=() as_root=() attempt
    while (($#)); do
        PATH="$PATH:/usr/sbin:/usr/local/sbin" command -v "$1" >/dev/null || packages+=("$2")
        shift 2
    done
    ((${#packages[@]} == 0)) && return
    [ "$(id -u)" = 0 ] || as_root=(sudo --non-interactive)
    for attempt in 1 2 3; do
        "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=120 update &&
            "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=120 install \
                --yes --no-install-recommends "${packages[@]}" && return
        echo "could not install ${packages[*]} (attempt $attempt of 3)" >&2
        sleep $((attempt * 10))
    done
    echo "the tests that need ${packages[*]} will fail" >&2
}

# The one line in the code block below <!-- command: NAME --> in the README.
readme_command() {
    awk -v marker="<!-- command: $1 -->" '
        $0 == marker         { marked = 1; next }
        marked && /^```/     { if (inside) exit; inside = 1; next }
        inside               { print; lines++ }
        END                  { exit lines != 1 }
    ' README.md || { echo "README.md: one line is expected in the code block below <!-- command: $1 -->" >&2; exit 1; }
}

failed=() unstable=() status=0
# step NAME SECONDS COMMAND: runs the command, keeps its output in NAME.log too, and notes whether it failed. What takes
# too long is interrupted as by Ctrl-C, at which pytest tells what it has found so far.
step() {
    printf '\n==> %s: %s\n' "$1" "$3"
    if timeout --signal=INT --kill-after=60 "$2" bash -c "$3" </dev/null 2>&1 | tee "$workshop/$1.log"; then
        status=0
    else
        status=$?
        failed+=("$1")
    fi
}

# run_tests NAME SECONDS PYTEST: a step that runs tests. Where a few failed beside thousands, in three processes on two
# cores, these are run once more by themselves: a defect fails again. What passes then is a bet on how busy the machine
# is: it is named in the last lines, to be mended.
run_tests() {
    local again
    step "$1" "$2" "$3"
    mapfile -t again < <(sed -nE 's/ - .*//; s/^(FAILED|ERROR) (tests\/.*)/\2/p' "$workshop/$1.log")
    # 1 is pytest's word for: all were run, and some failed.
    if ((status == 1 && ${#again[@]} > 0 && ${#again[@]} <= 10)); then
        unset 'failed[-1]'
        step "$1-again" 600 "${3##*&& } -n 0 --last-failed --last-failed-no-failures none"
        ((status)) || unstable+=("${again[@]}")
    fi
}

# run_version SUITE NAME SECONDS TESTS: the tests that pytest's arguments TESTS name, against the servers of another suite
# of Debian.
run_version() {
    local programs
    programs=$(timeout 1200 python3 tests/servers/versions.py "$1" </dev/null | tail -n 1) || true
    run_tests "$2" "$3" "TESTS_PROGRAMS='${programs:-/nowhere}' .venv/bin/python -m pytest $4"
}

# install_all_servers: all that the tests start.
install_all_servers() {
    printf '\n==> servers\n'
    install_servers redis-server redis-server rabbitmq-server rabbitmq-server openssl openssl npm npm mmdebstrap mmdebstrap
    timeout 1200 python3 tests/servers/install.py </dev/null || echo "the tests that need it will fail" >&2
}

# tell LOG ...: what failed, what is unstable, and pytest's summaries; the exit status says whether all is well.
tell() {
    local log
    echo
    grep --no-filename -E '^(FAILED|ERROR) ' "$workshop"/*.log 2>/dev/null || true
    ((${#unstable[@]} == 0)) || printf 'unstable, to be mended: %s\n' "${unstable[@]}"
    ((${#failed[@]} == 0)) || echo "failed: ${failed[*]}"
    for log; do tail -n 1 "$workshop/$log.log"; done
    ((${#failed[@]} == 0))
}
