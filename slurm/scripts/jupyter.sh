{% extends "_job.sh" %}
{% block body %}
# A port that nobody else on this node is likely to use: several learners may share it.
port=$((8000 + SLURM_JOB_ID % 2000))
node=$(hostname)
cat <<END
In a shell on your own machine:
    ssh -N -L $port:$node:$port $(id -un)@{{ site.login_host or "LOGIN_NODE" }}
Then open the address with the token below, with localhost in the place of $node. To end it: scancel $SLURM_JOB_ID
END

# Jupyter makes a token for each start and prints it below; without it nobody gets in.
"${in_environment[@]}" jupyter lab --no-browser --ip="$node" --port="$port" --port-retries=0 --ServerApp.root_dir=.
{% endblock %}
