#!/usr/bin/env bash
# A real Slurm cluster of two nodes on this machine, to learn on: Debian's slurmctld, slurmd and munged, and nothing of them left afterwards.
#
#   slurm/local_cluster.sh up            start it; the last line printed is the one to put into your shell
#   slurm/local_cluster.sh status        nodes and jobs
#   slurm/local_cluster.sh kill node2    cut a node's power: its slurmd and all its processes end at once
#   slurm/local_cluster.sh start node2   switch it on again, once the controller has noticed that it was gone (about 10 s)
#   slurm/local_cluster.sh down          end everything, and remove the folder with its state
#
# As root, where the kernel has namespaces, each node has its own network, address, host name, process numbers and /dev/shm. Otherwise
# both nodes share those of this machine, and the cluster runs your own jobs only. Accounting is off.
#
# SHARDLAB_CLUSTER  the folder for its state (default: /tmp/shardlab-cluster-<your user number>). A short path without spaces: Slurm's
#                   sockets lie in it.
set -euo pipefail

state=${SHARDLAB_CLUSTER:-/tmp/shardlab-cluster-$(id -u)}
logs=$state
nodes=(node1 node2)
bridge=sl$(printf %s "$state" | cksum | cut -d" " -f1)  # a network interface has at most 15 letters
PATH=$PATH:/usr/sbin:/sbin

say() { printf '%s\n' "$*"; }
fail() { printf 'local_cluster.sh: %s\n' "$*" >&2; exit 1; }

# The file holds a process number; it is ours if the process was started from this state folder.
alive() {
    local pid
    pid=$(cat "$1" 2>/dev/null) && [ -n "$pid" ] && [ -d "/proc/$pid" ] && tr '\0' ' ' <"/proc/$pid/cmdline" | grep -qF "$state"
}

end() {  # end PIDFILE [SIGNAL]
    if alive "$1"; then
        local pid
        pid=$(cat "$1")
        kill "-${2:-TERM}" "$pid" 2>/dev/null || true
        for _ in $(seq 50); do [ -d "/proc/$pid" ] || break; sleep 0.1; done
        [ ! -d "/proc/$pid" ] || kill -KILL "$pid" 2>/dev/null || true
    fi
    rm -f "$1"
}

wait_for() {  # wait_for SECONDS WHAT COMMAND…
    local limit=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $limit ] || fail "$what did not come up within the time allowed; the logs are in $logs"
        sleep 0.2
    done
}

has_namespaces() { [ "$(id -u)" = 0 ] && command -v ip >/dev/null && unshare --net --uts --ipc --mount --pid --fork true 2>/dev/null; }

missing_packages() {
    local command missing=()
    for command in slurmctld slurmd sbatch; do command -v $command >/dev/null || missing+=(slurm-wlm); done
    command -v munged >/dev/null || missing+=(munge)
    printf '%s\n' "${missing[@]}" | sort -u | tr '\n' ' '
}

