"""A Triton backend named "cpu" that compiles nothing.

vLLM's second model runner asks whether Triton has a backend of this name. With TRITON_INTERPRET=1
its kernels then run in Triton's interpreter, and nothing is ever compiled.
"""
