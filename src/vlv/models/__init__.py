"""The models: encoder, diffusion decoder, caption decoder, and the pipeline that joins them."""

import logging

# diffusers imports torchao where it is installed, which reports every CUDA kernel that does not fit this machine; only
# `--llm-bits 8` uses it. bitsandbytes misses a kernel of the hub wherever the processor has bf16 instructions.
for _name in (
    "bitsandbytes.backends.cpu.ops",
    "torchao",
    "torch.utils._pytree",
    "diffusers.quantizers.torchao.torchao_quantizer",
):
    logging.getLogger(_name).setLevel(logging.ERROR)
