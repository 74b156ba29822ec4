"""Runs a script with accelerate's FSDP2 on CPUs: accelerate has it, but asks for a GPU first.

    accelerate launch --config_file examples/training/accelerate_configs/fsdp2.yaml tests/fsdp2_on_cpus.py \
        examples/training/train.py ...

Without this, a launch on CPUs is not sharded, and says nothing (accelerate 1.15). What tells accelerate where it runs
is replaced; all that it does then is its own.
"""

import os
import runpy
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)

sys.argv = sys.argv[1:]
sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
runpy.run_path(sys.argv[0], run_name="__main__")
