#!/bin/bash
# A grid of two methods and two folds on a real SLURM of one node, with jobs killed in the middle.
#
#     tests/slurm/run.sh [PYTHON]
#
# PYTHON is of the environment that holds masksam-nnunet; default: python. Nothing is installed: Debian's packages
# slurm-wlm and munge must be there (apt-get install --no-install-recommends slurm-wlm munge). SLURM runs as the user
# who calls this, on this host, with all its files in a temporary folder, and is stopped at the end; KEEP=1 keeps the
# folder. SLOTS (default 1) is how many jobs run at a time. MASKSAM_TEST_DATA names a folder that holds
# Dataset004_Hippocampus; phantoms are used where there is none.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
python=${1:-python}
slots=${SLOTS:-1}

missing=()
for program in munged mungekey slurmctld slurmd sbatch srun squeue scontrol scancel; do
    PATH=$PATH:/usr/sbin command -v "$program" > /dev/null || missing+=("$program")
done
if [ ${#missing[@]} -gt 0 ]; then
    echo "missing: ${missing[*]}; install Debian's packages slurm-wlm and munge" >&2
    exit 77
fi
export PATH=$PATH:/usr/sbin

root=$(mktemp -d "${TMPDIR:-/tmp}/masksam_slurm.XXXXXX")
chmod 755 "$root"
mkdir -p "$root"/{munge,state,spool,log}
host=$(hostname -s)
user=$(id -un)
read -r control daemon < <("$python" -c '
import socket
sockets = [socket.socket() for _ in range(2)]
for s in sockets: s.bind(("127.0.0.1", 0))
print(*(s.getsockname()[1] for s in sockets))')

# Before anything else: without it, scancel below would speak to the cluster that this machine may belong to.
export SLURM_CONF=$root/slurm.conf
stop() {
    local code=$?
    trap - EXIT
    if [ -s "$SLURM_CONF" ]; then scancel --user="$user" 2> /dev/null || true; fi
    for _ in $(seq 30); do # until no job's processes are left: slurmd would leave them behind
        if [ -z "$(squeue --noheader 2> /dev/null)" ]; then break; fi
        sleep 1
    done
    for name in slurmd slurmctld munged; do
        pid=$(cat "$root/$name.pid" 2> /dev/null || true)
        if [ -z "$pid" ]; then continue; fi
        kill "$pid" 2> /dev/null || true
        for _ in $(seq 10); do
            if ! kill -0 "$pid" 2> /dev/null; then break; fi
            sleep 1
        done
        kill -9 "$pid" 2> /dev/null || true
    done
    if [ $code -ne 0 ]; then
        for log in slurmctld slurmd munged; do
            echo "--- the end of $log's log"
            tail -n 15 "$root/log/$log.log" 2> /dev/null || true
        done
    fi
    if [ "${KEEP:-0}" = 1 ] || [ $code -ne 0 ]; then echo "kept: $root"; else rm -rf "$root"; fi
    exit $code
}
trap stop EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

cat > "$root/slurm.conf" << END
ClusterName=masksam
SlurmctldHost=$host(127.0.0.1)
SlurmUser=$user
SlurmdUser=$user
SlurmctldPort=$control
SlurmdPort=$daemon
# Credentials expire soon, since SLURM starts a requeued job only when the last one's have.
AuthType=auth/munge
AuthInfo=socket=$root/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$root/state
SlurmdSpoolDir=$root/spool
SlurmctldPidFile=$root/slurmctld.pid
SlurmdPidFile=$root/slurmd.pid
SlurmctldLogFile=$root/log/slurmctld.log
SlurmdLogFile=$root/log/slurmd.log
# No systemd, no cgroups, no accounting database.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=1,sched_interval=5
JobRequeue=1
KillWait=10
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=$slots State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
END

mungekey --create --keyfile="$root/munge/key"
munged --force --key-file="$root/munge/key" --socket="$root/munge/socket" --pid-file="$root/munged.pid" \
    --log-file="$root/log/munged.log" --seed-file="$root/munge/seed"
slurmctld -c
slurmd
for _ in $(seq 30); do
    if [ "$(sinfo --noheader --format=%T 2> /dev/null)" = idle ]; then break; fi
    sleep 1
done
echo "SLURM $(sinfo --version | cut -d' ' -f2) is up:"
sinfo

PYTHONPATH=$here/..${PYTHONPATH:+:$PYTHONPATH} "$python" "$here/drive_grid.py" "$root/work"
