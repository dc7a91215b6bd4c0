# Slurm (Debian: slurm-wlm, munge): a controller and a node on this machine, and srun with two tasks.
for tool in slurmctld slurmd srun munged; do
    command -v $tool >/dev/null || PATH=$PATH:/usr/sbin
    command -v $tool >/dev/null || { echo "$tool is not installed"; exit 77; }
done
((EUID == 0)) || { echo "slurmd must be started by root"; exit 77; }
dir=$WORK/slurmd
mkdir -p "$dir"/{state,spool,run}
host=$(hostname -s)
end() {
    kill "${pids[@]}" 2>/dev/null
    wait 2>/dev/null
}
pids=()
trap end EXIT

# A key and a socket of this test's own, so that a munge that runs already is left alone.
dd if=/dev/urandom of="$dir/munge.key" bs=1024 count=1 2>/dev/null
chmod 400 "$dir/munge.key"
chmod 755 "$WORK" "$dir" "$dir/run"
munged --foreground --force --key-file="$dir/munge.key" --socket="$dir/run/munge.socket" --num-threads=2 \
    --pid-file="$dir/run/munged.pid" --log-file="$dir/munged.log" --seed-file="$dir/munged.seed" &
pids+=($!)
port=$((20000 + RANDOM % 10000))
cat >"$dir/slurm.conf" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/run/munge.socket
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
ReturnToService=2
MpiDefault=none
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
CONF
export SLURM_CONF=$dir/slurm.conf
for _ in {1..50}; do [[ -S $dir/run/munge.socket ]] && break; sleep 0.1; done
slurmctld -D >"$dir/slurmctld.out" 2>&1 &
pids+=($!)
slurmd -D -N "$host" >"$dir/slurmd.out" 2>&1 &
pids+=($!)
for _ in {1..100}; do
    sinfo -h -o %T 2>/dev/null | grep -qE 'idle|mixed|alloc' && break
    sleep 0.3
done
sinfo || { tail -5 "$dir"/*.log "$dir"/*.out; echo "the Slurm node does not come up here"; exit 1; }
timeout 200 srun --ntasks=2 --overcommit --export=ALL,FERROTUNE_MASTER_PORT=$((port + 2)) "$FERROTUNE" "$@"
code=$?
((code)) && tail -20 "$dir"/slurm*.log
exit $code
