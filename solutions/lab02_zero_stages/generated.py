"""What is made for `labs/lab02_zero_stages` from its solution: the ready DeepSpeed files for `Trainer`."""

import json


def files(solution) -> dict[str, str]:
    """Names in the lab's folder, and texts.

    Args:
        solution: the module of the solution.
    """
    create = solution.create_deepspeed_config
    made = {f"zero{stage}": create(stage) for stage in range(4)}
    made["zero2_offload"] = create(2, offload_optimizer=True)
    made["zero3_offload"] = create(3, offload_optimizer=True, offload_param=True)
    return {f"configs/{name}.json": json.dumps(config, indent=2) + "\n" for name, config in made.items()}
