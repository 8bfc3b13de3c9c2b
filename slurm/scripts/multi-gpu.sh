{% extends "_job.sh" %}
{% block body %}
"${in_environment[@]}" shardlab doctor || true

# On one node no rendezvous is needed: shardlab starts a rank for each GPU itself.
"${in_environment[@]}" shardlab run "multi-gpu-$SLURM_JOB_ID" --runs "$runs" --ranks {{ ranks }}{{ " " if arguments }}{{ arguments }}
{% endblock %}
