{% extends "_job.sh" %}
{% block body %}
# Each task of the array has its number; it trains with the method of that number, into a run folder of its own.
methods=({% for method in methods %}{{ method|quoted }}{{ "" if loop.last else " " }}{% endfor %})
method=${methods[$SLURM_ARRAY_TASK_ID]}

"${in_environment[@]}" shardlab run "sweep-$SLURM_ARRAY_JOB_ID-$method" --runs "$runs" --ranks {{ ranks }} --method "$method"{{ " " if arguments }}{{ arguments }}

# When all are over, one table of them: shardlab report RUNS
{% endblock %}
