"""Decoding for models built like Llama, at more than twice the speed of their own forward pass on a CPU.

`layers` has the layers of Llama, Mistral, Qwen2 and Qwen3, `decoder` a cache that is written in place, `prompts` the
keys and values of prompts, kept once for all their samples.
"""
