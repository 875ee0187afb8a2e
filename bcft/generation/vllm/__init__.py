"""The `vllm` engine: `engine` asks a server, `weights` keeps it at the policy's, `server` starts and ends it."""

from bcft.generation.vllm.engine import VLLM, VLLMEngine, open_vllm

__all__ = ["VLLM", "VLLMEngine", "open_vllm"]
