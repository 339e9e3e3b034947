"""
Compiles DeepSpeed's operators for CPUs, for a minute and once, into the folder where the tests look for them.

    TORCH_EXTENSIONS_DIR=.pytest_cache/torch_extensions python tests/compile_operators.py
"""

from deepspeed.accelerator import get_accelerator


for name in ("CPUAdamBuilder", "ShareMemCommBuilder"):
    get_accelerator().create_op_builder(name).load(verbose=False)