free_ports() {  # free_ports COUNT: ports that nobody listens on, below those that the kernel hands out
    local port found=()
    for port in $(shuf -i 6900-9900); do
        if ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then found+=("$port"); fi
        [ ${#found[@]} -lt "$1" ] || break
    done
    printf '%s\n' "${found[@]}"
}

free_subnet() {
    local third
    for third in $(seq 10 250); do
        [ -n "$(ip -4 route show "10.77.$third.0/24")" ] || { say "10.77.$third"; return; }
    done
    fail "no free network among 10.77.10.0/24 to 10.77.250.0/24"
}

has_address() {  # one besides 127.0.0.1; without it the C library finds no host at all for Slurm's programs
    awk '/32 host LOCAL/ {print last} {last = $2}' /proc/net/fib_trie | grep -qv '^127\.'
}

write_configuration() {
    local memory cpus user host
    memory=$(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
    cpus=$(nproc); [ "$cpus" -ge 4 ] || cpus=4
    user=$(id -un); host=$(hostname -s)
    {
        say "ClusterName=shardlab"
        say "SlurmctldHost=$host($controller)"
        say "SlurmctldPort=${ports[0]}"
        # The cluster's own munged; cred_expire is also how long a requeued job waits before it may start again (120 s by default).
        say "AuthType=auth/munge"
        say "AuthInfo=socket=$state/munge.socket,cred_expire=5"
        say "SlurmUser=$user"
        say "SlurmdUser=$user"
        say "StateSaveLocation=$state/controller"
        say "SlurmdSpoolDir=$state/%n"
        say "SlurmctldPidFile=$state/slurmctld.pid"
        say "SlurmdPidFile=$state/%n/slurmd.pid"
        say "SlurmctldLogFile=$state/slurmctld.log"
        say "SlurmdLogFile=$state/%n.log"
        say "ProctrackType=proctrack/linuxproc"
        say "TaskPlugin=task/none"
        say "MpiDefault=none"
        say "SelectType=select/cons_tres"
        say "SelectTypeParameters=CR_CPU"
        say "JobRequeue=1"
        # A dead node is noticed after 10 s, and may serve again as soon as it answers.
        say "SlurmdTimeout=10"
        say "ReturnToService=2"
        say "MessageTimeout=10"
        # As on a cluster that has been in use for a while: more jobs than a port number has room for.
        say "FirstJobId=70001"
        say "KillWait=5"
        # Jobs that have ended stay visible for an hour.
        say "MinJobAge=3600"
        say "SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2"
        say "AccountingStorageType=accounting_storage/none"
        say "JobAcctGatherType=jobacct_gather/none"
        # The nodes offer more cores than the machine has, so that two jobs can run side by side.
        say "SlurmdParameters=config_overrides"
        local number=0 node
        for node in "${nodes[@]}"; do
            number=$((number + 1))
            say "NodeName=$node NodeHostname=${hostname_of[$node]} NodeAddr=${address_of[$node]} Port=${ports[$number]} CPUs=$cpus RealMemory=$memory State=UNKNOWN"
        done
        say "PartitionName=learn Nodes=ALL Default=YES MaxTime=04:00:00 DefaultTime=00:30:00 State=UP"
    } >"$state/slurm.conf"
}

start_controller() {
    slurmctld -f "$state/slurm.conf" >"$state/slurmctld.out" 2>&1 9<&- || fail "slurmctld: $(tail -1 "$state/slurmctld.out")"
}

# What a node did not take while it was away, the controller sends again after a minute: the end of a job's step, say. By then the same
# job may be at work there again, with the same step number. A controller that starts anew knows its jobs and nodes, and no such message.
# (At a site, a requeued job starts after two minutes.)
forget_messages() {
    end "$state/slurmctld.pid"
    start_controller
    wait_for 10 "the controller" scontrol ping
}

# Each node's processes live below one `unshare`; when its first process ends, the kernel ends all others, as when the power is cut.
start_node() {
    local node=$1
    mkdir -p "$state/$node"
    if [ -f "$state/namespaces" ]; then
        ! alive "$state/$node.pid" || fail "$node is running"
        ip link del "$bridge${node#node}" 2>/dev/null || true
        # shellcheck disable=SC2016  # what is in quotes is the node's own program
        setsid unshare --net --uts --ipc --mount --pid --fork --kill-child --mount-proc \
            bash -c '
                set -e
                node=$1 state=$2
                hostname "$node"
                mount --bind "$state/hosts" /etc/hosts
                mount -t tmpfs -o size=50% tmpfs /dev/shm
                ip link set lo up
                until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
                ip addr add "$3/24" dev eth0
                ip link set eth0 up
                exec slurmd -D -N "$node" -f "$state/slurm.conf"
            ' "shardlab $node" "$node" "$state" "${address_of[$node]}" </dev/null >"$state/$node.out" 2>&1 9<&- &
        say $! >"$state/$node.pid"
        disown
        wait_for 10 "$node's network" first_process "$node"
        # Always the same hardware address: the other node remembers it, and would look for a node that came back at the old one.
        ip link add "$bridge${node#node}" type veth peer name eth0 address "02:00:00:00:00:1${node#node}" netns "$(first_process "$node")"
        ip link set "$bridge${node#node}" master "$bridge" up
    else
        ! alive "$state/$node/slurmd.pid" || fail "$node is running"
        setsid slurmd -N "$node" -f "$state/slurm.conf" </dev/null >"$state/$node.out" 2>&1 9<&- || fail "$node: $(tail -1 "$state/$node.out")"
    fi
}

# The node's process 1, as this machine numbers it: the child of its `unshare`.
first_process() {
    local child
    child=$(cat "/proc/$(cat "$state/$1.pid")/task/$(cat "$state/$1.pid")/children") && [ -n "${child// /}" ] && say "${child// /}"
}

kill_node() {
    local node=$1
    if [ -f "$state/namespaces" ]; then
        end "$state/$node.pid" KILL
        ip link del "$bridge${node#node}" 2>/dev/null || true
    else
        # Without namespaces, the node's processes are its slurmd, the slurmstepds that it has started, and all below those.
        local pid
        for pid in $(pgrep -f "^slurmstepd: \[[0-9]+\..*\]" || true); do
            if tr '\0' '\n' <"/proc/$pid/environ" 2>/dev/null | grep -qxF "SLURM_CONF=$state/slurm.conf" && step_of_node "$pid" "$node"; then
                kill_tree "$pid"
            fi
        done
        end "$state/$node/slurmd.pid" KILL
    fi
}

step_of_node() { [ -n "$(find "/proc/$1/fd" \( -lname "$state/$2.log" -o -lname "$state/$2/*" \) -print -quit 2>/dev/null)" ]; }

kill_tree() {
    local child
    for child in $(pgrep -P "$1" || true); do kill_tree "$child"; done
    kill -KILL "$1" 2>/dev/null || true
}

read_state() {
    declare -gA address_of hostname_of
    local node
    for node in "${nodes[@]}"; do
        address_of[$node]=$(sed -n "s/^NodeName=$node .*NodeAddr=\([^ ]*\) .*/\1/p" "$state/slurm.conf")
    done
}

is_missed() { sinfo --noheader --nodes="$1" --format=%T | grep -q '^down'; }

all_idle() { [ "$(sinfo --noheader --Node --format=%T | grep -c '^idle$')" = ${#nodes[@]} ]; }

up() {
    local packages
    packages=$(missing_packages)
    [ -z "${packages// /}" ] || fail "missing: ${packages}→ sudo apt-get install ${packages}"
    case $state in *[[:space:]]*) fail "the folder '$state' has a space in its name, which Slurm's configuration cannot hold; set SHARDLAB_CLUSTER" ;; esac
    [ ${#state} -le 60 ] || fail "the folder '$state' is too long a path for sockets; set SHARDLAB_CLUSTER to one of at most 60 letters"
    if [ -f "$state/slurm.conf" ]; then
        if alive "$state/slurmctld.pid"; then say "The cluster is up already."; tell; return; fi
        down
    fi
    has_namespaces || has_address || fail "this machine has no network address but 127.0.0.1, and Slurm does not start on such a machine. Connect it to a network, or → sudo ip addr add 10.77.0.1/32 dev lo"
    [ ! -e "$state" ] || [ -z "$(ls -A "$state")" ] || fail "$state is there already and holds no cluster; remove it, or set SHARDLAB_CLUSTER"
    mkdir -p "$state/controller"
    chmod 755 "$state"
    logs=$state.failed
    trap 'say "interrupted; removing what was started" >&2; exit 130' INT TERM
    trap 'end_what_failed' EXIT
    take_turns
    declare -gA address_of hostname_of
    mapfile -t ports < <(free_ports $((1 + ${#nodes[@]})))
    local number=0 node
    if has_namespaces; then
        touch "$state/namespaces"
        local subnet
        subnet=$(free_subnet)
        controller=$subnet.1
        for node in "${nodes[@]}"; do number=$((number + 1)); address_of[$node]=$subnet.1$number; hostname_of[$node]=$node; done
        ip link add "$bridge" type bridge
        ip addr add "$controller/24" dev "$bridge"
        ip link set "$bridge" up
        {
            say "127.0.0.1 localhost"
            say "$controller $(hostname -s)"
            for node in "${nodes[@]}"; do say "${address_of[$node]} $node"; done
        } >"$state/hosts"
    else
        say "Not root, or no namespaces: both nodes share this machine's network and host name."
        controller=127.0.0.1
        for node in "${nodes[@]}"; do address_of[$node]=127.0.0.1; hostname_of[$node]=$(hostname -s); done
    fi
    write_configuration
    # Nothing here uses control groups; but slurmd looks for them, and does not start where there are none, unless it is told which.
    say "CgroupPlugin=cgroup/v1" >"$state/cgroup.conf"
    export SLURM_CONF=$state/slurm.conf

    (umask 077 && head -c 1024 /dev/urandom >"$state/munge.key")
    munged --force --key-file="$state/munge.key" --socket="$state/munge.socket" --pid-file="$state/munged.pid" \
        --log-file="$state/munged.log" --seed-file="$state/munge.seed" >>"$state/munged.log" 2>&1 9<&- || fail "munged: $(tail -1 "$state/munged.log")"
    start_controller
    for node in "${nodes[@]}"; do start_node "$node"; done
    wait_for 30 "the cluster" all_idle
    exec 9<&-
    trap - INT TERM EXIT
    rm -rf "$logs"
    tell
}

# Two clusters that start at once would find the same network and the same ports free: one after the other, whoever starts them.
# What they start must not keep the lock, hence the `9<&-` there.
take_turns() {
    exec 9</tmp
    flock --wait 60 9 || fail "another cluster has been starting on this machine for a minute; wait for it, and try again"
}

end_what_failed() {
    rm -rf "$logs"
    mkdir -p "$logs"
    cp "$state"/*.log "$state"/*.out "$logs" 2>/dev/null || true
    down >/dev/null
}

tell() {
    say "Slurm $(sinfo --version | cut -d' ' -f2) is up: ${nodes[*]}, partition learn."
    say "This course's commands and notebooks find it by themselves. For sbatch, squeue and scontrol in your shell:"
    say "export SLURM_CONF=$state/slurm.conf"
}

status() {
    [ -f "$state/slurm.conf" ] || { say "no cluster; to start one: $0 up"; exit 1; }
    alive "$state/slurmctld.pid" || { say "the controller is not running; to remove what is left: $0 down"; exit 1; }
    sinfo --Node --format='%8N %10T %5c %15o %E'
    squeue --format='%8i %20j %10u %10T %6D %10M %R'
}

down() {
    [ -f "$state/slurm.conf" ] || [ -d "$state/controller" ] || { say "no cluster in $state"; return; }
    local node
    if alive "$state/slurmctld.pid" && [ -S "$state/munge.socket" ]; then timeout 10 scancel --user="$(id -un)" --full 2>/dev/null || true; fi
    for node in "${nodes[@]}"; do kill_node "$node"; done
    end "$state/slurmctld.pid"
    end "$state/munged.pid"
    ! [ -f "$state/namespaces" ] || ip link del "$bridge" 2>/dev/null || true
    rm -rf "$state"
    say "The cluster is down, and its folder is gone."
}

known() { case " ${nodes[*]} " in *" $1 "*) ;; *) fail "there is no node '$1'; there are ${nodes[*]}" ;; esac; }

export SLURM_CONF=$state/slurm.conf
case "${1:-}" in
up | status | down) "$1" ;;
kill | start)
    [ -f "$state/slurm.conf" ] || fail "no cluster; to start one: $0 up"
    known "${2:-}"
    read_state
    # A node that comes back before it was missed would leave its jobs waiting for tasks that are gone.
    if [ "$1" = start ]; then
        wait_for 40 "the controller's notice that $2 is gone" is_missed "$2"
        forget_messages
    fi
    "$1_node" "$2"
    # Until the controller notices by itself, it would give the node to the next job, or to the same one requeued, which loses it again.
    # (A site's controller asks each node every 100 s, and a requeued job waits for 120 s.)
    [ "$1" = start ] || scontrol update NodeName="$2" State=NoResp
    ;;
-h | --help) sed -n '2,/^set -e/ s/^# \{0,1\}//p' "$0" | sed '$d' ;;
*) fail "say up, status, kill NODE, start NODE or down; $0 --help tells more" ;;
esac
