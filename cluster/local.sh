#!/usr/bin/env bash
# A small Ray cluster on this machine: a head and N workers, each a raylet of its own, on loopback, with a token.
#   cluster/local.sh up [N]     start it (2 workers without N) and say how to use it
#   cluster/local.sh down       end it and forget its token
# FEDPROMPT_CLUSTER_DIR (a short path: it holds sockets), RAY_PORT and DASHBOARD_PORT place it elsewhere.
set -euo pipefail

dir=${FEDPROMPT_CLUSTER_DIR:-/tmp/fedprompt-cluster-$(id -u)}
port=${RAY_PORT:-6379}
dashboard=${DASHBOARD_PORT:-8265}
agents=$dashboard  # ports of the raylets' agents: the next ones

# Ray's command line, which here takes 127.0.0.1 at its word: of itself it listens on all of this host's addresses, or
# allows no second raylet.
on_loopback='
from ray._private import ray_constants, services
services.resolve_ip_for_localhost = lambda host: host
ray_constants.ENABLE_RAY_CLUSTER = True
from ray.scripts.scripts import main
main()'

fail() {
    echo "local.sh: $1" >&2
    exit "${2:-1}"
}

# start NAME ARGUMENT...: a raylet with its log in $dir/NAME.log, its process id in $dir/NAME.pid.
start() {
    local name=$1 agent=$((++agents))
    shift
    # A folder of its own: a raylet replaces a job's working folder when it finds one that it has not made.
    setsid python -c "$on_loopback" start --block --node-ip-address=127.0.0.1 --num-cpus="$cpus" \
        --object-store-memory=500000000 \
        --temp-dir="$dir/$name" \
        --disable-usage-stats --dashboard-agent-listen-port="$agent" "$@" >"$dir/$name.log" 2>&1 </dev/null &
    echo $! >"$dir/$name.pid"
    disown
}

# wait_for NAME: until it runs; fails where it has ended instead.
wait_for() {
    until grep -qs 'Ray runtime started' "$dir/$1.log"; do
        kill -0 "$(cat "$dir/$1.pid")" 2>/dev/null || return 1
        sleep 0.2
    done
}

# bring_up NAME ARGUMENT...: start it, up to three times: on a busy machine Ray's half a minute may be too short.
bring_up() {
    local attempt
    for attempt in 1 2 3; do
        start "$@"
        wait_for "$1" && return
        kill -KILL -- "-$(cat "$dir/$1.pid")" 2>/dev/null || true  # what it has left
    done
    tail -n 5 "$dir/$1.log" >&2
    down
    fail "$1 did not start"
}

up() {
    local workers=$1 i
    [[ $workers =~ ^[0-9]+$ ]] || fail "up: '$workers' workers; allowed: a whole number" 2
    command -v ray >/dev/null || fail "no ray on PATH; make setup && . .venv/bin/activate" 2
    mkdir -m 700 "$dir" 2>/dev/null || fail "$dir is there already; cluster/local.sh down ends that cluster" 2
    (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$dir/token")
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$dir/token"
    export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 RAY_enable_metrics_collection=0  # loopback; no numbers to whoever asks
    cpus=$(($(nproc) / (workers + 1)))
    cpus=$((cpus > 0 ? cpus : 1))
    bring_up head --head --port="$port" --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" \
        --ray-client-server-port=$((port - 1))
    for ((i = 1; i <= workers; i++)); do
        bring_up "worker$i" --address="127.0.0.1:$port" --num-gpus=0  # one after the other, for Ray's half a minute
    done
    cat <<EOF
A head and $workers workers with $cpus CPUs each are up. In a shell that is to use them:
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$dir/token RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 RAY_API_SERVER_ADDRESS=http://127.0.0.1:$dashboard
  ray job submit --working-dir . -- fedprompt run --output "\$PWD/runs/first"
  fedprompt run runtime.address=127.0.0.1:$port
To end them: cluster/local.sh down
EOF
}

down() {
    [[ -d $dir ]] || fail "no cluster in $dir" 2
    local file pid
    for file in "$dir"/worker*.pid "$dir"/head.pid; do
        [[ -e $file ]] || continue
        pid=$(cat "$file")
        # The session that setsid made: what this raylet started, and nothing else.
        kill -TERM -- "-$pid" 2>/dev/null || continue
        for _ in {1..50}; do kill -0 -- "-$pid" 2>/dev/null && sleep 0.1 || break; done
        kill -KILL -- "-$pid" 2>/dev/null || true
    done
    rm -rf "$dir"
}

case ${1:-} in
    up) up "${2:-2}" ;;
    down) down ;;
    *) fail "usage: cluster/local.sh up [N] | down" 2 ;;
esac
