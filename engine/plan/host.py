"""Memory of a process before it has a model, and DeepSpeed's own estimates, measured in a new process.

Both need the packages imported as in a rank, which takes seconds. The process runs while `engine.plan.cost` counts, and
the calling process is not changed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from engine.errors import UserError
from engine.plan.memory import Zero

# The imports of a rank, and a first pass of each kind, which triggers what torch loads lazily.
_PROGRAM = """
import json, sys
request = json.loads(sys.argv[1])
result = {}
def resident():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmRSS"))
def estimates():
    try:
        from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero3
        from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as zero2
    except ImportError as error:
        return {"missing": str(error)}
    shape = {"num_gpus_per_node": request["gpus_per_node"], "num_nodes": request["nodes"]}
    if request["stage"] == 2:
        host, gpu = zero2(request["parameters"], cpu_offload=request["offload_optimizer"], **shape)
    else:
        host, gpu, _ = zero3(request["parameters"], request["largest_layer"], cpu_offload=request["offload_optimizer"],
                             cpu_offload_params=request["offload_param"], zero_init=False, **shape)
    return {"host": host, "gpu": gpu}
if request["baseline"]:
    import torch, timm, engine.jobs.task
    if request["deepspeed"]:
        try:
            import deepspeed
        except ImportError:
            pass  # the plan says so beside the estimates
    layer = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 16, 16), torch.nn.Flatten(2), torch.nn.Linear(196, 64))
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    heads = layer(torch.zeros(2, 3, 224, 224)).view(2, 1, 64, 64)
    torch.nn.functional.scaled_dot_product_attention(heads, heads, heads).softmax(-1).sum().backward()
    optimizer.step()
    result["baseline"] = resident()
if request["stage"] >= 2:
    result["estimates"] = estimates()
print("\\n" + json.dumps(result))
"""


def measure_host(
    *,
    parameters: int,
    largest_layer: int,
    gpus: int,
    zero: Zero,
    deepspeed: bool,
    baseline: bool,
) -> dict[str, Any]:
    """Measure a process of the run, and return DeepSpeed's estimates.

    Returns:
        `baseline`: resident bytes of the process (Linux). `estimates`: host bytes of a node and bytes of a GPU by
            DeepSpeed's estimator, or what is `missing`; for stages 2 and 3 alone, since it has none for the others.

    Raises:
        UserError: The process failed.
    """
    nodes = -(-gpus // 8)
    request = {
        "parameters": parameters,
        "largest_layer": largest_layer,
        "gpus_per_node": gpus // nodes,
        "nodes": nodes,
        "stage": zero.stage,
        "offload_optimizer": zero.offload_optimizer,
        "offload_param": zero.offload_param,
        "deepspeed": deepspeed,
        "baseline": baseline,
    }
    environment = {**os.environ, "DS_LOG_LEVEL": "error", **({"DS_ACCELERATOR": "cpu"} if baseline else {})}
    command = [sys.executable, "-c", _PROGRAM, json.dumps(request)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if ended.returncode:
        reason = (ended.stderr.strip().splitlines() or ["no words"])[-1]
        raise UserError(f"plan --device cpu: a process with the imports of a rank could not be measured ({reason})")
    return json.loads(ended.stdout.splitlines()[-1])
