#!/usr/bin/env bash
# Shows oqc in front of a real Slurm of one node, all of it on the loopback address and in a
# temporary folder: jobs end with their codes, a cancelled one ends its step, and those that come
# while Slurm is away are tried again. As root, with Debian's slurm-wlm, munge and curl; takes about
# half a minute, and takes everything down at its end.
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
fail() { echo "slurm_demo: $*" >&2; exit 1; }
[ $# = 0 ] || fail "takes no arguments; its first lines say what it does"
step() { printf '\n== %s\n' "$*"; }

for tool in munged slurmctld slurmd srun squeue curl; do
    command -v "$tool" >/dev/null || fail "$tool is missing: apt-get install slurm-wlm munge curl"
done
[ "$(id -u)" = 0 ] || fail "slurmd starts jobs for others, and so it needs root"

folder=$(mktemp -d)
chmod 0755 "$folder"
pids=()
take_down() {
    status=$?
    trap - EXIT
    for ((i = ${#pids[@]} - 1; i >= 0; i--)); do
        kill "${pids[i]}" 2>/dev/null || true
        wait "${pids[i]}" 2>/dev/null || true
    done
    ((status == 0)) || tail -n 5 "$folder"/*.log >&2 || true
    rm -rf "$folder"
    exit "$status"
}
trap take_down EXIT
trap 'exit 130' INT TERM

# Runs a program in the background, its output in a log; its id is the last of pids.
start() {
    "$@" >>"$folder/${1##*/}.log" 2>&1 &
    pids+=($!)
}
# Waits until a command succeeds, for as many seconds as the first argument says.
until_ok() {
    local deadline=$((SECONDS + $1))
    until "${@:2}" >/dev/null 2>&1; do
        ((SECONDS < deadline)) || fail "not within $1 s: ${*:2}"
        sleep 0.1
    done
}
free_port() {
    "$python" -c 'import socket
with socket.create_server(("127.0.0.1", 0)) as probe:
    print(probe.getsockname()[1])'
}

step "A Slurm of one node, with a licence for one QPU"
head -c 1024 /dev/urandom >"$folder/munge.key"
chmod 0400 "$folder/munge.key"
start munged --foreground --force --key-file "$folder/munge.key" --socket "$folder/munge.socket" \
    --pid-file "$folder/munge.pid" --seed-file "$folder/munge.seed" --log-file "$folder/munge.log"
name=$(hostname -s)
mkdir "$folder/state" "$folder/spool"
cat >"$folder/slurm.conf" <<CONF
ClusterName=demo
SlurmctldHost=$name(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1
SlurmctldParameters=enable_configless
MessageTimeout=5
SlurmctldTimeout=5
KillWait=2
MinJobAge=10
ReturnToService=2
MpiDefault=none
Licenses=qpu:1
NodeName=$name NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=lab Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:8
CONF
export SLURM_CONF=$folder/slurm.conf
until_ok 10 test -S "$folder/munge.socket"
start slurmctld -D
controller=$((${#pids[@]} - 1))
start slurmd -D
idle() { sinfo -h -o %t | grep -qxE 'idle|mix|alloc'; }
until_ok 20 idle
sinfo

step "oqc with a runtime of three slots behind srun"
cat >"$folder/drive-qpu" <<'DRIVE'
#!/bin/sh
# Drives the QPU: as many seconds as the job has degrees around Z, and the degrees around Y as its
# return code.
read -r job
seconds=$(printf '%s' "$job" | sed -n 's/.*Z(\([0-9]*\)).*/\1/p')
code=$(printf '%s' "$job" | sed -n 's/.*Y(\([0-9]*\)).*/\1/p')
sleep "${seconds:-0}"
echo "[\"$job\", \"attempt $OQC_ATTEMPT\", \"step $SLURM_JOB_ID.$SLURM_STEP_ID\"]"
exit "${code:-0}"
DRIVE
chmod +x "$folder/drive-qpu"
cat >"$folder/oqc.ini" <<INI
[runtime qpu]
command = env SLURM_EXIT_ERROR=75 SLURM_EXIT_IMMEDIATE=75
    srun --quiet -n1 --licenses=qpu:1 $folder/drive-qpu
slots = 3
timeout = 60
retry_codes = 75
INI
cat "$folder/oqc.ini"
cd "$folder"
PYTHONPATH=$root "$python" -m oqc --port 0 --config oqc.ini --db oqc.db 2>oqc.log &
pids+=($!)
until_ok 10 grep -q 'listening on' oqc.log
url=$(grep -o 'http://[^ ]*' oqc.log | head -n 1)
key="X-API-Key: $("$python" -c 'import sys
sys.path.insert(0, sys.argv[1])
from oqc.config import DOCUMENTED_KEY
print(DOCUMENTED_KEY.decode())' "$root")"
ask() { curl -sS --max-time 70 -H "$key" "$@"; }
add() { ask "${url}jobs/add/" -d "{\"job\": \"$1\", \"mode\": \"verbatim\"}" | member id; }
member() { "$python" -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1"; }
job() { ask "${url}jobs/$1/" | member "$2"; }
ended() { ask "${url}jobs/$1/?wait=60" | member "$2"; }
is() { [ "$1" = "$2" ] || fail "expected $2, found $1"; echo "   $2, as it must be"; }

step "Jobs end with the codes of their program: 0, 3 and 0"
one=$(add 'X(90)') two=$(add 'Y(3)') three=$(add 'X(1), X(2)')
is "$(ended "$one" return_code) $(ended "$two" return_code) $(ended "$three" return_code)" "0 3 0"
ask "${url}jobs/$three/result/"

step "A job that is cancelled takes its step with it"
long=$(add 'Z(600)')
runs() { [ "$(squeue -h -t running -o %i | wc -l)" = "$1" ]; }
until_ok 20 runs 1
squeue
is "$(ask -X DELETE "${url}jobs/$long/" | member return_code)" 130
# Completing ones, too: what a controller stops with in that state, its successor may end only a
# minute later.
nothing_left() { [ -z "$(squeue -h)" ]; }
until_ok 20 nothing_left
echo "   no step is left"

step "Without a controller jobs are tried again, and end when it is back"
kill "${pids[controller]}"
wait "${pids[controller]}" || true
again=$(add 'X(7)')
retrying() { [ "$(job "$again" status)" = Retrying ]; }
until_ok 60 retrying
echo "   job $again is Retrying"
slurmctld -D >>"$folder/slurmctld.log" 2>&1 &
pids[controller]=$!
is "$(ended "$again" status)" Success
ask "${url}jobs/$again/result/"

step "All of it held; taking everything down"
