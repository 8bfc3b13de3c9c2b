#!/usr/bin/env bash
# {{ name }}: {{ what }}.
# Rendered by `shardlab slurm render {{ name }}` for {{ site.name }}. Change slurm/site.toml or the template in slurm/scripts/, not this text.

{% for directive in directives %}
# {{ directive.reason }}
#SBATCH {{ directive.option }}
{% endfor %}

# A command that fails ends the job, and so does a variable that nobody has set.
set -euo pipefail
cd {{ course|quoted }}
runs={{ runs|quoted }}
mkdir -p "$runs"

# Python and the packages.
{% include "_environment.sh" %}

{% block body %}{% endblock %}
