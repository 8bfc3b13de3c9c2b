{% extends "_job.sh" %}
{% block body %}
# The run folder has the job's number in its name, so that a job that is started again finds its checkpoints, and no other job's.
run=$runs/multi-node-$SLURM_JOB_ID

# Two minutes before the time is up, Slurm sends this shell SIGUSR1 (--signal above). The ranks look for the file after each step.
rm -f "$run/stop"
# It may not be there yet, and is the ranks' to make: then the file comes when the folder does.
trap '{ until touch "$run/stop" 2>/dev/null || ! kill -0 $$; do sleep 1; done; } &' USR1

# This script runs on the first node of the allocation, so its own address is where all ranks meet. There is no fallback: with another
# address, such as localhost, each node would wait for ever, or train alone and say nothing.
{% if site.interface == "auto" %}
address=$(getent ahostsv4 "$(hostname)" | awk 'NR == 1 {print $1}')
{% else %}
address=$(ip -4 -oneline address show dev {{ site.interface|quoted }} | awk 'NR == 1 {sub("/.*", "", $4); print $4}')
# gloo and NCCL choose an interface for themselves otherwise, and not always the one that all nodes share.
export GLOO_SOCKET_IFNAME={{ site.interface|quoted }} NCCL_SOCKET_IFNAME={{ site.interface|quoted }}
{% endif %}
if [ -z "$address" ]; then
    echo "$(hostname) has no address on the interface {{ site.interface }}; change it in the site profile" >&2
    exit 1
fi
# Two jobs on the same node need ports of their own.
port=$((12000 + SLURM_JOB_ID % 10000))

# Do all ranks reach each other, and are the nodes alike? If not, this names the node, in a minute instead of after a night.
srun --ntasks-per-node={{ ranks }} --ntasks={{ nodes * ranks }} --cpus-per-task=$((SLURM_CPUS_PER_TASK / {{ ranks }})) --kill-on-bad-exit=1 \
    "${in_environment[@]}" python -m shardlab.cluster.preflight --address "$address" --port $((port + 10000)) --runs "$runs"

# What every rank runs. --resume: from the newest whole checkpoint, if the job was started before.
train=(shardlab.cli run "multi-node-$SLURM_JOB_ID" --runs "$runs" --resume --save-every 50{{ " " if arguments }}{{ arguments }})
newest() { { find "$run/checkpoints" -name complete.json 2>/dev/null || true; } | sort --version-sort | tail -n 1; }
before=$(newest)

# A task that fails ends the others at once (--kill-on-bad-exit); they would wait for it otherwise. What stands in single quotes is for the
# shell of each task: $SLURM_NODEID and $SLURM_PROCID must be its own.
{% if launcher == "torchrun" %}
# torchrun: one task per node, which starts the node's ranks. They meet at a store on the first node (is_host).
# shellcheck disable=SC2016
srun --ntasks-per-node=1 --kill-on-bad-exit=1 "${in_environment[@]}" bash -c '
    exec torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node={{ ranks }} --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" \
        --rdzv-endpoint="$1" --rdzv-conf=is_host=$((SLURM_NODEID == 0)) -m "${@:2}"
' bash "$address:$port" "${train[@]}" &
{% elif launcher == "deepspeed" %}
# deepspeed: one task per node, each with the list of all nodes and its own rank among them. Without --no_ssh the first would start the
# others by ssh without a password, which many clusters do not allow, and which leaves most variables behind.
hostfile=$runs/hosts-$SLURM_JOB_ID.txt
scontrol show hostnames "$SLURM_JOB_NODELIST" | sed 's/$/ slots={{ ranks }}/' >"$hostfile"
# shellcheck disable=SC2016
srun --ntasks-per-node=1 --kill-on-bad-exit=1 "${in_environment[@]}" bash -c '
    exec deepspeed --hostfile="$1" --no_ssh --node_rank="$SLURM_NODEID" --master_addr="$2" --master_port="$3" --no_local_rank \
        --module "${@:4}"
' bash "$hostfile" "$address" "$port" "${train[@]}" &
{% else %}
# srun alone: one task per rank, and the variables that torch.distributed reads are made of Slurm's.
export MASTER_ADDR=$address MASTER_PORT=$port WORLD_SIZE={{ nodes * ranks }} LOCAL_WORLD_SIZE={{ ranks }}
# shellcheck disable=SC2016
srun --ntasks-per-node={{ ranks }} --ntasks={{ nodes * ranks }} --cpus-per-task=$((SLURM_CPUS_PER_TASK / {{ ranks }})) --kill-on-bad-exit=1 \
    "${in_environment[@]}" bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python -m "$@"' bash "${train[@]}" &
{% endif %}
srun_process=$!

# A signal interrupts `wait`, so it is called until the ranks are gone; the last call gives their status.
while kill -0 "$srun_process" 2>/dev/null; do wait "$srun_process" || true; done
wait "$srun_process" && status=0 || status=$?

if [ "$status" -eq 0 ] && [ -e "$run/stop" ] && grep -q '"outcome": "stopped"' "$run/run.json"; then
    echo "The time is nearly up. A checkpoint was saved; the job goes back into the queue."
    scontrol requeue "$SLURM_JOB_ID"
elif [ "$status" -ne 0 ] && [ "$(newest)" != "$before" ]; then
    # A lost node looks like this from here. A mistake in the program would come again, so a life without a new checkpoint is the last one.
    echo "The ranks ended with status $status after a new checkpoint; the job goes back into the queue."
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
{% endblock %}
