{% extends "_job.sh" %}
{% block body %}
# What works on this node; the job goes on if something optional does not.
"${in_environment[@]}" shardlab doctor || true

# The run folder gets memory.csv, sampled ten times a second on the GPU and on the host.
"${in_environment[@]}" shardlab run "baseline-$SLURM_JOB_ID" --runs "$runs" --ranks 1{{ " " if arguments }}{{ arguments }}
{% endblock %}
