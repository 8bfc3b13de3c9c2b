{% extends "_job.sh" %}
{% block body %}
# Each job of the array grades its share of the submissions, one at a time, each in a box. What is graded is kept in the output folder.
"${in_environment[@]}" shardlab grade {{ arguments }} --jobs 1 --part "$SLURM_ARRAY_TASK_ID/{{ parts }}"
{% endblock %}
