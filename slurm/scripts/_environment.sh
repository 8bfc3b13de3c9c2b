{% if site.environment.modules %}
module purge
{% for module in site.environment.modules %}
module load {{ module|quoted }}
{% endfor %}
{% endif %}
{% if site.environment.kind == "current" %}
export PATH={{ (prefix / "bin")|quoted }}:$PATH
in_environment=()
{% elif site.environment.kind == "venv" %}
# shellcheck disable=SC1091
source {{ site.environment.path|quoted }}/bin/activate
in_environment=()
{% elif site.environment.kind == "conda" %}
# conda's own scripts use variables that are not set.
set +u
# shellcheck disable=SC1091
source {{ site.environment.conda_setup|quoted }}
conda activate {{ site.environment.path|quoted }}
set -u
in_environment=()
{% else %}
# What is to run in the container stands after this; a task of srun starts a container of its own.
in_environment=({{ container }})
{% endif %}
{% if site.offline %}
# No network here: what is in the cache is used, and nothing is asked for.
export HF_HUB_OFFLINE=1
{% endif %}
{% for key, value in site.variables.items() %}
export {{ key }}={{ value|quoted }}
{% endfor %}
{% if site.gpus_per_node %}
# A notebook on a node without GPUs sets it to cpu, and sbatch hands it over.
unset DS_ACCELERATOR
{% else %}
# The site profile names no GPUs, so jobs ask for none; a rank must not take one that it happens to see.
export CUDA_VISIBLE_DEVICES='' DS_ACCELERATOR=cpu
{% endif %}
# srun does not take --cpus-per-task from the job since Slurm 22.05.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

# Threads of each rank, for what runs on CPU cores.
export OMP_NUM_THREADS={{ site.cores_per_task }}
