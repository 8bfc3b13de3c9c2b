{% extends "_job.sh" %}
{% block body %}
# The project with {{ "the reference solutions" if solutions else "your exercises" }}, beside the run folders. `production` goes on from its newest checkpoint there.
project="$runs/language-model"
{% if solutions %}
export SHARDLAB_EXERCISES=solutions
{% endif %}
"${in_environment[@]}" python labs/lab08_language_model/make_project.py "$project"

"${in_environment[@]}" "$project/run.sh" {{ arguments or "quick" }}
{% endblock %}
